"""An ONNX file as a model that a plan is learned from, and the file again, with the weights that it has by then.

Nothing is built anew: PyTorch runs the user's own graph, with gates where it adds to the stream of tokens, and what is
refitted are its own initializers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.boundary import reading
from ..core.errors import GraphError, ParityError, UserError
from ..core.external import check_data
from ..core.extras import require
from ..core.files import scratch_beside
from ..core.finite import check_finite
from ..core.geometry import Geometry
from ..core.metadata import ModelMetadata
from ..core.preprocess import resolve_preprocessing
from ..core.scratch import temporary_folder
from ..core.text import command
from ..prune.backbones.vit import weights_sha256
from ..prune.device import device_of, move, on_cpu
from ..prune.loaded import LoadedModel
from .dense import tidy, trace_module
from .files import save_model
from .fold import check_metadata
from .graph import Graph, OpenedGraph, copy_model, open_graph
from .graph_adapter import GraphAdapter
from .graph_costs import image_of
from .graph_outputs import GraphOutputs
from .parity import compare_float32, run_graph
from .torch_graph import GraphModule, write_back
from .yardstick import Yardstick


def open_graph_model(
    graph: Graph, *, preprocessing: Mapping[str, object] | None = None, output: str | None = None
) -> LoadedModel:
    """A dense ONNX file of any exporter as a model to learn from, compared with onnxruntime first.

    Args:
        graph: A file, a model in memory, or an opened graph.
        preprocessing: What the user said of it, see :func:`~vpruner.core.preprocess.resolve_preprocessing`; needed
            where the file does not say it.
        output: What it returns, one of :data:`~vpruner.core.geometry.OUTPUTS`. None: as the file says; where it does
            not, a last layer with a bias gives logits, one without (or none) an embedding, and anything but one vector
            for each image is values.

    Returns:
        The model under the name and weights hash of the file's metadata; without any, under the file's name and the
        hash of its own parameters. Its classes are those of the metadata.

    Raises:
        GraphError: The tokens cannot be followed, or the graph cannot be run in PyTorch; the message names the node.
        UserError: No ONNX file, pruned already, no three channels, or no preprocessing.
    """
    opened = open_graph(graph)
    about, geometry = opened.dense_metadata, opened.shape()
    name = opened.stem
    if about is not None:
        check_metadata(about, geometry, opened.source)
        geometry, name = about.geometry, about.model
    elif output is not None:
        geometry = replace(geometry, output=_agreed(output, geometry, opened.source))
    if geometry.in_chans != 3:
        found = f"{opened.source} takes {geometry.in_chans} channels"
        raise UserError(f"{found}, expected 3 (RGB)", "only RGB models are supported")
    resolved = resolve_preprocessing(
        opened.preprocessing, dict(preprocessing or {}), size=geometry.image_size, source=opened.source
    )
    adapter = _adapter(opened, name, geometry)
    return LoadedModel(
        adapter,
        resolved,
        None if about is None else about.classes,
        weights_sha256(adapter.model) if about is None else about.weights_sha256,
        opened,
        adapter.model.softmax,
    )


def export_adapter(module: nn.Module, name: str, sizes: tuple[int, int, int]) -> GraphAdapter:
    """The adapter of a module that has none of its own: that of the graph which PyTorch exports of it.

    Args:
        module: Takes images [batch, channel, height, width]; its weights are in it.
        sizes: Channels, height and width.

    Raises:
        UserError: It cannot be exported, or the tokens of its graph cannot be followed.
    """
    device = device_of(module)
    with on_cpu(module):
        try:
            exported = trace_module(module, name, sizes)
        except UserError:
            exported = trace_module(module, name, sizes, dynamic_batch=False)
        tidy(exported)
        exported.graph.name = name
        opened = OpenedGraph(exported)
        adapter = _adapter(opened, name, opened.shape())
        _check_export(module, opened, probe_images(adapter.geometry))
    move(adapter, device)
    return adapter


def _adapter(opened: OpenedGraph, name: str, geometry: Geometry) -> GraphAdapter:
    """The graph in PyTorch, compared with onnxruntime."""
    with opened.naming():
        followed = opened.followed()
        image = image_of(followed)
        if image.dtype is not None and not image.dtype.is_floating_point():
            raise GraphError(f"input {image.name!r} is {image.dtype}, expected FLOAT", "take the conversion off it")
        model = GraphOutputs(followed, image, values=geometry.output == "values")
        images = probe_images(geometry)
        _check_equal(model, opened, images)
        # Behind the check, which leaves the same weights in other tensors: the adapter knows its own by their address.
        adapter = GraphAdapter(followed, model, name, geometry, opened)
        adapter.look_at(torch.from_numpy(images))
    return adapter


def write_graph(loaded: LoadedModel, path: str | os.PathLike, props: Mapping[str, str] | None = None) -> Path:
    """Write the file that ``loaded`` was opened from, with what ``loaded`` knows of itself as metadata.

    Initializers whose numbers are others in the model now, as tuning leaves them, are written as the model has them.

    Args:
        loaded: From :func:`open_graph_model`; ``sha256`` is written as the identity of the weights.
        props: More metadata.

    Raises:
        ParityError: Weights were changed, and the graph with them does not compute what the model does.
    """
    adapter = loaded.adapter
    geometry, changed = adapter.geometry, adapter.changed()
    # A copy: the graph may be written again, with other weights.
    model = copy_model(loaded.graph.model)
    about = ModelMetadata(loaded.name, loaded.sha256, geometry, loaded.preprocessing, loaded.classes)
    model.metadata_props.update({**about.to_props(), **(props or {})})
    if changed:
        write_back(adapter.model, model, changed)
        with scratch_beside(path) as folder, on_cpu(adapter):
            written = OpenedGraph(model, save_model(model, folder / "tuned.onnx"))
            _compare(adapter.model, written, probe_images(geometry), "the tuned graph equals the tuned model")
    return save_model(model, path)


def read_module(graph: OpenedGraph) -> tuple[nn.Module, Callable[[Tensor], np.ndarray]]:
    """The graph in PyTorch, and how images [image, ...] are run through it to its first output.

    Raises:
        GraphError: It cannot be run there.
    """
    module = GraphModule(graph)

    @torch.no_grad()
    def run(images: Tensor) -> np.ndarray:
        step = module.batch or 4
        filled = torch.cat([images, images[-1:].expand(-len(images) % step, *images.shape[1:])])
        found = [module.compute(module.output_names[:1], chunk) for chunk in filled.split(step)]
        return torch.cat([value for one in found for value in one.values()])[: len(images)].numpy()

    return module, run


def probe_images(geometry: Geometry, seed: int = 0) -> np.ndarray:
    """Inputs to compare models on: noise of several strengths, fine and coarse, and a constant.

    Returns:
        float32 [7, channel, height, width], about the range of normalised pixels.
    """
    random = np.random.default_rng(seed)
    height, width = geometry.image_size
    fine = random.standard_normal((4, geometry.in_chans, height, width), np.float32)
    fine *= np.float32([0.1, 0.5, 1, 2])[:, None, None, None]
    coarse = random.uniform(-2, 2, (2, geometry.in_chans, 4, 4)).astype(np.float32)
    coarse = coarse.repeat(-(-height // 4), 2).repeat(-(-width // 4), 3)[:, :, :height, :width]
    return np.concatenate([fine, coarse, np.full_like(fine[:1], 0.5)])


# -- comparing --------------------------------------------------------------------------------------------------------


def _agreed(output: str, geometry: Geometry, source: str) -> str:
    if output != "values" and geometry.output == "values":
        raise UserError(
            f"{source} gives other outputs than one vector for each image, which are no {output}",
            "leave the loss at auto",
        )
    return output


def _check_equal(model: GraphOutputs, graph: OpenedGraph, images: np.ndarray) -> None:
    """Refuse a graph that PyTorch computes otherwise than onnxruntime."""
    what = "PyTorch gives what onnxruntime does"
    try:
        _compare(model, graph, images, what)
    except ParityError as error:
        raise GraphError(
            f"{graph.source} gives something else in PyTorch than in onnxruntime ({str(error).partition(what)[2][2:]})",
            f"learn the plan from the PyTorch model, then: {command('fold', 'FILE', plan='plan.json')}",
        ) from None


@torch.no_grad()
def _check_export(module: nn.Module, graph: OpenedGraph, images: np.ndarray) -> None:
    """Compare what the module gives with what its graph does.

    Raises:
        ParityError: They differ.
    """

    def run(given: torch.Tensor) -> list[np.ndarray]:
        found = module(given.to(next(module.parameters())))
        return [part.cpu().numpy() for part in (found if isinstance(found, (tuple, list)) else [found])]

    own, names = run(torch.from_numpy(images)), [value.name for value in graph.model.graph.outputs]
    for index, (expected, found) in enumerate(zip(own, run_graph(graph, images), strict=True)):
        yardstick = Yardstick(module, torch.from_numpy(images), lambda batch, index=index: run(batch)[index])
        what = f"{names[index]} of the exported graph equals that of the module"
        compare_float32(what, expected, found, yardstick, top1=False)


@torch.no_grad()
def _compare(model: GraphOutputs, graph: OpenedGraph, images: np.ndarray, name: str) -> None:
    """Compare the outputs of the graph for each image, one by one."""
    given = torch.from_numpy(images)
    with _session(graph) as session:
        references = model.ends(given, partial(_run, session))
    for output, reference in references.items():
        check_finite(reference.numpy(), graph.source, file=graph.path)

        def run(batch: Tensor, output: str = output) -> np.ndarray:
            return model.ends(batch)[output].cpu().flatten(1).numpy()

        compare_float32(name, reference.flatten(1).numpy(), run(given), Yardstick(model, given, run), top1=False)


def _run(session: Any, names: Sequence[str], feeds: Mapping[str, Tensor]) -> list[Tensor]:
    found = session.run(list(names), {name: value.contiguous().numpy() for name, value in feeds.items()})
    return [torch.from_numpy(output) for output in found]


@contextmanager
def _session(graph: OpenedGraph) -> Iterator[Any]:
    """The graph in onnxruntime; one in memory is written first."""
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # What fails is an exception; the log would say it a second time.
    options.enable_cpu_mem_arena = False
    hint = f"see what is wrong with it, with: {command('check', graph.source)}"
    with temporary_folder() as folder:
        path = graph.path or save_model(graph.model, Path(folder) / "graph.onnx")
        with reading(graph.source, hint):
            found = os.fspath(check_data(path))
            yield onnxruntime.InferenceSession(found, options, providers=["CPUExecutionProvider"])
