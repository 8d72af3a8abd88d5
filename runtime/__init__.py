"""Running pruned models on the target: no torch, no timm, no onnx. onnxruntime is imported when a session is opened."""

from ..core.preprocess import Preprocessing, load_image
from .opening import open
from .session import Prediction, Session

__all__ = ["Prediction", "Preprocessing", "Session", "load_image", "open"]
