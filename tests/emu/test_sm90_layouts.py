"""Where wgmma and TMA find and put each element, against tables from CuTe (cute_sm90_layouts.txt)."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_library import KernelError
from sm90_cases import BOXES, SM90, Box, wgmma_case


@pytest.fixture
def sm90(library):
    library.configure(architecture=90)
    return library


def run_wgmma(library, columns: int, dtype: str, a_layout: str, b_layout: str, adds: bool = True) -> None:
    case = wgmma_case(columns, dtype, a_layout, b_layout)
    name = f"wgmma_{columns}_{dtype}{'_trans' if b_layout.startswith('mn_') else ''}"
    d = case.d.copy() if adds else np.full_like(case.d, np.nan)
    arrays = case.memory, case.descriptors, case.a_registers, d
    library.run(name, *arrays, numbers=(4, a_layout == "registers", adds))
    np.testing.assert_array_equal(d, case.expected if adds else case.expected - case.d)


@pytest.mark.parametrize("b_layout", [name for name in SM90 if name.startswith(("k_", "mn_")) and "desc" not in name])
@pytest.mark.parametrize("columns", [64, 128])
def test_wgmma_reads_b_as_cute_lays_it_out(sm90, columns, b_layout):
    run_wgmma(sm90, columns, "bf16", "k_128", b_layout)


@pytest.mark.parametrize("a_layout", ["k_none", "k_32", "k_64", "k_128", "registers"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_wgmma_reads_a_as_cute_lays_it_out(sm90, dtype, a_layout):
    run_wgmma(sm90, 64, dtype, a_layout, "k_128")


@pytest.mark.parametrize("b_layout", ["k_128", "mn_128"])
@pytest.mark.parametrize("columns", [192, 256])
def test_wide_wgmma(sm90, columns, b_layout):
    run_wgmma(sm90, columns, "fp16", "registers", b_layout)


def test_first_wgmma_need_not_read_its_registers(sm90):
    run_wgmma(sm90, 64, "bf16", "k_128", "k_128", adds=False)


@pytest.mark.parametrize("field", [16, 32])  # bits of the leading and of the stride offset
def test_wrong_descriptor_reads_other_elements(sm90, field):
    """mn_128 has two groups of 64 columns, so both offsets count."""
    case = wgmma_case(128, "bf16", "k_128", "mn_128")
    d, right = case.d.copy(), case.descriptors.copy()
    case.descriptors[:, 1] += np.uint64(1024 >> 4 << field)
    sm90.run("wgmma_128_bf16_trans", case.memory, case.descriptors, case.a_registers, d, numbers=(4, 0, 1))
    assert (d != case.expected).any()
    d = case.d.copy()
    sm90.run("wgmma_128_bf16_trans", case.memory, right, case.a_registers, d, numbers=(4, 0, 1))
    np.testing.assert_array_equal(d, case.expected)


def test_operand_between_the_rows_of_the_swizzle_is_refused(sm90):
    case = wgmma_case(64, "bf16", "k_128", "k_128")
    case.descriptors[:, 1] += np.uint64(128 >> 4)
    with pytest.raises(KernelError, match="does not begin where the pattern of the swizzle does"):
        sm90.run("wgmma_64_bf16", case.memory, case.descriptors, case.a_registers, case.d, numbers=(4, 0, 1))


def test_wgmmas_are_counted(sm90):
    before = sm90.stats().wgmmas
    run_wgmma(sm90, 64, "bf16", "k_128", "k_128")
    assert sm90.stats().wgmmas == before + 4


def run_load(library, box: Box, tensor: np.ndarray) -> np.ndarray:
    loaded = np.zeros(int(np.prod(box.box)), np.uint16)
    library.run("tma_load_box", tensor, box.description(), loaded)
    return loaded


@pytest.mark.parametrize("policy", ["late", "early", "random"])
@pytest.mark.parametrize("box", BOXES, ids=str)
def test_tma_load(sm90, box, policy):
    sm90.configure(async_policy=policy, architecture=90)
    tensor = np.arange(1, 1 + box.num_elements(), dtype=np.uint16)
    at, inside = box.elements()
    expected = np.zeros(len(at), np.uint16)
    expected[box.places()] = np.where(inside, tensor[np.where(inside, at, 0)], 0)
    np.testing.assert_array_equal(run_load(sm90, box, tensor), expected)


@pytest.mark.parametrize("policy", ["late", "early", "random"])
@pytest.mark.parametrize("box", BOXES, ids=str)
def test_tma_store(sm90, box, policy):
    sm90.configure(async_policy=policy, architecture=90)
    tensor, shared = np.zeros(box.num_elements(), np.uint16), np.arange(1, 1 + np.prod(box.box), dtype=np.uint16)
    at, inside = box.elements()
    expected = tensor.copy()
    expected[at[inside]] = shared[box.places()][inside]
    sm90.run("tma_store_box", tensor, box.description(), shared)
    np.testing.assert_array_equal(tensor, expected)


@pytest.mark.parametrize(("swizzle", "columns"), [("none", 8), ("32", 16), ("64", 32), ("128", 64)])
def test_tma_swizzles_as_cute_does(sm90, swizzle, columns):
    """128 rows of a box are the first columns of CuTe's layout of 128 x 64 elements."""
    tensor = np.arange(128 * columns, dtype=np.uint16)
    loaded = run_load(sm90, Box((columns, 128), (1, columns), (columns, 128), (0, 0), swizzle), tensor)
    pieces = SM90[f"k_{swizzle}"][:, : columns // 8]
    np.testing.assert_array_equal(loaded.reshape(-1, 8)[pieces].reshape(-1), tensor)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (
            Box((64, 4), (1, 68), (64, 4), (0, 0), "128"),
            "dimension 1 must be a positive multiple of 8 elements, got 68",
        ),
        (Box((64, 4), (1, 0), (64, 4), (0, 0), "128"), "dimension 1 must be a positive multiple of 8 elements, got 0"),
        (Box((64, 4), (1, 64), (64, 257), (0, 0), "128"), "box of dimension 1 must be 1 to 256, got 257"),
        (Box((64, 4), (1, 64), (12, 4), (0, 0), "128"), "a row of the box must be a multiple of 16 bytes, got 24"),
        (Box((64, 4), (1, 64), (64, 4), (0, 0), "64"), "a row of the box, 128 bytes, is wider than the swizzle"),
        (Box((0, 4), (1, 64), (64, 4), (0, 0), "128"), "size of dimension 0 is 0"),
    ],
)
def test_tensor_maps_that_the_driver_refuses(sm90, box, message):
    with pytest.raises(KernelError, match=message):
        sm90.run("tma_load_box", np.zeros(1024, np.uint16), box.description(), np.zeros(64 * 300, np.uint16))
