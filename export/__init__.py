"""ONNX graphs: read, followed, pruned, converted and checked."""

import logging

# onnx_ir logs what it meets in a damaged graph with a traceback, and a logger without a handler prints that on standard
# error. What matters of it is an error or a finding of ours.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())
