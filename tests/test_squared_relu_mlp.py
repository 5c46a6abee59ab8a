"""squared_relu_mlp on every backend, against the reference in fp64."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, CUDA, DTYPES, EMU, ISAS, assert_within_contract, backend, cpu_isa, emulator_counts, randn

from persimmon_fast import ops, reference

NUM_ROWS = [0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 33]
# hidden_size, intermediate_size: tails of vectors, of groups of 8 neurons, of column blocks
SIZES = [(1, 1), (7, 65), (64, 7), (65, 64), (130, 257)]
LONG_SIZES = [(4099, 20), (20, 4096)]
# rows, hidden_size, intermediate_size of the CUDA kernels' tiles: see test_linear_residual.py. The last three take the
# large tile in the second product, the first product or both.
TILE_SHAPES = [
    (1, 8, 8), (65, 72, 296), (63, 56, 136), (64, 32, 128), (33, 65, 301), (1, 63, 31),
    (256, 384, 40), (256, 40, 384), (129, 328, 328),
]  # fmt: skip
NAMES = ("x", "up_weight", "up_bias", "down_weight", "down_bias", "residual")


def inputs(
    rows: int, hidden: int, intermediate: int, dtype: torch.dtype, neuron_major: bool = True, device: str = "cpu"
):
    """The arguments NAMES."""
    down_weight = randn(intermediate, hidden, dtype=dtype, seed=4, scale=intermediate**-0.5).to(device).t()
    return (
        randn(rows, hidden, dtype=dtype, seed=1).to(device),
        randn(intermediate, hidden, dtype=dtype, seed=2, scale=hidden**-0.5).to(device),
        randn(intermediate, dtype=dtype, seed=3).to(device),
        down_weight if neuron_major else down_weight.contiguous(),
        randn(hidden, dtype=dtype, seed=5).to(device),
        randn(rows, hidden, dtype=dtype, seed=6).to(device),
    )


def run(*args):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*zeros cannot be skipped")
        return ops.squared_relu_mlp(*args)


def expected(args):
    return reference.squared_relu_mlp(*(None if t is None else t.double() for t in args))


def plain(x, up_weight, up_bias, down_weight, down_bias, residual):
    """The same formula in plain torch, every step rounded to the dtype of x."""
    out = F.linear(F.linear(x, up_weight, up_bias).relu().square(), down_weight, down_bias)
    return out if residual is None else residual + out


def skips_by_list(name, rows, neuron_major):
    """Whether the CUDA kernel for few rows runs: its sums follow the list of neurons that are active in any row, so a
    row's bits depend on the other rows."""
    return name in ("emu", "cuda") and rows <= 16 and neuron_major


def check(name, args, what):
    """On the device of the arguments, inside `with backend(name)`."""
    out = run(*args)
    assert out.dtype == args[0].dtype
    assert_within_contract(out, expected(args), plain(*args), f"{name} {what}")
    return out


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neuron_major", [True, False])
@pytest.mark.parametrize("rows", NUM_ROWS)
def test_row_counts(name, dtype, neuron_major, rows):
    with backend(name) as device:
        check(name, inputs(rows, 100, 203, dtype, neuron_major, device), f"{rows} rows")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "intermediate"), SIZES)
def test_sizes(name, dtype, hidden, intermediate):
    with backend(name) as device:
        for rows, neuron_major in ((1, True), (3, False), (16, True)):
            args = inputs(rows, hidden, intermediate, dtype, neuron_major, device)
            check(name, args, f"{rows} x {hidden} x {intermediate}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "intermediate"), LONG_SIZES)
def test_long_sizes(isa, dtype, hidden, intermediate):
    with cpu_isa(isa):
        for rows, neuron_major in ((1, True), (3, False), (16, True)):
            check(isa, inputs(rows, hidden, intermediate, dtype, neuron_major), f"{rows} x {hidden} x {intermediate}")


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neuron_major", [True, False])
@pytest.mark.parametrize(("rows", "hidden", "intermediate"), TILE_SHAPES)
def test_tiles_and_pipeline_lengths(name, dtype, neuron_major, rows, hidden, intermediate):
    with backend(name) as device:
        check(name, inputs(rows, hidden, intermediate, dtype, neuron_major, device), "tiles")


@pytest.mark.parametrize("name", [CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neuron_major", [True, False])
def test_large_tiles_on_a_gpu(name, dtype, neuron_major):
    with backend(name) as device:
        check(name, inputs(2100, 4136, 4200, dtype, neuron_major, device), "large tiles")


# What the sanitizers repeat: both memory orders, both tiles and load paths, more k-tiles than 2 * stages + 1.
@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU])
@pytest.mark.parametrize(
    ("dtype", "rows", "hidden", "intermediate", "neuron_major"),
    [
        (torch.float16, 33, 72, 296, True),
        (torch.bfloat16, 65, 24, 40, False),
        (torch.bfloat16, 17, 65, 301, True),
        (torch.float16, 129, 328, 40, True),
        (torch.float32, 18, 70, 50, True),
    ],
    ids=str,
)
def test_sanitized(name, dtype, rows, hidden, intermediate, neuron_major):
    with backend(name) as device:
        check(name, inputs(rows, hidden, intermediate, dtype, neuron_major, device), "sanitized")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("neuron_major", [True, False])
@pytest.mark.parametrize("rows", [2, 20])
def test_no_bias_no_residual_and_strided_tensors(name, neuron_major, rows):
    with backend(name) as device:
        x, up_weight, up_bias, down_weight, _, residual = inputs(rows, 140, 90, torch.bfloat16, neuron_major, device)
        part = slice(20, 120)
        args = (x[:, part], up_weight[:80, part], up_bias[:80], down_weight[part, 3:83], None, residual[:, part])
        out = check(name, args, "strided")
        assert torch.equal(out, run(*(None if t is None else t.contiguous() for t in args[:3]), *args[3:]))
        check(name, (*args[:2], None, args[3], None, None), "no bias")


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neuron_major", [True, False])
def test_alignment_changes_no_bit(name, dtype, neuron_major):
    with backend(name) as device:
        args = inputs(5, 72, 136, dtype, neuron_major, device)
        out = run(*args)
        for moved in range(6):
            size = args[moved].numel() + 1
            wide = args[moved].new_empty(size)[1:].as_strided(args[moved].shape, args[moved].stride(), 1)
            wide.copy_(args[moved])
            assert wide.data_ptr() % 16 != 0
            assert torch.equal(run(*args[:moved], wide, *args[moved + 1 :]), out), NAMES[moved]


def with_zeros(args, share: float):
    """The same arguments with a bias that switches about `share` of the neurons off for every row."""
    off = (torch.rand(args[2].shape, generator=torch.Generator().manual_seed(7)) < share).to(args[2].device)
    return (*args[:2], torch.where(off, -1000.0, args[2].float() + 1000 * (share == 0)).to(args[2].dtype), *args[3:])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_inactive_neurons_are_not_read(name, dtype, share, rows):
    with backend(name) as device:
        args = with_zeros(inputs(rows, 150, 300, dtype, device=device), share)
        if dtype == torch.float16 and share == 0.0:  # plain torch overflows: a yardstick with finite squares
            args = (*args[:2], args[2] * 0.1, *args[3:])
        inactive = ~(F.linear(args[0].float(), args[1].float(), args[2].float()) > 0).any(0)
        assert int(inactive.sum()) >= share * 200
        clean = check(name, args, f"{share} zeros")
        poisoned = args[3].clone()  # keeps the strides
        poisoned[:, inactive] = float("nan")
        assert torch.equal(run(*args[:3], poisoned, *args[4:]), clean)
        if share == 1.0:
            assert torch.equal(clean, (args[4].float() + args[5].float()).to(dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("neuron_major", [True, False])
@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_reach_the_output(name, neuron_major, rows, dtype):
    with backend(name) as device:
        args = inputs(rows, 70, 90, dtype, neuron_major, device)
        clean, exact, yardstick = run(*args), expected(args), plain(*args)
        x, up_weight, up_bias, down_weight, down_bias, residual = args
        x[0, 69], x[1, 3] = float("nan"), float("inf")
        weight = up_weight.clone()
        weight[:, 3] = weight[:, 3].abs() + 0.1  # every neuron of row 1 is inf, not 0 or inf - inf
        out = run(x, weight, up_bias, down_weight, down_bias, residual)
        assert out[0].isnan().all()
        assert not out[1].isfinite().any()
        assert out[2:].isfinite().all()
        others = run(*args)[2:]
        if skips_by_list(name, rows, neuron_major):
            assert_within_contract(others, exact[2:], yardstick[2:], f"{name} other rows")
        else:
            assert torch.equal(others, clean[2:])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 20])
def test_all_zero_rows_and_negative_zeros(name, dtype, rows):
    with backend(name) as device:
        x, up_weight, up_bias, down_weight, down_bias, residual = inputs(rows, 40, 72, dtype, device=device)
        out = run(x, up_weight, torch.full_like(up_bias, -1000.0), down_weight, down_bias, residual)
        assert torch.equal(out, (down_bias.float() + residual.float()).to(dtype))
        out = run(x * 0, up_weight * 0, torch.full_like(up_bias, -0.0), down_weight, down_bias, residual)
        assert torch.equal(out, (down_bias.float() + residual.float()).to(dtype))


def with_largest(args, row: int, largest: float):
    """x scaled so that the largest pre-activation of a row is `largest`; no up bias."""
    x = args[0].clone()
    x[row] *= largest / float(F.linear(x[row].float(), args[1].float()).max())
    return (x, args[1], args[2] * 0, *args[3:])


def scaled_plain(args, shift: int):
    """Plain fp16 with the hidden activation divided by 2^shift before it is squared, without residual and bias."""
    hidden = (F.linear(args[0], args[1], args[2]).relu().float() * 2.0**-shift).square().half()
    out = (F.linear(hidden.float(), args[3].float()) * 4.0**shift).half()
    assert out.isfinite().all()  # else everything would be within its error
    return out


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("neuron_major", [True, False])
def test_fp16_squares_do_not_overflow_below_4000(name, rows, neuron_major):
    with backend(name) as device:
        args = with_largest(inputs(rows, 64, 200, torch.float16, neuron_major, device), 0, 3990)
        args = (*args[:3], args[3] * 2**-8, *args[4:])
        assert 3900 < float(F.linear(args[0].float(), args[1].float()).max()) < 4000
        out = run(*args)
        exact = expected(args)
        assert out.isfinite().all()
        # Plain fp16 is inf here; the yardstick rounds the hidden activation divided by 2^4 instead.
        yardstick = scaled_plain(args, 4) + args[4] + args[5]
        assert_within_contract(out[:1], exact[:1], yardstick[:1], f"{name} scaled row")
        assert_within_contract(out[1:], exact[1:], plain(*args)[1:], f"{name} other rows")


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("neuron_major", [True, False])
def test_fp16_keeps_every_magnitude(name, neuron_major):
    """Rows whose largest activation runs from 2^-10, where plain fp16 squares have 4 bits, to 30,000."""
    with backend(name) as device:
        args = inputs(8, 64, 200, torch.float16, neuron_major, device)
        largest = [30000.0, 4000.0, 300.0, 255.0, 1.0, 2.0**-4, 2.0**-7, 2.0**-10]
        for row, value in enumerate(largest):
            args = with_largest(args, row, value)
        for row, value in enumerate(largest):
            batch = (args[0], args[1], args[2], (args[3] / value).to(torch.float16), None, None)
            alone = (args[0][row : row + 1], *batch[1:])
            shift = max(-15, min(8, round(torch.tensor(value).log2().floor().item()) - 7))
            actual, exact = run(*batch)[row : row + 1], expected(alone)
            assert exact.isfinite().all()
            assert_within_contract(actual, exact, scaled_plain(alone, shift), f"{name} largest {value}")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neuron_major", [True, False])
def test_a_row_has_the_same_bits_in_every_batch_and_run(name, dtype, neuron_major):
    with backend(name) as device:
        sizes = (333, 700) if name in ISAS else (40, 136)
        args = with_zeros(inputs(16, *sizes, dtype, neuron_major, device), 0.3)

        def part(begin: int, end: int):
            return run(args[0][begin:end], *args[1:5], args[5][begin:end])

        singles = torch.cat([part(i, i + 1) for i in range(16)])
        for rows in (2, 3, 8, 16):
            batch = part(0, rows)
            assert torch.equal(batch, part(0, rows)), rows
            if skips_by_list(name, rows, neuron_major):
                check(name, (args[0][:rows], *args[1:5], args[5][:rows]), f"{rows} rows")
            else:
                assert torch.equal(batch, singles[:rows]), rows


@pytest.mark.parametrize("name", [EMU])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("neuron_major", [True, False])
def test_the_tile_changes_no_bit(name, dtype, neuron_major):
    with backend(name) as device:
        args = inputs(129, 328, 328, dtype, neuron_major, device)
        large = run(*args)
        rows = 17 if neuron_major else 1  # with fewer the zeros are skipped, in another order
        for part in (slice(0, rows), slice(100, 100 + rows), slice(129 - rows, 129)):
            assert torch.equal(large[part], run(args[0][part], *args[1:5], args[5][part]))


@pytest.mark.parametrize("name", [CUDA])
def test_runs_on_the_current_stream(name):
    with backend(name) as device:
        args = inputs(300, 1024, 4096, torch.float16, device=device)
        late = torch.zeros_like(args[0])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # a kernel on another stream would read the zeros
            late.copy_(args[0])
            out = run(late, *args[1:])
        stream.synchronize()
        assert torch.equal(out, run(*args))


@pytest.mark.parametrize("name", [EMU])
@pytest.mark.parametrize("neuron_major", [True, False])
@pytest.mark.parametrize(("rows", "hidden", "intermediate"), [(64, 64, 72), (129, 328, 40)])
def test_no_bank_conflicts(name, neuron_major, rows, hidden, intermediate):
    with backend(name) as device:
        args = inputs(rows, hidden, intermediate, torch.float16, neuron_major, device)
        counts = emulator_counts(lambda: run(*args))
    assert counts["launches"] == 2
    assert counts["ldmatrix_wavefronts"] == counts["ldmatrix_wavefronts_ideal"] > 0


def test_bits_do_not_depend_on_the_number_of_threads():
    args = inputs(3, 1000, 1500, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(ops.squared_relu_mlp(*args))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("neuron_major", [True, False])
def test_more_rows_than_one_pass_give_the_same_bits_twice(neuron_major):
    args = inputs(40, 100, 300, torch.bfloat16, neuron_major)
    with cpu_isa("scalar"):
        assert torch.equal(run(*args), run(*args))


def test_row_major_down_weight_warns_once():
    args = inputs(2, 20, 30, torch.float32, neuron_major=False)
    ops._warned.clear()
    with pytest.warns(UserWarning, match="zeros cannot be skipped"):
        ops.squared_relu_mlp(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.squared_relu_mlp(*args)
        ops.squared_relu_mlp(*args[:3], ops.to_neuron_major(args[3]), *args[4:])


def test_leading_dimensions():
    args = inputs(6, 40, 24, torch.float32)
    out = ops.squared_relu_mlp(args[0].view(2, 3, 40), *args[1:5], args[5].view(2, 3, 40))
    assert out.shape == (2, 3, 40)
    assert torch.equal(out.view(6, 40), ops.squared_relu_mlp(*args))


@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize("neuron_major", [True, False])
def test_opcheck(rows, neuron_major):
    args = inputs(rows, 24, 40, torch.float32, neuron_major)
    torch.library.opcheck(torch.ops.persimmon_fast.squared_relu_mlp.default, args)
    torch.library.opcheck(torch.ops.persimmon_fast.squared_relu_mlp.default, (*args[:2], None, args[3], None, None))


@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(3, 24).int()}, TypeError, "x must be float32, float16 or bfloat16, got Int"),
        ({"x": randn(24)}, ValueError, r"x must be \[num_rows, hidden_size\] .* got \[24\]"),
        ({"x": randn(3, 0)}, ValueError, r"x must have hidden_size > 0, got \[3, 0\]"),
        ({"x": randn(24, 20).t()}, ValueError, "x must have a last dimension of stride 1"),
        ({"up_weight": randn(40, 23)}, ValueError, r"up_weight must be .* = \[-1, 24\], got \[40, 23\]"),
        ({"up_weight": randn(0, 24)}, ValueError, r"up_weight must have intermediate_size > 0, got \[0, 24\]"),
        ({"up_weight": randn(24, 40).t()}, ValueError, "up_weight must have a last dimension of stride 1"),
        ({"up_weight": randn(40, 24).half()}, TypeError, "up_weight must be Float as x is, got Half"),
        ({"up_bias": randn(39)}, ValueError, r"up_bias must be \[intermediate_size\] = \[40\], got \[39\]"),
        ({"down_weight": randn(40, 24)}, ValueError, r"down_weight must be .* = \[24, 40\], got \[40, 24\]"),
        ({"down_weight": randn(24, 80)[:, ::2]}, ValueError, "down_weight must have a dimension of stride 1, got str"),
        ({"down_weight": randn(24, 40).half()}, TypeError, "down_weight must be Float as x is, got Half"),
        ({"down_bias": randn(40)}, ValueError, r"down_bias must be \[hidden_size\] = \[24\], got \[40\]"),
        ({"residual": randn(1, 24)}, ValueError, r"residual must be \[num_rows, hidden_size\] = \[\d+, 24\], got"),
        ({"residual": randn(3, 24).half()}, TypeError, "residual must be Float as x is, got Half"),
    ],
)
def test_errors_name_op_argument_expected_and_found(rows, change, error, match):
    args = dict(zip(NAMES, inputs(rows, 24, 40, torch.float32), strict=True)) | change
    with pytest.raises(error, match="^squared_relu_mlp: " + match):
        torch.ops.persimmon_fast.squared_relu_mlp(*(args[name] for name in NAMES))
