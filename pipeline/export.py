"""Export a model, whole or reduced, and convert it to other precisions: all of the files, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import progress
from ..core.choices import INT8_IMAGES, METHOD_IMAGES, TARGET
from ..core.cost import dense_macs
from ..core.errors import UserError
from ..core.files import scratch_beside
from ..core.plan import TokenPlan
from ..core.specs import DataSpec, ExportSpec, PrecisionSpec
from ..core.text import command, option
from .graphs import Reduced, write_graphs
from .inputs import at_least_one, calibration_set, noise_images
from .learned import remark_untuned, rule_of
from .options import RULE_PARITY_IMAGES
from .precisions import precision_check

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.content_plan import ContentPlan
    from ..export.deploy import Deployment
    from ..export.parity import ParityCheck
    from ..export.precision import Agreement, Conversion
    from ..prune.loaded import LoadedModel
    from ..prune.methods.rule import TokenRule
    from ..report.blocks import Table


@dataclass(frozen=True)
class MethodSpec:
    """A method of token reduction, to be calibrated here.

    Attributes:
        name: As :func:`~vpruner.prune.methods.find_method` knows it.
        target: Budget as a fraction of the dense model's multiply-adds.
        seed: Of the choice of images, and of what depends on chance.
    """

    name: str
    target: float = TARGET
    seed: int = 0


@dataclass(frozen=True)
class Exported:
    """Files of an export.

    Attributes:
        path: The float32 file.
        checks: Every parity check, passed.
        deployment: How it was written for its target; None for the plain form.
        conversions: For each precision what was converted, what that costs, and on which images.
    """

    path: Path
    checks: tuple[ParityCheck, ...]
    deployment: Deployment | None = None
    conversions: tuple[tuple[Conversion, Agreement, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        from .results import parity_row

        found: dict[str, Any] = {"file": str(self.path), "parity": [parity_row(check) for check in self.checks]}
        if self.deployment is not None:
            found["deployment"] = self.deployment.to_json()
        found["precisions"] = [
            {**done.to_json(), "compared_on": what, "agreement": cost.to_json()}
            for done, cost, what in self.conversions
        ]
        return found

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file, the float32 one first."""
        return (self.path, *(done.path for done, _, _ in self.conversions))

    def __fspath__(self) -> str:
        """The float32 file, wherever a path is taken."""
        return str(self.path)

    def _table(self) -> Table:
        from ..report.tables.run import parity_table
        from .results import parity_row

        return parity_table([parity_row(check) for check in self.checks])

    def __str__(self) -> str:
        deployed = [] if self.deployment is None else [self.deployment.summary]
        return "\n".join([str(self._table()), *deployed, *map(str, self.files)])

    def _repr_html_(self) -> str:
        return f"{self._table()._repr_html_()}<p>{'<br>'.join(escape(str(path)) for path in self.files)}</p>"


def export(
    loaded: LoadedModel,
    output: Path,
    spec: ExportSpec,
    precision: PrecisionSpec,
    *,
    plan: TokenPlan | ContentPlan | None = None,
    plan_path: str | Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
    method: MethodSpec | None = None,
    data: Any = None,
    images: int | None = None,
    tokens: bool = False,
) -> Exported:
    """Export an opened model: whole, pruned by a plan, or with a method that is calibrated here.

    Args:
        plan: Static or by content.
        plan_path: Where the plan was read from, for remarks.
        weights: State-dict name -> tensor, where tuning for the plan changed weights of the model; the plan says their
            hash.
        data, images: Calibration images of the method and of static int8, and how many are used at most.
        tokens: Of a model that ends in the mean of its tokens: return these instead.

    Raises:
        PlanError: The plan is for another model.
        UserError: Options do not go together, or the target does not take the graph.
        ParityError: The graph does not compute what the model does.
    """
    check_export(precision, plan, method, data, tokens)
    DataSpec(images=images or INT8_IMAGES)  # Checks that it is a number.
    if loaded.softmax:
        raise UserError(
            f"{loaded.graph.source} ends in a Softmax, and what it returns is compared as logits",
            f"save the plan and fold it into the graph: {command('fold', 'FILE', plan='plan.json')}",
        )
    if method is not None:
        reduced, noise = _calibrated(loaded, method, data, images or METHOD_IMAGES)
    else:
        reduced, noise = by_plan(loaded, plan, plan_path=plan_path, weights=weights), None
        if tokens:
            from ..export.tokens import check_pools_by_mean

            check_pools_by_mean(loaded.adapter)
            if reduced.rule is not None:
                raise UserError(f"{option('tokens')} goes with a plan of static positions", "leave it out")
    return export_reduced(
        reduced, output, spec, precision, parity_images=noise, data=data, images=images or INT8_IMAGES, tokens=tokens
    )


def written_files(output: Path, precision: PrecisionSpec) -> tuple[Path, ...]:
    """What an export to ``output`` writes, the float32 file first."""
    from ..export.precision import beside

    return (output, *(beside(output, name) for name in precision.precisions))


def check_export(precision: PrecisionSpec, plan: Any, method: MethodSpec | None, data: Any, tokens: bool) -> None:
    """Refuse, before any work, what does not go together.

    Args:
        plan: A plan or the path of one; None: none.
        data: Calibration images; None: none.
    """
    if method is not None and not isinstance(method.name, str):
        raise UserError(f"{option('method')} is {method.name!r}", "expected the name of a method, such as tome")
    if plan is not None and method is not None:
        raise UserError(f"{option('plan')} and {option('method')} both say which tokens leave", "give one of them")
    if tokens and (method is not None or precision.precisions):
        raise UserError(
            f"{option('tokens')} goes with neither {option('method')} nor {option('precisions')}", "leave it out"
        )
    if "int8" in precision.precisions and data is None:
        raise UserError(
            "static int8 is calibrated on images", f"give them with {option('data', 'DIR')}, or use int8-dynamic"
        )
    if data is not None and "int8" not in precision.precisions and method is None:
        raise UserError(
            f"{option('data')} calibrates static int8",
            f"add {option('precisions', ['int8'])} or {option('method', 'NAME')}, or leave it out",
        )


def by_plan(
    loaded: LoadedModel,
    plan: TokenPlan | ContentPlan | None,
    *,
    plan_path: str | Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Reduced:
    """A model with a plan that was learned for it.

    Args:
        weights: As for :func:`export`.

    Raises:
        PlanError: The plan is for another model.
    """
    if plan is None:
        return Reduced(loaded)
    plan.check_fits(loaded.name, loaded.adapter.geometry, loaded.sha256)
    if weights:
        return Reduced(loaded, rule_of(plan) or plan, weights, plan.provenance["tuned_weights_sha256"])
    remark_untuned(plan, loaded.sha256, plan_path=plan_path)
    tuned = loaded.sha256 == plan.provenance.get("tuned_weights_sha256")
    trained = plan.provenance.get("weights_sha256") if tuned else None
    return Reduced(loaded, rule_of(plan) or plan, trained_sha256=trained)


def export_reduced(
    reduced: Reduced,
    output: Path,
    spec: ExportSpec,
    precision: PrecisionSpec,
    *,
    parity_images: Tensor | None = None,
    data: Any = None,
    images: int = INT8_IMAGES,
    tokens: bool = False,
) -> Exported:
    """Write a reduced model to ``output``, and its precisions next to it; nothing appears before all is checked.

    Args:
        parity_images: Float32 [image, channel, height, width], preprocessed; None: seeded noise.
        data, images: Calibration images of static int8.
        tokens: As for :func:`export`.
    """
    import torch

    from ..export.files import move_model
    from ..export.precision import beside
    from .convert import convert_checked

    if parity_images is None:
        parity_images = torch.from_numpy(noise_images(reduced.loaded.adapter.geometry))
    with scratch_beside(output) as scratch:
        folder, graphs = scratch / "files", scratch / "graphs"
        folder.mkdir()
        graphs.mkdir()
        written = write_graphs(reduced, spec, folder, graphs, parity_images, tokens=tokens, name=output.name)
        # The graph lies in a scratch folder under another name.
        checks = [replace(one, name=one.name.replace(written.last.name, output.name)) for one in written.checks]
        converted, conversions = [], []
        for name in precision.precisions:
            path = beside(folder / output.name, name)
            done, (compared,) = convert_checked(
                written.last,
                path,
                name,
                io="float32" if name.startswith("int8") else precision.io,
                data=data if name == "int8" else None,
                count=images,
            )
            converted.append(path)
            conversions.append((replace(done, path=beside(output, name)), compared.agreement, compared.what))
            checks.append(precision_check(path.name, output.name, compared.agreement))
        move_model(written.last, output)
        for path in converted:
            move_model(path, output.with_name(path.name))
    return Exported(output, tuple(checks), written.deployment, tuple(conversions))


def make_pruning(loaded: LoadedModel, method: MethodSpec, images: Tensor) -> TokenPlan | TokenRule:
    """What a method makes of the model within its target.

    Args:
        images: Float32 [image, channel, height, width], preprocessed, to calibrate on.

    Raises:
        UserError: There is no such method, or it cannot work on this model or within the target.
    """
    from ..prune.backbones.adapter import require_blocks
    from ..prune.batches import images_at_once
    from ..prune.device import computing
    from ..prune.methods import find_method

    maker = find_method(method.name)()
    if maker.needs_blocks:
        require_blocks(loaded.adapter, maker.name)
    batches = images[: maker.enough_images].split(images_at_once(loaded.adapter, most=64))
    with computing(loaded.adapter.model), progress.stage(f"Calibrating {method.name}"):
        return maker.make(loaded.adapter, batches, method.target, seed=method.seed)


def _calibrated(loaded: LoadedModel, method: MethodSpec, data: Any, count: int) -> tuple[Reduced, Tensor | None]:
    """The model with the method, and what its graph is compared with PyTorch on; None: anything will do."""
    from ..export.rules import counts_depend
    from ..prune.methods import find_method

    if not find_method(method.name).fixed_counts:
        raise counts_depend(method.name)
    geometry = loaded.adapter.geometry
    calibration = calibration_set(loaded.classes, geometry, DataSpec(data=data, images=count, seed=method.seed))
    images, _ = next(at_least_one(calibration.batches(loaded.preprocessing, count), calibration))
    progress.remark(calibration.remark("calibration"))
    made = make_pruning(loaded, method, images)
    if isinstance(made, TokenPlan):
        return by_plan(loaded, made), None
    ratio = made.static_macs() / dense_macs(geometry)
    tokens = ", ".join(map(str, made.static_counts()[:-1]))
    progress.remark(f"{method.name}: {ratio:.4f} of the dense MACs; tokens that enter each block: {tokens}")
    return Reduced(loaded, made), images[:RULE_PARITY_IMAGES]
