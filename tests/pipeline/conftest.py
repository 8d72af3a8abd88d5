"""Files and machines that tests of runtimes have too."""

from linear_onnx import machine, make_onnx  # noqa: F401  (fixtures)
