"""The Python API: models, images and results as objects, and the jobs of the command line as calls.

``import vpruner`` offers these names. Nothing here prints: progress goes to a sink that the caller passes, or to
Python's logging under ``vpruner``. A mistake of the caller raises :class:`~vpruner.core.errors.UserError`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.choices import COMPARE_IMAGES, COMPARE_TARGETS, IMAGES, OPSET, TARGET
from .core.content_plan import ContentPlan
from .core.errors import UserError
from .core.extras import RUN_PACKAGES, require_all
from .core.files import is_onnx
from .core.plan import TokenPlan
from .core.progress import Sink
from .core.specs import ExportSpec, LearnSpec, ModelSpec, PrecisionSpec, TimingSpec
from .core.text import option
from .pipeline.calls import Path_, job, mapping_of, names_of, numbers_of, path_of, spec_of
from .pipeline.images import data_of, evaluation_of, images_for
from .pipeline.models import fields_of, model_spec, name_of
from .pipeline.pruned import Pruned, checked_output, form_of, plan_of
from .report.measurements import Finished, Measurements

if TYPE_CHECKING:
    import torch

    from .core.plan import Geometry
    from .core.preprocess import Preprocessing
    from .pipeline.export import Exported, MethodSpec
    from .prune.loaded import LoadedModel
    from .runtime.sidecar import EngineRecord


# -- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Model:
    """A trained model that was opened by :func:`open_model`.

    Attributes:
        loaded: The model as the stages take it.
        spec: What it was opened from.
        loss: What its output is, as :func:`open_model` was told.
    """

    loaded: LoadedModel
    spec: ModelSpec
    loss: str = "auto"
    _scratch: Any = field(default=None, repr=False)  # Holds the file of an ONNX model that came in memory.

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def geometry(self) -> Geometry:
        return self.loaded.adapter.geometry

    @property
    def preprocessing(self) -> Preprocessing:
        return self.loaded.preprocessing

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.loaded.classes

    @property
    def module(self) -> torch.nn.Module:
        """The unpruned model."""
        return self.loaded.adapter.model

    def __str__(self) -> str:
        shape = self.geometry
        size, grid = " x ".join(map(str, shape.image_size)), " x ".join(map(str, shape.grid))
        return f"{self.name}: {shape.depth} blocks, {grid} patches of {size} pixels, {shape.outputs} {shape.output}"

    def prune(
        self,
        images: Any = None,
        target: float = TARGET,
        *,
        cost: str = "macs",
        loss: str | None = None,
        rounds: int | None = None,
        rearrange: str = "ppo",
        tune: str = "weights",
        select: str = "static",
        episodes: int | None = None,
        time_limit: float | None = None,
        state: Path_ | None = None,
        resume: bool = False,
        seed: int = 0,
        progress: Sink | None = None,
    ) -> Pruned:
        """Learn which tokens the model can do without.

        Args:
            images: Calibration images, as :func:`open_images` takes them; labels are used where there are any. None:
                the bundled ones.
            target: Budget as a fraction of the dense model's cost.
            cost: What the budget is of: ``"macs"``, or ``"latency:TABLE.json"``.
            loss: What gradients are of: ``"labels"``, ``"self"`` or ``"features"``; None picks one.
            rounds, rearrange, tune, select, episodes, time_limit, seed: See
                :class:`~vpruner.core.specs.LearnSpec`.
            state: A folder that keeps what was learned until the learning has finished. None: nothing is kept.
            resume: Whether to go on from what is there.
            progress: Who hears of the progress; None: Python's logging.

        Raises:
            UserError: Images or options cannot be used, or the budget is out of reach.
        """
        spec = LearnSpec(
            target=target,
            cost=cost,
            loss=loss or self.loss,
            rounds=rounds,
            rearrange=rearrange,
            tune=tune,
            select=select,
            episodes=episodes,
            time_limit=time_limit,
            resume=resume,
            seed=seed,
        )
        with job(progress):
            from .pipeline.prune import learn_in_memory

            place = None if state is None else path_of(state, "state")
            learned = learn_in_memory(self.loaded, self.spec, images_for(images)[1], spec, place)
            return Pruned(self.loaded, self.spec.files, learned)

    def with_plan(
        self, plan: Path_ | TokenPlan | ContentPlan, weights: Path_ | None = None, *, progress: Sink | None = None
    ) -> Pruned:
        """The model with a plan that was learned before, ready for export.

        Args:
            plan: The plan or its file.
            weights: The file of tuned weights. None: the one next to the plan's file, where it is there.

        Raises:
            PlanError: The plan cannot be read, or is for another model.
            UserError: The weights cannot be read, or were not tuned for the plan.
        """
        with job(progress):
            from .pipeline.learned import tuned_for_plan
            from .prune.learned import Learned

            plan, path = plan_of(plan)
            plan.check_fits(self.name, self.geometry, self.loaded.sha256)
            file = None if weights is None else path_of(weights, "weights")
            changed = tuned_for_plan(self.loaded, plan, path, file)
            content = plan if isinstance(plan, ContentPlan) else None
            static = plan.plan if isinstance(plan, ContentPlan) else plan
            return Pruned(self.loaded, self.spec.files, Learned(static, changed, (), content), path)

    def export(
        self,
        output: Path_ = "dense.onnx",
        *,
        plan: Path_ | TokenPlan | ContentPlan | None = None,
        method: str | MethodSpec | None = None,
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
        """Write the model as ONNX and check that the graph computes what it does: whole, or reduced.

        Args:
            output: The file.
            plan: Export the model with this plan, as :meth:`with_plan` and :meth:`Pruned.export` do.
            method: Or with this method of token reduction, calibrated on ``data`` first.
            opset, dynamic_batch, batch_size, deploy_for: See :class:`~vpruner.core.specs.ExportSpec`.
            precisions, io: Files in other precisions to write next to it, see
                :class:`~vpruner.core.specs.PrecisionSpec`.
            data, images: Calibration images of the method and of static int8, and how many are used at most.
            tokens: Of a model that ends in the mean of its tokens: return these instead.

        Raises:
            UserError: Options do not go together, or the target does not take the graph.
            ParityError: The graph does not compute what the model does.
        """
        form = form_of(opset, dynamic_batch, batch_size, deploy_for, precisions, io)
        given: dict[str, Any] = dict(data=data, images=images, tokens=tokens)
        with job(progress):
            require_all(RUN_PACKAGES)
            if plan is not None and method is None:
                return self.with_plan(plan).written(output, *form, **given)
            from .pipeline.export import MethodSpec, export

            path = checked_output(output, form[1], *self.spec.files)
            spec = method if isinstance(method, MethodSpec) or method is None else MethodSpec(method)
            if data is not None:
                given["data"] = images_for(data)[0].source
            return export(
                self.loaded, path, *form, plan=None if plan is None else plan_of(plan)[0], method=spec, **given
            )


def open_model(
    model: Any = None,
    *,
    weights: Path_ | None = None,
    pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None,
    resample: bool = False,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    device: str | None = None,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    loss: str = "auto",
    progress: Sink | None = None,
) -> Model:
    """Open a trained model for pruning and export.

    Args:
        model: A timm name (with ``weights`` or ``pretrained``), a model card (``.json``), the folder of a transformers
            vision tower or LLaVA, an ONNX file of any exporter, an ONNX ``ModelProto``, or a torch module of a class
            that can be pruned. A module is used as it is, in evaluation mode; its weights are not changed. None: the
            bundled reference.
        weights: A file with weights for it.
        pretrained: Let timm download the weights.
        model_args: Arguments of the model's architecture.
        resample: Load weights of another patch size, with a resampled patch kernel, in place of refusing them.
        preprocessing: Of an ONNX file or a module: how an image becomes the input, where that is not stated.
        device: Where PyTorch computes: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``. None: on a GPU that works,
            else on the CPU; a module stays where it is.
        name, classes: Of a module: what to call it, and its outputs.
        loss: Of an ONNX file: ``"features"`` if it returns an embedding, ``"self"`` or ``"labels"`` if logits.

    Raises:
        UserError: It cannot be opened or pruned, or there is no such device; the message says which part and why.
    """
    if isinstance(model, Model):
        if weights is not None or pretrained or model_args or preprocessing or device is not None:
            raise UserError(f"{model.name} is open already", "give these options where it is opened")
        return model
    with job(progress, model, weights):
        from .pipeline.models import open_any

        stated = (weights, pretrained, model_args, resample, preprocessing, device)
        loaded, spec, scratch = open_any(model, *stated, name=name, classes=classes, loss=loss)
        return Model(loaded, spec, loss, scratch)


# -- jobs -------------------------------------------------------------------------------------------------------------


def evaluate(
    model: Any,
    images: Any = None,
    *,
    against: Any = None,
    plan: Path_ | TokenPlan | ContentPlan | None = None,
    weights: Path_ | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    device: str | None = None,
    runtime: str = "auto",
    provider: str | tuple[str, Mapping[str, Any]] = "cpu",
    progress: Sink | None = None,
) -> Measurements:
    """Accuracy with confidence intervals.

    Args:
        model: An ONNX file, what an export wrote, a :class:`Pruned`, or whatever :func:`open_model` takes.
        images: Images that nothing was learned from, as :func:`open_images` takes them, or a mapping from names to
            several sets. None: the bundled ones.
        against: Of an ONNX file: the dense model or file to compare it with, on the same images.
        plan: Of a model: compare it with itself pruned by this plan.
        weights: A file with weights of a model.
        preprocessing: Of an ONNX file that does not state it: how an image becomes its input.
        device: Of a model: as for :func:`open_model`.
        runtime, provider: Of an ONNX file: what runs it, as for :func:`profile`.

    Raises:
        UserError: Options do not go together, or there is nothing to measure.
    """
    with job(progress, model):
        from .pipeline.evaluate import evaluate as measure
        from .report.tables.run import evaluation_table

        data = evaluation_of(images)
        how: dict[str, Any] = dict(runtime=runtime, provider=provider)
        if is_onnx(model):
            model = os.fspath(model)
            if weights is not None or plan is not None:
                refused = f"{option('weights')} and {option('plan')} go with a PyTorch model, {model} is a file"
                raise UserError(refused, f"compare it with the dense model: {option('against')}")
            dense, said = _baseline(against)
            stated = mapping_of(fields_of(preprocessing or said), "preprocessing")
            spec = ModelSpec(model, preprocessing=stated, device=device or "auto")
            rows = measure(spec, data, against=dense, **how)
            return Measurements(rows, [evaluation_table(rows)])
        if against is not None:
            raise UserError(f"{option('against')} goes with an ONNX file", f"for a model give {option('plan')}")
        if isinstance(model, Pruned):
            if plan is not None or weights is not None or device is not None:
                named = f"{option('plan')}, {option('weights')} and {option('device')}"
                raise UserError(
                    "a Pruned has its plan and its weights, and is where it was learned", f"leave out {named}"
                )
            loaded, pruned = model.loaded, model
        else:
            opened = open_model(model, weights=weights, preprocessing=preprocessing, device=device)
            loaded, pruned = opened.loaded, None if plan is None else opened.with_plan(plan)
        rows = measure(ModelSpec(loaded), data, **how, **({} if pruned is None else pruned.reduction))
        return Measurements(rows, [evaluation_table(rows)])


def _baseline(against: Any) -> tuple[Path | LoadedModel | None, Preprocessing | None]:
    """A dense file or a model, and how images become its input, where that is to be said; None for none."""
    if against is None or is_onnx(against):
        return None if against is None else Path(against), None
    loaded = open_model(against).loaded
    path = None if loaded.graph is None else loaded.graph.path
    # Of a model that came as a file, the file: it may end in a Softmax, which the model leaves out.
    return (loaded, None) if path is None else (path, loaded.preprocessing)


def profile(
    model: Any,
    *,
    against: Any = None,
    batches: int | Sequence[int] = (1,),
    runtime: str = "auto",
    provider: str | tuple[str, Mapping[str, Any]] = "cpu",
    threads: int | None = None,
    precision: str | None = None,
    cuda_graph: bool | None = None,
    layers: bool = False,
    power: bool = False,
    trust: bool = False,
    seconds: float = 10.0,
    progress: Sink | None = None,
) -> Measurements:
    """Time a file on this machine, in turns with a baseline.

    Args:
        model, against: ONNX files in onnxruntime or OpenVINO, or engines in TensorRT.
        batches: Images per run.
        power: Whether to read power, clocks and temperature.
        runtime, provider, threads, precision, cuda_graph, layers, trust, seconds: See
            :func:`~vpruner.runtime.profile.profile_files`.

    Raises:
        UserError: A file cannot be opened, does not take a batch, or the two cannot be compared.
    """
    with job(progress, model, against):
        from .pipeline.profile import check_baseline
        from .pipeline.profile import profile as measure
        from .report.tables.latency import profile_tables

        path = path_of(model, "model")
        paths = {path.stem: path}
        if against is not None:
            paths = {"dense": path_of(against, "against"), "pruned": path}
            check_baseline(path, paths["dense"])
        TimingSpec(threads, seconds)
        sizes = numbers_of(batches, "batches", int)
        how: dict[str, Any] = dict(runtime=runtime, provider=provider, threads=threads, precision=precision)
        how.update(cuda_graph=cuda_graph, layers=layers, trust=trust, seconds=seconds)
        rows = measure(paths, batches=sizes, power=power, **how)
        return Measurements(rows, profile_tables(rows))


def fold_plan(
    dense: Any,
    plan: Path_ | TokenPlan | None = None,
    output: Path_ = "pruned.onnx",
    *,
    identity: bool = False,
    deploy_for: str | None = None,
    progress: Sink | None = None,
) -> Exported:
    """Fold a plan into a dense ONNX graph of any exporter, and check the result; PyTorch is not needed.

    Args:
        dense: A file, an ONNX ``ModelProto``, or an ``onnx_ir.Model``; a model in memory is left as it is.
        identity: Instead of a plan: drop no token, only what nothing reads.
        deploy_for: The deployment target whose form is written; None: the plain form.

    Raises:
        GraphError: The graph is not understood; the message names the node.
        UserError: The plan or the file cannot be used.
        ParityError: The folded graph computes something else.
    """
    with job(progress, dense):
        require_all(("onnx", "onnx_ir", "onnxruntime"))
        from .pipeline.export import Exported
        from .pipeline.fold import fold_checked
        from .pipeline.folders import check_output

        if (plan is not None) == bool(identity):
            raise UserError(f"give one of {option('plan')} and {option('identity', True)}")
        graph: Any = path_of(dense, "dense") if dense is None or isinstance(dense, (str, os.PathLike)) else dense
        target = path_of(output, "output")
        opened, path = (None, None) if plan is None else plan_of(plan)
        check_output(target, ".onnx", graph if isinstance(graph, Path) else None, path)
        if isinstance(opened, ContentPlan):
            opened = TokenPlan.from_json(opened.to_json())  # Says what to do with a plan by content.
        _, checks, deployment = fold_checked(graph, opened, target, deploy_for=deploy_for, plan_path=path)
        return Exported(target, tuple(checks), deployment)


def build_engine(onnx: Any, output: Path_, *, progress: Sink | None = None, **options: Any) -> EngineRecord:
    """Build a TensorRT engine from an ONNX file, and write what it was built with beside it.

    Args:
        options: Fields of :class:`~vpruner.runtime.build.BuildOptions`: ``precision="fp16"``, ``batch=(1, 8, 32)``, ...

    Raises:
        UserError: The file, the options, or this machine cannot be used.
    """
    with job(progress, onnx):
        from dataclasses import fields

        from .pipeline.engines import build_engine as build
        from .pipeline.folders import check_output
        from .runtime.build import BuildOptions

        known = [one.name for one in fields(BuildOptions)]
        if unknown := [name for name in options if name not in known]:
            raise UserError(f"build_engine has no {', '.join(unknown)}", f"expected some of {', '.join(known)}")
        source, target = path_of(onnx, "onnx"), path_of(output, "output")
        check_output(target, "", source)
        return build(source, target, BuildOptions(**options))


def _model_spec(model: Any, preprocessing: Any, **given: Any) -> ModelSpec:
    """What :func:`run` and :func:`compare` open themselves, or a model that is open already.

    Args:
        given: Of :func:`open_model`.
    """
    if model is None or isinstance(model, (str, os.PathLike)):
        what = None if model is None else os.fspath(model)
        return model_spec(what, preprocessing=fields_of(preprocessing), **given)
    return ModelSpec(open_model(model, preprocessing=preprocessing, **given).loaded)


def run(
    model: Any = None,
    data: Any = None,
    *,
    eval_data: Any = None,
    output: Path_ | None = None,
    target: float | None = None,
    weights: Path_ | None = None,
    pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None,
    resample: bool = False,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    device: str | None = None,
    images: int | None = None,
    eval_images: int | None = None,
    seed: int = 0,
    learn: LearnSpec | None = None,
    export: ExportSpec | None = None,
    precision: PrecisionSpec | None = None,
    timing: TimingSpec | None = None,
    force: bool = False,
    progress: Sink | None = None,
) -> Finished:
    """Prune, export, check, measure and report: a folder with everything in it, or nothing.

    Args:
        model: What :func:`open_model` takes, or a model that it opened.
        data, eval_data: Images to learn from and images to report on, as :func:`open_images` takes them. Several sets
            to report on are a mapping from names; all but a table goes by the first. Without ``eval_data`` a part of
            ``data`` is put aside.
        output: The folder; None: ``runs/NAME``.
        target: Budget as a fraction of the dense model's cost; None: that of ``learn``.
        weights, pretrained, model_args, resample, preprocessing, device: Of :func:`open_model`.
        images, eval_images: How many are used at most.
        seed: Of everything that depends on chance.
        learn, export, precision, timing: Everything else that can be asked for.
        force: Replace an earlier run in that folder.

    Raises:
        UserError: Something that was given cannot be used.
        ParityError: A graph does not compute what the model does.
        SystemExit: All have learned, and this is not the first of the processes that torchrun started.
    """
    with job(progress, model, weights):
        require_all(RUN_PACKAGES)
        from .pipeline.options import RunOptions
        from .pipeline.run import run as run_all
        from .report.results import Results
        from .report.tables.run import run_tables

        given = dict(weights=weights, pretrained=pretrained, model_args=model_args, resample=resample, device=device)
        spec = _model_spec(model, preprocessing, **given)
        learn = replace(spec_of(learn, LearnSpec, "learn"), seed=seed, **({} if target is None else {"target": target}))
        chosen = data_of(data, eval_data, images, eval_images, seed, IMAGES)
        form, others = spec_of(export, ExportSpec, "export"), spec_of(precision, PrecisionSpec, "precision")
        options = RunOptions(spec, chosen, learn, form, others, spec_of(timing, TimingSpec, "timing"))
        folder = Path("runs") / name_of(spec) if output is None else path_of(output, "output")
        done = run_all(options, folder, force=force)
        return Finished.of(folder, done, run_tables(Results(tuple(done["rows"]))), done["left_out"])


def compare(
    model: Any = None,
    data: Any = None,
    *,
    eval_data: Any = None,
    output: Path_ | None = None,
    targets: float | Sequence[float] = COMPARE_TARGETS,
    methods: str | Sequence[str] | None = None,
    smaller: Sequence[Any] = (),
    seeds: int = 1,
    batches: int | Sequence[int] = (1,),
    latency: bool = True,
    weights: Path_ | None = None,
    pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None,
    resample: bool = False,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    device: str | None = None,
    images: int | None = None,
    eval_images: int | None = None,
    seed: int = 0,
    learn: LearnSpec | None = None,
    timing: TimingSpec | None = None,
    opset: int = OPSET,
    results: Path_ | None = None,
    force: bool = False,
    progress: Sink | None = None,
) -> Finished:
    """Compare methods of token reduction at equal budgets; a comparison that was interrupted goes on.

    Args:
        model, data, eval_data, weights, pretrained, model_args, resample, preprocessing, device, images, eval_images,
            seed: As for :func:`run`.
        output: The folder; None: ``runs/compare-NAME``.
        targets, methods, smaller, seeds, batches, latency, learn, opset: See
            :class:`~vpruner.pipeline.options.CompareOptions`.
        results: File that rows are read from and added to; None: ``results.jsonl`` of the folder.
        force: Forget what an earlier comparison left there.

    Raises:
        UserError: Something that was given cannot be used.
    """
    with job(progress, model, weights):
        require_all(RUN_PACKAGES)
        from .pipeline.compare.compare import compare as compare_all
        from .pipeline.options import CompareOptions
        from .report.entries import entries_of
        from .report.tables.compare import comparison_table

        given = dict(weights=weights, pretrained=pretrained, model_args=model_args, resample=resample, device=device)
        spec = _model_spec(model, preprocessing, **given)
        options = CompareOptions(
            spec,
            data_of(data, eval_data, images, eval_images, seed, COMPARE_IMAGES),
            replace(spec_of(learn, LearnSpec, "learn"), seed=seed),
            spec_of(timing, TimingSpec, "timing"),
            targets=numbers_of(targets, "targets", float),
            methods=None if methods is None else names_of(methods, "methods"),
            smaller=tuple(smaller),
            seeds=seeds,
            batches=numbers_of(batches, "batches", int),
            latency=latency,
            opset=opset,
        )
        folder = Path("runs") / f"compare-{name_of(spec)}" if output is None else path_of(output, "output")
        rows = None if results is None else path_of(results, "results")
        done = compare_all(options, folder, results=rows, force=force)
        entries = entries_of(done["rows"])
        failed = (row for row in done["rows"] if row["kind"] == "compared" and row["failure"] is not None)
        names = [f"{row['method']} at {row['target']:g}" for row in failed]
        return Finished.of(folder, done, [comparison_table(entries)] if done["made"] else [], names)
