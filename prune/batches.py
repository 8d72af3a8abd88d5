"""How many images are run at once, and what happens where they do not fit.

No result depends on it but by rounding: what is learned are sums over images, each taken by itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..core.environment import available_memory
from ..core.geometry import Geometry
from ..core.progress import remark
from ..core.text import counted
from . import ranks
from .backbones.adapter import Adapter, BlockAdapter
from .device import described, device_of, half_forward, is_out_of_memory, out_of_memory

#: Activations of a batch on the CPU, in bytes: larger batches only cost memory.
CPU_BYTES = 3 << 29
#: Share of the free memory that the activations of a batch may take; the estimate of them is rough.
FREE_SHARE = 0.5
#: Images of a batch at most.
MOST = 128

_Found = TypeVar("_Found")
#: Key of the chunks of a refit, beside whether gradients are taken.
_REFIT = "refit"
#: Model -> whether gradients are taken, or a refit -> images of a batch at most, where more did not fit.
_FITTED: WeakKeyDictionary[nn.Module, dict[bool | str, int]] = WeakKeyDictionary()
#: Model -> images of a chunk of the refit that is going on.
_CHUNKS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def activation_bytes(geometry: Geometry, *, backward: bool = False) -> int:
    """Rough upper bound of the memory one image takes on its way through the model, in bytes (float32)."""
    tokens, hidden = geometry.tokens, geometry.mlp_macs // (2 * geometry.embed_dim)
    block = 4 * (tokens * (8 * geometry.embed_dim + 2 * hidden) + 3 * geometry.num_heads * tokens**2)
    return block * (geometry.depth if backward else 1)


def batch_size_for(
    geometry: Geometry, *, backward: bool = False, memory_bytes: int = CPU_BYTES, most: int = MOST
) -> int:
    """Images per batch such that activations stay within ``memory_bytes``."""
    return max(1, min(most, memory_bytes // activation_bytes(geometry, backward=backward)))


def images_at_once(adapter: Adapter, *, backward: bool = False, most: int = MOST) -> int:
    """Images per batch of a model where it is: by the free memory there, and by what did not fit before.

    Args:
        backward: Whether gradients are taken, for which activations of all blocks are kept.
    """
    size = batch_size_for(
        adapter.geometry, backward=backward, memory_bytes=_bytes_for(device_of(adapter.model)), most=most
    )
    return min(size, _FITTED.get(adapter.model, {}).get(backward, size))


def _bytes_for(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # PyTorch holds on to memory that it does not need any more.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(FREE_SHARE * (free + held))
    free = available_memory()
    return CPU_BYTES if free is None else min(CPU_BYTES, int(FREE_SHARE * free))


def in_batches(
    model: nn.Module, batches: Iterable[Any], step: Callable[[Any], _Found], *, backward: bool = False
) -> Iterator[_Found]:
    """What ``step`` gives for each batch, in order. One that does not fit into memory is given to it again in halves,
    and so are those that follow, here and later.

    Args:
        model: What is run.
        batches: Each something with a length that can be sliced, or a tuple of such things and of None.
        step: Nothing of a call that fails may be left.
        backward: As of :func:`images_at_once`.

    Raises:
        UserError: Not even one image fits.
    """
    for batch in batches:
        start, count = 0, len(batch[0] if isinstance(batch, tuple) else batch)
        while start < count:
            size = min(count - start, _FITTED.get(model, {}).get(backward, count))
            try:
                found = step(batch if size == count else _part(batch, slice(start, start + size)))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                yield found
                start += size
                continue
            # Out of the handler: the error holds the frames that hold the memory.
            _halve(model, size, backward)


def chunk_of(model: nn.Module, size: int) -> int:
    """``size`` images for a chunk of a refit, or as many as fitted into memory before."""
    _CHUNKS[model] = size = min(size, _FITTED.get(model, {}).get(_REFIT, size))
    return size


def refitted(
    model: nn.Module, refit: Callable[[Callable[[int], None]], _Found], on_step: Callable[[int], None]
) -> _Found:
    """What ``refit`` finds. Where it does not fit into memory, it begins again with chunks of half as many images, and
    so do those that follow. Chunks are dealt to folds, so that ridges may come out differently then. Of several
    processes all would have to begin again: there it is an error.

    Args:
        refit: Called with what to call after each step.
        on_step: Called with 1 after each step that no refit before had reached.

    Raises:
        UserError: Not even one image fits.
    """
    reached = 0
    while True:
        done = 0

        def step(count: int) -> None:
            nonlocal done, reached
            done += count
            if done > reached:
                on_step(done - reached)
                reached = done

        try:
            return refit(step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or ranks.world().size > 1:
                raise
        # Out of the handler: the error holds the frames that hold the memory.
        _halve(model, _CHUNKS[model], _REFIT)


def halved(adapter: Adapter, wanted: bool = True) -> AbstractContextManager[None]:
    """Forward passes of timm blocks with products of bfloat16, if ``wanted`` and where they save time."""
    if not (wanted and isinstance(adapter, BlockAdapter)):
        return nullcontext()
    return half_forward(device_of(adapter.model), adapter.geometry.embed_dim)


def outputs_of(
    model: nn.Module, batches: Iterable[Tensor], run: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Tensor]:
    """float32 [image, ...] on the CPU, of each batch [image, channel, height, width], which may lie anywhere.

    Args:
        run: A form of ``model``; None: the model as it is.
    """
    device, form = device_of(model), model if run is None else run
    return in_batches(model, batches, lambda images: form(images.to(device)).float().cpu())


def _part(batch: Any, part: slice) -> Any:
    if isinstance(batch, tuple):
        return tuple(None if one is None else one[part] for one in batch)
    return batch[part]


def _halve(model: nn.Module, size: int, key: bool | str) -> None:
    device = device_of(model)
    if size == 1:
        raise out_of_memory("one image and the model do not fit into memory", device)
    fitted = _FITTED.setdefault(model, {})
    fitted[key] = (size + 1) // 2
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    what = {True: "with gradients", False: "without gradients", _REFIT: "in the refit"}[key]
    remark(
        f"{counted(size, 'image')} at once did not fit into the memory of {described(device)}: "
        f"{fitted[key]} are run {what} from now on"
    )
