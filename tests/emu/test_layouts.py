"""Where each element of a fragment lies, against tables from CuTe; bank conflicts of ldmatrix and stmatrix."""

from __future__ import annotations

import numpy as np
import pytest
from cute import CUTE, ldmatrix_case, mma_case


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mma_layout_equals_cute(library, dtype):
    a, b, c, expected = mma_case(dtype)
    d = np.full((32, 4), np.nan, np.float32)
    library.run(f"mma_{dtype}", a, b, c, d)
    np.testing.assert_array_equal(d, expected)


def test_mma_reads_special_fp16_values(library):
    """Subnormals, infinity and NaN of fp16, through one product each."""
    values = np.array([6e-8, -6e-8, 6.1e-5, 65504.0, np.inf, -np.inf, np.nan, -0.0], np.float16)
    a = np.zeros((16, 16), np.float16)
    a[:8, 0] = values
    b = np.zeros((16, 8), np.float16)
    b[0, :] = 1
    fragments = [
        a[CUTE["A"] % 16, CUTE["A"] // 16].copy(),
        b[CUTE["B"] // 8, CUTE["B"] % 8].copy(),
        np.zeros((32, 4), np.float32),
        np.zeros((32, 4), np.float32),
    ]
    library.run("mma_fp16", *fragments)
    d = np.zeros((16, 8), np.float32)
    d[CUTE["C"] % 16, CUTE["C"] // 16] = fragments[3]
    np.testing.assert_array_equal(d[:8, 0], values.astype(np.float32))


@pytest.mark.parametrize("trans", ["", "_trans"])
@pytest.mark.parametrize("num_matrices", [1, 2, 4])
def test_ldmatrix_layout_equals_cute(library, num_matrices, trans):
    rows, expected = ldmatrix_case(num_matrices, trans)
    registers = np.zeros_like(expected)
    library.run(f"ldmatrix_x{num_matrices}{trans}", rows, registers)
    np.testing.assert_array_equal(registers, expected)


@pytest.mark.parametrize("trans", ["", "_trans"])
@pytest.mark.parametrize("num_matrices", [1, 2, 4])
def test_stmatrix_is_the_inverse_of_ldmatrix(library, num_matrices, trans):
    """CuTe's traits of stmatrix are those of ldmatrix with source and destination exchanged."""
    source, destination = CUTE[f"ldmatrix{trans}_src"], CUTE[f"ldmatrix{trans}_dst"][:, : 2 * num_matrices]
    registers = np.arange(1000, 1000 + 64 * num_matrices, dtype=np.uint16).reshape(32, 2 * num_matrices)
    element = np.zeros(256, np.uint16)
    element[destination] = registers
    rows = np.zeros(64 * num_matrices, np.uint16)
    library.run(f"stmatrix_x{num_matrices}{trans}", registers, rows)
    np.testing.assert_array_equal(rows, element[source[: 8 * num_matrices].reshape(-1)])


@pytest.mark.parametrize(("swizzled", "factor"), [(1, 1), (0, 8)])
def test_wavefronts_show_bank_conflicts(library, swizzled, factor):
    """Rows of 128 bytes begin in the same bank: eight wavefronts per matrix, one with the XOR swizzle."""
    wrong = np.ones(32, np.uint32)
    before = library.stats()
    library.run("swizzle", wrong, numbers=(swizzled,))
    after = library.stats()
    assert not wrong.any()
    for name in ("ldmatrix", "stmatrix"):
        ideal = getattr(after, f"{name}_wavefronts_ideal") - getattr(before, f"{name}_wavefronts_ideal")
        wavefronts = getattr(after, f"{name}_wavefronts") - getattr(before, f"{name}_wavefronts")
        assert ideal == 64 * 128 // 128  # the tile, 128 bytes at a time
        assert wavefronts == factor * ideal
