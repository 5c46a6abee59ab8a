"""The wrappers of csrc/cuda/ptx_sm90.cuh and wgmma.cuh: emulated and, with nvcc, on a GPU of compute capability 9.0."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import emulator
import numpy as np
import pytest
import torch
from ptx_library import PtxLibrary, devices

sys.path.insert(0, str(Path(__file__).parent / "emu"))
from cute import CUTE
from sm90_cases import Box, wgmma_case

SOURCES = [Path(__file__).with_name("ptx_sm90_wrappers.cu"), emulator.ROOT / "csrc/cuda/tensor_map.cu"]
BOX_ELEMENTS = 4096  # ptx_sm90_wrappers.cu


def has_sm90() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


class _TensorBox(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p), ("rank", ctypes.c_int), ("size", ctypes.c_int64 * 5), ("stride", ctypes.c_int64 * 5),
        ("box", ctypes.c_int * 5),
    )  # fmt: skip


class Wrappers(PtxLibrary):
    def run_boxed(self, name: str, *arrays: np.ndarray, box: Box | None = None) -> None:
        """box: of array 0."""
        tensor_box = None
        if box is not None:
            tensor_box = ctypes.byref(_TensorBox(None, len(box.size), box.size, box.stride, box.box))
        self.run(name, *arrays, more=(tensor_box,))


@pytest.fixture(scope="module", params=devices(has_sm90(), "a CUDA device of compute capability 9.0"))
def wrappers(request) -> Wrappers:
    return Wrappers(request.param, SOURCES, "-gencode=arch=compute_90a,code=sm_90a")


BOXES = [  # of 4,096 elements, inside and across every edge
    Box((96, 80), (1, 104), (64, 64), (0, 0), "128"),
    Box((96, 80), (1, 104), (64, 64), (48, 40), "128"),
    Box((96, 80), (1, 104), (64, 64), (-16, -3), "128"),
    Box((96, 80), (1, 104), (64, 64), (13, 0), "128"),  # a coordinate need not be a multiple of 16 bytes
    Box((64, 20, 9), (1, 64, 1280), (64, 16, 4), (0, 9, -1), "128"),
    Box((64, 5, 20, 6), (1, 64, 320, 6400), (64, 2, 8, 4), (0, 4, 15, 3), "128"),
]


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_tma_load(wrappers, box):
    tensor = np.arange(1, 1 + box.num_elements(), dtype=np.uint16)
    loaded, coordinates = np.zeros(BOX_ELEMENTS, np.uint16), np.array(box.at, np.int32)
    at, inside = box.elements()
    expected = np.zeros(BOX_ELEMENTS, np.uint16)
    expected[box.places()] = np.where(inside, tensor[np.where(inside, at, 0)], 0)
    names = ["tma_load_2d", "tma_load_multicast"] if len(box.at) == 2 else [f"tma_load_{len(box.at)}d"]
    for name in names:
        loaded[...] = 7
        wrappers.run_boxed(name, tensor, coordinates, loaded, box=box)
        np.testing.assert_array_equal(loaded, expected)


@pytest.mark.parametrize("box", BOXES[:5], ids=str)
def test_tma_store(wrappers, box):
    tensor, shared = np.zeros(box.num_elements(), np.uint16), np.arange(1, 1 + BOX_ELEMENTS, dtype=np.uint16)
    at, inside = box.elements()
    expected = tensor.copy()
    expected[at[inside]] = shared[box.places()][inside]
    wrappers.run_boxed(f"tma_store_{len(box.at)}d", tensor, np.array(box.at, np.int32), shared, box=box)
    np.testing.assert_array_equal(tensor, expected)


@pytest.mark.parametrize("trans", ["", "_trans"])
@pytest.mark.parametrize("a", ["shared", "registers"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("columns", [64, 128, 192, 256])
def test_wgmma(wrappers, columns, dtype, a, trans):
    a_layout, b_layouts = "k_128" if a == "shared" else a, ["mn_128"] if trans else ["k_128"]
    if columns <= 128:
        b_layouts += ["mn_none", "mn_32", "mn_64", "mn_128_boxes"] if trans else ["k_none", "k_32", "k_64"]
    for b_layout in b_layouts:
        case = wgmma_case(columns, dtype, a_layout, b_layout)
        wrappers.run_boxed(
            f"wgmma_{columns}_{dtype}_{a}{trans}", case.memory, case.descriptors, case.a_registers, case.d
        )
        np.testing.assert_array_equal(case.d, case.expected)


def test_stmatrix(wrappers):
    """CuTe's traits of stmatrix are those of ldmatrix with source and destination exchanged."""
    registers = np.arange(1000, 1256, dtype=np.uint16).reshape(32, 8)
    element, rows = np.zeros(256, np.uint16), np.zeros(256, np.uint16)
    element[CUTE["ldmatrix_dst"]] = registers
    wrappers.run_boxed("stmatrix", registers, rows)
    np.testing.assert_array_equal(rows, element[CUTE["ldmatrix_src"].reshape(-1)])


def test_cluster(wrappers):
    out, threads = np.zeros((2, 2, 128), np.int32), np.arange(128)
    wrappers.run_boxed("cluster", out)
    for rank in (0, 1):
        np.testing.assert_array_equal(out[rank, 0], 128 * (1 - rank) + (threads + 1) % 128)
        np.testing.assert_array_equal(out[rank, 1], 1000 + 128 * (1 - rank) + threads)


def test_registers_and_named_barriers(wrappers):
    out = np.zeros(128, np.int32)
    wrappers.run_boxed("registers", out)
    np.testing.assert_array_equal(out, np.arange(127, -1, -1))
