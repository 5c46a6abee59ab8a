"""layer_norm and add_layer_norm on every CPU instruction set, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, ISAS, assert_within_contract, cpu_isa, randn

from persimmon_fast import ops, reference

EPS = 1e-5
SHAPES = [(1, 4096), (3, 4096), (5, 1), (4, 7), (2, 64), (7, 65), (1, 15), (33, 257), (0, 64)]


def inputs(rows: int, size: int, dtype: torch.dtype, offset: float = 0.0):
    x = randn(rows, size, dtype=dtype, seed=1) + offset
    return x, randn(size, dtype=dtype, seed=2), randn(size, dtype=dtype, seed=3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_matches_reference(isa, dtype, rows, size):
    x, weight, bias = inputs(rows, size, dtype)
    expected = reference.layer_norm(x.double(), weight.double(), bias.double(), EPS)
    with cpu_isa(isa):
        out = ops.layer_norm(x, weight, bias, EPS)
    assert_within_contract(out, expected, F.layer_norm(x, (size,), weight, bias, EPS), f"{isa} {rows}x{size}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_sum_is_rounded_before_the_norm(isa, dtype):
    x, weight, bias = inputs(6, 100, dtype)
    residual = randn(6, 100, dtype=dtype, seed=4, scale=30)
    with cpu_isa(isa):
        out, total = ops.add_layer_norm(x, residual, weight, bias, EPS)
    assert torch.equal(total, x + residual)
    expected = reference.layer_norm(total.double(), weight.double(), bias.double(), EPS)
    assert_within_contract(out, expected, F.layer_norm(total, (100,), weight, bias, EPS), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_large_mean_does_not_cancel(isa):
    x, weight, bias = inputs(4, 4096, torch.float32, offset=1000.0)
    with cpu_isa(isa):
        out = ops.layer_norm(x, weight, bias, EPS)
    expected = reference.layer_norm(x.double(), weight.double(), bias.double(), EPS)
    assert_within_contract(out, expected, F.layer_norm(x, (4096,), weight, bias, EPS), isa)


def test_strided_rows_and_leading_dimensions():
    wide = randn(2, 3, 200, seed=1)
    x, weight, bias = wide[:, :, 20:120], randn(100, seed=2), randn(100, seed=3)
    out = ops.layer_norm(x, weight, bias, EPS)
    assert out.shape == x.shape
    assert torch.equal(out, ops.layer_norm(x.contiguous(), weight, bias, EPS))
    rows = wide[0, :, 20:120]  # row stride 200 reaches the kernel
    assert torch.equal(torch.ops.persimmon_fast.layer_norm(rows, weight, bias, EPS), out[0])


@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_inf_stay_in_their_row(isa):
    x, weight, bias = inputs(3, 70, torch.float32)
    x[0, 69], x[1, 3] = float("nan"), float("inf")
    with cpu_isa(isa):
        out = ops.layer_norm(x, weight, bias, EPS)
    assert out[0].isnan().all()
    assert out[1].isnan().any()
    assert out[2].isfinite().all()


def test_same_bits_on_every_run_and_in_every_batch():
    x, weight, bias = inputs(64, 4096, torch.bfloat16)
    out = ops.layer_norm(x, weight, bias, EPS)
    assert torch.equal(out, ops.layer_norm(x, weight, bias, EPS))
    assert torch.equal(out[5:6], ops.layer_norm(x[5:6], weight, bias, EPS))


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
