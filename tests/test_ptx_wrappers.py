"""The wrappers of csrc/cuda/ptx.cuh, the only assembly, against CuTe's layouts: emulated and, with nvcc, on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx_library import PtxLibrary, devices

sys.path.insert(0, str(Path(__file__).parent / "emu"))
from cute import ldmatrix_case, mma_case

SOURCES = [Path(__file__).with_name("ptx_wrappers.cu")]


@pytest.fixture(scope="module", params=devices(torch.cuda.is_available(), "a CUDA device"))
def wrappers(request) -> PtxLibrary:
    major, minor = torch.cuda.get_device_capability() if request.param == "cuda" else (0, 0)
    return PtxLibrary(request.param, SOURCES, f"-arch=sm_{major}{minor}")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mma(wrappers, dtype):
    a, b, d, expected = mma_case(dtype)
    wrappers.run(f"mma_{dtype}", a, b, d)
    np.testing.assert_array_equal(d, expected)


@pytest.mark.parametrize("trans", ["", "_trans"])
@pytest.mark.parametrize("num_matrices", [2, 4])
def test_ldmatrix(wrappers, num_matrices, trans):
    rows, expected = ldmatrix_case(num_matrices, trans)
    registers = np.zeros_like(expected)
    wrappers.run(f"ldmatrix_x{num_matrices}{trans}", rows, registers)
    np.testing.assert_array_equal(registers, expected)


@pytest.mark.parametrize("name", ["cp_async", "cp_async_once"])
def test_cp_async(wrappers, name):
    source = np.random.default_rng(1).integers(1, 256, (33, 16)).astype(np.uint8)
    first, second = np.full((32, 16), 7, np.uint8), np.full((32, 16), 7, np.uint8)
    wrappers.run(name, source, first, second)
    valid = np.arange(16)[None, :] < (np.arange(32) % 17)[:, None]
    np.testing.assert_array_equal(first, np.where(valid, source[:32], 0))
    np.testing.assert_array_equal(second, source[:32])


def test_exp2(wrappers):
    x = np.concatenate([np.linspace(-120, 3, 28), [0, -np.inf, np.inf, np.nan]]).astype(np.float32)
    out = np.zeros(32, np.float32)
    wrappers.run("exp2", x, out)
    np.testing.assert_allclose(out, np.exp2(x.astype(np.float64)), rtol=3e-7)
