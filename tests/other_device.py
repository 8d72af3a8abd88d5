"""A GPU for machines without one: the CPU computes, and what a GPU would refuse is refused.

    with other_device(monkeypatch, "cuda:0") as device:
        move(adapter, device)
        ...

A tensor is on the device if it was moved there, made there, or computed from one that is. Refused are operations on
tensors of both sides (but for tensors of no dimensions, and what may index), reading one as NumPy's, and on ``"mps"``
any float64. Everything in between says what it would say there: ``tensor.device``, ``tensor.to``, ``device=``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves, tree_map

_CPU = torch.device("cpu")
_DEVICE, _SET_DATA = Tensor.device.__get__, Tensor.data.__set__
#: The first argument decides where the result is; others may be on the CPU.
_MIXED = {Tensor.__getitem__, Tensor.__setitem__}
#: Of both sides in any order.
_BOTH = {Tensor.copy_, torch._has_compatible_shallow_copy_type}
_AS_NUMPY = {Tensor.numpy, Tensor.__array__}
_SAME = {Tensor.to, Tensor.cpu, Tensor.type_as}


class OtherDevice(TorchFunctionMode):
    def __init__(self, name: str):
        super().__init__()
        self.device = torch.device(name)
        self.operations = 0

    def is_there(self, x: Tensor) -> bool:
        while True:
            found = x.__dict__.get("_elsewhere")
            if found is not None:
                return found
            if not torch._C._functorch.is_functorch_wrapped_tensor(x):
                return False
            x = torch._C._functorch.get_unwrapped(x)

    def _marked(self, x: Any, there: bool) -> Any:
        if isinstance(x, Tensor):
            if there and self.device.type == "mps" and x.dtype == torch.float64:
                raise TypeError("cannot convert a tensor to float64 on mps")
            x.__dict__["_elsewhere"] = there
        return x

    def _is_other(self, x: Any) -> bool:
        return isinstance(x, (torch.device, str)) and str(x) in (str(self.device), self.device.type)

    def marked_vmap(self, vmap):
        """What it takes apart and puts together again lies where it did, which no operation says."""

        def marked(function, *options, **named):
            def run(*tensors):
                found = vmap(function, *options, **named)(*tensors)
                there = any(self.is_there(x) for x in tree_leaves(tensors) if isinstance(x, Tensor))
                return tree_map(lambda x: self._marked(x, there), found)

            return run

        return marked

    def exporting(self, export):
        """PyTorch's exporter, which looks through what is between; models are exported on the CPU."""

        def exported(model, *arguments, **options):
            if any(map(self.is_there, (*model.parameters(), *model.buffers()))):
                raise RuntimeError(f"a model on {self.device} is exported")
            with _pop_mode_temporarily():
                return export(model, *arguments, **options)

        return exported

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == _DEVICE:
            return self.device if self.is_there(args[0]) else _CPU
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(map(self.is_there, tensors))
        if func in _AS_NUMPY and there:
            raise TypeError(f"cannot convert a tensor on {self.device} to numpy")
        if func == _SET_DATA:
            func(*args)
            self._marked(args[0], self.is_there(args[1]))
            return None
        if func in _SAME:
            return self._moved(func, args, kwargs)
        named = kwargs.get("device")
        if named is not None:
            there, kwargs["device"] = self._is_other(named), _CPU
        if func in _MIXED | _BOTH:
            there = self.is_there(args[0])
        sides = {self.is_there(x) for x in tensors if x.dim()}
        if len(sides) > 1 and not (func in _BOTH or (func in _MIXED and there)):
            raise RuntimeError(f"{getattr(func, '__name__', func)}: expected all tensors to be on the same device")
        self.operations += there
        found = func(*args, **kwargs)
        return tree_map(lambda x: self._marked(x, there), found) if there else found

    def _moved(self, func, args, kwargs):
        x, *rest = args
        there = self.is_there(x)
        target = _CPU if func is Tensor.cpu else kwargs.get("device", rest[0] if rest else None)
        if isinstance(target, Tensor):
            goes = self.is_there(target)
        elif isinstance(target, (torch.device, str)):
            goes = self._is_other(target)
        else:
            goes = there
        rest = [_CPU if isinstance(one, (torch.device, str)) else one for one in rest]
        kwargs = {name: _CPU if name == "device" else value for name, value in kwargs.items()}
        found = func(x, *rest, **kwargs)
        if found is x and goes != there:
            found = x.clone()
        return self._marked(found, goes) if found is not x else x


@contextmanager
def other_device(monkeypatch, name: str) -> Iterator[OtherDevice]:
    """Make the CPU act as the device of that name until the context is left."""
    with monkeypatch.context() as patched:
        for called, answer in {
            "mem_get_info": (1 << 30, 1 << 30),
            "memory_reserved": 0,
            "memory_allocated": 0,
            "get_device_name": "Test GPU",
            "is_bf16_supported": False,
            "empty_cache": None,
        }.items():
            patched.setattr(torch.cuda, called, lambda *_, answer=answer, **options: answer)
        mode = OtherDevice(name)
        for module in (torch, torch.func):
            patched.setattr(module, "vmap", mode.marked_vmap(module.vmap))
        patched.setattr(torch.onnx, "export", mode.exporting(torch.onnx.export))
        with mode:
            yield mode
