"""An ONNX graph that is read once and followed once, however many steps of a command look at it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import onnx_ir as ir

from ..core.errors import GraphError, UserError
from ..core.files import file_sha256
from ..core.metadata import PLAN, PREFIX, REQUIRED, WEIGHTS_SHA256, ModelMetadata
from ..core.plan import Geometry
from ..core.preprocess import Preprocessing
from ..core.text import command
from .files import check_tensors, load_model
from .follow import Followed, follow
from .follow.fold import not_valid
from .graph_costs import geometry_of, image_of
from .nodes import HINT, copy_model
from .streaming import StoredTensor
from .structure import find_problems
from .unfit import refuse_unfit

#: What stands for a graph: a file, a model in memory, or one that is open already.
Graph: TypeAlias = "str | os.PathLike | onnx.ModelProto | ir.Model | OpenedGraph"


@dataclass(frozen=True, eq=False)
class OpenedGraph:
    """A graph that was read. Nothing changes it: a step that rewrites a graph works on a copy, which shares tensors.

    Attributes:
        model: The graph as it was read.
        path: The file; None for a model in memory.
    """

    model: ir.Model
    path: Path | None = None

    @property
    def source(self) -> str:
        """What to call it in messages."""
        return "the model" if self.path is None else str(self.path)

    @property
    def name(self) -> str:
        """The same without the folder."""
        return self.source if self.path is None else self.path.name

    @property
    def stem(self) -> str:
        """A name for a model whose graph says none."""
        return "model" if self.path is None else self.path.stem

    @cached_property
    def metadata(self) -> ModelMetadata | None:
        """What a file of ours says about itself; None for a graph from elsewhere.

        Raises:
            UserError: Some keys of ours are there, and not all, or malformed.
        """
        props = self.model.metadata_props
        if not any(key.startswith(PREFIX) for key in props):
            return None
        if PLAN in props and WEIGHTS_SHA256 not in props:
            raise already_pruned(self.source, props[PLAN])
        return ModelMetadata.from_props(props, self.source, require=REQUIRED)

    @property
    def dense_metadata(self) -> ModelMetadata | None:
        """The same of a graph that is to be pruned.

        Raises:
            UserError: As :attr:`metadata`, or the graph is pruned already.
        """
        about = self.metadata
        if about is not None and about.plan is not None:
            raise already_pruned(self.source, about.plan, about.rule)
        return about

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images become the input, where the file says it."""
        return None if self.metadata is None else self.metadata.preprocessing

    @cached_property
    def sha256(self) -> str | None:
        """Of the file; None for a model in memory."""
        return None if self.path is None else file_sha256(self.path)

    @property
    def stored_bytes(self) -> int:
        """Size of the file and of those that hold its weights; of the weights alone for a model in memory."""
        tensors = [
            value.const_value for value in self.model.graph.initializers.values() if value.const_value is not None
        ]
        if self.path is None:
            return sum(tensor.nbytes for tensor in tensors)
        files = {self.path, *(tensor.path for tensor in tensors if isinstance(tensor, StoredTensor))}
        return sum(map(os.path.getsize, files))

    def followed(self, expected: Geometry | None = None) -> Followed:
        """Where its tokens go; the work is done once.

        Args:
            expected: Gives the image size to a graph whose own is open, where the metadata does not.

        Raises:
            GraphError: The graph is no dense ViT, or is written in a way that is not understood; names the node.
        """
        found = self.__dict__.get("_followed")
        if found is None:
            if expected is None and self.metadata is not None:
                expected = self.metadata.geometry
            with self.naming():
                refuse_unfit(self.model)
                found = follow(_with_image_size(self.model, expected))
            self.__dict__["_followed"] = found
        return found

    def shape(self, expected: Geometry | None = None) -> Geometry:
        """The shape of the model as the graph has it; as :meth:`followed`."""
        found = self.__dict__.get("_shape")
        if found is None:
            followed = self.followed(expected)
            with self.naming():
                found = self.__dict__["_shape"] = geometry_of(followed)
        return found

    def image_sizes(self) -> tuple[int, ...]:
        """Sizes of one image as the graph takes it; as :meth:`followed`, of which it must have been asked before."""
        followed = self.followed()
        return followed.tokens.known.shapes[image_of(followed)][1:]

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Put the file's name before what is said of its graph.

        Raises:
            GraphError: Also in the place of any other error, if the graph is not valid ONNX: what follows tokens relies
                on that, and to check it ahead would take as long as the work.
        """
        try:
            yield
        except GraphError as error:
            if self.path is None or self.source in error.marked_problem:
                raise
            raise GraphError(f"{self.source}: {error.marked_problem}", error.marked_hint or HINT) from error
        except UserError:
            raise
        except Exception as error:
            if not (said := not_valid(self.model)):
                raise
            hint = f"see what is wrong with it, with: {command('check', self.source)}"
            raise GraphError(f"{self.source}: the graph is not valid ONNX: {said}", hint) from error


def _with_image_size(model: ir.Model, expected: Geometry | None) -> ir.Model:
    """The model, or a copy whose image has the expected size where the graph leaves it open.

    Raises:
        GraphError: It is open, and no size is expected.
    """
    image = next((value for value in model.graph.inputs if value.const_value is None and _is_open_image(value)), None)
    if image is None:
        return model
    if expected is None:
        raise GraphError(
            f"input {image.name!r} is an image {image.shape}, expected a fixed number of channels, height and width",
            "fix them with: python -m onnxruntime.tools.make_dynamic_shape_fixed",
        )
    model = copy_model(model)
    image = next(value for value in model.graph.inputs if value.name == image.name)
    image.shape = ir.Shape([image.shape[0], expected.in_chans, *expected.image_size])
    return model


def _is_open_image(value: ir.Value) -> bool:
    shape = value.shape
    return shape is not None and len(shape) == 4 and not all(isinstance(size, int) for size in shape[1:])


def open_graph(graph: Graph) -> OpenedGraph:
    """Read a graph, or take one that is in memory; an opened one is returned as it is.

    Raises:
        UserError: It is none of those; a file is missing, truncated or no ONNX model; some numbers are not there.
    """
    if isinstance(graph, OpenedGraph):
        return graph
    if isinstance(graph, (str, os.PathLike)):
        return OpenedGraph(load_model(graph), Path(graph))
    model = graph
    if isinstance(graph, onnx.ModelProto):
        for problem in find_problems(graph):
            raise problem.error("the model")
        model = ir.from_proto(graph)
        model.graph.sort()
    if not isinstance(model, ir.Model):
        expected = "expected a path, an onnx.ModelProto or an onnx_ir.Model"
        raise UserError(f"the graph is a {type(graph).__name__}", expected)
    opened = OpenedGraph(model)
    check_tensors(model, opened.source)
    return opened


def already_pruned(source: str, digest: str, rule: Mapping[str, Any] | None = None) -> GraphError:
    """Of a graph whose metadata names the plan ``digest``, or the ``rule`` that chooses the tokens of each image."""
    found = f"holds plan {digest[:12]} already" if rule is None else f"chooses tokens with {rule['method']} already"
    return GraphError(
        f"{source} {found}, expected a dense graph",
        f"give the dense.onnx that is written by: {command('export', 'MODEL')}",
    )
