"""Chains: a real model in which every block does the same work, for measuring what a block costs.

A chain is a dense graph cut to its first n blocks. In each K tokens are read, Q attend and M pass the MLP, exactly as
:mod:`vpruner.export.fold` folds it; the rest passes by, so that the next block finds its tokens. What a chain computes
is of no use; its time is. :mod:`vpruner.runtime.table.measure` says which chains are measured and what follows from
them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ..core.errors import UserError
from ..core.metadata import REQUIRED, ModelMetadata
from ..core.plan import KINDS, TokenPlan
from ..core.text import option
from ..core.timing import random_images
from ..export.files import save_model
from ..export.fold import fold_file
from ..export.follow import Block, Followed, fold, follow
from ..export.graph import already_pruned, open_graph
from ..export.passes.edit import add_constant
from ..runtime import cuda
from ..runtime.build import BuildOptions
from ..runtime.onnx_file import read_onnx
from ..runtime.opening import open_timed
from ..runtime.profile_trt import EngineRun
from ..runtime.session import Session
from ..runtime.table.graphs import Chain, Graphs
from ..runtime.trt import TrtSession
from .engines import build_engine


def cut_to_blocks(followed: Followed, blocks: int) -> Followed:
    """The first ``blocks`` blocks: the head reads what the last of them gives, and a second output, the mean of all
    tokens, keeps every token alive to the end."""
    if not 1 <= blocks <= len(followed.blocks):
        raise ValueError(f"{blocks} of {len(followed.blocks)} blocks")
    followed = followed.copy()
    last, left = (_output(followed.blocks[index]) for index in (-1, blocks - 1))
    if last is not left:
        ir.convenience.replace_all_uses_with(last, left)
    graph = followed.model.graph
    tokens = add_constant(graph, "vpruner.chain.axes", np.array([1]))
    given = ([left, tokens], {}) if followed.model.opset_imports[""] >= 18 else ([left], {"axes": [1]})
    mean = ir.node("ReduceMean", given[0], {**given[1], "keepdims": 0})
    mean.outputs[0].name, mean.outputs[0].dtype = "vpruner.chain", left.dtype
    graph.append(mean)
    graph.outputs.append(mean.outputs[0])
    passes.TopologicalSortPass()(followed.model)
    passes.RemoveUnusedNodesPass()(followed.model)
    return follow(followed.model)


def _output(block: Block) -> ir.Value:
    return (block.mlp or block.attention)[-1].add.outputs[0]


def make_chain(followed: Followed, chain: Chain) -> ir.Model:
    """A model of as many blocks as a chain; ``followed`` stays as it is.

    Raises:
        ValueError: The chain is longer than the model, or names more tokens than that has or fewer than enter the head.
    """
    prefix, tokens = followed.prefix, followed.prefix + followed.patches
    if chain.blocks != len(followed.blocks) or not max(1, prefix) <= chain.tokens <= tokens:
        raise ValueError(f"no {chain} of {tokens} tokens and {len(followed.blocks)} blocks")
    sets = {kind: [range(count - prefix) for count in row] for kind, row in zip(KINDS, chain.counts(), strict=True)}
    return fold(followed, SimpleNamespace(**sets, reads=range(chain.tokens - prefix)))


class _FoldedGraphs(Graphs):
    """Chains and pruned forms of one dense file; how a file is opened is for subclasses to say.

    Graphs are written into ``folder``, opened, and removed at once, so that there is never more than one on the disk.

    Args:
        dense: A file that ``vpruner export`` wrote.
        folder: A scratch folder.
        batch: Images per run; a file with a static batch has its own.
        seed: Of the images.

    Raises:
        UserError: The file cannot be read, or is pruned already.
    """

    def __init__(self, dense: str | os.PathLike, folder: Path, *, batch: int, seed: int):
        self.dense, self.folder, self.batch, self.seed = Path(dense), folder, batch, seed
        self._opened = open_graph(self.dense)
        props = self._opened.model.metadata_props
        metadata = ModelMetadata.from_props(props, self._opened.source, require=REQUIRED)
        if metadata.plan is not None:
            raise already_pruned(self._opened.source, metadata.plan, metadata.rule)
        self.name, self.geometry = metadata.model, metadata.geometry
        weights = [value.const_value for value in self._opened.model.graph.initializers.values()]
        self.weight_bytes = sum(tensor.nbytes for tensor in weights if tensor is not None)
        self.opset = self._opened.model.opset_imports[""]

    @contextmanager
    def chain(self, chain: Chain) -> Iterator[Callable[[], object]]:
        # A copy: every chain is made from the same graph.
        cut = cut_to_blocks(self._opened.followed(), chain.blocks)
        path = save_model(make_chain(cut, chain), self.folder / "chain.onnx")
        with self._open(path) as call:
            yield call

    @contextmanager
    def model(self, plan: TokenPlan | None) -> Iterator[Callable[[], object]]:
        path = self.dense
        if plan is not None:
            path = self.folder / "model.onnx"
            fold_file(self._opened, plan, path)
        with self._open(path) as call:
            yield call

    def _open(self, path: Path) -> AbstractContextManager[Callable[[], object]]:
        raise NotImplementedError

    def _images(self, session: Session) -> np.ndarray:
        """float [batch, channel, height, width], of the session's dtype.

        Raises:
            UserError: The file has another batch.
        """
        if session.static_batch not in (None, self.batch):
            raise UserError(
                f"{self.dense} runs at its own batch size {session.static_batch}, asked for {self.batch}",
                f"measure with {option('batch_size', session.static_batch)}, or export it again with "
                f"{option('batch_size', self.batch)}",
            )
        shape = (self.geometry.in_chans, *self.geometry.image_size)
        images = random_images(self.batch, shape, session.preprocessing, self.seed)
        return images.astype(session.inputs[0].dtype, copy=False)

    def _remove(self, path: Path) -> None:
        """What a runtime needs of a file it has read by now, but weights of their own file may be mapped, not read."""
        if path != self.dense:
            for part in self.folder.glob(f"{path.name}*"):
                part.unlink()


class OnnxGraphs(_FoldedGraphs):
    """Graphs opened in onnxruntime or OpenVINO: :class:`~vpruner.runtime.table.graphs.Graphs`.

    Args:
        dense, folder, batch, seed: The file, a scratch folder, images per run, and of the images.
        runtime, provider, threads, precision: As in :func:`~vpruner.runtime.opening.open_timed`.

    Raises:
        UserError: The file cannot be read, is pruned already, or has another batch.
    """

    def __init__(
        self,
        dense: str | os.PathLike,
        folder: Path,
        *,
        threads: int,
        batch: int = 1,
        runtime: str = "ort",
        provider: str = "cpu",
        precision: str | None = None,
        seed: int = 0,
    ):
        super().__init__(dense, folder, batch=batch, seed=seed)
        self._how = dict(runtime=runtime, provider=provider, threads=threads, precision=precision)
        with open_timed(self.dense, **self._how) as session:
            self._feeds = session.check_feeds({session.inputs[0].name: self._images(session)})
            self.about: dict[str, Any] = {
                "runtime": session.runtime,
                "provider": session.provider,
                "precision": session.precision,
                "threads": threads,
                "batch": batch,
                "opset": self.opset,
            }
            self.protocol: dict[str, Any] = {
                **session.protocol,
                "input": f"smooth random images, seed {seed}, the same for all",
            }

    @contextmanager
    def _open(self, path: Path) -> Iterator[Callable[[], object]]:
        with open_timed(path, **self._how) as session:
            self._remove(path)
            yield session.caller(self._feeds)


class TrtGraphs(_FoldedGraphs):
    """Graphs built into TensorRT engines and timed by the GPU's events: :class:`~vpruner.runtime.table.graphs.Graphs`.

    An engine is built for every graph, with the device's timing cache, so that only the first few builds take long.

    Args:
        dense, folder, batch, seed: As for :class:`OnnxGraphs`.
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        step: Multiples that kernels like: both edges of such steps are measured.

    Raises:
        UserError: The file cannot be read, is pruned already or has another batch; TensorRT, its driver or a GPU is
            missing.
    """

    own_time, opening_counts = True, True

    def __init__(
        self,
        dense: str | os.PathLike,
        folder: Path,
        *,
        batch: int = 1,
        precision: str = "fp16",
        step: int = 8,
        seed: int = 0,
    ):
        cuda.device_properties()
        super().__init__(dense, folder, batch=batch, seed=seed)
        self.precision, self.step = precision, step
        self.about: dict[str, Any] = {
            "runtime": "tensorrt",
            "provider": "cuda",
            "precision": precision,
            "threads": 1,
            "batch": batch,
            "opset": self.opset,
        }
        self.protocol: dict[str, Any] = {
            "clock": "CUDA events around one run; input on the GPU, no copies, CUDA graph where it can be recorded",
            "input": f"smooth random images, seed {seed}, the same for all",
            "step": step,
        }

    @contextmanager
    def _open(self, path: Path) -> Iterator[Callable[[], object]]:
        engine = self.folder / "graph.engine"
        open_batch = any(not isinstance(size, int) for one in read_onnx(path).inputs for size in one.shape[:1])
        options = BuildOptions(
            precision=self.precision, batch=self.batch if open_batch else None, layer_details=False, check=False
        )
        build_engine(path, engine, options)
        self._remove(path)
        with TrtSession(engine, batch_size=self.batch) as session:
            for part in self.folder.glob(f"{engine.name}*"):
                part.unlink()
            run = EngineRun(session, self._images(session))
            yield run.on_gpu
