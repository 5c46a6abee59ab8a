"""Huge pages for what a decode step streams.

A processor finds a page of memory in a table that holds a few thousand of them. With pages of 4 KiB that covers less
than one weight matrix: every row costs a walk through the page tables, and the hardware's prefetching stops at each
page. With pages of 2 MiB it does not. Linux gives them to who asks (transparent huge pages, mode "madvise" or
"always"), for fresh memory everywhere and for mapped files where the file system can (ext4 from Linux 6.16, xfs).
Asking costs nothing where there are none.

What it gains: docs/cpu.md.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_MIN_BYTES = 4 << 20  # less than two huge pages: none may fit


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C function; None where the system has no such advice."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def use_huge_pages(tensor: Tensor) -> Tensor:
    """Asks for huge pages under a dense tensor on the CPU, before its memory is touched; returns it. Does nothing to
    small tensors and on other devices. A wish: what the system answers is not looked at."""
    madvise = _madvise()
    if madvise is not None and tensor.device.type == "cpu" and tensor.nbytes >= _MIN_BYTES:
        begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(begin, tensor.data_ptr() + tensor.nbytes - begin, mmap.MADV_HUGEPAGE)
    return tensor


def empty_huge(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """torch.empty in huge pages, where there are any."""
    return use_huge_pages(torch.empty(tuple(shape), dtype=dtype, device=device))


def to_neuron_major(down_weight: Tensor) -> Tensor:
    """The same [hidden_size, intermediate_size] matrix, lying in memory as one row per neuron (strides
    (1, hidden_size)); the tensor itself where it lies so already."""
    rows = down_weight.t()
    if rows.is_contiguous():
        return down_weight
    return empty_huge(rows.shape, rows.dtype, rows.device).copy_(rows).t()
