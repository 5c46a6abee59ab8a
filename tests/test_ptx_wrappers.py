"""The wrappers of csrc/cuda/ptx.cuh, the only assembly, against CuTe's layouts: emulated and, with nvcc, on a GPU."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import emulator
import numpy as np
import persimmon_toolchain as toolchain
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "emu"))
from cute import ldmatrix_case, mma_case

SOURCE = Path(__file__).with_name("ptx_wrappers.cu")


def build_for_gpu() -> Path:
    nvcc = toolchain.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found")
    library = emulator.ROOT / "build" / "ptx_wrappers_cuda.so"
    library.parent.mkdir(exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    command = [nvcc, "-std=c++17", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{major}{minor}"]
    subprocess.run([*command, f"-I{emulator.ROOT}", str(SOURCE), "-o", str(library)], check=True)
    return library


def build_for_emulator() -> Path:
    library = emulator.ROOT / "build" / "ptx_wrappers_emu.so"
    library.parent.mkdir(exist_ok=True)
    command = ["g++", "-x", "c++", *emulator.COMMON, *emulator.VARIANTS["plain"], "-shared"]
    include = [f"-I{emulator.ROOT}", "-isystem", str(emulator.cuda_include())]
    subprocess.run([*command, *include, str(SOURCE), "-o", str(library)], check=True)
    return library


class Wrappers:
    def __init__(self, device: str) -> None:
        self.device = device
        path = build_for_gpu() if device == "cuda" else build_for_emulator()
        self._library = ctypes.CDLL(str(path))

    def run(self, name: str, *arrays: np.ndarray) -> None:
        """Runs a case on up to four arrays, which then hold what it wrote."""
        tensors = [torch.from_numpy(array.view(np.uint8)).to(self.device) for array in arrays]
        pointers = (ctypes.c_void_p * 4)(*(tensor.data_ptr() for tensor in tensors))
        assert self._library.run_case(name.encode(), pointers) == 0
        for array, tensor in zip(arrays, tensors, strict=True):
            array.view(np.uint8)[...] = tensor.cpu().numpy()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            "cpu",
            marks=[
                pytest.mark.emu,
                pytest.mark.skipif(emulator.missing() is not None, reason=f"no emulator: {emulator.missing()}"),
            ],
            id="emu",
        ),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def wrappers(request) -> Wrappers:
    return Wrappers(request.param)


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
