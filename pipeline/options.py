"""What runs and comparisons can be asked for: the Specs that each composes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..core.choices import COMPARE_IMAGES, COMPARE_TARGETS, OPSET
from ..core.specs import DataSpec, ExportSpec, LearnSpec, ModelSpec, PrecisionSpec, TimingSpec

#: Images that are run through PyTorch and onnxruntime to compare the two.
PARITY_IMAGES = 16
#: Images that an exported rule is compared with PyTorch on: which tokens are kept depends on them.
RULE_PARITY_IMAGES = 64
#: Images that the report draws the plan on.
EXAMPLE_IMAGES = 4


@dataclass(frozen=True)
class RunOptions:
    """Everything a run can be asked for.

    Attributes:
        command: What the user typed, for the report; empty where the run was called from Python.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSpec = field(default_factory=DataSpec)
    learn: LearnSpec = field(default_factory=LearnSpec)
    export: ExportSpec = field(default_factory=ExportSpec)
    precision: PrecisionSpec = field(default_factory=PrecisionSpec)
    timing: TimingSpec = field(default_factory=TimingSpec)
    command: str = ""


@dataclass(frozen=True)
class CompareOptions:
    """Everything a comparison can be asked for.

    Attributes:
        learn: Of our own methods: the loss, and the episodes and time of the rearrangement. Its seed is the first;
            target and stages are set by each contender.
        targets: Budgets as fractions of the dense model's multiply-adds.
        methods: Names, see :func:`~vpruner.pipeline.compare.contenders.contenders`; None: all.
        smaller: Models that one could deploy in place of a reduced one, as :attr:`ModelSpec.what`. Each takes part at
            the smallest budget that it meets.
        seeds: What depends on chance or on the choice of calibration images is made with so many seeds. Graphs are
            timed for the first.
        batches: Batch sizes to time.
        latency: Whether to export graphs and time them.
        opset: ONNX opset of the graphs.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSpec = field(default_factory=lambda: DataSpec(images=COMPARE_IMAGES))
    learn: LearnSpec = field(default_factory=LearnSpec)
    timing: TimingSpec = field(default_factory=TimingSpec)
    targets: tuple[float, ...] = COMPARE_TARGETS
    methods: tuple[str, ...] | None = None
    smaller: tuple[Any, ...] = ()
    seeds: int = 1
    batches: tuple[int, ...] = (1,)
    latency: bool = True
    opset: int = OPSET

    def __post_init__(self) -> None:
        LearnSpec(seed=self.seeds)  # A whole number.
        ExportSpec(self.opset)
