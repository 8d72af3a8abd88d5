"""What every way of running a model shares: images in, named tensors or labels out.

A backend (:mod:`vpruner.runtime.ort` and those to come) opens the file and runs tensors; checking the inputs, preparing
images, filling the graph's batch and turning logits into labels is done here, once.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.environment import usable_cores
from ..core.errors import UserError
from ..core.finite import check_finite
from ..core.metadata import ModelMetadata
from ..core.preprocess import Preprocessing
from ..core.text import command

#: Images per run of a graph whose batch is dynamic. On a CPU larger batches gain nothing and cost memory.
DEFAULT_BATCH_SIZE = 16
#: More threads than this per usable core are a slip of the keyboard: idle ones spin, and thousands hang the machine.
THREADS_PER_CORE = 4
#: dtype of an input -> what rows call a file of that precision.
FLOATS = {"float32": "fp32", "float16": "fp16", "float64": "fp64"}
#: Engines of TensorRT.
ENGINE_SUFFIXES = (".engine", ".plan", ".trt")


class TensorSpec(NamedTuple):
    """An input or output of a graph.

    Attributes:
        name: Its name.
        shape: A number for a static dimension, else the name of the dynamic one (None when it has no name).
        dtype: numpy name: ``"float32"``.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join('?' if size is None else str(size) for size in self.shape)}]"


class Score(NamedTuple):
    """One line of a prediction: ``score`` is the softmax probability of output ``index``."""

    label: str
    score: float
    index: int


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says about one image.

    Attributes:
        scores: The likeliest classes, best first; empty for a model without a classifier.
        features: float32 [feature], for a model without a classifier; else None.
    """

    scores: tuple[Score, ...] = ()
    features: np.ndarray | None = None

    @property
    def label(self) -> str:
        """The likeliest class."""
        if not self.scores:
            raise UserError("this model gives features, not classes", "read .features instead of .label")
        return self.scores[0].label

    def to_json(self) -> dict[str, Any]:
        if self.features is not None:
            return {"features": self.features.tolist()}
        return {"scores": [score._asdict() for score in self.scores]}


class Session(ABC):
    """An opened model. A context manager; usable without ``with`` too, then :meth:`close` frees its memory.

    Threads may share a session: :meth:`run`, :meth:`logits` and :meth:`predict` give each thread its own results. On a
    GPU, inputs and outputs have one place, so runs go one after another. A backend's ``upload``, ``enqueue`` and
    ``download`` are three steps of one thread: if another thread uploads or runs in between, the next step is a
    UserError. :meth:`close` waits for a run on a GPU; what is called after it is a UserError.

    Args:
        path: The model file.
        batch_size: Images per run when the graph's batch is dynamic; a static graph dictates its own.
        preprocessing: Overrides what the file says (and is needed where the file says nothing).
        classes: Names of the outputs; overrides what the file says.

    Attributes:
        runtime, provider: What rows call what runs it: ``"onnxruntime"`` and ``"cpu"``.
        inputs, outputs: The graph's tensors.
        metadata: What the file says about itself.
    """

    runtime: str
    provider: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: ModelMetadata
    #: Fewer images than this are filled up where the batch is dynamic.
    minimum_batch: int = 1

    def __init__(
        self,
        path: str | PathLike,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        preprocessing: Preprocessing | Mapping[str, Any] | None = None,
        classes: Sequence[str] | None = None,
    ):
        self.path = Path(path)
        # Reentrant: a run takes it for all of its three steps, and each step by itself.
        self._lock = threading.RLock()
        self._uploaded_by: int | None = None
        if not self.path.is_file():
            raise UserError(f"{path}: {'is not a file' if self.path.exists() else 'no such file'}", "expected a model")
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise UserError(f"batch_size is {batch_size!r}, expected a whole number of at least 1")
        self._open()
        image = self.inputs[0].shape if len(self.inputs) == 1 else ()
        #: The graph's own batch size; None when it is dynamic.
        self.static_batch: int | None = image[0] if image and isinstance(image[0], int) else None
        self.batch_size: int = self.static_batch or int(batch_size)
        if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
            preprocessing = Preprocessing.from_json(preprocessing)
        self.preprocessing: Preprocessing | None = preprocessing or self.metadata.preprocessing
        self.classes: tuple[str, ...] | None = tuple(classes) if classes is not None else self.metadata.classes
        width = self.outputs[0].shape[-1] if self.outputs and self.outputs[0].shape else None
        if self.classes is not None and isinstance(width, int) and len(self.classes) != width:
            self.close()
            raise UserError(f"{self.path}: {len(self.classes)} class names for {width} outputs")

    @abstractmethod
    def _open(self) -> None:
        """Set :attr:`inputs`, :attr:`outputs` and :attr:`metadata`; UserError when the file is unusable."""

    @abstractmethod
    def _run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run checked inputs; the outputs in the order of :attr:`outputs`."""

    def caller(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """What a clock is put around: each call is one run on ``feeds``, which are checked here, once."""
        checked = self.check_feeds(feeds)
        return lambda: self._run(checked)

    @property
    def precision(self) -> str:
        """What rows say of the file: its own precision, or what its input tells."""
        return self.metadata.precision or FLOATS.get(self.inputs[0].dtype, self.inputs[0].dtype)

    @property
    def protocol(self) -> dict[str, Any]:
        """What rows say of how :meth:`caller` runs; JSON values."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Free the model. Closing twice is fine; running afterwards is a UserError."""

    @property
    @abstractmethod
    def closed(self) -> bool: ...

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}: {', '.join(map(str, self.inputs))})"

    # -- tensors --------------------------------------------------------------------------------------------------

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run named tensors as they are, without preprocessing; outputs are returned whatever they hold.

        Args:
            feeds: One array for each input, of exactly its dtype and shape.

        Returns:
            All outputs by name, in the graph's order.

        Raises:
            UserError: A name, shape or dtype does not fit (the message says what was found and expected), or the
                session is closed.
        """
        feeds = self.check_feeds(feeds)
        return dict(zip((spec.name for spec in self.outputs), self._run(feeds), strict=True))

    def check_feeds(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``feeds``, C-contiguous, once their names, dtypes and shapes are known to fit."""
        self._check_open()
        if not isinstance(feeds, Mapping):
            raise UserError(
                f"run takes named tensors, found {type(feeds).__name__}",
                f"expected {{name: array}} for {', '.join(map(str, self.inputs))}",
            )
        names = [spec.name for spec in self.inputs]
        if set(feeds) != set(names):
            raise UserError(f"{self.path}: found tensors {sorted(map(str, feeds))}, expected {sorted(names)}")
        dynamic: dict[str, int] = {}
        checked = {}
        for spec in self.inputs:
            array = feeds[spec.name]
            if not isinstance(array, np.ndarray):
                raise UserError(f"{self.path}: {spec.name} is a {type(array).__name__}, expected a numpy array {spec}")
            if array.dtype != spec.dtype:
                raise UserError(
                    f"{self.path}: {spec.name} is {array.dtype}, expected {spec.dtype}", f"use .astype({spec.dtype!r})"
                )
            fits = len(array.shape) == len(spec.shape)
            for size, want in zip(array.shape, spec.shape, strict=False):
                # A named dimension must be the same number wherever the name occurs; an unnamed one is free.
                expected = dynamic.setdefault(want, size) if isinstance(want, str) else want
                fits = fits and size > 0 and expected in (None, size)
            if not fits:
                raise UserError(f"{self.path}: {spec.name} has shape {list(array.shape)}, expected {spec}")
            checked[spec.name] = np.ascontiguousarray(array)
        return checked

    # -- images ---------------------------------------------------------------------------------------------------

    def logits(self, images: Any, *, finite: bool = True) -> np.ndarray:
        """The model's first output for images: files, PIL images or uint8 arrays.

        Any number of images goes through in runs of :attr:`batch_size`. A graph with a static batch always computes
        a whole one: the last run is filled up with zeros and their rows are dropped, so one image on a graph of batch 8
        costs what 8 cost. With a dynamic batch the last run is just shorter.

        Args:
            images: One image or an iterable of them; read lazily, one batch in memory at a time. An array is one image
                (uint8 [height, width, 3], or [height, width] for grey) or many (uint8 [image, height, width, 3]).
            finite: Refuse outputs that are not. False: the caller looks at them, with :meth:`check_finite`.

        Returns:
            float32 [image, output]; an FP16 output is widened.

        Raises:
            UserError: An image cannot be read, the file lacks preprocessing, an output is not finite, or the session is
                closed.
        """
        self._check_open()
        spec, preprocessing = self._image_input()
        rows = []
        for chunk in _chunks(_as_images(images), self.batch_size):
            batch = preprocessing.batch(chunk)
            missing = (self.static_batch or max(len(batch), self.minimum_batch)) - len(batch)
            if missing:
                batch = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)])
            outputs = self._run(self.check_feeds({spec.name: batch.astype(spec.dtype, copy=False)}))
            rows.append(np.asarray(outputs[0], np.float32)[: len(chunk)])
        if rows:
            outputs = np.concatenate(rows)
            if finite:
                self.check_finite(outputs)
            return outputs
        return np.zeros((0, *(size if isinstance(size, int) else 0 for size in self.outputs[0].shape[1:])), np.float32)

    def predict(self, images: Any, top: int = 5) -> list[Prediction]:
        """Labels (or, for a model without a classifier, the feature vector) for each image.

        Args:
            images: As in :meth:`logits`.
            top: How many classes to name per image; fewer when the model has fewer. Equal scores keep the order of
                the outputs.

        Returns:
            One prediction per image, in order. Classes without a name are called ``"class 17"``.

        Raises:
            UserError: As in :meth:`logits`; ``top`` is below 1.
        """
        if isinstance(top, bool) or not isinstance(top, (int, np.integer)) or top < 1:
            raise UserError(f"top is {top!r}, expected a whole number of at least 1")
        values = self.logits(images)
        if self.metadata.output == "features":
            return [Prediction(features=row) for row in values]
        if values.ndim != 2:
            raise UserError(f"{self.path}: {self.outputs[0]} is no list of logits per image", "use logits() or run()")
        predictions = []
        for row in softmax(values):
            order = np.argsort(-row, kind="stable")[:top]
            predictions.append(Prediction(tuple(Score(self.label_of(i), float(row[i]), int(i)) for i in order)))
        return predictions

    def check_finite(self, outputs: np.ndarray) -> None:
        """Refuse outputs [image, ...] of this model that hold NaN or infinity.

        Raises:
            UserError: It says for how many images they do, and what in the file explains it.
        """
        if not np.isfinite(outputs).all():
            file = self.path if self.path.suffix.lower() == ".onnx" else None
            check_finite(outputs, str(self.path), precision=self._precision(), file=file)

    def _precision(self) -> str | None:
        """What the weights are stored in, where that can be told."""
        if self.metadata.precision is not None or self.path.suffix.lower() != ".onnx":
            return self.metadata.precision
        from .onnx_file import read_onnx

        return read_onnx(self.path).precision

    def label_of(self, index: int) -> str:
        return self.classes[index] if self.classes is not None else f"class {index}"

    def _claim(self) -> None:
        """What lies in the inputs' place is of this thread from here on."""
        self._uploaded_by = threading.get_ident()

    def _check_claim(self) -> None:
        """Refuse a step on what another thread has put into the inputs' place; nobody's is fine."""
        if self._uploaded_by not in (None, threading.get_ident()):
            raise UserError(
                f"{self.path}: another thread has uploaded to this session since",
                "give each thread its own session, or call run(), which any thread may",
            )

    def _check_open(self) -> None:
        if self.closed:
            raise UserError(f"{self.path}: the session is closed", "open the file again")

    def _image_input(self) -> tuple[TensorSpec, Preprocessing]:
        """The one input that images go to, and how they get there."""
        if len(self.inputs) != 1 or len(self.inputs[0].shape) != 4:
            raise UserError(
                f"{self.path}: takes {', '.join(map(str, self.inputs))}, expected one [batch, 3, height, width]",
                "use run()",
            )
        if self.preprocessing is None:
            raise UserError(
                f"{self.path} does not say how images are prepared (no vpruner.preprocessing in its metadata)",
                f"write the file with {command('export')}, or in Python pass preprocessing={{'mean': ..., 'std': ..., "
                "'size': [h, w], 'interpolation': 'bicubic'} or use run()",
            )
        spec, preprocessing = self.inputs[0], self.preprocessing
        wanted = (3, *preprocessing.size)
        if any(isinstance(have, int) and have != want for have, want in zip(spec.shape[1:], wanted, strict=True)):
            raise UserError(f"{self.path}: preprocessing gives {list(wanted)} per image, the graph takes {spec}")
        return spec, preprocessing


def check_threads(threads: int | None) -> None:
    """Refuse what is no number of threads for this machine; None leaves it to the runtime."""
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise UserError(f"threads is {threads!r}, expected a whole number of at least 1, or None for the default")
    if threads > THREADS_PER_CORE * (cores := usable_cores()):
        raise UserError(
            f"threads is {threads}, this machine has {cores} usable cores",
            f"expected 1 to {THREADS_PER_CORE * cores}; the default is right for most models",
        )


def softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [image, class] probabilities of float [image, class] logits."""
    values = logits.astype(np.float64)
    values = np.exp(values - values.max(axis=-1, keepdims=True))
    return values / values.sum(axis=-1, keepdims=True)


def _as_images(images: Any) -> Iterator[Any]:
    """One image alone is a batch of one: iterating a path would give its letters."""
    from PIL import Image as pillow

    single = isinstance(images, (str, PathLike, pillow.Image))
    if isinstance(images, np.ndarray) and not (images.ndim == 1 and images.dtype.kind in "OU"):
        # Never guessed: [height, width, 4] or [3, height, width] would pass for many grey images.
        single = images.ndim == 2 or (images.ndim == 3 and images.shape[2] == 3)
        many = images.ndim == 4 and images.shape[3] == 3
        if images.dtype != np.uint8 or not (single or many):
            raise UserError(
                f"the images are an array of {images.dtype} {list(images.shape)}",
                "expected uint8 [height, width], [height, width, 3] or [image, height, width, 3]",
            )
    if single:
        images = [images]
    if not isinstance(images, Iterable):
        raise UserError(f"images is a {type(images).__name__}", "expected a list of paths, PIL images or uint8 arrays")
    return iter(images)


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(islice(items, size)):
        yield chunk
