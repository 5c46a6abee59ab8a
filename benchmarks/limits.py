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
    """Both limits, with their rates at the start of the run, which decide which of them binds a case.

    samples: by limit, in bytes or flops per second.
    """

    read: Limit
    matmul: Limit
    bytes_per_second: float
    flops_per_second: float
    samples: dict[str, list[float]]


def measure_limits(
    block: Callable[[], Tensor], dtype: torch.dtype, timer: Timer, budget: Budget, matmul_size: int | None = None
) -> Limits:
    read, matmul = read_limit(block), matmul_limit(dtype, block().device, matmul_size)
    seconds = measure({limit.name: limit.variant for limit in (read, matmul)}, timer, budget)
    samples = {limit.name: [limit.work / s for s in seconds[limit.name]] for limit in (read, matmul)}
    return Limits(read, matmul, Stats.of(samples[read.name]).median, Stats.of(samples[matmul.name]).median, samples)
