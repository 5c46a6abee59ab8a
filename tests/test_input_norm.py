"""The LayerNorm that qkv_norm_rope, qkv_norm_rope_paged and squared_relu_mlp take along: bit for bit layer_norm and
then the op."""

from __future__ import annotations

import pytest
import test_qkv_norm_rope
import test_squared_relu_mlp
import torch
from helpers import BACKENDS, CUDA, DTYPES, EMU, backend, randn

from persimmon_fast import ops

HEADS, HEAD_DIM, HIDDEN = 2, 64, 88
EPS = 1e-3  # not the default
NUM_ROWS = [0, 1, 3, 8, 9, 16, 17, 40]


def norm(dtype: torch.dtype, device: str = "cpu", hidden: int = HIDDEN):
    return {
        "norm_weight": randn(hidden, dtype=dtype, seed=40).to(device),
        "norm_bias": randn(hidden, dtype=dtype, seed=41).to(device),
        "norm_eps": EPS,
    }


def qkv(rows, dtype, device, x, **input_norm):
    args = test_qkv_norm_rope.inputs(rows, HIDDEN, HEADS, HEAD_DIM, 32, dtype, "shared")
    args = tuple(None if a is None else a.to(device) for a in args)
    return ops.qkv_norm_rope(x, *args[1:], 1e-5, HEADS, **input_norm)


def qkv_paged(rows, dtype, device, x, **input_norm):
    args = test_qkv_norm_rope.inputs(rows, HIDDEN, HEADS, HEAD_DIM, 32, dtype, "shared")
    args = tuple(None if a is None else a.to(device) for a in args)
    caches = [torch.zeros(3, HEADS, 16, HEAD_DIM, dtype=dtype, device=device) for _ in range(2)]
    slots = torch.arange(rows, device=device) + 2
    q = ops.qkv_norm_rope_paged(x, *args[1:], 1e-5, HEADS, slots, *caches, **input_norm)
    return q, *caches


def mlp(rows, dtype, device, x, **input_norm):
    args = test_squared_relu_mlp.inputs(rows, HIDDEN, 70, dtype, device=device)
    residual = randn(rows, HIDDEN, dtype=dtype, seed=43).to(device)
    return (ops.squared_relu_mlp(x, *args[1:5], residual, **input_norm),)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [qkv, qkv_paged, mlp])
def test_has_the_bits_of_layer_norm_and_the_op(name, dtype, op):
    with backend(name) as device:
        for rows in NUM_ROWS:
            x = (3 + 2 * randn(rows, HIDDEN + 8, dtype=dtype, seed=42)).to(device)[:, 8:]  # rows with a stride
            input_norm = norm(dtype, device)
            normalised = ops.layer_norm(x, input_norm["norm_weight"], input_norm["norm_bias"], EPS)
            pairs = zip(op(rows, dtype, device, x, **input_norm), op(rows, dtype, device, normalised), strict=True)
            assert all(torch.equal(actual, expected) for actual, expected in pairs), f"{name} {rows} rows"


# A warp per row; blocks of 4 (with lanes that have nothing), 8 and 16 warps; more than two chunks per thread.
@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "hidden",
    [pytest.param(13, marks=pytest.mark.sanitize), 520, pytest.param(1096, marks=pytest.mark.sanitize), 4096, 9001],
)
def test_kernels_normalise_with_the_bits_of_layer_norm(name, dtype, hidden):
    """Rows of W that hold a single 1 show the normalised input itself, as v."""
    with backend(name) as device:
        columns = torch.randperm(hidden, generator=torch.Generator().manual_seed(1))[:HEAD_DIM]
        columns[0] = hidden - 1
        weight = torch.zeros(3 * HEAD_DIM, hidden, dtype=dtype)
        weight[2 * HEAD_DIM + torch.arange(len(columns)), columns] = 1
        input_norm = norm(dtype, device, hidden)
        for rows in (1, 2, 7):
            x = (9 + 2 * randn(rows, hidden, dtype=dtype, seed=44)).to(device)
            rotary = torch.ones(rows, 32, device=device)
            positions = torch.arange(rows, device=device)
            rest = (weight.to(device), None, None, None, None, None, rotary, positions, 1e-5, 1)
            v = ops.qkv_norm_rope(x, *rest, **input_norm)[2]
            expected = ops.layer_norm(x, input_norm["norm_weight"], input_norm["norm_bias"], EPS)
            assert torch.equal(v[:, 0, : len(columns)], expected[:, columns.to(device)]), rows


@pytest.mark.parametrize("op", [qkv, mlp])
def test_gradients_pass_through_it(op):
    input_norm = norm(torch.float32)
    input_norm["norm_weight"].requires_grad_()
    x = randn(4, HIDDEN, seed=42).requires_grad_()
    ops._warned.clear()
    with pytest.warns(UserWarning, match="no backward kernel"):
        outs = op(4, torch.float32, "cpu", x, **input_norm)
    sum(out.sin().sum() for out in outs).backward()
    other = x.detach().clone().requires_grad_()
    weight = input_norm["norm_weight"].detach().clone().requires_grad_()
    normalised = torch.nn.functional.layer_norm(other, (HIDDEN,), weight, input_norm["norm_bias"], EPS)
    sum(out.sin().sum() for out in op(4, torch.float32, "cpu", normalised)).backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(input_norm["norm_weight"].grad, weight.grad)


@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"norm_bias": None}, ValueError, "norm_weight and norm_bias must be given together, got only norm_weight"),
        ({"norm_weight": None}, ValueError, "norm_weight and norm_bias must be given together, got only norm_bias"),
        ({"norm_weight": randn(87)}, ValueError, r"norm_weight must be \[hidden_size\] = \[88\], got \[87\]"),
        ({"norm_bias": randn(88, 1)}, ValueError, r"norm_bias must be \[hidden_size\] = \[88\], got \[88, 1\]"),
        ({"norm_weight": randn(88).half()}, TypeError, "norm_weight must be Float as x is, got Half"),
        ({"norm_bias": randn(176)[::2]}, ValueError, "norm_bias must have a last dimension of stride 1"),
    ],
)
@pytest.mark.parametrize("op", [qkv, qkv_paged, mlp])
def test_errors_name_the_argument(op, rows, change, error, match):
    with pytest.raises(error, match=match):
        op(rows, torch.float32, "cpu", randn(rows, HIDDEN), **(norm(torch.float32) | change))


def test_opcheck():
    args = test_squared_relu_mlp.inputs(3, 24, 40, torch.float32)
    torch.library.opcheck(torch.ops.persimmon_fast.squared_relu_mlp.default, (*args, randn(24), randn(24), EPS))
    args = test_qkv_norm_rope.inputs(3, 24, 1, 64, 32, torch.float32, "shared")
    op = torch.ops.persimmon_fast.qkv_norm_rope.default
    torch.library.opcheck(op, (*args, EPS, 1, randn(24), randn(24), EPS))
