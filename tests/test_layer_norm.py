"""layer_norm and add_layer_norm on every backend, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, DTYPES, assert_within_contract, backend, randn

from persimmon_fast import ops, reference

EPS = 1e-5
# The last three: rows longer than what the CUDA kernel keeps in registers, whole and with tails.
SHAPES = [
    (1, 4096), (3, 4096), (5, 1), (4, 7), (2, 64), (7, 65), (1, 15), (33, 257), (0, 64), (5, 1025), (2, 4104),
    (2, 8200), (2, 9001), (1, 20000),
]  # fmt: skip


def inputs(rows: int, size: int, dtype: torch.dtype, offset: float = 0.0, device: str = "cpu"):
    x = randn(rows, size, dtype=dtype, seed=1) + offset
    return [t.to(device) for t in (x, randn(size, dtype=dtype, seed=2), randn(size, dtype=dtype, seed=3))]


def check(out, x, weight, bias, what):
    """out against the reference in fp64 of the same values."""
    expected = reference.layer_norm(x.double(), weight.double(), bias.double(), EPS)
    assert_within_contract(out, expected, F.layer_norm(x, weight.shape, weight, bias, EPS), what)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_matches_reference(name, dtype, rows, size):
    with backend(name) as device:
        x, weight, bias = inputs(rows, size, dtype, device=device)
        out = ops.layer_norm(x, weight, bias, EPS)
        assert out.device == x.device
        check(out, x, weight, bias, f"{name} {rows}x{size}")


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [100, 4096, 9001])
def test_residual_sum_is_rounded_before_the_norm(name, dtype, size):
    with backend(name) as device:
        x, weight, bias = inputs(6, size, dtype, device=device)
        residual = randn(6, size, dtype=dtype, seed=4, scale=30).to(device)
        out, total = ops.add_layer_norm(x, residual, weight, bias, EPS)
        assert torch.equal(total, x + residual)
        check(out, total, weight, bias, name)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
def test_large_mean_does_not_cancel(name):
    with backend(name) as device:
        x, weight, bias = inputs(4, 4096, torch.float32, offset=1000.0, device=device)
        check(ops.layer_norm(x, weight, bias, EPS), x, weight, bias, name)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_and_leading_dimensions(name, dtype):
    with backend(name) as device:
        wide = randn(2, 3, 200, dtype=dtype, seed=1).to(device)
        x, weight, bias = wide[:, :, 20:120], *(randn(100, dtype=dtype, seed=s).to(device) for s in (2, 3))
        out = ops.layer_norm(x, weight, bias, EPS)
        assert out.shape == x.shape
        assert torch.equal(out, ops.layer_norm(x.contiguous(), weight, bias, EPS))
        rows = wide[0, :, 20:120]  # row stride 200 reaches the kernel
        assert torch.equal(ops._kernel("layer_norm")(rows, weight, bias, EPS), out[0])


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 4096])
def test_alignment_changes_no_bit(name, dtype, size):
    with backend(name) as device:
        x, weight, bias = inputs(3, size, dtype, device=device)
        shifted = torch.empty(3 * size + 1, dtype=dtype, device=device)[1:].view(3, size).copy_(x)
        assert shifted.data_ptr() % 16 != 0
        assert torch.equal(ops.layer_norm(shifted, weight, bias, EPS), ops.layer_norm(x, weight, bias, EPS))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("size", [100, 4096])
def test_small_deviations_from_a_large_mean(name, size):
    """The fp32 mean is off by up to 3e-5, a third of a percent of these deviations."""
    with backend(name) as device:
        x = (1000 + 0.01 * randn(3, size, seed=1)).to(device)
        ones, zeros = torch.ones(size, device=device), torch.zeros(size, device=device)
        expected = reference.layer_norm(x.double(), ones.double(), zeros.double(), EPS)
        assert float((ops.layer_norm(x, ones, zeros, EPS) - expected).abs().max()) < 2e-5


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("size", [70, 5000])
def test_nan_and_inf_stay_in_their_row(name, size):
    with backend(name) as device:
        x, weight, bias = inputs(3, size, torch.float32, device=device)
        x[0, size - 1], x[1, 3] = float("nan"), float("inf")
        out = ops.layer_norm(x, weight, bias, EPS)
        assert out[0].isnan().all()
        assert out[1].isnan().any()
        assert out[2].isfinite().all()


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
def test_statistics_that_overflow_are_not_hidden(name):
    with backend(name) as device:
        x, weight, bias = inputs(1, 4096, torch.float32, device=device)
        out = ops.layer_norm(1e30 + 1e25 * x, weight, bias, EPS)  # inf - inf in the variance
        assert out.isnan().all()


@pytest.mark.parametrize("name", BACKENDS)
def test_same_bits_on_every_run_and_in_every_batch(name):
    with backend(name) as device:
        x, weight, bias = inputs(64, 4096, torch.bfloat16, device=device)
        out = ops.layer_norm(x, weight, bias, EPS)
        assert torch.equal(out, ops.layer_norm(x, weight, bias, EPS))
        assert torch.equal(out[5:6], ops.layer_norm(x[5:6], weight, bias, EPS))


@pytest.mark.parametrize("name", BACKENDS[-1:])
def test_runs_on_the_current_stream(name):
    with backend(name) as device:
        x, weight, bias = inputs(64, 4096, torch.bfloat16, device=device)
        expected = ops.layer_norm(x, weight, bias, EPS)
        late = torch.zeros_like(x)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # a kernel on another stream would read the zeros
            late.copy_(x)
            out = ops.layer_norm(late, weight, bias, EPS)
        stream.synchronize()
        assert torch.equal(out, expected)


def test_opcheck():
    x, weight, bias = inputs(3, 40, torch.float32)
    torch.library.opcheck(torch.ops.persimmon_fast.layer_norm.default, (x, weight, bias, EPS))
    torch.library.opcheck(torch.ops.persimmon_fast.add_layer_norm.default, (x, x, weight, bias, EPS))


def test_gradient_runs_the_reference_with_one_warning():
    x, weight, bias = inputs(3, 40, torch.float32)
    x.requires_grad_()
    ops._warned.clear()
    with pytest.warns(UserWarning, match="no backward kernel yet"):
        out = ops.layer_norm(x, weight, bias, EPS)
    out.sum().backward()
    assert x.grad is not None
    with pytest.raises(NotImplementedError, match="argument x requires a gradient"):
        torch.ops.persimmon_fast.layer_norm(x, weight, bias, EPS)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": randn(39)}, ValueError, r"weight must be \[hidden_size\] = \[40\], got \[39\]"),
        ({"bias": randn(40, dtype=torch.float16)}, TypeError, "bias must be Float as x is, got Half"),
        ({"x": torch.zeros(3, 40, dtype=torch.int64)}, TypeError, "x must be float32, float16 or bfloat16, got Long"),
        ({"x": randn(40, 3).t()}, ValueError, r"x must have a last dimension of stride 1 .* got strides \[1, 3\]"),
        ({"x": randn(3)}, ValueError, r"x must be \[num_rows, hidden_size\], got \[3\]"),
    ],
)
def test_errors_name_op_argument_expected_and_found(change, error, match):
    args = dict(zip(("x", "weight", "bias"), inputs(3, 40, torch.float32), strict=True)) | change
    with pytest.raises(error, match="layer_norm: " + match):
        torch.ops.persimmon_fast.layer_norm(args["x"], args["weight"], args["bias"], EPS)
