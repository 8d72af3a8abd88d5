"""Where PyTorch computes: which device, that it works, and how it computes there.

A model is moved once, where it is opened. Everything after that goes by where its parameters are. What depends on
chance is drawn on the CPU, from NumPy, and moved: the same seed draws the same numbers on every device.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.errors import UserError
from ..core.progress import remark
from ..core.specs import check_device
from ..core.text import first_line, option
from .ranks import launched

#: What cuBLAS needs to give the same bits each time; it is read when cuBLAS is used for the first time.
_CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
#: Channels of a model from which products of bfloat16 save time on a CPU that has them.
HALF_FROM = 192


def resolve(name: str) -> torch.device:
    """The device of that name, on which a product was computed.

    Args:
        name: As of :attr:`~vpruner.core.specs.ModelSpec.device`. ``"auto"`` is the GPU that works, and says which; else
            the CPU.

    Raises:
        UserError: There is no such device, or it does not work; says why.
    """
    check_device(name)
    if name == "cpu":
        return torch.device("cpu")
    if name == "auto":
        return _automatic()
    reason = _missing(name) or _broken(torch.device(name))
    if reason:
        raise UserError(f"{option('device', name)}: {reason}", f"leave it out, or give {option('device', 'cpu')}")
    return _numbered(torch.device(name))


def _automatic() -> torch.device:
    for name in ("cuda", "mps"):
        if _missing(name):
            continue
        device = torch.device(name)
        if reason := _broken(device):
            remark(f"{described(device)} is not used: {reason}")
        else:
            remark(f"PyTorch computes on {described(device)}; to change that: {option('device', 'cpu')}")
            return _numbered(device)
    return torch.device("cpu")


def _numbered(device: torch.device) -> torch.device:
    """As tensors that lie there have it. Processes that were started together have GPUs of their own, if there are."""
    if device != torch.device("cuda"):
        return device
    together = launched()
    number = together.local % torch.cuda.device_count() if together.size > 1 else torch.cuda.current_device()
    return torch.device("cuda", number)


def described(device: torch.device) -> str:
    """What rows and messages call it: ``"cpu"``, ``"cuda (NVIDIA H200)"``."""
    if device.type != "cuda":
        return device.type
    try:
        return f"cuda ({torch.cuda.get_device_name(device)})"
    except (RuntimeError, AssertionError):  # Of a driver that is there and does not answer.
        return "cuda"


def _missing(name: str) -> str:
    """Why there is no such device; empty where there is one."""
    if name == "mps":
        mps = torch.backends.mps
        built = "this PyTorch is built without it" if not mps.is_built() else "this machine has no GPU of Apple's"
        return "" if mps.is_available() else built
    if not torch.backends.cuda.is_built():
        return "this PyTorch is built without CUDA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A driver that is too old is said below.
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return _no_gpu()
    number = int(name.partition(":")[2] or 0)
    if number < count:
        return ""
    return f"there {'is 1 GPU, cuda:0' if count == 1 else f'are {count} GPUs, cuda:0 to cuda:{count - 1}'}"


def _no_gpu() -> str:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error).partition(". ")[0]
    return "CUDA finds no GPU"


def _broken(device: torch.device) -> str:
    """Why a product cannot be computed there; empty where it can."""
    if device.type == "cuda":
        os.environ.setdefault(*_CUBLAS)
    try:
        ones = torch.ones(8, 8, device=device)
        return "" if float((ones @ ones).sum()) == 8**3 else "it computes a wrong product"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return first_line(error)


# -- moving -----------------------------------------------------------------------------------------------------------


class Moved(Protocol):
    """What is moved here: an :class:`~vpruner.prune.backbones.adapter.Adapter`."""

    @property
    def model(self) -> nn.Module: ...

    def moved(self, where: Mapping[int, Tensor]) -> None: ...


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def name_of(device: torch.device) -> str:
    """As :func:`resolve` takes it."""
    return device.type if device.index is None or device.type != "cuda" else str(device)


def move(adapter: Moved, device: torch.device) -> None:
    """Move a model for good.

    Raises:
        UserError: It does not fit there.
    """
    try:
        data = {tensor: tensor.data.to(device) for tensor in _tensors(adapter.model, device)}
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise out_of_memory("the model does not fit", device) from error
        raise
    _exchange(adapter, data)


@contextmanager
def on_cpu(adapter: Moved | nn.Module) -> Iterator[None]:
    """The model on the CPU until the context is left, as it is exported and compared with graphs; then its own tensors
    are back, where they were. No form of it may be applied yet."""
    model = adapter if isinstance(adapter, nn.Module) else adapter.model
    before = {tensor: tensor.data for tensor in _tensors(model, torch.device("cpu"))}
    _exchange(adapter, {tensor: data.cpu() for tensor, data in before.items()})
    try:
        yield
    finally:
        _exchange(adapter, before)


def _tensors(model: nn.Module, device: torch.device) -> list[Tensor]:
    """Parameters and buffers that are elsewhere."""
    return [tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.device != device]


def _exchange(adapter: Moved | nn.Module, data: Mapping[Tensor, Tensor]) -> None:
    where = {tensor.data_ptr(): new for tensor, new in data.items()}
    for tensor, new in data.items():
        tensor.data = new
    if where and not isinstance(adapter, nn.Module):
        adapter.moved(where)


# -- how a GPU computes -----------------------------------------------------------------------------------------------


@contextmanager
def computing(model: nn.Module) -> Iterator[None]:
    """Until the context is left, ``model`` computes so that the same seed gives the same plan; the CPU does so anyway.

    On CUDA products of float32 are of float32, not of TF32, which has the 11 bits of float16: convolutions have it by
    default. Where there is an algorithm that adds up in the same order each time, it is taken.

    Raises:
        UserError: Memory runs out where no smaller batches help.
    """
    device = device_of(model)
    try:
        with _exactly() if device.type == "cuda" else nullcontext():
            yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory("memory ran out", device) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: PyTorch has a class for that of CUDA alone."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = ("can't allocate memory", "not enough memory", "out of memory", "cublas_status_alloc_failed")
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in said)


def out_of_memory(problem: str, device: torch.device) -> UserError:
    hint = "end other programs that use it"
    if device.type != "cpu":
        hint += f", or give {option('device', 'cpu')}"
    return UserError(f"{problem} on {described(device)}", hint)


@contextmanager
def _exactly() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as undo, warnings.catch_warnings():
        # Said of what has none, such as sums along an axis: a user can do nothing about it.
        warnings.filterwarnings("ignore", ".*deterministic.*", UserWarning)
        for part in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
            undo.callback(setattr, part, "fp32_precision", part.fp32_precision)
            part.fp32_precision = "ieee"
        undo.callback(torch.use_deterministic_algorithms, before[0], warn_only=before[1])
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield


def same_gradients(device: torch.device) -> AbstractContextManager[None]:
    """Attention whose gradients are the same each time: on CUDA the fused kernels add them up in any order."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def half_statistics(device: torch.device, width: int) -> AbstractContextManager[None]:
    """bfloat16 for the products of a forward pass whose gradients are summed up over many images.

    Only where a GPU computes it itself, and as :func:`half_forward` has it. What it changes of a plan is at most a
    quarter of what another choice of images does (``benchmarks/half_statistics.py``, in docs/scale.md).
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    return half_forward(device, width)


def half_forward(device: torch.device, width: int) -> AbstractContextManager[None]:
    """bfloat16 for the products of forward passes that plans are only learned from: on CPUs that save time so.

    Args:
        width: Channels of the model's stream.
    """
    if not saves_time(device, width):
        return nullcontext()
    # Weights are exchanged meanwhile: a cache would keep those of before.
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


@contextmanager
def half_sums(saves: bool) -> Iterator[None]:
    """Products of float32 whose factors are rounded to bfloat16, and which are added up in float32.

    Args:
        saves: What :func:`saves_time` says; where it does not, within autocast too, products are of float32.
    """
    products = torch.backends.mkldnn.matmul if saves else None
    before = products and products.fp32_precision
    try:
        if saves:
            products.fp32_precision = "bf16"
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        if saves:
            products.fp32_precision = before


def saves_time(device: torch.device, width: int) -> bool:
    """Whether products of bfloat16 take a third of the time or less: on CPUs with AMX, those of wide models."""
    return device.type == "cpu" and width >= HALF_FROM and _has_amx()


@cache
def _has_amx() -> bool:
    # PyTorch before 2.11 does not say.
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))
