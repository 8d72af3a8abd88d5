"""Options as objects: what always travels together, checked once.

Commands, the Python API and benchmarks build these; the library takes them whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .choices import (
    DEVICES,
    EVAL_IMAGES,
    IMAGES,
    IO,
    LOSSES,
    PRECISIONS,
    REARRANGEMENTS,
    SELECTIONS,
    TARGET,
    TUNINGS,
)
from .errors import UserError
from .files import is_onnx
from .text import option


def _check_choice(name: str, found: Any, known: Sequence[str]) -> None:
    if found not in known:
        raise UserError(f"{option(name)} is {found!r}", f"expected one of {', '.join(known)}")


def _check_at_least(least: int, **values: Any) -> None:
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UserError(f"{option(name)} is {value!r}", f"expected a whole number of at least {least}")


def _check_positive(**values: Any) -> None:
    for name, value in values.items():
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise UserError(f"{option(name)} is {value!r}", "expected a positive number of seconds")


def check_device(device: Any) -> None:
    """Refuse what is no name of a device; whether there is one of that name, PyTorch has to be asked.

    Raises:
        UserError: Says which there can be.
    """
    if device in DEVICES or (isinstance(device, str) and re.fullmatch(r"cuda:\d{1,3}", device)):
        return
    raise UserError(f"{option('device')} is {device!r:.60}", f"expected one of {', '.join(DEVICES)}, or cuda:1")


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how images become its input.

    Attributes:
        what: A timm name, the path of a model card, of an ONNX file or of the folder of a transformers model; an opened
            model (:class:`~vpruner.prune.loaded.LoadedModel`); None for the bundled reference.
        weights: A file with weights for it.
        pretrained: Whether timm may download the weights.
        model_args: Arguments for the model's class, such as ``img_size``.
        preprocessing: What the user said of how images become the input of an ONNX file, see
            :func:`~vpruner.core.preprocess.resolve_preprocessing`.
        resample: Whether weights of another patch size are loaded, with a resampled patch kernel.
        device: Where PyTorch computes: one of :data:`~vpruner.core.choices.DEVICES`, or one GPU of several,
            ``"cuda:1"``. With ``"auto"`` an opened model stays where it is.
    """

    what: Any = None
    weights: str | Path | None = None
    pretrained: bool = False
    model_args: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    resample: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        check_device(self.device)

    @property
    def is_onnx(self) -> bool:
        """Whether it is the path of an ONNX file."""
        return is_onnx(self.what)

    @property
    def files(self) -> tuple[str | Path, ...]:
        """Paths that it is read from, as far as they are given."""
        return tuple(path for path in (self.what, self.weights) if isinstance(path, (str, Path)))


#: Names stand in rows and in the lines of tables.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,23}")


@dataclass(frozen=True)
class EvalSet:
    """Evaluation images, as the user gives them.

    Attributes:
        data: A folder, a tar or a timm data set, or an opened source.
        name: What rows and tables call the set; None for one without a name.
    """

    data: Any
    name: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            raise UserError(
                f"{option('eval_data')} calls a set {self.name!r:.60}",
                "expected a name of at most 24 letters, digits, - and _, a letter first",
            )
        if isinstance(self.data, str) and not self.data:
            of = "" if self.name is None else f" of {self.name!r}"
            raise UserError(f"{option('eval_data')}: the path{of} is empty", "give a folder, a .tar or a data set")


def eval_sets(given: Any, name: str = "eval_data") -> tuple[EvalSet, ...]:
    """What a user gives for evaluation images, as sets: one of them, a mapping from names, sets, or None for nothing.

    Args:
        name: Of the option, for errors.

    Raises:
        UserError: A name cannot be used, is there twice, or is missing where it is needed.
    """
    if isinstance(given, Mapping):
        if not given:
            raise UserError(f"{option(name)} holds no set", "give at least one, or leave it out")
        given = tuple(EvalSet(data, called) for called, data in given.items())
    elif given is None or not (isinstance(given, tuple) and all(isinstance(one, EvalSet) for one in given)):
        given = () if given is None else (EvalSet(given),)
    names = [one.name for one in given]
    for position, one in enumerate(given[1:], 1):
        if one.name is None:
            raise UserError(
                f"{option(name)} is given {len(given)} times, and {one.data} has no name",
                f"name every set but the first: {option(name, 'NAME=PATH')}",
            )
        if one.name in names[:position]:
            raise UserError(f"{option(name)} has two sets called {one.name!r}", "give each a name of its own")
    return given


@dataclass(frozen=True)
class DataSpec:
    """Which images calibrate, and which are reported on.

    Attributes:
        data: Calibration images: a folder, a tar or a timm data set, or an opened source; None for the bundled ones.
        eval_data: Sets of images to report on, never learned from, given as :func:`eval_sets` takes them. What needs
            one set goes by the first. Without any, a part of ``data`` is put aside.
        images, eval_images: How many are used at most, of each set.
        seed: Of the choice.
        strict: Whether an unreadable image is an error; otherwise it is skipped and counted.
        workers: Threads that read images; 0: none beside the caller's; None: as many as suit images and cores.
    """

    data: Any = None
    eval_data: tuple[EvalSet, ...] = ()
    images: int = IMAGES
    eval_images: int = EVAL_IMAGES
    seed: int = 0
    strict: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_data", eval_sets(self.eval_data))
        _check_at_least(1, images=self.images, eval_images=self.eval_images)
        _check_at_least(0, seed=self.seed, workers=self.workers)


@dataclass(frozen=True)
class LearnSpec:
    """What a plan is to reach and how it is learned.

    Attributes:
        target: Budget as a fraction of the dense model's cost.
        cost: What the budget is of: ``"macs"``, or ``"latency:TABLE.json"`` for milliseconds by a measured table.
        loss: What the gradients are of; ``"auto"`` picks by what the model returns and whether there are labels.
        rounds: Rounds of scoring and searching; None: as many as the images allow, up to eight.
        rearrange, tune, select: See :mod:`vpruner.core.choices`.
        episodes, time_limit: Of the rearrangement by reinforcement learning; None: its defaults for ``tune``.
        resume: Whether to go on where an earlier run of the same kind was stopped.
        seed: Of everything that depends on chance, but for the choice of images.
    """

    target: float = TARGET
    cost: str = "macs"
    loss: str = "auto"
    rounds: int | None = None
    rearrange: str = "ppo"
    tune: str = "weights"
    select: str = "static"
    episodes: int | None = None
    time_limit: float | None = None
    resume: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.target, bool) or not isinstance(self.target, (int, float)):
            raise UserError(f"{option('target')} is {self.target!r}", "expected a fraction such as 0.65")
        if not isinstance(self.cost, str):
            raise UserError(f"{option('cost')} is {self.cost!r}", "expected macs or latency:TABLE.json")
        _check_choice("loss", self.loss, ("auto", *LOSSES))
        _check_choice("rearrange", self.rearrange, REARRANGEMENTS)
        _check_choice("tune", self.tune, TUNINGS)
        _check_choice("select", self.select, SELECTIONS)
        _check_at_least(1, rounds=self.rounds, episodes=self.episodes)
        _check_at_least(0, seed=self.seed)
        _check_positive(time_limit=self.time_limit)


@dataclass(frozen=True)
class ExportSpec:
    """The form of the graphs.

    Attributes:
        opset: ONNX opset; None: 20, or the newest that ``deploy_for`` takes.
        dynamic_batch: Whether the batch stays open.
        batch_size: Images of a batch; of a graph with an open batch the size that it is traced and timed with.
        deploy_for: The deployment target whose form is written; None: the plain form.
    """

    opset: int | None = None
    dynamic_batch: bool = False
    batch_size: int = 1
    deploy_for: str | None = None

    def __post_init__(self) -> None:
        _check_at_least(1, opset=self.opset, batch_size=self.batch_size)


@dataclass(frozen=True)
class PrecisionSpec:
    """Precisions that a graph is converted to besides float32.

    Attributes:
        precisions: Some of :data:`~vpruner.core.choices.PRECISIONS`.
        io: Whether inputs and outputs of fp16 and bf16 graphs stay float32.
    """

    precisions: tuple[str, ...] = ()
    io: str = "float32"

    def __post_init__(self) -> None:
        for name in self.precisions:
            _check_choice("precisions", name, PRECISIONS)
        _check_choice("io", self.io, IO)
        if self.io != "float32" and not {"fp16", "bf16"} & set(self.precisions):
            raise UserError(
                f"{option('io', self.io)} goes with {option('precisions', ['fp16'])} or bf16", "leave it out"
            )


@dataclass(frozen=True)
class TimingSpec:
    """How graphs are timed, in turns.

    Attributes:
        threads: Of each session; None: every core that this process may use.
        seconds: Time to measure for; a few rounds are made in any case.
        timed_rounds: Rounds to measure at most; None: as many as fit into the time.
    """

    threads: int | None = 1
    seconds: float = 10.0
    timed_rounds: int | None = None

    def __post_init__(self) -> None:
        _check_at_least(1, threads=self.threads, timed_rounds=self.timed_rounds)
        _check_positive(seconds=self.seconds)
