"""What learning compares of an ONNX graph: its outputs for each image, side by side, from one PyTorch module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..core.errors import GraphError
from .follow import Followed
from .follow.known import used_by
from .graph_costs import is_channels_last
from .nodes import attribute_int
from .torch_graph import GraphModule
from .torch_graph.table import DTYPES

#: Numbers of an image that are compared at most: as many tell how far two maps are apart as millions do.
MOST_VALUES = 16_384
_CUT = "cut the graph down to the image and to what it gives, with onnx.utils.extract_model"


class GraphOutputs(GraphModule):
    """A graph as a function of images alone: [image, channel, height, width] -> [image, output].

    Inputs beside the image are fed with ones, or with zeros where ones give no finite numbers. Where the graph ends in
    a ``Softmax`` over classes, the logits ahead of it are returned. *Values* are outputs of any other kind: each is
    flattened, a fixed random choice of its numbers where there are many, and all are put side by side. They are scaled
    so that the squared distance of two results is the squared error of each output relative to its mean square, the
    mean over outputs.

    Args:
        followed: The graph. It stays as it is.
        image: Its input that holds the images.
        values: Whether what it gives is values.

    Attributes:
        judged: Names of what is returned.
        softmax: Whether one at the end is left out.

    Raises:
        GraphError: The graph cannot be run, or gives no finite numbers for each image.
    """

    def __init__(self, followed: Followed, image: ir.Value, *, values: bool):
        super().__init__(followed.model)
        self._inputs_fed = _Feeds(followed, image, self.input_names)
        self._values = values
        self._running: GraphModule | None = None
        outputs = [value for value in followed.model.graph.outputs if _depends_on(value, image)]
        self._ends = tuple(value.name for value in outputs)
        self.softmax = not values and len(outputs) == 1 and _ends_in_softmax(outputs[0])
        if self.softmax:
            outputs = [outputs[0].producer().inputs[0]]
        self.judged = tuple(value.name for value in outputs)
        widths = self._find_outputs()
        #: Of each output, which of its numbers are looked at; None: all.
        self._rows = _choose(widths, MOST_VALUES) if values else [None] * len(widths)
        self._widths = [width if rows is None else len(rows) for width, rows in zip(widths, self._rows, strict=True)]
        self._scales = [1.0] * len(widths)

    def forward(self, images: Tensor) -> Tensor:
        """[image, channel, height, width] -> [image, output]."""
        count, module = len(images), self if self._running is None else self._running
        found = module.compute(self.judged, *self.feeds(images))
        parts = []
        for name, rows, scale in zip(self.judged, self._rows, self._scales, strict=True):
            part = found[name].flatten(1)[:count]
            if rows is not None:
                part = part.index_select(1, rows.to(part.device))
            parts.append(part * scale if scale != 1 else part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def feeds(self, images: Tensor) -> list[Tensor]:
        """The inputs of the graph for images [image, channel, height, width], in whole batches."""
        return self._inputs_fed.of(self._filled(images))

    def blank(self, count: int) -> list[Tensor]:
        """Inputs for so many images, in whole batches, where nothing but their shapes is asked for."""
        # One zero for all pixels: it takes no memory.
        return self._inputs_fed.of(self._like.new_zeros(()).expand(count, *self._inputs_fed.image_shape))

    def _filled(self, images: Tensor) -> Tensor:
        """Whole batches, of a graph whose batch is fixed."""
        missing = -len(images) % (self.batch or 1)
        return torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images

    def ends(
        self, images: Tensor, run: Callable[[Sequence[str], Mapping[str, Tensor]], Sequence[Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """The outputs of the graph that are judged, as they are: name -> [image, ...].

        Args:
            run: Another program of the graph: names of outputs, and inputs by their names -> those outputs.
        """
        found: dict[str, list[Tensor]] = {}
        names = self._ends if self.softmax else self.judged
        for chunk in self._filled(images).split(self.batch or 4):
            feeds = self._inputs_fed.of(chunk)
            if run is None:
                outputs = self.compute(names, *feeds).values()
            else:
                outputs = run(names, dict(zip(self.input_names, feeds, strict=True)))
            for name, output in zip(names, outputs, strict=True):
                found.setdefault(name, []).append(output)
        return {name: torch.cat(parts)[: len(images)] for name, parts in found.items()}

    @contextmanager
    def instead(self, module: GraphModule) -> Iterator[GraphOutputs]:
        """Let a folded form of the graph give the outputs until the context is left."""
        # Not as a part: its weights are no weights of this one.
        before, self.__dict__["_running"] = self._running, module
        try:
            yield self
        finally:
            self.__dict__["_running"] = before

    def look_at(self, images: Tensor) -> None:
        """Scale values by what the graph gives for these images, [image, channel, height, width].

        Raises:
            GraphError: An output is 0, or not finite, for all of them.
        """
        if not self._values:
            return
        self._scales = [1.0] * len(self._scales)
        sums, count = np.zeros(len(self._scales)), len(images)
        with torch.no_grad():
            for chunk in images.split(4):
                sums += [float(part.cpu().double().square().sum()) for part in self(chunk).split(self._widths, 1)]
        for index, total in enumerate(sums / count):
            if not 0 < total < np.inf:
                found = "0" if total == 0 else "not finite"
                raise GraphError(f"output {self.judged[index]!r} is {found}, so nothing can be learned of it", _CUT)
            self._scales[index] = float((total * len(sums)) ** -0.5)

    def _find_outputs(self) -> list[int]:
        """Settle what is fed and what is judged; how many numbers each output has for an image."""
        unit, random, feeds = self.batch or 1, np.random.default_rng(0), self._inputs_fed
        images = torch.from_numpy(random.standard_normal((2 * unit, *feeds.image_shape), np.float32))
        for fill in (1, 0) if feeds.beside else (1,):
            feeds.fill = fill
            with torch.no_grad():
                once, twice = (self.compute(self.judged, *feeds.of(images[: unit * times])) for times in (1, 2))
            kept = tuple(
                name
                for name in self.judged
                if once[name].is_floating_point()
                and once[name].ndim
                and (len(once[name]), len(twice[name])) == (unit, 2 * unit)
            )
            # Numbers that are not finite are the images' own where nothing else is fed.
            if kept and (not feeds.beside or all(twice[name].isfinite().all() for name in kept)):
                self.judged = kept
                return [once[name][0].numel() for name in kept]
        others = ", ".join(repr(value.name) for value in feeds.beside)
        beside = f" while {others} are fed with 1 or 0" if others else ""
        raise GraphError(f"no output has finite numbers for each image{beside}", _CUT)


class _Feeds:
    """What a graph is fed with beside images.

    Attributes:
        fill: The number that other inputs get.
        beside: Those inputs.
        image_shape: (channels, height, width).
    """

    def __init__(self, followed: Followed, image: ir.Value, names: Sequence[str]):
        self.image, self.names, self.fill = image, names, 1
        self.beside = [value for value in followed.model.graph.inputs if value.name in names and value is not image]
        for value in self.beside:
            if value.shape is None:
                raise GraphError(f"input {value.name!r} has no shape, so nothing can be fed beside the images", _CUT)
        sizes = followed.tokens.known.shapes[image][1:]
        self._last = is_channels_last(sizes)
        self.image_shape = (sizes[-1], *sizes[:-1]) if self._last else tuple(sizes)

    def of(self, images: Tensor) -> list[Tensor]:
        """The inputs for images [image, channel, height, width]."""
        given = {self.image.name: images.movedim(1, -1) if self._last else images}
        given |= {value.name: self._filled(value, len(images)) for value in self.beside}
        return [given[name] for name in self.names]

    def _filled(self, value: ir.Value, count: int) -> Tensor:
        first = self.image.shape[0]
        sizes = [size if isinstance(size, int) else 1 for size in value.shape]
        if sizes and isinstance(first, int):
            # As many passes of the graph's batch as there are of the images.
            sizes[0] *= count // first
        elif sizes and value.shape[0] == first:
            sizes[0] = count
        return torch.full(sizes, self.fill, dtype=DTYPES.get(value.dtype, torch.float32))


def _depends_on(value: ir.Value, source: ir.Value) -> bool:
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if one is source:
            return True
        if one not in seen and one.producer() is not None:
            seen.add(one)
            waiting.extend(used_by(one.producer()))
    return False


def _ends_in_softmax(output: ir.Value) -> bool:
    node = output.producer()
    last = output.shape is not None and attribute_int(node, "axis", -1) in (-1, len(output.shape) - 1)
    return node.op_type == "Softmax" and last


def _choose(widths: Sequence[int], most: int) -> list[Tensor | None]:
    """Of outputs of so many numbers, ``most`` altogether: small ones whole, of the others equal shares."""
    random, rows, left = np.random.default_rng(0), [None] * len(widths), most
    for done, index in enumerate(np.argsort(widths, kind="stable")):
        share = max(1, left // (len(widths) - done))
        if widths[index] > share:
            rows[index] = torch.from_numpy(np.sort(random.choice(widths[index], share, replace=False)))
        left -= min(share, widths[index])
    return rows
