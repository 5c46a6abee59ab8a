"""What a benchmark case is, the shapes it comes in, and the memory its weights come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.counts import Counts
from persimmon_fast.memory import empty_huge

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model, and the row counts and contexts at which its ops are measured."""

    name: str
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    head_dim: int = 64
    rotary_dim: int = 32
    rope_theta: float = 25000.0
    eps: float = 1e-5
    decode_rows: tuple[int, ...] = (1, 4, 16)
    prefill_rows: tuple[int, ...] = (512, 2048)
    contexts: tuple[int, ...] = (2048, 16384)


PERSIMMON_8B = Shapes("Persimmon-8B", 4096, 64, 16384, 262144)
SMALL = Shapes("shipped small model", 256, 4, 1024, 4096, contexts=(256, 1024), prefill_rows=(128, 512))


@dataclass(frozen=True)
class Call:
    """A function and one set of arguments per copy of the weights; call number i uses set i modulo their number."""

    function: Callable[..., Any]
    arguments: Sequence[tuple[Any, ...]]

    def __call__(self, index: int) -> Any:
        return self.function(*self.arguments[index % len(self.arguments)])


@dataclass
class Prepared:
    """A case with its memory: everything that can be timed.

    Args:
        ours: the function of `persimmon_fast.ops`.
        reference: that of `persimmon_fast.reference`.
        plain: the best that plain torch offers in this dtype, by description; the fastest counts.
        counts: of one call.
        dtype: of the weights.
        working_set: bytes that pass before a call meets the same memory again.
        result: what of the outputs must agree between ours and the others (close up to rounding), None: nothing.
        notes: measured facts to report, such as the share of zeros.
    """

    ours: Call
    reference: Call
    plain: dict[str, Call]
    counts: Counts
    dtype: torch.dtype
    working_set: int
    result: Callable[[Any], Tensor] | None = lambda out: out
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Args:
        op: its name in `persimmon_fast.ops`.
        label: the shape in words.
        phase: decode reads weights for few rows, prefill multiplies many.
        shape: sizes by name, for the JSON.
        prepare: allocates in a workspace.
        quick: whether `--quick` runs it.
    """

    op: str
    label: str
    phase: Literal["decode", "prefill"]
    shape: Mapping[str, float]
    prepare: Callable[[Workspace], Prepared]
    quick: bool = False


class Workspace:
    """One block of random memory from which all weights and caches are cut.

    Copies of a layer's weights lie one after the other in it, as many as make the working set: a benchmark that
    reuses one copy would read it from the last-level cache, which decoding a whole model never does.

    Args:
        device, dtype: of the weights.
        working_set: bytes to rotate over; a layer larger than this has one copy.
    """

    STD = 0.02  # of the weights; that of the model's initialisation
    _POOL = 8_388_593  # prime: the pattern never lines up with rows, so no two rows are equal
    _ALIGN = 4096  # bytes
    MAX_COPIES = 1024

    def __init__(self, device: torch.device, dtype: torch.dtype, working_set: int) -> None:
        self.device, self.dtype = device, dtype
        self.itemsize = dtype.itemsize
        self.working_set = working_set
        self._generator = torch.Generator().manual_seed(0)
        self._block = torch.empty(0, dtype=dtype, device=device)
        self.block(working_set)

    def block(self, num_bytes: int = 0) -> Tensor:
        """The block, of at least num_bytes bytes; it is replaced where it must grow, so that tensors cut from it
        earlier keep the old one alive: drop a case before the next."""
        wanted = math.ceil(num_bytes / self.itemsize)
        if self._block.numel() < wanted:
            self._block = torch.empty(0, dtype=self.dtype, device=self.device)  # free before allocating
            pool = torch.randn(min(self._POOL, wanted), generator=self._generator) * self.STD
            pool = pool.to(self.device, self.dtype)
            self._block = empty_huge((wanted,), self.dtype, self.device)
            for start in range(0, wanted, pool.numel()):
                self._block[start : start + pool.numel()] = pool[: wanted - start]
        return self._block

    def rotate(self, *shapes: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
        """Copies of a set of tensors of these shapes, none overlapping another, until the working set is full."""
        align = self._ALIGN // self.itemsize
        sizes = [-(-math.prod(shape) // align) * align for shape in shapes]
        per_copy = sum(sizes)
        copies = min(self.MAX_COPIES, max(1, -(-self.working_set // (per_copy * self.itemsize))))
        block = self.block(copies * per_copy * self.itemsize)
        sets = []
        for copy in range(copies):
            start = copy * per_copy
            tensors = []
            for shape, size in zip(shapes, sizes, strict=True):
                tensors.append(block[start : start + math.prod(shape)].view(shape))
                start += size
            sets.append(tuple(tensors))
        return sets

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Fresh normal numbers outside the block: activations, which a real step finds in the cache."""
        return (torch.randn(*shape, generator=self._generator) * scale).to(self.device, self.dtype)

    def cos_sin(self, shapes: Shapes, num_positions: int) -> Tensor:
        """[num_positions, rotary_dim] fp32: cosines, then sines."""
        half = shapes.rotary_dim // 2
        frequencies = shapes.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(num_positions, dtype=torch.float64).unsqueeze(1) * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1).float().to(self.device)

    def arange(self, count: int, start: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.arange(start, start + count, dtype=dtype, device=self.device)


def rows_label(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows:,} rows"


def set_bytes(sets: Sequence[tuple[Tensor, ...]]) -> int:
    """Bytes of all copies together."""
    return len(sets) * sum(tensor.nbytes for tensor in sets[0])


def phase_of(rows: int) -> Literal["decode", "prefill"]:
    return "decode" if rows <= 16 else "prefill"


def is_quick(rows: int) -> bool:
    """`--quick` runs one decode and one prefill shape of an op."""
    return rows in (1, 512)
