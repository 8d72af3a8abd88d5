"""What runs and comparisons can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: What a whole run imports at one point or another.
PACKAGES = ("torch", "timm", "safetensors", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "matplotlib")
#: Images that the parity checks run through PyTorch and onnxruntime.
PARITY_IMAGES = 16
#: Images that an exported rule is compared with PyTorch on: which tokens are kept depends on them.
RULE_PARITY_IMAGES = 64
#: Images that the report draws the plan on.
EXAMPLE_IMAGES = 4


@dataclass(frozen=True)
class RunOptions:
    """Everything ``vpruner run`` can be told; see the command's help for the meaning.

    Where ``episodes`` or ``time_limit`` is None, it is that of
    :meth:`~vpruner.prune.rearrange.search.RearrangeSettings.for_tuning`.
    """

    target: float = 0.65
    cost: str = "macs"
    model: str | None = None
    pretrained: bool = False
    weights: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    eval_data: str | None = None
    images: int = 4096
    eval_images: int = 2000
    loss: str = "auto"
    rounds: int | None = None
    rearrange: str = "ppo"
    tune: str = "weights"
    select: str = "static"
    episodes: int | None = None
    time_limit: float | None = None
    checkpoint: Path | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    strict: bool = False
    opset: int | None = None
    deploy_for: str | None = None
    dynamic_batch: bool = False
    batch_size: int = 1
    threads: int | None = 1
    seconds: float = 10.0
    precisions: tuple[str, ...] = ()
    io: str = "float32"
    command: str = ""


@dataclass(frozen=True)
class CompareOptions:
    """Everything ``vpruner compare`` can be told; see the command's help for the meaning.

    Attributes:
        methods: Names, see :func:`contenders`; None: all.
        seed, seeds: What depends on chance or on the choice of calibration images is made with ``seeds`` seeds from
            ``seed`` on. Graphs are timed for the first.
        episodes, time_limit: Of V-Pruner's rearrangement; None: as ``vpruner run`` has them.
        latency: Whether to export graphs and time them.
    """

    targets: tuple[float, ...] = (0.8, 0.65, 0.5)
    methods: tuple[str, ...] | None = None
    model: str | None = None
    pretrained: bool = False
    weights: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    eval_data: str | None = None
    images: int = 1024
    eval_images: int = 2000
    loss: str = "auto"
    episodes: int | None = None
    time_limit: float | None = None
    seed: int = 0
    seeds: int = 1
    strict: bool = False
    batches: tuple[int, ...] = (1,)
    threads: int = 1
    seconds: float = 10.0
    latency: bool = True
    opset: int = 20
