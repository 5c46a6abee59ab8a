"""Products of 1 to 16 rows, which stream the weight (csrc/cuda/stream.cuh), through linear_residual."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import emulator
import pytest
import torch
import torch.nn.functional as F
from helpers import CUDA, DTYPES, EMU, assert_within_contract, backend, randn
from torch import Tensor

from persimmon_fast import _C, decode_graph, ops, reference

# rows, in_features, out_features. 8 warps take steps of 128 bytes of k in turn, three in flight; the emulator's 8
# multiprocessors have a block each and take units of 16 rows in turn. So: one step; fewer steps than warps; one more;
# more than three per warp; one, several and an uneven number of units; x that does not fit in shared memory.
SHAPES = [
    (1, 8, 8), (3, 104, 200), (1, 31, 65), (2, 64, 16), (16, 72, 17), (5, 520, 129), (9, 511, 145), (8, 576, 384),
    (1, 2200, 40), (16, 2200, 40), (11, 2201, 33),
]  # fmt: skip


def inputs(rows: int, k: int, n: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    x, residual = randn(rows, k, dtype=dtype, seed=1), randn(rows, n, dtype=dtype, seed=4)
    weight, bias = randn(n, k, dtype=dtype, seed=2, scale=k**-0.5), randn(n, dtype=dtype, seed=3)
    return [t.to(device) for t in (x, weight, bias, residual)]


def check(name: str, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    out = ops.linear_residual(x, weight, bias, residual)
    expected = reference.linear_residual(x.double(), weight.double(), bias.double(), residual.double())
    plain = F.linear(x, weight, bias) + residual
    assert_within_contract(out, expected, plain, f"{name} {tuple(x.shape)} x {tuple(weight.shape)}")
    return out


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
def test_steps_units_and_tails(name, dtype, rows, k, n):
    with backend(name) as device:
        check(name, *inputs(rows, k, n, dtype, device))


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", range(1, 18))
def test_rows_around_the_switch(name, dtype, rows):
    with backend(name) as device:
        check(name, *inputs(rows, 200, 40, dtype, device))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU])
@pytest.mark.parametrize(
    ("dtype", "rows", "k", "n"),
    [
        (torch.bfloat16, 1, 648, 168),
        (torch.float16, 9, 1920, 40),
        (torch.float16, 3, 301, 33),
        (torch.bfloat16, 16, 2088, 24),
        (torch.float32, 11, 360, 136),
    ],
    ids=str,
)
def test_sanitized(name, dtype, rows, k, n):
    with backend(name) as device:
        check(name, *inputs(rows, k, n, dtype, device))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [104, 2048])
def test_a_row_has_the_bits_that_it_has_alone(name, dtype, k):
    """Also where it fits in shared memory alone, but not with the others, of 2,048 columns."""
    with backend(name) as device:
        x, weight, _, _ = inputs(16, k, 24, dtype, device)
        # Sums near zero beside the terms: another order of additions shows, also after the rounding.
        weight[:, k // 2 :] = -weight[:, : k // 2]
        x[:, k // 2 :] = x[:, : k // 2]
        residual = torch.zeros(16, 24, dtype=dtype, device=device)
        single = torch.cat([ops.linear_residual(x[i : i + 1], weight, None, residual[:1]) for i in range(16)])
        for rows in (2, 8, 9, 16):
            out = ops.linear_residual(x[:rows], weight, None, residual[:rows])
            assert torch.equal(out, single[:rows]), rows


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "k"), [(1, 296), (9, 2056), (16, 301)])
def test_neighbours_are_not_read(name, dtype, rows, k):
    """x and W between NaN: in front of and behind their rows and columns."""
    with backend(name) as device:
        n = 21
        x, weight, bias, residual = inputs(rows, k, n, dtype, device)
        wide = [torch.full((t.shape[0] + 16, k + 64), float("nan"), dtype=dtype, device=device) for t in (x, weight)]
        framed = [w[8 : 8 + t.shape[0], 32 : 32 + k].copy_(t) for w, t in zip(wide, (x, weight), strict=True)]
        assert torch.equal(ops.linear_residual(*framed, bias, residual), ops.linear_residual(x, weight, bias, residual))


@contextmanager
def dependent_launches() -> Iterator[None]:
    """Inside `with backend("emu")`: kernels may start before their predecessors end."""
    torch.ops.persimmon_fast_emu.set_dependent_launches(True)
    try:
        yield
    finally:
        torch.ops.persimmon_fast_emu.set_dependent_launches(False)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU])
@pytest.mark.parametrize("rows", [1, 16])
def test_dependent_kernels_wait_for_what_they_read(name, rows):
    """The second product reads what the first has written; only under ThreadSanitizer can it see less than that."""
    with backend(name) as device:
        x, *others = inputs(rows, 64, 64, torch.bfloat16, device)
        # These launches are ordinary: what was there before them is known to those that follow.
        expected = ops.linear_residual(ops.linear_residual(x, *others), *others)
        with dependent_launches():
            out = ops.linear_residual(ops.linear_residual(x, *others), *others)
        assert torch.equal(out, expected)


def test_kernels_start_early_in_a_captured_step_alone(monkeypatch):
    for name in ("graph_pool_handle", "Stream", "CUDAGraph", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    seen = []

    def step() -> None:
        seen.append(_C.set_dependent_launches(True))

    def failing_step() -> None:
        step()
        raise RuntimeError("no capture")

    capture = decode_graph.CudaGraphCapture(torch.device("cuda"))
    capture(step)
    assert _C.set_dependent_launches(False) is False
    with pytest.raises(RuntimeError, match="no capture"):
        capture(failing_step)
    assert _C.set_dependent_launches(False) is False
    assert seen == [True, True]


PLAN = """
#include "csrc/cuda/stream_plan.h"
using namespace persimmon_fast::cuda;
constexpr size_t kKb = 1024;
constexpr DeviceLimits a100{163 * kKb, 164 * kKb, false};
constexpr DeviceLimits ada{99 * kKb, 100 * kKb, false};
constexpr DeviceLimits h100{227 * kKb, 228 * kKb, true};
constexpr StreamPlan plan(int rows, int k, const DeviceLimits& limits, int unit = 64) {
  return plan_stream(rows, k, 2, unit, limits);
}
static_assert(kStreamRingBytes == 48 * kKb);
static_assert(stream_steps(4096, 2) == 64 && stream_steps(1, 2) == 1 && stream_steps(65, 2) == 2);
static_assert(stream_steps(33, 4) == 2);
// ring + partial sums + staged + x
static_assert(plan(1, 4096, h100).smem_bytes == (48 + 1 + 4 + 8) * kKb);
static_assert(plan(1, 4096, h100).x_in_shared && plan(1, 4096, h100).blocks_per_multiprocessor == 2);
static_assert(plan(1, 4096, a100).x_in_shared && plan(1, 4096, a100).blocks_per_multiprocessor == 2);
static_assert(plan(1, 4096, ada).x_in_shared && plan(1, 4096, ada).blocks_per_multiprocessor == 1);
static_assert(plan(16, 4096, h100).x_in_shared && plan(16, 4096, h100).blocks_per_multiprocessor == 1);
static_assert(plan(12, 4096, a100).x_in_shared && !plan(13, 4096, a100).x_in_shared);
static_assert(plan(5, 4096, ada).x_in_shared && !plan(6, 4096, ada).x_in_shared);
static_assert(!plan(1, 1 << 20, h100).x_in_shared && plan(1, 1 << 20, h100).blocks_per_multiprocessor == 2);
// What no plan may exceed, nor two blocks together.
constexpr bool fits(const DeviceLimits& limits) {
  for (int rows = 1; rows <= kStreamMaxRows; ++rows) {
    for (int k = 1; k < 20000; k += 977) {
      for (int unit = 16; unit <= 128; unit *= 2) {
        const StreamPlan p = plan(rows, k, limits, unit);
        if (p.smem_bytes > limits.smem_per_block) return false;
        if (p.blocks_per_multiprocessor * (p.smem_bytes + kKb) > limits.smem_per_multiprocessor) return false;
      }
    }
  }
  return true;
}
static_assert(fits(a100) && fits(ada) && fits(h100));
"""


@pytest.mark.skipif(
    shutil.which("g++") is None or emulator.cuda_include() is None, reason="needs g++ and CUDA's headers"
)
def test_plan(tmp_path):
    source = tmp_path / "plan.cpp"
    source.write_text(PLAN)
    include = [f"-I{emulator.ROOT}", "-isystem", str(emulator.cuda_include())]
    command = ["g++", "-std=c++17", "-fsyntax-only", *include, str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
