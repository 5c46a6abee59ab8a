"""What this machine can do at most, measured in the same rounds as what is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.timing import Budget, Stats, Timer, Variant, measure
from persimmon_fast import _C

_PART = 512 << 20  # bytes that one call reads


@dataclass(frozen=True)
class Limit:
    """A program that does nothing but read memory or multiply matrices.

    Args:
        name: of the limit.
        variant: one call of it.
        work: bytes or flops of a call.
    """

    name: str
    variant: Variant
    work: float

    def rate(self, seconds: list[float]) -> Stats:
        """Bytes or flops per second."""
        return Stats.of([self.work / s for s in seconds])


def read_limit(block: Callable[[], Tensor]) -> Limit:
    """Reading part after part of the memory that block() returns. The part stays the same size while the block may
    grow; with a block larger than the last-level cache, each part has left it before it is read again."""
    step = 4096 * torch.get_num_threads()  # read_memory rounds down to such steps
    part = min(block().nbytes, _PART) // step * step

    def read(call: int) -> object:
        memory = block()
        start = call % (memory.nbytes // part) * part
        if memory.device.type == "cpu":
            return _C.read_memory(memory.data_ptr() + start, part)
        return memory.view(torch.uint8)[start : start + part].view(torch.float32).sum()

    return Limit("read bandwidth", read, part)


def copy_limit(block: Callable[[], Tensor]) -> Limit:
    """Copying one part of the memory that block() returns to another, as read_limit reads: bytes read and written. What
    binds a GPU kernel that writes as much as it reads."""
    part = min(block().nbytes // 2, _PART) // 4096 * 4096

    def copy(call: int) -> object:
        memory = block().view(torch.uint8)
        parts = memory.nbytes // part
        source, target = (2 * call % parts * part, (2 * call + 1) % parts * part)
        return memory[target : target + part].copy_(memory[source : source + part])

    return Limit("copy bandwidth", copy, 2.0 * part)


def matmul_limit(dtype: torch.dtype, device: torch.device, size: int | None = None) -> Limit:
    """torch.mm of square matrices of normal numbers (zeros would draw less power and run faster on a GPU).

    size: rows, None: 8,192 on a GPU; on a CPU 4,096, in fp32 2,048 (a call of about 0.1 s).
    """
    if size is None:
        size = 8192 if device.type == "cuda" else 4096 if dtype != torch.float32 else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Limit("matmul peak", lambda call: torch.mm(a, b, out=out), 2.0 * size**3)


@dataclass(frozen=True)
class Limits:
    """The limits, with the rates of reading and multiplying at the start of the run, which decide what binds a case.

    copy: on GPUs. samples: by limit, in bytes or flops per second.
    """

    read: Limit
    matmul: Limit
    copy: Limit | None
    bytes_per_second: float
    flops_per_second: float
    samples: dict[str, list[float]]


def measure_limits(
    block: Callable[[], Tensor], dtype: torch.dtype, timer: Timer, budget: Budget, matmul_size: int | None = None
) -> Limits:
    device = block().device
    read, matmul = read_limit(block), matmul_limit(dtype, device, matmul_size)
    copy = copy_limit(block) if device.type == "cuda" else None
    limits = [limit for limit in (read, matmul, copy) if limit is not None]
    seconds = measure({limit.name: limit.variant for limit in limits}, timer, budget)
    samples = {limit.name: [limit.work / s for s in seconds[limit.name]] for limit in limits}
    return Limits(
        read, matmul, copy, Stats.of(samples[read.name]).median, Stats.of(samples[matmul.name]).median, samples
    )
