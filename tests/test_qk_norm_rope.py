"""qk_norm_rope and qk_norm_rope_ on every CPU instruction set, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, ISAS, assert_within_contract, cpu_isa, randn

from persimmon_fast import ops, reference

EPS = 1e-5
NUM_POSITIONS = 50
# head_dim, rotary_dim: quarter, half and all of a head; rotary halves with and without whole vectors
HEADS = [(8, 2), (8, 8), (64, 16), (64, 32), (64, 64), (80, 20), (80, 40), (128, 64), (128, 128)]
NORMS = ["shared", "per_head", None]


def table(rotary_dim: int):
    angles = randn(NUM_POSITIONS, rotary_dim // 2, seed=9, scale=100)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def inputs(tokens: int, num_heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype, norm: str | None):
    """q, k, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids"""
    shape = (num_heads, head_dim) if norm == "per_head" else (head_dim,)
    norms = [None if norm is None else randn(*shape, dtype=dtype, seed=3 + i) for i in range(4)]
    positions = torch.randint(0, NUM_POSITIONS, (tokens,), generator=torch.Generator().manual_seed(8))
    qk = [randn(tokens, num_heads, head_dim, dtype=dtype, seed=i) + 0.5 for i in (1, 2)]
    return (*qk, *norms, table(rotary_dim), positions)


def wide(args):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]


def plain(x, weight, bias, cos_sin, positions):
    """The same formula in plain torch, every step rounded to the dtype of x."""
    if weight is not None:
        x = F.layer_norm(x, x.shape[-1:], eps=EPS) * weight + bias
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[positions].to(x.dtype).unsqueeze(1).split(half, dim=-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def check(args, actual, what):
    q, k, q_weight, q_bias, k_weight, k_bias, cos_sin, positions = args
    expected = reference.qk_norm_rope(*wide(args), EPS)
    assert_within_contract(actual[0], expected[0], plain(q, q_weight, q_bias, cos_sin, positions), f"q {what}")
    assert_within_contract(actual[1], expected[1], plain(k, k_weight, k_bias, cos_sin, positions), f"k {what}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), HEADS)
def test_matches_reference(isa, dtype, norm, head_dim, rotary_dim):
    for tokens in (1, 5):
        args = inputs(tokens, 3, head_dim, rotary_dim, dtype, norm)
        with cpu_isa(isa):
            out = ops.qk_norm_rope(*args, EPS)
        assert out[0].is_contiguous()
        assert out[1].is_contiguous()
        check(args, out, f"{isa} {norm} head_dim {head_dim} rotary_dim {rotary_dim} tokens {tokens}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 7, 65, 130, 256])  # the op takes what the wrapper sends to the reference
def test_any_head_dim(isa, dtype, head_dim):
    args = inputs(4, 2, head_dim, head_dim // 2 * 2, dtype, "shared")
    with cpu_isa(isa):
        check(args, torch.ops.persimmon_fast.qk_norm_rope(*args, EPS), f"{isa} {head_dim}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_a_packed_projection_and_in_place(isa, dtype):
    args = inputs(6, 4, 80, 40, dtype, "per_head")
    packed = torch.full((6, 4, 3, 80), float("nan"), dtype=dtype)
    packed[:, :, 0], packed[:, :, 1] = args[0], args[1]
    views = (packed[:, :, 0], packed[:, :, 1], *args[2:])
    with cpu_isa(isa):
        expected = ops.qk_norm_rope(*args, EPS)
        out = ops.qk_norm_rope(*views, EPS)
        ops.qk_norm_rope_(*views, EPS)
    for i in range(2):
        assert torch.equal(out[i], expected[i])
        assert torch.equal(packed[:, :, i], expected[i])
    assert packed[:, :, 2].isnan().all()


def test_inputs_stay_as_they_were():
    args = inputs(6, 4, 64, 32, torch.bfloat16, "shared")
    copies = [t.clone() for t in args]
    ops.qk_norm_rope(*args, EPS)
    assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_large_mean_does_not_cancel(isa):
    args = inputs(4, 2, 64, 32, torch.float32, "shared")
    args = (args[0] + 1000, args[1] + 1000, *args[2:])
    with cpu_isa(isa):
        check(args, ops.qk_norm_rope(*args, EPS), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_inf_stay_in_their_head(isa):
    args = inputs(3, 2, 64, 32, torch.float32, "shared")
    args[0][0, 1, 63], args[1][2, 0, 3] = float("nan"), float("inf")
    with cpu_isa(isa):
        q, k = ops.qk_norm_rope(*args, EPS)
    for t, bad in ((q, (0, 1)), (k, (2, 0))):
        assert t[bad].isnan().all()
        finite = t.isfinite().all(-1)
        finite[bad] = True
        assert finite.all()


def test_threads_runs_and_batches_give_the_same_bits():
    args = inputs(200, 5, 64, 32, torch.bfloat16, "shared")
    out = ops.qk_norm_rope(*args, EPS)
    again = ops.qk_norm_rope(*args, EPS)
    one = ops.qk_norm_rope(args[0][7:8], args[1][7:8], *args[2:7], args[7][7:8], EPS)
    check(args, out, "200 tokens")
    for i in range(2):
        assert torch.equal(out[i], again[i])
        assert torch.equal(out[i][7:8], one[i])


def test_empty():
    args = inputs(0, 3, 64, 32, torch.float32, "shared")
    q, k = ops.qk_norm_rope(*args, EPS)
    assert q.shape == k.shape == (0, 3, 64)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_opcheck(norm):
    args = inputs(3, 2, 16, 8, torch.float32, norm)
    torch.library.opcheck(torch.ops.persimmon_fast.qk_norm_rope.default, (*args, EPS))
    torch.library.opcheck(torch.ops.persimmon_fast.qk_norm_rope_.default, (*args, EPS))


NAMES = ("q", "k", "q_weight", "q_bias", "k_weight", "k_bias", "cos_sin", "position_ids")


@pytest.mark.parametrize("op", ["qk_norm_rope", "qk_norm_rope_"])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q": torch.zeros(3, 2, 16).int()}, TypeError, "q must be float32, float16 or bfloat16, got Int"),
        ({"q": randn(3, 32)}, ValueError, r"q must be \[num_tokens, num_heads, head_dim\] .* got \[3, 32\]"),
        ({"q": randn(3, 16, 2).mT}, ValueError, r"q must have a last dimension of stride 1"),
        ({"q": randn(3, 2, 257)} | {"k": randn(3, 2, 257)}, ValueError, r"head_dim must be 1 .. 256, got 257"),
        ({"k": randn(3, 3, 16)}, ValueError, r"k must be \[num_tokens, num_heads, head_dim\] = \[3, 2, 16\], got"),
        ({"k": randn(3, 2, 16).half()}, TypeError, "k must be Float as q is, got Half"),
        ({"q_bias": None}, ValueError, "q_weight, q_bias, k_weight and k_bias must be given together or not"),
        ({"k_weight": randn(15)}, ValueError, r"k_weight must be \[head_dim=16\] or \[num_heads=2, head_dim=16\], got"),
        ({"k_weight": randn(3, 16)}, ValueError, r"k_weight must be .* got \[3, 16\]"),
        ({"k_bias": randn(2, 16)}, ValueError, r"k_bias must have the shape of k_weight = \[16\], got \[2, 16\]"),
        ({"q_weight": randn(2, 16)}, ValueError, r"q_bias must have the shape of q_weight = \[2, 16\], got \[16\]"),
        ({"q_weight": randn(16).half()}, TypeError, "q_weight must be Float as q is, got Half"),
        ({"q_bias": randn(32)[::2]}, ValueError, r"q_bias must be contiguous, got strides \[2\]"),
        ({"cos_sin": table(8).double()}, TypeError, "cos_sin must be Float, got Double"),
        ({"cos_sin": randn(50, 7)}, ValueError, r"cos_sin must have an even number of columns, 2 .. head_dim=16, got"),
        ({"cos_sin": randn(50, 18)}, ValueError, r"cos_sin must have an even number of columns"),
        ({"cos_sin": randn(50, 0)}, ValueError, r"cos_sin must have an even number of columns"),
        ({"cos_sin": randn(50)}, ValueError, r"cos_sin must be \[num_positions, rotary_dim\] .* got \[50\]"),
        ({"position_ids": torch.zeros(3).int()}, TypeError, "position_ids must be Long, got Int"),
        (
            {"position_ids": torch.zeros(4).long()},
            ValueError,
            r"position_ids must be \[num_tokens\] = \[3\], got \[4\]",
        ),
        ({"position_ids": torch.zeros(1).long().expand(3)}, ValueError, r"position_ids must have a last dimension"),
        (
            {"position_ids": torch.tensor([0, 49, 50])},
            ValueError,
            r"position_ids\[2\] = 50 is outside the table: cos_sin has positions 0 .. 49",
        ),
        ({"position_ids": torch.tensor([0, -1, 3])}, ValueError, r"position_ids\[1\] = -1 is outside the table"),
    ],
)
def test_errors_name_op_argument_expected_and_found(op, change, error, match):
    args = dict(zip(NAMES, inputs(3, 2, 16, 8, torch.float32, "shared"), strict=True)) | change
    with pytest.raises(error, match=f"^{op}: {match}"):
        getattr(torch.ops.persimmon_fast, op)(*(args[name] for name in NAMES), EPS)


def test_in_place_refuses_expanded_tensors():
    args = inputs(3, 2, 16, 8, torch.float32, None)
    with pytest.raises(ValueError, match=r"qk_norm_rope_: k is written in place .* got strides \[0, 16, 1\]"):
        torch.ops.persimmon_fast.qk_norm_rope_(args[0], args[1][:1].expand(3, 2, 16), *args[2:], EPS)
