"""PyTorch's own count of operations, which closed forms are compared with."""

import contextlib

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextlib.contextmanager
def flop_counter():
    """A ``FlopCounterMode`` under which attention is two matrix products.

    Which of the fused attention kernels are counted depends on the version of PyTorch: that of the CPU is not by 2.14.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter
