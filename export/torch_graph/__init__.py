"""x"""
from .module import GraphModule
from .program import logits_name
from .weights import write_back
