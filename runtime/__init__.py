"""Running pruned models on the target: no torch, no timm, no onnx. onnxruntime is imported when a session is opened."""

from .preprocess import Preprocessing, load_image
from .session import Prediction, Session, open

__all__ = ["Prediction", "Preprocessing", "Session", "load_image", "open"]
