"""Fragment layouts of the matrix instructions from CuTe (cute_layouts.txt), as inputs and expected results."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_tables(name: str = "cute_layouts.txt") -> dict[str, np.ndarray]:
    tables = {}
    for line in Path(__file__).with_name(name).read_text().splitlines():
        if not line.startswith("#"):
            name, num_lanes, num_values, *values = line.split()
            tables[name] = np.array([int(value) for value in values]).reshape(int(num_lanes), int(num_values))
    return tables


CUTE = read_tables()


def bits_of(values: np.ndarray, dtype: str) -> np.ndarray:
    """Small integers as bf16 or fp16 bits."""
    if dtype == "fp16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def mma_case(dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Fragments of a, b, c as they lie in registers, [lane][value], and that of a b + c."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-8, 9, shape) for shape in ((16, 16), (16, 8), (16, 8)))  # exact in 16 bits and in fp32
    place = CUTE["C"] % 16, CUTE["C"] // 16
    return (
        bits_of(a[CUTE["A"] % 16, CUTE["A"] // 16], dtype),
        bits_of(b[CUTE["B"] // 8, CUTE["B"] % 8], dtype),
        c[place].astype(np.float32),
        (a @ b + c)[place].astype(np.float32),
    )


def ldmatrix_case(num_matrices: int, trans: str) -> tuple[np.ndarray, np.ndarray]:
    """Matrices, row after row, and what each lane receives of them; trans: "" or "_trans".

    CuTe's tables are of x4. Matrix i lies in register i, so those of x1 and x2 are their beginnings."""
    source, destination = CUTE[f"ldmatrix{trans}_src"], CUTE[f"ldmatrix{trans}_dst"][:, : 2 * num_matrices]
    rows = np.arange(1000, 1000 + 64 * num_matrices, dtype=np.uint16)
    element = np.zeros(256, np.uint16)  # of CuTe's numbering
    element[source[: 8 * num_matrices].reshape(-1)] = rows
    return rows, element[destination]
