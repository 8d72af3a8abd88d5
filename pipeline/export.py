"""Export with a method or in several precisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import progress
from ..core.choices import INT8_IMAGES, METHOD_IMAGES
from ..core.cost import dense_macs
from ..core.errors import UserError
from ..core.files import scratch_beside
from ..core.plan import TokenPlan
from .graphs import export_checked, export_rule_checked, move_model
from .inputs import at_least_one, one_set
from .options import RULE_PARITY_IMAGES
from .precisions import check_precisions, precision_check

if TYPE_CHECKING:
    from torch import Tensor

    from ..export.deploy import Deployment
    from ..export.parity import ParityCheck
    from ..export.precision import Agreement, Conversion
    from ..prune.loaded import LoadedModel
    from ..prune.methods.rule import TokenRule


def make_pruning(
    loaded: LoadedModel, method: str, target: float, images: Tensor, *, seed: int = 0
) -> TokenPlan | TokenRule:
    """What the method called ``method`` makes of the model within ``target``.

    Args:
        images: Float32 [image, channel, height, width], preprocessed, to calibrate on.

    Raises:
        UserError: There is no such method, or it cannot work on this model or within the target.
    """
    from ..prune.fisher import batch_size_for
    from ..prune.methods import find_method

    maker = find_method(method)()
    batches = images[: maker.enough_images].split(batch_size_for(loaded.adapter.geometry, most=64))
    with progress.stage(f"Calibrating {method}"):
        return maker.make(loaded.adapter, batches, target, seed=seed)


def export_method_checked(
    loaded: LoadedModel,
    output: Path,
    *,
    method: str,
    target: float,
    data: str | None,
    count: int,
    seed: int,
    **options: Any,
) -> tuple[list[ParityCheck], Deployment | None]:
    """Calibrate a method on images and export the model with it, as :func:`export_checked` would with a plan.

    Args:
        data, count: Where calibration images are, None for the bundled ones, and how many are used at most.
        options: Of :func:`export_checked`, ``plan`` aside.
    """
    from ..export.rules import counts_depend
    from ..prune.methods import find_method

    if not find_method(method).fixed_counts:
        raise counts_depend(method)
    geometry = loaded.adapter.geometry
    calibration = one_set(loaded.classes, geometry, data, count, "calibration", seed=seed, strict=False)
    images, _ = next(at_least_one(calibration.batches(loaded.preprocessing, count), calibration))
    progress.remark(calibration.skipped_remark("calibration"))
    made = make_pruning(loaded, method, target, images, seed=seed)
    if isinstance(made, TokenPlan):
        return export_checked(loaded, output, plan=made, **options)
    ratio = made.static_macs() / dense_macs(geometry)
    tokens = ", ".join(map(str, made.static_counts()[:-1]))
    progress.remark(f"{method}: {ratio:.4f} of the dense MACs; tokens that enter each block: {tokens}")
    images = images[:RULE_PARITY_IMAGES]
    return export_rule_checked(loaded, output, rule=made, images=images, **options)


def export_with_precisions(
    loaded: LoadedModel,
    output: Path,
    *,
    precisions: Sequence[str],
    io: str,
    data: str | None,
    images: int | None,
    method: str | None = None,
    target: float = 0.65,
    seed: int = 0,
    **options: Any,
) -> tuple[list[ParityCheck], Deployment | None, list[tuple[Conversion, Agreement, str]]]:
    """Export a model, and beside it the same file in other precisions: all of them, or nothing.

    Args:
        io, data, images: As ``--io``, ``--data`` and ``--images`` of ``vpruner convert``; the method is calibrated on
            the same images.
        method, target, seed: As for :func:`export_method_checked`; None: no method.
        options: Of :func:`export_checked`.

    Returns:
        The parity checks, with one for each precision; the deployment; and for each precision what was converted, what
        that costs, and on which images.

    Raises:
        UserError: As :func:`~vpruner.pipeline.convert.convert_checked`, or an option that no precision takes.
    """
    from ..export.precision import beside
    from .convert import convert_checked

    check_precisions(precisions, io)
    if "int8" in precisions and data is None:
        raise UserError("static int8 is calibrated on images", "give them with --data DIR, or use int8-dynamic")
    if data is not None and "int8" not in precisions and method is None:
        raise UserError("--data calibrates static int8", "add --precision int8 or --method NAME, or leave it out")
    with scratch_beside(output) as scratch:
        written = [scratch / output.name]
        if method is None:
            checks, deployed = export_checked(loaded, written[0], **options)
        else:
            calibrated = dict(method=method, target=target, data=data, count=images or METHOD_IMAGES, seed=seed)
            checks, deployed = export_method_checked(loaded, written[0], **calibrated, **options)
        conversions = []
        for precision in precisions:
            path = beside(written[0], precision)
            done, cost, what = convert_checked(
                written[0],
                path,
                precision,
                io="float32" if precision.startswith("int8") else io,
                data=data if precision == "int8" else None,
                count=images or INT8_IMAGES,
            )
            written.append(path)
            conversions.append((replace(done, path=beside(output, precision)), cost, what))
            checks.append(precision_check(path.name, output.name, cost))
        for path in written:
            move_model(path, output.with_name(path.name))
    return checks, deployed, conversions
