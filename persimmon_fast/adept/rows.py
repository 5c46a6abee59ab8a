"""Matrices of bytes that are read a few rows at a time: what lies in files, stacked, joined and cut without loading it.

A tensor [rows, ...] of some dtype is `num_rows` rows of `row_bytes` bytes here, so that splitting over tensor parallel
ranks and merging them move bytes and never change a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persimmon_fast.adept.pickles import FileTensor

CHUNK_BYTES = 2**24  # read at once: large enough for full disk speed, far below the smallest matrix of the 8B model

Bytes = NDArray[np.uint8]


class Rows(Protocol):
    """num_rows rows of row_bytes bytes."""

    @property
    def num_rows(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    def read(self, start: int, stop: int) -> Bytes:
        """Rows [start, stop) as [stop - start, row_bytes]."""


def _sizes(dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], dtype.itemsize * torch.Size(shape[1:]).numel()


class FileRows:
    """A tensor in a file, at least one-dimensional."""

    def __init__(self, tensor: FileTensor) -> None:
        self._path, self._offset = tensor.path, tensor.offset
        self.num_rows, self.row_bytes = _sizes(tensor.dtype, tensor.shape)

    def read(self, start: int, stop: int) -> Bytes:
        count = (stop - start) * self.row_bytes
        data: Bytes = np.fromfile(self._path, np.uint8, count, offset=self._offset + start * self.row_bytes)
        if data.size != count:
            raise OSError(f"{self._path}: it became shorter while it was read")
        return data.reshape(stop - start, self.row_bytes)


class TensorRows:
    """A contiguous tensor in memory, or mapped."""

    def __init__(self, tensor: Tensor) -> None:
        self.num_rows, self.row_bytes = _sizes(tensor.dtype, tensor.shape)
        self._bytes = tensor.detach().reshape(self.num_rows, -1).view(torch.uint8)

    def read(self, start: int, stop: int) -> Bytes:
        data: Bytes = self._bytes[start:stop].numpy()
        return data


@dataclass(frozen=True)
class Stacked:
    """Parts below one another (dimension 0), of one width."""

    parts: Sequence[Rows]

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    @property
    def row_bytes(self) -> int:
        return self.parts[0].row_bytes

    def read(self, start: int, stop: int) -> Bytes:
        blocks, first = [], 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, part.num_rows)
            if low < high:
                blocks.append(part.read(low, high))
            first += part.num_rows
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


@dataclass(frozen=True)
class SideBySide:
    """Parts next to one another (dimension 1), of one height."""

    parts: Sequence[Rows]

    @property
    def num_rows(self) -> int:
        return self.parts[0].num_rows

    @property
    def row_bytes(self) -> int:
        return sum(part.row_bytes for part in self.parts)

    def read(self, start: int, stop: int) -> Bytes:
        return np.concatenate([part.read(start, stop) for part in self.parts], axis=1)


@dataclass(frozen=True)
class Cut:
    """One of num_parts equal parts of some rows, along dimension 0 or 1."""

    whole: Rows
    dim: int
    part: int
    num_parts: int

    @property
    def num_rows(self) -> int:
        return self.whole.num_rows // (self.num_parts if self.dim == 0 else 1)

    @property
    def row_bytes(self) -> int:
        return self.whole.row_bytes // (self.num_parts if self.dim == 1 else 1)

    def read(self, start: int, stop: int) -> Bytes:
        if self.dim == 0:
            first = self.part * self.num_rows
            return self.whole.read(first + start, first + stop)
        first = self.part * self.row_bytes
        return self.whole.read(start, stop)[:, first : first + self.row_bytes]


def blocks(rows: Rows) -> Iterator[Bytes]:
    """All rows, in blocks of about CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // max(1, rows.row_bytes))
    for start in range(0, rows.num_rows, step):
        yield np.ascontiguousarray(rows.read(start, min(start + step, rows.num_rows)))


def equal(a: Rows, b: Rows) -> bool:
    """Whether two matrices have the same bytes."""
    return (a.num_rows, a.row_bytes) == (b.num_rows, b.row_bytes) and all(
        np.array_equal(x, y) for x, y in zip(blocks(a), blocks(b), strict=True)
    )


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to write: what a header says of it, and its bytes when they are asked for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: Rows

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()
