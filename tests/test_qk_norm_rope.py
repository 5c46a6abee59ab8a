"""qk_norm_rope and qk_norm_rope_ on every backend, against the reference in fp64."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, CUDA, DTYPES, EMU, ISAS, assert_within_contract, backend, randn

from persimmon_fast import ops, reference

EPS = 1e-5
NUM_POSITIONS = 50
# head_dim, rotary_dim: quarter, half and all of a head; rotary halves with and without whole vectors
HEADS = [(8, 2), (8, 8), (64, 16), (64, 32), (64, 64), (80, 20), (80, 40), (128, 64), (128, 128)]
# Of the CUDA kernels, whose vectors of 16 bytes are 8 elements, or 4 in fp32: rotary halves with and without whole ones
CUDA_HEADS = [(64, 2), (64, 16), (64, 24), (64, 32), (64, 62), (64, 64), (128, 8), (128, 64), (128, 90), (128, 128)]
NAMES = ("q", "k", "q_weight", "q_bias", "k_weight", "k_bias", "cos_sin", "position_ids")
NORMS = ["shared", "per_head", None]
GPU_BACKENDS = [EMU, CUDA]
# For tests of Python and checks, which do not depend on the instruction set.
ONE_OF_EACH = [ISAS[-1], EMU, CUDA]


def backends_with_heads():
    """(backend, head_dim, rotary_dim): every backend with the head sizes of its kernels."""
    return [(isa, *heads) for isa in ISAS for heads in HEADS] + [
        pytest.param(*b.values, *heads, marks=b.marks) for b in GPU_BACKENDS for heads in CUDA_HEADS
    ]


@contextmanager
def kernels(name: str) -> Iterator[str]:
    """`backend` in which falling back to the reference is an error."""
    ops._warned.clear()
    with backend(name) as device, warnings.catch_warnings():
        warnings.simplefilter("error")
        yield device


def to(device: str, args):
    return tuple(t.to(device) if isinstance(t, torch.Tensor) else t for t in args)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize(("name", "head_dim", "rotary_dim"), backends_with_heads())
def test_matches_reference(name, dtype, norm, head_dim, rotary_dim):
    for tokens in (1, 5):
        with kernels(name) as device:
            args = to(device, inputs(tokens, 3, head_dim, rotary_dim, dtype, norm))
            out = ops.qk_norm_rope(*args, EPS)
            assert out[0].is_contiguous()
            assert out[1].is_contiguous()
            check(args, out, f"{name} {norm} head_dim {head_dim} rotary_dim {rotary_dim} tokens {tokens}")


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "norm"), [(64, 32, "per_head"), (128, 128, "shared"), (64, 2, None)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_at_the_ends_of_blocks(name, dtype, head_dim, rotary_dim, norm):
    """A CUDA block does 32 / 16 / 8 (16-bit, 16-byte vectors, or fp32) or 4 (without) heads of q and of k."""
    for tokens, num_heads in ((1, 1), (3, 1), (4, 1), (5, 3), (16, 1), (17, 1), (31, 1), (32, 1), (11, 3)):
        with kernels(name) as device:
            args = to(device, inputs(tokens, num_heads, head_dim, rotary_dim, dtype, norm))
            out = [t.clone() for t in args[:2]]
            ops.qk_norm_rope_(*out, *args[2:], EPS)
            check(args, out, f"{name} {tokens} tokens {num_heads} heads")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 7, 65, 130, 256])  # the op takes what the wrapper sends to the reference
def test_any_head_dim(isa, dtype, head_dim):
    args = inputs(4, 2, head_dim, head_dim // 2 * 2, dtype, "shared")
    with backend(isa):
        check(args, torch.ops.persimmon_fast.qk_norm_rope(*args, EPS), f"{isa} {head_dim}")


@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("op", ["qk_norm_rope", "qk_norm_rope_"])
def test_head_dims_without_a_kernel_run_the_reference_with_a_warning(name, op):
    with backend(name) as device:
        args = to(device, inputs(4, 2, 80, 40, torch.bfloat16, "shared"))
        ops._warned.clear()
        copies = [t.clone() for t in args[:2]]
        with pytest.warns(UserWarning, match=rf"{op} has kernels for a head_dim of \(64, 128\) on CUDA, not of 80"):
            out = getattr(ops, op)(*copies, *args[2:], EPS)
        check(args, copies if out is None else out, name)
        with pytest.raises(ValueError, match=f"^{op}: head_dim must be 64 or 128 on CUDA, got 80"):
            ops._kernel(op)(*args, EPS)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary_dim", [32, 34])
@pytest.mark.parametrize(("offset", "padding"), [(0, 0), (1, 0), (0, 1)])
def test_views_of_a_packed_projection_and_in_place(name, dtype, rotary_dim, offset, padding):
    """Strides change no bit. An offset or a padding of one element leaves (almost) nothing aligned to 16 bytes."""
    with kernels(name) as device:
        args = to(device, inputs(6, 4, 64, rotary_dim, dtype, "per_head"))
        memory = torch.full((offset + 6 * (4 * 3 * 64 + padding),), float("nan"), dtype=dtype, device=device)
        packed = memory[offset:].view(6, -1)[:, : 4 * 3 * 64].unflatten(1, (4, 3, 64))
        packed[:, :, 0], packed[:, :, 1] = args[0], args[1]
        views = (packed[:, :, 0], packed[:, :, 1], *args[2:])
        expected = ops.qk_norm_rope(*args, EPS)
        out = ops.qk_norm_rope(*views, EPS)
        ops.qk_norm_rope_(*views, EPS)
        for i in range(2):
            assert torch.equal(out[i], expected[i])
            assert torch.equal(packed[:, :, i], expected[i])
        assert int(memory.isnan().sum()) == memory.numel() - 2 * 6 * 4 * 64


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("which", [*range(7), "rows of cos_sin"], ids=lambda w: w if isinstance(w, str) else NAMES[w])
def test_alignment_changes_no_bit(name, which):
    """Each argument alone not aligned to 16 bytes."""
    with kernels(name) as device:
        args = to(device, inputs(5, 3, 64, 32, torch.bfloat16, "shared"))
        expected = ops.qk_norm_rope(*args, EPS)
        changed = list(args)
        if which == "rows of cos_sin":
            changed[6] = F.pad(args[6], (0, 1))[:, :32]
        else:
            changed[which] = torch.cat([args[which].new_zeros(1), args[which].flatten()])[1:].view(args[which].shape)
        out = ops.qk_norm_rope(*changed, EPS)
        ops.qk_norm_rope_(*changed, EPS)
        for i in range(2):
            assert torch.equal(out[i], expected[i])
            assert torch.equal(changed[i], expected[i])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_offsets_pass_two_to_the_31_elements(name):
    """Two tokens 2^31 elements apart; only the pages that are touched take memory on a CPU."""
    try:
        memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device="cuda" if name == "cuda" else "cpu")
    except RuntimeError as error:
        pytest.skip(f"no 4.3 GB of address space: {error}")
    with kernels(name) as device:
        args = to(device, inputs(2, 1, 64, 32, torch.bfloat16, "shared"))
        q = memory.as_strided((2, 1, 64), (2**31, 64, 1)).copy_(args[0])
        ops.qk_norm_rope_(q, *args[1:], EPS)
        assert torch.equal(q, ops.qk_norm_rope(*args, EPS)[0])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_inputs_stay_as_they_were(name):
    with kernels(name) as device:
        args = to(device, inputs(6, 4, 64, 32, torch.bfloat16, "shared"))
        copies = [t.clone() for t in args]
        ops.qk_norm_rope(*args, EPS)
        assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
def test_large_mean_does_not_cancel(name):
    with kernels(name) as device:
        args = to(device, inputs(4, 2, 64, 32, torch.float32, "shared"))
        args = (args[0] + 1000, args[1] + 1000, *args[2:])
        check(args, ops.qk_norm_rope(*args, EPS), name)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("rotary_dim", [32, 34])
def test_small_deviations_from_a_large_mean(name, rotary_dim):
    """The fp32 mean is off by up to 3e-5, a third of a percent of these deviations."""
    with kernels(name) as device:
        args = to(device, inputs(8, 4, 64, rotary_dim, torch.float32, "shared"))
        args = (1000 + 0.01 * args[0], 1000 + 0.01 * args[1], *args[2:])
        expected = reference.qk_norm_rope(*wide(args), EPS)
        for actual, target in zip(ops.qk_norm_rope(*args, EPS), expected, strict=True):
            assert float((actual - target).abs().max()) < 2e-5


@pytest.mark.sanitize
@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_statistics_that_overflow_are_not_hidden(name):
    with kernels(name) as device:
        args = to(device, inputs(1, 1, 64, 32, torch.float32, "shared"))
        q, k = ops.qk_norm_rope(1e25 * args[0], *args[1:], EPS)
        assert q.isnan().all()  # inf - inf in the variance
        assert k.isfinite().all()


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
def test_nan_and_inf_stay_in_their_head(name):
    with kernels(name) as device:
        args = to(device, inputs(3, 2, 64, 32, torch.float32, "shared"))
        args[0][0, 1, 63], args[1][2, 0, 3] = float("nan"), float("inf")
        q, k = ops.qk_norm_rope(*args, EPS)
        for t, bad in ((q, (0, 1)), (k, (2, 0))):
            assert t[bad].isnan().all()
            finite = t.isfinite().all(-1)
            finite[bad] = True
            assert finite.all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_and_batches_give_the_same_bits(name, dtype):
    with kernels(name) as device:
        args = to(device, inputs(200, 5, 64, 32, dtype, "shared"))
        out = ops.qk_norm_rope(*args, EPS)
        again = ops.qk_norm_rope(*args, EPS)
        one = ops.qk_norm_rope(args[0][7:8], args[1][7:8], *args[2:7], args[7][7:8], EPS)
        check(args, out, "200 tokens")
        for i in range(2):
            assert torch.equal(out[i], again[i])
            assert torch.equal(out[i][7:8], one[i])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_empty(name):
    with kernels(name) as device:
        for tokens, num_heads in ((0, 3), (4, 0)):
            args = to(device, inputs(tokens, num_heads, 64, 32, torch.float32, "shared"))
            q, k = ops.qk_norm_rope(*args, EPS)
            assert q.shape == k.shape == (tokens, num_heads, 64)


@pytest.mark.parametrize("name", [CUDA])
def test_runs_on_the_current_stream(name):
    with kernels(name) as device:
        args = to(device, inputs(64, 8, 64, 32, torch.bfloat16, "shared"))
        expected = ops.qk_norm_rope(*args, EPS)
        late = torch.zeros_like(args[0])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # a kernel on another stream would read the zeros
            late.copy_(args[0])
            out = ops.qk_norm_rope(late, *args[1:], EPS)
        stream.synchronize()
        assert torch.equal(out[0], expected[0])


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_opcheck(norm):
    args = inputs(3, 2, 16, 8, torch.float32, norm)
    torch.library.opcheck(torch.ops.persimmon_fast.qk_norm_rope.default, (*args, EPS))
    torch.library.opcheck(torch.ops.persimmon_fast.qk_norm_rope_.default, (*args, EPS))


@pytest.mark.parametrize("name", ONE_OF_EACH)
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
    ],
)
def test_errors_name_op_argument_expected_and_found(name, op, change, error, match):
    args = dict(zip(NAMES, inputs(3, 2, 16, 8, torch.float32, "shared"), strict=True)) | change
    with backend(name) as device, pytest.raises(error, match=f"^{op}: {match}"):
        ops._kernel(op)(*(None if args[n] is None else args[n].to(device) for n in NAMES), EPS)


@pytest.mark.parametrize("op", ["qk_norm_rope", "qk_norm_rope_"])
@pytest.mark.parametrize(("positions", "found"), [([0, 49, 50], r"\[2\] = 50"), ([0, -1, 3], r"\[1\] = -1")])
def test_a_cpu_refuses_positions_outside_the_table(op, positions, found):
    args = (*inputs(3, 2, 16, 8, torch.float32, "shared")[:-1], torch.tensor(positions))
    with pytest.raises(ValueError, match=f"^{op}: position_ids{found} is outside the table: cos_sin has .* 0 .. 49"):
        getattr(torch.ops.persimmon_fast, op)(*args, EPS)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_in_place_refuses_expanded_tensors(name):
    with backend(name) as device:
        args = to(device, inputs(3, 2, 64, 8, torch.float32, None))
        with pytest.raises(ValueError, match=r"qk_norm_rope_: k is written in place .* got strides \[0, 64, 1\]"):
            ops._kernel("qk_norm_rope_")(args[0], args[1][:1].expand(3, 2, 64), *args[2:], EPS)
