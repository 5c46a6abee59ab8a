"""Huge pages for what a decode step streams.

A processor finds a page of memory in a table that holds a few thousand of them. With pages of 4 KiB that covers less
than one weight matrix: every row costs a walk through the page tables, and the hardware's prefetching stops at each
page. With pages of 2 MiB it does not. Linux gives them to who asks (transparent huge pages, mode "madvise" or
"always"), for fresh memory everywhere and for mapped files where the file system can (ext4 from Linux 6.16, xfs).
Asking costs nothing where there are none.

What it gains: docs/cpu.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from persimmon_fast import _C

_MIN_BYTES = 4 << 20  # less than two huge pages: none may fit


def use_huge_pages(tensor: Tensor) -> Tensor:
    """Asks for huge pages under a dense tensor on the CPU, before its memory is touched; returns it. Does nothing to
    small tensors and on other devices."""
    if tensor.device.type == "cpu" and tensor.nbytes >= _MIN_BYTES:
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def empty_huge(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """torch.empty in huge pages, where there are any."""
    return use_huge_pages(torch.empty(tuple(shape), dtype=dtype, device=device))
