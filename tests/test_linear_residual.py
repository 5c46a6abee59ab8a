"""linear_residual on every CPU instruction set, against the reference in fp64."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, ISAS, assert_within_contract, cpu_isa, randn

import persimmon_fast
from persimmon_fast import ops, reference

# in_features x out_features: tails of vectors, cache lines, chunks and streams; more than one chunk and one task
SIZES = [(1, 1), (7, 5), (64, 64), (65, 33), (100, 8), (513, 9), (4096, 70), (4099, 17)]
NUM_ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 15, 16, 17, 33]


def inputs(rows: int, k: int, n: int, dtype: torch.dtype):
    x, residual = randn(rows, k, dtype=dtype, seed=1), randn(rows, n, dtype=dtype, seed=4)
    return x, randn(n, k, dtype=dtype, seed=2, scale=k**-0.5), randn(n, dtype=dtype, seed=3), residual


def check(isa, x, weight, bias, residual):
    with cpu_isa(isa):
        out = ops.linear_residual(x, weight, bias, residual)
    wide_bias = None if bias is None else bias.double()
    expected = reference.linear_residual(x.double(), weight.double(), wide_bias, residual.double())
    plain = F.linear(x, weight, bias) + residual
    assert out.dtype == x.dtype
    assert_within_contract(out, expected, plain, f"{isa} {tuple(x.shape)} x {tuple(weight.shape)}")
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_sizes(isa, dtype, k, n):
    for rows in (1, 3, 16):
        check(isa, *inputs(rows, k, n, dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", NUM_ROWS)
def test_row_counts(isa, dtype, rows):
    check(isa, *inputs(rows, 777, 50, dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [2, 20])
def test_no_bias_and_strided_tensors(isa, rows):
    x, weight, bias, residual = inputs(rows, 300, 90, torch.bfloat16)
    dense = check(isa, x[:, 20:220], weight[:, 40:240], bias, residual)
    with cpu_isa(isa):
        copies = ops.linear_residual(x[:, 20:220].contiguous(), weight[:, 40:240].contiguous(), bias, residual)
    assert torch.equal(dense, copies)
    check(isa, x, weight[:70], None, residual[:, 10:80])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_every_batch_and_run(isa, dtype):
    x, weight, bias, residual = inputs(16, 1000, 60, dtype)
    with cpu_isa(isa):
        single = torch.cat([ops.linear_residual(x[i : i + 1], weight, bias, residual[i : i + 1]) for i in range(16)])
        for rows in (2, 3, 5, 8, 11, 16):
            out = ops.linear_residual(x[:rows], weight, bias, residual[:rows])
            assert torch.equal(out, single[:rows]), rows
            assert torch.equal(out, ops.linear_residual(x[:rows], weight, bias, residual[:rows])), rows


def test_bits_do_not_depend_on_the_number_of_threads():
    x, weight, bias, residual = inputs(3, 4096, 203, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(ops.linear_residual(x, weight, bias, residual))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [4, 20])
def test_nan_and_inf_stay_in_their_row_and_column(isa, rows):
    x, weight, bias, residual = inputs(rows, 70, 30, torch.float32)
    x[0, 69], x[1, 3], weight[7, 5], residual[3, 29] = float("nan"), float("inf"), float("nan"), float("-inf")
    with cpu_isa(isa):
        out = ops.linear_residual(x, weight, bias, residual)
    assert out[0].isnan().all()
    assert not out[1].isfinite().any()
    assert out[:, 7].isnan().all()
    assert out[3, 29] == float("-inf")
    assert out[2, :7].isfinite().all()
    assert out[2, 8:].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
def test_reads_no_neighbouring_memory(isa):
    """Rows between poisoned columns: a tail that reads further shows as NaN."""
    k, n = 37, 19
    wide_x, wide_weight = torch.full((3, k + 64), float("nan")), torch.full((n, k + 64), float("nan"))
    wide_residual = torch.full((3, n + 64), float("nan"))
    x, weight, residual = wide_x[:, 32 : 32 + k], wide_weight[:, 32 : 32 + k], wide_residual[:, 32 : 32 + n]
    for t, seed in ((x, 1), (weight, 2), (residual, 4)):
        t.copy_(randn(*t.shape, seed=seed))
    with cpu_isa(isa):
        assert torch.ops.persimmon_fast.linear_residual(x, weight, None, residual).isfinite().all()


def guarded(t):
    """A copy of t that ends where memory ends: the page behind it may not be read."""
    page = mmap.PAGESIZE
    size = -(-t.nbytes // page) * page
    buffer = mmap.mmap(-1, size + page)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(buffer, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes).view(t.shape)
    return copy.copy_(t)


def run_guarded():
    for isa in ISAS:
        for dtype in DTYPES:
            for rows, k, n in ((1, 33, 9), (3, 64, 8), (16, 100, 15), (5, 7, 1)):
                print(isa, dtype, rows, k, n, flush=True)
                check(isa, *(guarded(t) for t in inputs(rows, k, n, dtype)))


@pytest.mark.skipif(sys.platform != "linux", reason="uses mprotect")
def test_reads_nothing_behind_the_last_element():
    """In a process of its own, which a read too far kills."""
    env = os.environ | {"PYTHONPATH": str(Path(persimmon_fast.__file__).parents[1])}  # the package that is tested here
    command = [sys.executable, "-c", "import test_linear_residual; test_linear_residual.run_guarded()"]
    result = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert result.returncode == 0, (
        f"status {result.returncode} after {result.stdout.splitlines()[-1:]}\n{result.stderr}"
    )


def test_leading_dimensions():
    x, weight, bias, residual = inputs(6, 40, 24, torch.float32)
    out = ops.linear_residual(x.view(2, 3, 40), weight, bias, residual.view(2, 3, 24))
    assert out.shape == (2, 3, 24)
    assert torch.equal(out.view(6, 24), ops.linear_residual(x, weight, bias, residual))


@pytest.mark.parametrize("rows", [3, 17])
def test_opcheck(rows):
    x, weight, bias, residual = inputs(rows, 40, 24, torch.float32)
    torch.library.opcheck(torch.ops.persimmon_fast.linear_residual.default, (x, weight, bias, residual))
    torch.library.opcheck(torch.ops.persimmon_fast.linear_residual.default, (x, weight, None, residual))


@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": randn(40)}, ValueError, r"x must be \[num_rows, in_features\], got \[40\]"),
        ({"x": torch.zeros(3, 40, dtype=torch.int64)}, TypeError, "x must be float32, float16 or bfloat16, got Long"),
        ({"x": randn(3, 0)}, ValueError, r"x must have in_features > 0, got \[3, 0\]"),
        ({"x": randn(40, 3).t()}, ValueError, r"x must have a last dimension of stride 1 .* got strides \[1, 3\]"),
        ({"weight": randn(24, 39)}, ValueError, r"weight must be \[out_features, in_features\] = \[-1, 40\], got"),
        ({"weight": randn(40, 24).t()}, ValueError, r"weight must have a last dimension of stride 1"),
        ({"weight": randn(24, 40).half()}, TypeError, "weight must be Float as x is, got Half"),
        ({"bias": randn(23)}, ValueError, r"bias must be \[out_features\] = \[24\], got \[23\]"),
        ({"bias": randn(24).bfloat16()}, TypeError, "bias must be Float as x is, got BFloat16"),
        ({"residual": randn(1, 24)}, ValueError, r"residual must be \[num_rows, out_features\] = \[\d+, 24\], got"),
        ({"residual": randn(17, 24).half()}, TypeError, "residual must be Float as x is, got Half"),
    ],
)
def test_errors_name_op_argument_expected_and_found(rows, change, error, match):
    names = ("x", "weight", "bias", "residual")
    args = dict(zip(names, inputs(rows, 40, 24, torch.float32), strict=True)) | change
    with pytest.raises(error, match="linear_residual: " + match):
        torch.ops.persimmon_fast.linear_residual(*(args[name] for name in names))
