"""The methods that can be compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ...core import progress
from ...core.cost import dense_macs
from ...core.errors import UserError
from ...core.plan import TokenPlan
from ...core.specs import LearnSpec, ModelSpec
from ...core.text import option
from ...report.entries import SMALLER
from ..inputs import open_prunable
from ..learned import rule_of
from ..options import CompareOptions
from .made import Contender, Made

if TYPE_CHECKING:
    from torch import Tensor

    from ...prune.calibration import Calibration
    from ...prune.data import ImageSet
    from ...prune.loaded import LoadedModel
    from ...prune.methods.method import Method


def contenders(options: CompareOptions) -> dict[str, Contender]:
    """name -> everything that can be compared, ours first. Needs PyTorch."""
    from ...prune.methods import methods

    found = {
        "v-pruner": _learned("v-pruner", options.learn),
        "v-pruner-content": _learned("v-pruner-content", replace(options.learn, select="content")),
        "fisher": _learned("fisher", replace(options.learn, rearrange="none", tune="none")),
    }
    return found | {name: _registered(method()) for name, method in methods().items()}


def chosen_contenders(options: CompareOptions) -> list[Contender]:
    """Those the user named, in that order, or all.

    Raises:
        UserError: There is none of that name.
    """
    known = contenders(options)
    unknown = [name for name in options.methods or () if name not in known]
    if unknown:
        raise UserError(f"there is no method called {unknown[0]!r}", f"choose from {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(options.methods or known)]


def able(taking_part: Sequence[Contender], options: CompareOptions, loaded: LoadedModel) -> list[Contender]:
    """Those that work on the model: only on a timm VisionTransformer what works inside of its blocks.

    Raises:
        UserError: The user named one that does not.
    """
    from ...prune.backbones.adapter import has_blocks, require_blocks, what_runs

    unable = [one.name for one in taking_part if one.needs_blocks]
    if has_blocks(loaded.adapter) or not unable:
        return list(taking_part)
    if options.methods:
        require_blocks(loaded.adapter, unable[0])
    left_out = f"{', '.join(unable)} need a timm VisionTransformer and were left out"
    progress.remark(f"{loaded.name} {what_runs(loaded.adapter)}: {left_out}")
    return [one for one in taking_part if not one.needs_blocks]


def smaller_models(options: CompareOptions, loaded: LoadedModel) -> list[Contender]:
    """The models that one could deploy in place of a reduced one, each opened.

    Raises:
        UserError: One cannot be opened, does not do what the model does, or is no smaller.
    """
    opened = (open_prunable(ModelSpec(what, device=loaded.device)) for what in options.smaller)
    found = [_smaller(small, loaded, options) for small in opened]
    names = [contender.name for contender in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"{option('smaller')}: two models are called {twice[0].removeprefix(SMALLER)}", "rename one file"
        )
    return found


def _smaller(small: LoadedModel, loaded: LoadedModel, options: CompareOptions) -> Contender:
    geometry, of = small.adapter.geometry, loaded.adapter.geometry
    given = f"{option('smaller')}: {small.name}"
    if (geometry.output, geometry.outputs) != (of.output, of.outputs):
        raise UserError(
            f"{given} returns {geometry.outputs} {geometry.output}, {loaded.name} {of.outputs} {of.output}",
            "name a model of the same task",
        )
    if None not in (small.classes, loaded.classes) and small.classes != loaded.classes:
        raise UserError(f"{given} names other classes than {loaded.name}", "name a model of the same classes")
    share = dense_macs(geometry) / dense_macs(of)

    def make(*_: object) -> Made:
        return Made(TokenPlan.identity(small.name, geometry), None, 0.0, instead=small)

    settings = {"weights": small.sha256, "geometry": geometry.to_json()}
    contender = Contender(f"{SMALLER}{small.name}", settings, False, False, make, share)
    if not contender.within(options.targets):
        raise UserError(
            f"{given} has {share:.1%} of the multiply-adds of {loaded.name}, more than every budget",
            f"name a smaller model, or a larger budget with {option('targets')}",
        )
    return contender


def _learned(name: str, spec: LearnSpec) -> Contender:
    from ...prune.rearrange.settings import RearrangeSettings

    settings = RearrangeSettings.for_tuning(spec.tune, episodes=spec.episodes, time_limit=spec.time_limit)

    def make(loaded: LoadedModel, images: ImageSet, calibration: Calibration, target: float, seed: int) -> Made:
        from ...prune.learn import learn

        with progress.reporting(progress.Sink()):  # A method that takes part is one line of progress.
            learned = learn(loaded, images, replace(spec, target=target, seed=seed))
        if any("interrupted" in stage.note for stage in learned.stages):
            raise KeyboardInterrupt  # A plan that was cut short is worth having in a run, and no result here.
        undone = [stage.name for stage in learned.stages[1:] if not stage.kept]
        note = f"undone, as it did not help: {', '.join(undone)}" if undone else ""
        reduction = learned.plan if learned.content is None else rule_of(learned.content)
        seconds = sum(stage.seconds for stage in learned.stages)
        return Made(reduction, learned.weights, seconds, note, content=learned.content)

    how = {"rearrange": spec.rearrange, "tune": spec.tune, "loss": spec.loss}
    if spec.select != "static":
        how["select"] = spec.select
    if spec.rearrange == "ppo":
        how |= {"episodes": settings.episodes, "time_limit": settings.time_limit}
    return Contender(name, how, True, True, make, needs_blocks=spec.select == "content" or "gates" in spec.tune)


def _registered(method: Method) -> Contender:
    def make(loaded: LoadedModel, images: ImageSet | None, calibration: Calibration | None, target: float, seed: int):
        from ...prune.batches import images_at_once
        from ...prune.device import computing

        batches: Sequence[Tensor] = ()
        if calibration is not None:
            used = calibration.fit[: method.enough_images]
            batches = Batches(calibration, used, images_at_once(loaded.adapter))
        started = time.perf_counter()
        with computing(loaded.adapter.model):
            reduction = method.make(loaded.adapter, batches, target, seed=seed)
        return Made(reduction, None, time.perf_counter() - started)

    settings = {"class": type(method).__name__, **_plain_settings(method)}
    seeded = method.needs_images or method.seeded
    return Contender(method.name, settings, method.needs_images, seeded, make, needs_blocks=method.needs_blocks)


def _plain_settings(method: Method) -> dict[str, Any]:
    """The settings of a method as JSON values; what is no JSON value goes by how it is written."""
    plain = (str, int, float, bool, type(None), list)
    return {name: value if isinstance(value, plain) else repr(value) for name, value in asdict(method).items()}


class Batches(Sequence):
    """Calibration images as methods take them, prepared when they are asked for: in memory they are bytes."""

    def __init__(self, calibration: Calibration, indices: Sequence[int], size: int):
        self.calibration = calibration
        self.chunks = [indices[start : start + size] for start in range(0, len(indices), size)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> Tensor:
        """float32 [batch, channel, height, width]."""
        return self.calibration.images(self.chunks[number])
