"""A model with a plan, in memory: to look at, save, export, or go on with in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.content_plan import ContentPlan, load_plan
from ..core.errors import UserError
from ..core.extras import RUN_PACKAGES, require_all
from ..core.plan import TokenPlan
from ..core.progress import Sink
from ..core.specs import ExportSpec, PrecisionSpec
from .calls import Path_, job, names_of, path_of
from .folders import check_output
from .images import images_for
from .learned import described
from .prune import save_pruned

if TYPE_CHECKING:
    import torch

    from ..prune.learned import Learned, Stage
    from ..prune.loaded import LoadedModel
    from ..report.blocks import Table
    from .export import Exported


def plan_of(plan: Any) -> tuple[TokenPlan | ContentPlan, Path | None]:
    """A plan, and the file that it came from; None where that is not known."""
    if isinstance(plan, (TokenPlan, ContentPlan)):
        return plan, None
    path = path_of(plan, "plan")
    return load_plan(path), path


def form_of(
    opset: Any, dynamic_batch: bool, batch_size: Any, deploy_for: str | None, precisions: Any, io: str
) -> tuple[ExportSpec, PrecisionSpec]:
    """The form of the graphs of an export, checked."""
    spec = ExportSpec(opset, dynamic_batch, batch_size, deploy_for)
    return spec, PrecisionSpec(names_of(precisions, "precisions"), io)


def checked_output(output: Any, precision: PrecisionSpec, *inputs: str | Path | None) -> Path:
    """The file to write, which is none of ``inputs``; those in other precisions may be written next to it too."""
    from .export import written_files

    path = path_of(output, "output")
    for file in written_files(path, precision):
        check_output(file, ".onnx", *inputs)
    return path


class Pruned:
    """A model with a plan: learned now, or read from a file. Prints as its tables.

    Attributes:
        loaded: The model, whose own weights are as before.
        files: What it was read from.
        plan: What each block does with which patches, with its provenance.
        plan_path: The file that it was read from, if it was.
    """

    def __init__(
        self, loaded: LoadedModel, files: Sequence[str | Path], learned: Learned, plan_path: Path | None = None
    ):
        self.loaded, self.files = loaded, tuple(files)
        self.plan: TokenPlan | ContentPlan = described(loaded, learned)
        self.plan_path = plan_path
        self._learned = learned

    @property
    def weights(self) -> Mapping[str, torch.Tensor] | None:
        """State-dict name -> tensor of the weights that tuning changed; None where it changed none."""
        return self._learned.weights or None

    @property
    def reduction(self) -> dict[str, Any]:
        """The plan, its file and the tuned weights, as jobs take them."""
        return dict(plan=self.plan, plan_path=self.plan_path, weights=self.weights)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What each stage did; empty for a plan that was read."""
        return self._learned.stages

    def save(self, output: Path_ = "plan.json") -> tuple[Path, ...]:
        """Write the plan, and next to it the tuned weights where there are any; returns the paths.

        Raises:
            UserError: A file cannot be written, or its place is taken by something else.
        """
        with job(None):
            return save_pruned(self.loaded, self._learned, path_of(output, "output"), self.files).files

    def module(self) -> torch.nn.Module:
        """A copy of the model that computes the plan: tokens really removed, the tuned weights in it, no hooks.

        It takes any batch size, has the state dict of the model, and goes through ``torch.compile`` and
        ``torch.export``.

        Raises:
            UserError: The plan is one by content, so each image chooses its own patches; or the model runs as a graph.
        """
        if isinstance(self.plan, ContentPlan):
            raise UserError("each image chooses its own patches by this plan", "export it, or learn a static plan")
        with job(None):
            from ..prune.backbones.adapter import require_blocks
            from ..prune.gathered import gathered_module

            blocks = require_blocks(self.loaded.adapter, "a pruned module", plain=False)
            return gathered_module(blocks, self.plan, self.weights)

    def export(
        self,
        output: Path_ = "pruned.onnx",
        *,
        opset: int | None = None,
        dynamic_batch: bool = False,
        batch_size: int = 1,
        deploy_for: str | None = None,
        precisions: str | Sequence[str] = (),
        io: str = "float32",
        data: Any = None,
        images: int | None = None,
        tokens: bool = False,
        progress: Sink | None = None,
    ) -> Exported:
        """Write the pruned model as a static ONNX graph and check that it computes what the pruned model does.

        Args: as for :meth:`vpruner.Model.export`.

        Raises:
            UserError: Options do not go together, or the target does not take the graph.
            ParityError: The graph does not compute what the model does; nothing is written then.
        """
        form = form_of(opset, dynamic_batch, batch_size, deploy_for, precisions, io)
        with job(progress):
            require_all(RUN_PACKAGES)
            return self.written(output, *form, data=data, images=images, tokens=tokens)

    def written(
        self, output: Any, form: ExportSpec, precision: PrecisionSpec, *, data: Any, images: int | None, tokens: bool
    ) -> Exported:
        """:meth:`export`, with options that are checked already."""
        from .export import export

        path = checked_output(output, precision, *self.files, self.plan_path)
        source = None if data is None else images_for(data)[0].source
        return export(self.loaded, path, form, precision, data=source, images=images, tokens=tokens, **self.reduction)

    def _tables(self) -> list[Table]:
        from ..report.tables.plan import plan_table
        from ..report.tables.run import stages_table

        stages = [stages_table([stage.to_json() for stage in self.stages])] if self.stages else []
        return [*stages, plan_table(self._learned.plan)]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._tables()))

    def __repr__(self) -> str:
        tuned = "no tuned weights" if self.weights is None else f"{len(self.weights)} tuned weights"
        return f"Pruned({self.loaded.name}, {len(self.stages)} stages, {tuned})"

    def _repr_html_(self) -> str:
        tables = "".join(table._repr_html_() for table in self._tables()[:-1])
        return f"<div>{tables}{self.plan._repr_html_()}</div>"
