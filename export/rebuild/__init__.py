"""Read an ONNX graph as a timm model."""
