"""linear_residual on every backend, against the reference in fp64."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKENDS,
    CUDA,
    DTYPES,
    EMU,
    ISAS,
    assert_same_whatever_the_alignment,
    assert_within_contract,
    backend,
    cpu_isa,
    emulator_counts,
    randn,
)

import persimmon_fast
from persimmon_fast import ops, reference

# in_features x out_features: tails of vectors, cache lines, chunks and streams
SIZES = [(1, 1), (7, 5), (64, 64), (65, 33), (100, 8), (513, 9)]
LONG_SIZES = [(4096, 70), (4099, 17)]  # more than one chunk and one task of the CPU kernels
NUM_ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 15, 16, 17, 33]
# rows, in_features, out_features of the CUDA kernels' tiles, for more than 16 rows (fewer: test_stream.py); k advances
# by 32 through 4 stages. On the emulator's 8 multiprocessors the last three take the large tile (one each, against 3 of
# the small ones), and on a real GPU of 108 to 132 the one of GPU_SHAPES.
TILE_SHAPES = [
    (17, 8, 8), (64, 32, 64), (63, 40, 72), (65, 128, 56), (64, 296, 64), (19, 104, 200),
    (65, 33, 63), (17, 31, 65), (64, 287, 64), (17, 300, 129),
    (256, 32, 384), (255, 136, 392), (129, 288, 328),
]  # fmt: skip
GPU_SHAPES = [(2100, 264, 4136)]


def inputs(rows: int, k: int, n: int, dtype: torch.dtype, device: str = "cpu"):
    x, residual = randn(rows, k, dtype=dtype, seed=1), randn(rows, n, dtype=dtype, seed=4)
    weight, bias = randn(n, k, dtype=dtype, seed=2, scale=k**-0.5), randn(n, dtype=dtype, seed=3)
    return [t.to(device) for t in (x, weight, bias, residual)]


def check(name, x, weight, bias, residual):
    """On the device of x, inside `with backend(name)`."""
    out = ops.linear_residual(x, weight, bias, residual)
    wide_bias = None if bias is None else bias.double()
    expected = reference.linear_residual(x.double(), weight.double(), wide_bias, residual.double())
    plain = F.linear(x, weight, bias) + residual
    assert out.dtype == x.dtype
    assert_within_contract(out, expected, plain, f"{name} {tuple(x.shape)} x {tuple(weight.shape)}")
    return out


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_sizes(name, dtype, k, n):
    with backend(name) as device:
        for rows in (1, 3, 16):
            check(name, *inputs(rows, k, n, dtype, device))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), LONG_SIZES)
def test_long_rows(isa, dtype, k, n):
    with cpu_isa(isa):
        for rows in (1, 3, 16):
            check(isa, *inputs(rows, k, n, dtype))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", NUM_ROWS)
def test_row_counts(name, dtype, rows):
    with backend(name) as device:
        check(name, *inputs(rows, 777 if name in ISAS else 40, 50, dtype, device))


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "k", "n"), TILE_SHAPES)
def test_tiles_and_pipeline_lengths(name, dtype, rows, k, n):
    with backend(name) as device:
        check(name, *inputs(rows, k, n, dtype, device))


@pytest.mark.parametrize("name", [CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "k", "n"), GPU_SHAPES)
def test_large_tiles_on_a_gpu(name, dtype, rows, k, n):
    with backend(name) as device:
        check(name, *inputs(rows, k, n, dtype, device))


# What the sanitizers repeat: tails in every dimension, more k-tiles than 2 * stages + 1, every tile and load path.
@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU])
@pytest.mark.parametrize(
    ("dtype", "rows", "k", "n"),
    [
        (torch.bfloat16, 65, 296, 72),
        (torch.float16, 19, 24, 8),
        (torch.float16, 33, 301, 65),
        (torch.bfloat16, 129, 328, 328),
        (torch.float32, 65, 50, 66),
    ],
    ids=str,
)
def test_sanitized(name, dtype, rows, k, n):
    with backend(name) as device:
        x, weight, bias, residual = inputs(rows, k, n, dtype, device)
        check(name, x, weight, bias, residual)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("rows", [2, 20])
def test_no_bias_and_strided_tensors(name, rows):
    with backend(name) as device:
        x, weight, bias, residual = inputs(rows, 300, 90, torch.bfloat16, device)
        dense = check(name, x[:, 20:220], weight[:, 40:240], bias, residual)
        copies = ops.linear_residual(x[:, 20:220].contiguous(), weight[:, 40:240].contiguous(), bias, residual)
        assert_same_whatever_the_alignment(dense, copies)
        check(name, x, weight[:70], None, residual[:, 10:80])


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [5, 21])
def test_alignment_changes_no_bit(name, dtype, rows):
    with backend(name) as device:
        args = inputs(rows, 136, 72, dtype, device)
        out = ops.linear_residual(*args)
        for moved in range(4):
            wide = args[moved].new_empty(args[moved].numel() + 1)[1:].view(args[moved].shape).copy_(args[moved])
            assert wide.data_ptr() % 16 != 0
            assert_same_whatever_the_alignment(ops.linear_residual(*args[:moved], wide, *args[moved + 1 :]), out, moved)
        x = args[0].new_empty(rows, 144)[:, :136].copy_(args[0])  # rows further apart, still aligned
        assert torch.equal(ops.linear_residual(x, *args[1:]), out)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_every_batch_and_run(name, dtype):
    with backend(name) as device:
        k, n = (1000, 60) if name in ISAS else (104, 60)
        x, weight, bias, residual = inputs(16, k, n, dtype, device)
        single = torch.cat([ops.linear_residual(x[i : i + 1], weight, bias, residual[i : i + 1]) for i in range(16)])
        for rows in (2, 3, 5, 8, 11, 16):
            out = ops.linear_residual(x[:rows], weight, bias, residual[:rows])
            assert torch.equal(out, single[:rows]), rows
            assert torch.equal(out, ops.linear_residual(x[:rows], weight, bias, residual[:rows])), rows


@pytest.mark.parametrize(("name", "rows", "n"), [pytest.param(*EMU.values, 256, 384, marks=EMU.marks),
                                                 pytest.param(*CUDA.values, 2100, 4136, marks=CUDA.marks)])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_tile_changes_no_bit(name, rows, n, dtype):
    with backend(name) as device:
        x, weight, bias, residual = inputs(rows, 136, n, dtype, device)
        large = ops.linear_residual(x, weight, bias, residual)
        assert torch.equal(large, ops.linear_residual(x, weight, bias, residual))
        for row in (0, 100, rows - 17):
            small = ops.linear_residual(x[row : row + 17], weight, bias, residual[row : row + 17])
            assert torch.equal(large[row : row + 17], small), row


@pytest.mark.parametrize("name", [CUDA])
def test_runs_on_the_current_stream(name):
    with backend(name) as device:
        args = inputs(300, 4096, 4096, torch.bfloat16, device)
        late = torch.zeros_like(args[0])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # a kernel on another stream would read the zeros
            late.copy_(args[0])
            out = ops.linear_residual(late, *args[1:])
        stream.synchronize()
        assert torch.equal(out, ops.linear_residual(*args))


@pytest.mark.parametrize("name", [EMU])
@pytest.mark.parametrize(
    ("rows", "k", "n", "blocks"),
    [(64, 296, 64, 1), (65, 40, 72, 4), (65, 33, 72, 4), (256, 136, 384, 6), (129, 288, 328, 6), (256, 136, 256, 16)],
)
def test_blocks_and_bank_conflicts(name, rows, k, n, blocks):
    with backend(name) as device:
        args = inputs(rows, k, n, torch.bfloat16, device)
        counts = emulator_counts(lambda: ops.linear_residual(*args))
    assert counts["blocks"] == blocks
    assert counts["mmas"] > 0
    assert counts["ldmatrix_wavefronts"] == counts["ldmatrix_wavefronts_ideal"] > 0


TILE_CHOICE = """
#include "csrc/cuda/gemm_tile.h"
using namespace persimmon_fast::cuda;
constexpr auto large = GemmTile::kLarge, small = GemmTile::kSmall;
static_assert(choose_gemm_tile(1, 4096, 108) == small);
static_assert(choose_gemm_tile(64, 262144, 132) == small);
static_assert(choose_gemm_tile(512, 4096, 108) == small, "128 large tiles would be two waves");
static_assert(choose_gemm_tile(2048, 4096, 108) == large);
static_assert(choose_gemm_tile(2048, 12288, 132) == large);
static_assert(choose_gemm_tile(16384, 16384, 132) == large);
static_assert(choose_gemm_tile(256, 384, 8) == large);
static_assert(choose_gemm_tile(129, 328, 8) == large);
static_assert(choose_gemm_tile(64, 4096, 108, 128) == small);
static_assert(step_cycles(128, 128) == 256 && step_cycles(64, 64) == 96 && step_cycles(64, 128) == 144);
// Every tile of an uneven grid is computed once.
constexpr bool covers(int64_t tiles_m, int64_t tiles_n) {
  bool seen[50][50] = {};
  for (int64_t i = 0; i < tiles_m * tiles_n; ++i) {
    const TileIndex tile = tile_of_block(i, tiles_m, tiles_n);
    if (tile.m < 0 || tile.m >= tiles_m || tile.n < 0 || tile.n >= tiles_n || seen[tile.m][tile.n]) return false;
    seen[tile.m][tile.n] = true;
  }
  return true;
}
static_assert(covers(1, 1) && covers(16, 3) && covers(17, 5) && covers(15, 4) && covers(40, 7));
// Blocks beside each other in time: one column of B, 16 rows of A.
static_assert(tile_of_block(15, 40, 7).n == 0 && tile_of_block(15, 40, 7).m == 15 && tile_of_block(16, 40, 7).n == 1);
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_tile_choice(tmp_path):
    source = tmp_path / "tile_choice.cpp"
    source.write_text(TILE_CHOICE)
    root = Path(__file__).resolve().parents[1]
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{root}", str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


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


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [4, 20])
def test_nan_and_inf_stay_in_their_row_and_column(name, dtype, rows):
    with backend(name) as device:
        x, weight, bias, residual = inputs(rows, 70, 30, dtype, device)
        x[0, 69], x[1, 3], weight[7, 5], residual[3, 29] = float("nan"), float("inf"), float("nan"), float("-inf")
        out = ops.linear_residual(x, weight, bias, residual)
        assert out[0].isnan().all()
        assert not out[1].isfinite().any()
        assert out[:, 7].isnan().all()
        assert out[3, 29] == float("-inf")
        assert out[2, :7].isfinite().all()
        assert out[2, 8:].isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 19])
def test_reads_no_neighbouring_memory(name, dtype, rows):
    """Rows between poisoned columns: a tail that reads further shows as NaN."""
    with backend(name) as device:
        # torch's bf16 product of many rows on AMX multiplies what lies behind a row by 0 unless k is a multiple of 4
        by_torch = rows > 16 and name in ISAS
        for k, n in ((40, 24),) if by_torch else ((37, 19), (40, 24)):
            nan = torch.full((n + rows, k + 64), float("nan"), dtype=dtype, device=device)
            x, weight, residual = nan[:rows, 32 : 32 + k], nan.clone()[:n, 32 : 32 + k], nan.clone()[:rows, 32 : 32 + n]
            for t, seed in ((x, 1), (weight, 2), (residual, 4)):
                t.copy_(randn(*t.shape, seed=seed))
            assert ops._kernel("linear_residual")(x, weight, None, residual).isfinite().all()


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
                with cpu_isa(isa):
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
