"""vpruner: learn which tokens a Vision Transformer can do without, and ship the smaller static graph.

Importing this package imports nothing heavy: torch, timm, onnx, onnxruntime and tensorrt are extras that are imported
where they are used.
"""

__version__ = "0.1.0"
