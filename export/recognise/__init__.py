"""Find the parts of a Vision Transformer in an ONNX graph."""
