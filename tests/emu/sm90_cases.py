"""Operands of wgmma in CuTe's layouts and boxes of TMA, as inputs and expected results. Needs no torch."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from cute import bits_of, read_tables

SM90 = read_tables("cute_sm90_layouts.txt")
SWIZZLES = ("none", "32", "64", "128")
A_BYTES, B_BYTES = 24 * 1024, 64 * 1024  # sm90_primitives.cu


def pieces(layout: str, size: int) -> np.ndarray:
    """The table of an operand of `size` rows or columns: beyond 128 the tables repeat."""
    axis = 0 if layout.startswith("k_") else 1
    table = np.concatenate([SM90[layout], SM90[layout] + 1024], axis)
    return np.take(table, range(size if axis == 0 else size // 8), axis)


def place(memory: np.ndarray, layout: str, operand: np.ndarray) -> None:
    """operand: [row or column][64 k] in 16 bits."""
    data = operand if layout.startswith("k_") else operand.T
    memory.reshape(-1, 8)[pieces(layout, len(operand))] = data.reshape(data.shape[0], -1, 8)


class WgmmaCase(NamedTuple):
    memory: np.ndarray
    descriptors: np.ndarray  # [step][a, b]
    a_registers: np.ndarray
    d: np.ndarray  # [thread][register]
    expected: np.ndarray


def wgmma_case(columns: int, dtype: str, a_layout: str, b_layout: str) -> WgmmaCase:
    """64 k in four steps; a_layout "registers": a lies there."""
    rng = np.random.default_rng(columns)
    a, b, d = (rng.integers(-8, 9, shape) for shape in ((64, 64), (columns, 64), (64, columns)))
    memory = np.full((A_BYTES + B_BYTES) // 2, 0xFFFF, np.uint16)  # NaN
    descriptors = np.zeros((4, 2), np.uint64)
    if a_layout != "registers":
        place(memory[: A_BYTES // 2], a_layout, bits_of(np.concatenate([a, np.zeros_like(a)]), dtype))
        descriptors[:, 0] = SM90[f"{a_layout}_descriptors"][0]
    place(memory[A_BYTES // 2 :], b_layout, bits_of(b, dtype))
    descriptors[:, 1] = SM90[f"{b_layout}_descriptors"][0]
    a_elements = SM90["a_thread"][0][:, None] + SM90["a_register"][0]
    registers = np.stack([bits_of(a, dtype)[a_elements % 64, a_elements // 64 + 16 * step] for step in range(4)])
    d_elements = SM90["d_thread"][0][:, None] + SM90["d_register"][0][: columns // 2]
    at = d_elements % 64, d_elements // 64
    expected = (a @ b.T + d)[at].astype(np.float32)
    return WgmmaCase(memory, descriptors, registers, d[at].astype(np.float32), expected)


class Box(NamedTuple):
    """A tensor of 16-bit elements and a box of it; dimension 0 first."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    box: tuple[int, ...]
    at: tuple[int, ...]
    swizzle: str = "none"

    def description(self) -> np.ndarray:
        padding = (0,) * (5 - len(self.size))
        fields = [(*values, *padding) for values in (self.size, self.stride, self.box, self.at)]
        return np.array([len(self.size), *itertools.chain(*fields), SWIZZLES.index(self.swizzle)], np.int64)

    def num_elements(self) -> int:
        return 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))

    def elements(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each element of the box, in the order of shared memory without swizzle: where it lies in the tensor, and
        whether it does."""
        rank = len(self.size)
        index = np.indices(self.box[::-1]).reshape(rank, -1)[::-1]
        at = index + np.array(self.at)[:, None]
        inside = ((at >= 0) & (at < np.array(self.size)[:, None])).all(0)
        return (at * np.array(self.stride)[:, None]).sum(0), inside

    def places(self) -> np.ndarray:
        """Where each element of the box lies in shared memory."""
        address = np.arange(int(np.prod(self.box))) * 2
        mask = (1 << SWIZZLES.index(self.swizzle)) - 1
        return (address ^ ((address >> 7 & mask) << 4)) // 2


BOXES = [
    Box((64,), (1,), (32,), (40,)),
    Box((70, 20), (1, 80), (64, 16), (0, 0), "128"),
    Box((70, 20), (1, 80), (64, 16), (40, 12), "128"),
    Box((70, 20), (1, 80), (64, 16), (-24, -3), "128"),
    Box((70, 20), (1, 80), (64, 8), (70, 0), "128"),
    Box((70, 20), (1, 80), (16, 8), (3, 5), "128"),
    Box((70, 20), (1, 80), (32, 16), (7, 2), "64"),
    Box((70, 20), (1, 80), (16, 24), (7, 2), "32"),
    Box((300, 20), (1, 304), (256, 3), (45, 18)),
    Box((24, 9, 5), (1, 24, 400), (24, 4, 3), (-8, 7, 3), "64"),
    Box((64, 9, 5), (1, 64, 640), (64, 5, 3), (0, 6, -1), "128"),
    Box((16, 5, 3, 4), (1, 64, 16, 400), (16, 3, 2, 3), (0, 3, 1, 2), "32"),
    Box((8, 2, 3, 4, 5), (1, 8, 16, 48, 192), (8, 2, 2, 2, 3), (0, 1, 2, 3, 4)),
]
