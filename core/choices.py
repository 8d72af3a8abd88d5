"""Every vocabulary and every default that more than one place needs: the command line, the library and its checks."""

from __future__ import annotations

#: What the gradients of a search are of; ``"auto"`` picks one.
LOSSES = ("labels", "self", "features", "output")
#: How tokens are moved within the budget after the search.
REARRANGEMENTS = ("ppo", "greedy", "none")
#: What is refitted to the tokens that are left.
TUNINGS = ("weights", "gates", "gates-distill", "none")
#: Whether every image keeps the same patches, or each chooses as many of its own.
SELECTIONS = ("static", "content")

#: Where PyTorch computes; of several GPUs ``cuda:1`` names one. ``"auto"`` takes a GPU that works, else the CPU.
DEVICES = ("auto", "cpu", "cuda", "mps")

TARGET = 0.65
#: Calibration and evaluation images that are used at most.
IMAGES, EVAL_IMAGES = 4096, 2000
#: Threads that read images at most, where the user names no number: a tenth of their work has to be done by one after
#: the other, so that more hardly help.
MOST_WORKERS = 12
#: Episodes where weights will be refitted and where they stay as they are: without a refit, plans go on getting better
#: for longer, and there are no stand-in weights to pay for.
EPISODES, EPISODES_UNTUNED = 384, 640
#: Calibration images of a comparison of methods, and its budgets.
COMPARE_IMAGES, COMPARE_TARGETS = 1024, (0.8, 0.65, 0.5)
#: Images that methods are calibrated on when a model is exported with one, and static INT8.
METHOD_IMAGES, INT8_IMAGES = 512, 128

#: Precisions a graph is converted to. fp16 and bf16 are half, int8 is static (Q/DQ nodes), int8-dynamic is for CPUs.
HALF_PRECISIONS = ("fp16", "bf16")
INT8_PRECISIONS = ("int8", "int8-dynamic")
PRECISIONS = (*HALF_PRECISIONS, *INT8_PRECISIONS)
#: Whether inputs and outputs of half graphs stay float32.
IO = ("float32", "same")
#: How static INT8 gets the range of an activation from what was seen. Calibrated on 128 images, minmax changed the
#: bundled reference's top-1 by +0.05 pp, and by +0.20 when pruned to 0.65 of its MACs; percentile by -0.10 and +0.10,
#: entropy by -0.15 and -0.35 (2,000 images, ± 0.5). The histogram methods are slower besides, as they keep every
#: activation.
CALIBRATIONS = ("minmax", "entropy", "percentile")
DEFAULT_CALIBRATION = "minmax"

#: ONNX opset of plain graphs.
OPSET = 20
#: Short name -> onnxruntime's execution provider.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
}
ENGINE_PRECISIONS = ("fp32", "fp16", "bf16", "int8")
#: Name -> TensorRT's level of hardware compatibility.
HARDWARE_COMPATIBILITY = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")

#: Ways of SAINT to drop visual tokens of a vision-language model, and all ways.
SAINT_MODES = ("vit", "llm", "hybrid")
VLM_MODES = (*SAINT_MODES, "random", "fastv", "vispruner", "static")
#: Types of a vision-language model's weights; ``"auto"`` is as saved.
VLM_DTYPES = ("auto", "float32", "bfloat16", "float16")
