"""Builds and calls a library of one kernel per PTX wrapper: emulated, or by nvcc for a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import emulator
import numpy as np
import persimmon_toolchain as toolchain
import pytest
import torch


def devices(on_gpu: bool, needs: str) -> list[object]:
    """Parameters of a fixture: "cpu", emulated, and "cuda" where `on_gpu`; needs: why not."""
    emu = [
        pytest.mark.emu,
        pytest.mark.skipif(emulator.missing() is not None, reason=f"no emulator: {emulator.missing()}"),
    ]
    cuda = [pytest.mark.cuda, pytest.mark.skipif(not on_gpu, reason=f"needs {needs}")]
    return [pytest.param("cpu", marks=emu, id="emu"), pytest.param("cuda", marks=cuda)]


class PtxLibrary:
    """sources: the first names the library. architecture: option of nvcc."""

    def __init__(self, device: str, sources: Sequence[Path], architecture: str) -> None:
        self._device = device
        library = emulator.ROOT / "build" / f"{sources[0].stem}_{device}.so"
        library.parent.mkdir(exist_ok=True)
        if device == "cuda":
            nvcc = toolchain.find_nvcc()
            if nvcc is None:
                pytest.skip("nvcc was not found")
            command = [nvcc, "-std=c++17", "-shared", "-Xcompiler", "-fPIC", architecture]
        else:
            command = ["g++", "-x", "c++", *emulator.COMMON, *emulator.VARIANTS["plain"], "-shared"]
            command += ["-isystem", str(emulator.cuda_include())]
        subprocess.run([*command, f"-I{emulator.ROOT}", *map(str, sources), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))

    def run(self, name: str, *arrays: np.ndarray, more: Sequence[object] = ()) -> None:
        """Runs a case on up to four arrays, which then hold what it wrote. more: further arguments of run_case."""
        tensors = [torch.from_numpy(array.view(np.uint8)).to(self._device) for array in arrays]
        pointers = (ctypes.c_void_p * 4)(*(tensor.data_ptr() for tensor in tensors))
        assert self._library.run_case(name.encode(), pointers, *more) == 0
        for array, tensor in zip(arrays, tensors, strict=True):
            array.view(np.uint8)[...] = tensor.cpu().numpy()
