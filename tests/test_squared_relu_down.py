"""The CUDA kernel that reads only the active neurons' rows of the down weight, against the reference in fp64: which
neurons are active is made by hand."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

import emulator
import pytest
import torch
from helpers import CUDA, DTYPES, EMU, assert_within_contract, backend, emulator_counts, randn
from test_squared_relu_mlp import expected, plain, run
from test_stream import dependent_launches
from torch import Tensor

ROWS = [1, 2, 8, 9, 16]  # one group of rows (fp32: to four), two, all
FEW = [(torch.bfloat16, 1), (torch.float16, 9), (torch.float32, 3)]
SCHEDULES = ["fifo", "reverse", "random", "warp", "pct"]


def with_activations(z: Tensor, hidden: int, dtype: torch.dtype, device: str) -> tuple[Tensor | None, ...]:
    """Arguments of squared_relu_mlp whose pre-activations are z [rows, intermediate_size], rounded to dtype."""
    rows, intermediate = z.shape
    assert rows <= hidden
    up_weight = torch.zeros(intermediate, hidden, dtype=dtype)
    up_weight[:, :rows] = z.t().to(dtype)
    return (
        torch.eye(rows, hidden, dtype=dtype).to(device),
        up_weight.to(device),
        None,
        randn(intermediate, hidden, dtype=dtype, seed=4, scale=0.1).to(device).t(),
        randn(hidden, dtype=dtype, seed=5).to(device),
        randn(rows, hidden, dtype=dtype, seed=6).to(device),
    )


def activations(rows: int, intermediate: int, active: Iterable[int], share: float = 1.0) -> Tensor:
    """Negative but at the neurons `active`, where a share of the rows, and one row at least, is positive."""
    z = -randn(rows, intermediate, seed=1).abs() - 0.1
    generator = torch.Generator().manual_seed(2)
    chosen = torch.tensor(sorted(active), dtype=torch.long)
    on = torch.rand(rows, len(chosen), generator=generator) < share
    on[torch.arange(len(chosen)) % rows, torch.arange(len(chosen))] = True
    z[:, chosen] = torch.where(on, -z[:, chosen], z[:, chosen])
    return z


def every(intermediate: int, share_of_zeros: float) -> list[int]:
    kept = torch.rand(intermediate, generator=torch.Generator().manual_seed(3)) >= share_of_zeros
    return kept.nonzero().flatten().tolist()


def check(name: str, args: tuple[Tensor | None, ...], what: str) -> Tensor:
    """Values, that inactive rows of the down weight are not read, and that a second run gives the same bits."""
    out = run(*args)
    assert_within_contract(out, expected(args), plain(*args), f"{name} {what}")
    z = args[0].float() @ args[1].float().t()
    poisoned = args[3].clone()
    poisoned[:, (z <= 0).all(0)] = float("nan")
    assert torch.equal(run(*args[:3], poisoned, *args[4:]), out), what
    return out


PATTERNS = {
    "0 %": lambda n: range(n),
    "50 %": lambda n: every(n, 0.5),
    "90 %": lambda n: every(n, 0.9),
    "95 %": lambda n: every(n, 0.95),
    "99 %": lambda n: every(n, 0.99),
    "100 %": lambda n: [],
    "the first": lambda n: [0],
    "the last": lambda n: [n - 1],
    "one unit": lambda n: range(min(n, 64), min(n, 128)),
    "one mask and the tail": lambda n: [*range(min(n, 32)), *range(n - n % 32, n)],
    "every 33rd": lambda n: range(0, n, 33),
}


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patterns(name, dtype, rows, pattern):
    with backend(name) as device:
        for intermediate in (1, 33, 300):
            z = activations(rows, intermediate, PATTERNS[pattern](intermediate), 0.6)
            check(name, with_activations(z, 88, dtype, device), f"{pattern} of {intermediate}")


# Five slices, so one part each on the emulator's 8 multiprocessors: the rings of the list (four segments) and of the
# activations (two) wrap around, and the last step has one neuron.
@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU])
@pytest.mark.parametrize(
    ("dtype", "rows", "hidden", "active"),
    [(torch.bfloat16, 1, 1048, 1041), (torch.float16, 9, 1032, 529), (torch.float32, 5, 513, 521)],
    ids=str,
)
def test_segments(name, dtype, rows, hidden, active):
    with backend(name) as device:
        intermediate = active + active // 3
        chosen = torch.randperm(intermediate, generator=torch.Generator().manual_seed(8))[:active].tolist()
        check(name, with_activations(activations(rows, intermediate, chosen), hidden, dtype, device), "segments")


# What the sanitizers repeat: eight parts, both load paths, an empty part, and none but empty ones.
@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize(("hidden", "active"), [(72, 257), (65, 7), (24, 0)])
@pytest.mark.parametrize(("dtype", "rows"), FEW, ids=str)
def test_sanitized(name, dtype, rows, hidden, active):
    with backend(name) as device:
        args = with_activations(activations(rows, 400, range(100, 100 + active), 0.5), hidden, dtype, device)
        assert_within_contract(run(*args), expected(args), plain(*args), f"{name} {active} active")


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("hidden", [24, 65, 520])
@pytest.mark.parametrize(("dtype", "rows"), FEW, ids=str)
def test_hidden_sizes_and_lengths_around_a_step(name, dtype, rows, hidden):
    with backend(name) as device:
        for active in (0, 1, 15, 16, 17, 255, 257):
            z = activations(rows, 400, range(100, 100 + active), 0.5)
            check(name, with_activations(z, hidden, dtype, device), f"{active} active")


@pytest.mark.parametrize("name", [EMU])
@pytest.mark.parametrize("async_policy", ["late", "early", "random"])
@pytest.mark.parametrize("sched", SCHEDULES)
@pytest.mark.parametrize(("dtype", "rows"), FEW, ids=str)
def test_schedules_change_no_bit(name, dtype, rows, sched, async_policy):
    with backend(name) as device:
        args = with_activations(activations(rows, 500, every(500, 0.4)), 300, dtype, device)
        clean = run(*args)
        configure = torch.ops.persimmon_fast_emu.configure
        try:
            for resident in (1, 3, 0):
                configure(sched, async_policy, 5, resident)
                assert torch.equal(run(*args), clean), resident
        finally:
            configure("fifo", "late", 1, 1)


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize(("dtype", "rows"), FEW, ids=str)
def test_calls_leave_nothing_behind(name, dtype, rows):
    """Different sizes in turn, each with the bits of its first call."""
    with backend(name) as device:
        calls = [
            with_activations(activations(rows, size, every(size, 0.7)), hidden, dtype, device)
            for size, hidden in ((200, 64), (33, 520), (500, 88))
        ]
        first = [run(*args) for args in calls]
        for _ in range(2):
            for args, out in zip(calls, first, strict=True):
                assert torch.equal(run(*args), out)


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activity_of_one_row_alone(name, dtype):
    """Rows 0 to 15 have their own neurons, row 15 none: what another row needs adds exactly nothing."""
    with backend(name) as device:
        z = torch.full((16, 480), -1.0)
        for row in range(15):
            z[row, 32 * row : 32 * row + 32] = randn(32, seed=row).abs() + 0.5
        args = with_activations(z, 100, dtype, device)
        out = check(name, args, "one row each")
        assert torch.equal(out[15], (args[4].float() + args[5][15].float()).to(dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_active_and_negative_zero_is_not(name, dtype):
    with backend(name) as device:
        x, up_weight, _, down_weight, down_bias, residual = with_activations(
            activations(3, 200, [10, 150]), 72, dtype, device
        )
        up_bias = torch.zeros(200, dtype=dtype, device=device)
        up_weight[77], up_bias[77] = 0.0, -0.0
        poisoned = down_weight.clone()
        poisoned[:, 77] = float("nan")
        args = (x, up_weight, up_bias, poisoned, down_bias, residual)
        assert torch.equal(run(*args), run(*args[:3], down_weight, *args[4:]))
        up_weight[199, 1] = float("nan")  # 0 * NaN in the other rows: neuron 199 is NaN in all of them
        assert run(*args).isnan().all()
        up_weight[199, 1] = float("inf")
        x[0], x[2] = x[0] + 1e-3, x[2] + 1e-3  # inf in every row, not 0 * inf
        assert not run(*args).isfinite().any()


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_inf_in_the_down_weight_reaches_rows_whose_neuron_is_zero(name, dtype):
    """As the CPU kernel does: rows of active neurons are multiplied for every row of the batch, and 0 * inf is NaN."""
    with backend(name) as device:
        args = with_activations(activations(2, 64, [5]), 40, dtype, device)
        args[1][5, 1] = -1.0  # active in row 0 alone
        args[3][7, 5] = float("inf")
        out = run(*args)
        assert out[0, 7] == float("inf")
        assert out[1, 7].isnan()
        rest = torch.ones(40, dtype=torch.bool)
        rest[7] = False
        assert out[:, rest].isfinite().all()


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU, CUDA])
def test_fp16_scale_of_a_row_comes_from_all_of_its_neurons(name):
    """The largest activation in any mask, warp or row: 20,000 would overflow under the scale of the others."""
    with backend(name) as device:
        for rows, place in ((1, 31), (3, 599), (9, 300), (16, 0)):
            z = activations(rows, 600, every(600, 0.9)) / 8
            z[rows - 1, place] = 20000.0
            args = with_activations(z, 64, torch.float16, device)
            args = (*args[:3], args[3] * 2**-13, *args[4:])
            out, exact = run(*args), expected(args)
            assert out.isfinite().all()
            wide = tuple(None if t is None else t.float() for t in args)
            assert_within_contract(out, exact, plain(*wide).half(), f"{name} {rows} rows, neuron {place}")


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize(("dtype", "rows"), FEW, ids=str)
def test_strides_and_alignment_change_no_bit(name, dtype, rows):
    with backend(name) as device:
        args = with_activations(activations(rows, 300, every(300, 0.8)), 264, dtype, device)
        out = check(name, args, "contiguous")
        for padding in (8, 3):  # whole 16-byte pieces, and not
            wide = torch.full((300, 264 + padding), float("nan"), dtype=dtype, device=device)
            wide[:, :264] = args[3].t()
            assert torch.equal(run(*args[:3], wide[:, :264].t(), *args[4:]), out), padding
        odd = (args[0], args[1], None, args[3][:261], args[4][:261], args[5][:, :261])
        with pytest.raises(ValueError, match="down_weight"):  # the op has one hidden_size: cut all of them
            run(*odd)
        x, up_weight = args[0][:, :261], args[1][:, :261]
        assert torch.equal(run(x, up_weight, None, args[3][:261], args[4][:261], args[5][:, :261]), out[:, :261])


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU])
@pytest.mark.parametrize(("dtype", "rows"), FEW, ids=str)
def test_waits_for_what_it_reads(name, dtype, rows):
    """Only under ThreadSanitizer can a dependent kernel see less than its predecessor has written."""
    with backend(name) as device:
        args = with_activations(activations(rows, 200, every(200, 0.5)), 40, dtype, device)
        clean = run(*args)  # its launches are ordinary: the arguments are known to those that follow
        with dependent_launches():
            assert torch.equal(run(*args), clean)


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_up_to_16_rows_skip(name, dtype):
    with backend(name) as device:
        for rows in (16, 17):
            args = with_activations(activations(rows, 96, range(40)), 32, dtype, device)
            args[3][:, 50] = float("nan")
            assert run(*args).isfinite().all() == (rows == 16)


@pytest.mark.parametrize("name", [EMU])
@pytest.mark.parametrize("rows", [1, 9])
def test_two_launches_without_bank_conflicts(name, rows):
    with backend(name) as device:
        args = with_activations(activations(rows, 500, every(500, 0.3)), 300, torch.bfloat16, device)
        counts = emulator_counts(lambda: run(*args))
    assert counts["launches"] == 2
    assert counts["ldmatrix_wavefronts"] == counts["ldmatrix_wavefronts_ideal"] > 0


SHAPES = """
#include "csrc/cuda/squared_relu_down.h"
using namespace persimmon_fast::cuda;
using persimmon_fast::DType;
constexpr bool is(const DownShape& s, int slices, int parts, int groups) {
  return s.num_slices == slices && s.num_parts == parts && s.num_groups == groups;
}
static_assert(is(down_shape(DType::kBFloat16, 1, 4096, 132), 16, 8, 1));
static_assert(is(down_shape(DType::kFloat16, 8, 4096, 108), 16, 6, 1));
static_assert(is(down_shape(DType::kFloat16, 9, 4096, 128), 16, 8, 2));
static_assert(is(down_shape(DType::kFloat32, 4, 4096, 132), 32, 4, 1));
static_assert(is(down_shape(DType::kFloat32, 9, 4096, 132), 32, 4, 4), "no kernel for three groups");
static_assert(is(down_shape(DType::kBFloat16, 16, 1, 8), 1, 8, 2));
static_assert(is(down_shape(DType::kBFloat16, 1, 257, 8), 2, 4, 1));
static_assert(is(down_shape(DType::kBFloat16, 1, 8192, 8), 32, 1, 1), "more slices than multiprocessors");
"""


@pytest.mark.skipif(emulator.missing() is not None, reason=f"no emulator: {emulator.missing()}")
def test_blocks_fill_a_gpu_once(tmp_path):
    source = tmp_path / "shapes.cpp"
    source.write_text(SHAPES)
    include = ["-I", str(emulator.ROOT), "-isystem", str(emulator.cuda_include())]
    subprocess.run(["g++", "-std=c++20", "-fsyntax-only", *include, str(source)], check=True)
