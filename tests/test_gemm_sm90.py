"""The matrix product for sm_90a (csrc/cuda/gemm_sm90.cuh) through the ops that use it, emulated and on a GPU.

The emulator has 8 multiprocessors, so 4 clusters: wide products take 128 x 256 tiles of 4 stages, narrow ones 128 x 128
of 6, and those of more than 4 pairs of tiles make a block go from tile to tile.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import test_linear_residual as linear
import test_qkv_norm_rope as qkv
import test_squared_relu_mlp as mlp
import torch
from helpers import CUDA, DTYPES, EMU_SM90, backend, emulator_counts
from test_qk_norm_rope import EPS

from persimmon_fast import ops

SIXTEEN_BIT = DTYPES[1:]
BACKENDS = [EMU_SM90, CUDA]
# rows, k, n: one k-tile of 64, as many as stages, more than twice that; tails in each dimension; one row tile, two, and
# an odd number of them; every width
SHAPES = [
    (17, 8, 8), (64, 64, 64), (65, 256, 72), (127, 384, 128), (128, 400, 136), (129, 832, 128), (257, 72, 256),
    (300, 520, 264), (130, 600, 648), (600, 136, 520), (20, 64, 1544),
]  # fmt: skip
WIDTHS = {(64, 64): 128, (130, 648): 192, (20, 1544): 256, (600, 520): 192}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
def test_linear_residual(name, dtype, rows, k, n):
    with backend(name) as device:
        linear.check(name, *linear.inputs(rows, k, n, dtype, device))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("neuron_major", [True, False])
@pytest.mark.parametrize(
    ("rows", "hidden", "intermediate"), [(17, 8, 64), (129, 64, 832), (70, 328, 392), (300, 520, 136)]
)
def test_squared_relu_mlp(name, dtype, neuron_major, rows, hidden, intermediate):
    with backend(name) as device:
        mlp.check(name, mlp.inputs(rows, hidden, intermediate, dtype, neuron_major, device), "sm_90a")


# tokens, hidden_size, num_heads, head_dim, rotary_dim, norm
QKV_CASES = [
    (17, 64, 1, 64, 32, "shared"), (130, 264, 3, 64, 32, "per_head"), (64, 832, 2, 64, 32, None),
    (257, 72, 4, 64, 32, "shared"), (33, 136, 2, 128, 64, "per_head"), (140, 72, 5, 128, 64, "shared"),
]  # fmt: skip


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("case", QKV_CASES, ids=str)
def test_qkv_norm_rope(name, dtype, case):
    with backend(name) as device:
        args = qkv.to(device, qkv.inputs(*case[:5], dtype, case[5]))
        qkv.check(args, case[2], ops.qkv_norm_rope(*args, EPS, case[2]), f"{name} {case}")


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "rows", "k", "n"),
    [(torch.bfloat16, 129, 600, 72), (torch.float16, 300, 328, 520), (torch.bfloat16, 130, 328, 648)],
    ids=str,
)
def test_sanitized_linear_residual(name, dtype, rows, k, n):
    with backend(name) as device:
        args = linear.inputs(rows, k, n, dtype, device)
        linear.check(name, *args)
        linear.check(name, args[0], args[1], None, args[3])


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "neuron_major", "rows", "hidden", "intermediate"),
    [(torch.bfloat16, True, 140, 136, 600), (torch.float16, False, 33, 72, 584), (torch.float16, True, 129, 264, 328)],
    ids=str,
)
def test_sanitized_squared_relu_mlp(name, dtype, neuron_major, rows, hidden, intermediate):
    with backend(name) as device:
        mlp.check(name, mlp.inputs(rows, hidden, intermediate, dtype, neuron_major, device), "sm_90a")


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("tokens", "head_dim", "page_size"), [(33, 64, 16), (140, 128, 8)])
def test_sanitized_paged_qkv(name, tokens, head_dim, page_size):
    qkv.test_paged_writes_its_slots_and_nothing_else(name, torch.bfloat16, tokens, head_dim, page_size)


@pytest.mark.parametrize("name", [EMU_SM90])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_uses_wgmma_and_no_bank_conflicts(name, dtype):
    """In the mlp ldmatrix reads what TMA wrote."""
    with backend(name) as device:
        counts = [
            emulator_counts(lambda: ops.linear_residual(*linear.inputs(64, 64, 64, dtype, device))),
            emulator_counts(lambda: mlp.run(*mlp.inputs(130, 136, 264, dtype, True, device))),
            emulator_counts(lambda: ops.qkv_norm_rope(*qkv.inputs(64, 64, 1, 64, 32, dtype, "shared"), EPS, 1)),
        ]
    for count in counts:
        assert count["wgmmas"] > 0
        assert count["mmas"] == 0
        assert count["ldmatrix_wavefronts"] == count["ldmatrix_wavefronts_ideal"]
        assert count["stmatrix_wavefronts"] == count["stmatrix_wavefronts_ideal"] > 0
    assert counts[0]["blocks"] == 2  # a cluster


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU_SM90])
def test_every_tile_is_computed_once(name):
    """600 rows are 10 warpgroups of 64, 520 columns 3 tiles of 192, 136 of k 3 stages of 4 products."""
    with backend(name) as device:
        args = linear.inputs(600, 136, 520, torch.bfloat16, device)
        assert emulator_counts(lambda: linear.check(name, *args))["wgmmas"] == 10 * 3 * 3 * 4


@pytest.mark.parametrize("name", [EMU_SM90])
def test_what_tma_cannot_address_runs_the_other_kernels(name):
    """Rows that are no multiples of 16 bytes apart, or one row many times; a rotary_dim that splits blocks of 8 columns
    over threads."""
    with backend(name) as device:
        for shape in ((20, 20, 64), (20, 64, 20)):
            counts = emulator_counts(lambda shape=shape: linear.check(
                name, *linear.inputs(*shape, torch.bfloat16, device)))  # fmt: skip
            assert counts["wgmmas"] == 0
            assert counts["mmas"] > 0
        x, weight, bias, residual = linear.inputs(20, 64, 64, torch.bfloat16, device)
        for moved in (x, weight, residual):
            wide = moved.new_empty(moved.numel() + 1)[1:].view(moved.shape).copy_(moved)
            args = [wide if t is moved else t for t in (x, weight, bias, residual)]
            assert emulator_counts(lambda args=args: linear.check(name, *args))["wgmmas"] == 0
        expanded = x[:1].expand(20, -1)  # stride 0
        assert emulator_counts(lambda: linear.check(name, expanded, weight, bias, residual))["wgmmas"] == 0
        args = qkv.inputs(20, 64, 1, 64, 30, torch.bfloat16, "shared")
        assert emulator_counts(lambda: ops.qkv_norm_rope(*args, EPS, 1))["wgmmas"] == 0


@pytest.mark.parametrize("name", [EMU_SM90])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_a_row_has_the_same_bits_in_every_batch_and_run(name, dtype):
    """Wherever it lies in a tile, and whatever the tile's width."""
    with backend(name) as device:
        x, weight, bias, residual = linear.inputs(600, 136, 520, dtype, device)
        whole = linear.check(name, x, weight, bias, residual)
        for begin, end in ((0, 600), (0, 17), (100, 130), (583, 600)):
            part = ops.linear_residual(x[begin:end], weight, bias, residual[begin:end])
            assert torch.equal(part, whole[begin:end]), (begin, end)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_nan_stays_in_its_row_and_column(name, dtype):
    with backend(name) as device:
        x, weight, bias, residual = linear.inputs(140, 72, 136, dtype, device)
        nan = float("nan")
        x[0, 71], weight[7, 5], residual[3, 135], x[139, 0] = nan, nan, nan, nan
        out = ops.linear_residual(x, weight, bias, residual)
        expected = torch.zeros_like(out, dtype=torch.bool)
        expected[0], expected[139], expected[:, 7], expected[3, 135] = True, True, True, True
        assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_fp16_squares_do_not_overflow(name):
    """Rows of very different magnitudes in one tile: each has its own scale."""
    with backend(name) as device:
        args = list(mlp.inputs(40, 64, 136, torch.float16, True, device))
        args[0] *= torch.logspace(-3, 2, 40, device=device).half()[:, None]
        args[5] = None
        out = mlp.run(*args)
        assert out.isfinite().all()
        expected = mlp.expected(args)
        for row in range(40):
            error = (out[row].double() - expected[row]).abs().max()
            assert error <= 4e-3 * expected[row].abs().max() + 1e-3, row


TILE_CHOICE = """
#include "csrc/cuda/gemm_sm90_tile.h"
using namespace persimmon_fast::cuda;
static_assert(step_clocks_sm90(256) == 256 && step_clocks_sm90(192) == 224 && step_clocks_sm90(128) == 192);
// Persimmon-8B on 132 multiprocessors, 66 clusters: 512 rows ...
static_assert(choose_block_n_sm90(512, 12288, 132) == 192, "128 clusters: two rounds, nearly full");
static_assert(choose_block_n_sm90(512, 4096, 132) == 128);
static_assert(choose_block_n_sm90(512, 16384, 132) == 256);
// ... and 2,048 and 16,384
static_assert(choose_block_n_sm90(2048, 12288, 132) == 256);
static_assert(choose_block_n_sm90(2048, 4096, 132) == 256);
static_assert(choose_block_n_sm90(2048, 16384, 132) == 256);
static_assert(choose_block_n_sm90(16384, 4096, 132) == 256);
static_assert(choose_block_n_sm90(512, 12288, 132, 128) == 256, "heads of 128 do not fit 192");
static_assert(choose_block_n_sm90(17, 64, 1) != 0);
static_assert(num_cluster_tiles(1, 1, 256) == 1 && num_cluster_tiles(257, 257, 256) == 4);
// The tests' shapes on the emulator's 8 multiprocessors.
WIDTHS
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_tile_choice(tmp_path):
    source = tmp_path / "tile_choice.cpp"
    widths = [f"static_assert(choose_block_n_sm90({m}, {n}, 8) == {width});" for (m, n), width in WIDTHS.items()]
    source.write_text(TILE_CHOICE.replace("WIDTHS", "\n".join(widths)))
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{Path(__file__).resolve().parents[1]}", str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
