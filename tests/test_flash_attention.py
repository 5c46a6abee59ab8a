"""flash_attention on every CPU instruction set, against the reference in fp64 and torch's SDPA."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, FLOOR, ISAS, assert_within_contract, cpu_isa, max_error, randn
from torch.nn.attention import SDPBackend, sdpa_kernel

from persimmon_fast import ops, reference

# (queries, keys) of one sequence: empty, around one tile of keys, around one block of queries, q != kv both ways
LENGTHS = [(0, 0), (0, 5), (3, 0), (1, 1), (1, 200), (3, 65), (5, 64), (63, 63), (64, 64), (65, 65), (17, 200), (9, 4)]
# bf16 on AMX leaves these to torch's kernel where it is faster: square, rectangular
LONG = [(200, 200), (130, 300)]


def cu_seqlens(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def inputs(total_q, total_k, dtype, num_heads=2, head_dim=64, seed=1):
    shape = (num_heads, head_dim)
    return (
        randn(total_q, *shape, dtype=dtype, seed=seed),
        randn(total_k, *shape, dtype=dtype, seed=seed + 1),
        randn(total_k, *shape, dtype=dtype, seed=seed + 2),
    )


def packed(q, k, v, lengths_q, lengths_k, **kwargs):
    return ops.flash_attention(
        q, k, v, cu_seqlens_q=cu_seqlens(lengths_q), cu_seqlens_k=cu_seqlens(lengths_k),
        max_seqlen_q=max(lengths_q, default=0), max_seqlen_k=max(lengths_k, default=0), **kwargs,
    )  # fmt: skip


def plain_torch(q, k, v, causal):
    """torch's own attention of one sequence in the dtype of q, [seqlen_q, num_heads, head_dim]."""
    mask = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool)
    if causal:
        mask = mask.tril(k.shape[0] - q.shape[0])
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), attn_mask=mask)
    return out.transpose(0, 1).nan_to_num(0.0)  # rows without keys


def check(q, k, v, causal, what):
    out, lse = packed(q, k, v, [len(q)], [len(k)], causal=causal)
    scale = q.shape[-1] ** -0.5
    expected, expected_lse = reference.attention(q.double(), k.double(), v.double(), scale, causal)
    assert_within_contract(out, expected, plain_torch(q, k, v, causal), what)
    assert lse.dtype == torch.float32
    has_keys = expected_lse > -math.inf
    assert torch.equal(lse > -math.inf, has_keys)
    if has_keys.any():
        # torch's kernel, which serves long bf16 sequences, takes exp to about 1e-4
        tolerance = 1e-4 if q.dtype == torch.bfloat16 and len(q) > 100 else FLOOR[torch.float32]
        bound = tolerance * max(1.0, float(expected_lse[has_keys].abs().max()))
        assert max_error(lse[has_keys], expected_lse[has_keys]) <= bound, what


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_matches_reference(isa, dtype, causal):
    with cpu_isa(isa):
        for seqlen_q, seqlen_k in [*LENGTHS, *LONG]:
            check(*inputs(seqlen_q, seqlen_k, dtype), causal, f"{isa} {seqlen_q}x{seqlen_k}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 80, 128])
def test_head_dims(isa, dtype, head_dim):
    with cpu_isa(isa):
        for seqlen_q, seqlen_k in [(1, 70), (6, 70), (70, 70), (128, 128)]:
            check(*inputs(seqlen_q, seqlen_k, dtype, head_dim=head_dim), True, f"{isa} {seqlen_q}x{seqlen_k}")


@pytest.mark.parametrize("isa", ISAS)
def test_few_queries_over_many_keys_are_split(isa):
    with cpu_isa(isa):
        for seqlen_q in (1, 4, 16):
            check(*inputs(seqlen_q, 4500, torch.float32), True, f"{isa} {seqlen_q} queries")
        # A split that some queries do not see at all: its weight is zero there
        check(*inputs(4, 2050, torch.float32), True, f"{isa} short last split")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype):
    q, k, v = inputs(70, 70, dtype)
    check(q * 30, k * 30, v, True, "scores of some thousands")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_varlen_is_the_sequences_one_by_one(dtype):
    lengths_q, lengths_k = [5, 0, 150, 1, 64], [9, 3, 150, 300, 64]
    q, k, v = inputs(sum(lengths_q), sum(lengths_k), dtype)
    out, lse = packed(q, k, v, lengths_q, lengths_k)
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), lengths_q, lengths_k, strict=True)
    singles = [packed(a, b, c, [n], [m]) for a, b, c, n, m in parts]
    assert torch.equal(out, torch.cat([single[0] for single in singles]))
    assert torch.equal(lse, torch.cat([single[1] for single in singles], dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batched_layout_against_sdpa(dtype):
    q, k, v = (randn(3, 96, 2, 64, dtype=dtype, seed=s) for s in range(3))
    out, lse = ops.flash_attention(q, k, v)
    assert lse.shape == (3, 2, 96)
    with sdpa_kernel(SDPBackend.MATH):
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]
        plain = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
        expected = F.scaled_dot_product_attention(*(t.double() for t in heads_first), is_causal=True).transpose(1, 2)
    assert_within_contract(out, expected, plain, "batched")
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 8
    expected_lse = scores.masked_fill(torch.ones(96, 96, dtype=torch.bool).triu(1), -math.inf).logsumexp(-1)
    assert max_error(lse, expected_lse) <= FLOOR[torch.float32] * float(expected_lse.abs().max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_beyond_seqused_are_never_read(isa, dtype):
    lengths_q, lengths_k, used = [4, 150, 2], [70, 200, 66], [65, 150, 0]
    q, k, v = inputs(sum(lengths_q), sum(lengths_k), dtype)
    starts = cu_seqlens(lengths_k).tolist()
    kept = torch.cat([torch.arange(s, s + n) for s, n in zip(starts[:-1], used, strict=True)])
    with cpu_isa(isa):
        expected = packed(q, k[kept], v[kept], lengths_q, used)
        for poisoned in (k, v):
            clean = poisoned[kept]
            poisoned.fill_(float("nan"))[kept] = clean
        out = packed(q, k, v, lengths_q, lengths_k, seqused_k=torch.tensor(used, dtype=torch.int32))
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])
    assert (out[0][-2:] == 0).all()
    assert (out[1][:, -2:] == -math.inf).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen", [4, 70, 200])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_queries_that_see_them_and_no_other(isa, dtype, seqlen, value):
    clean = inputs(seqlen, seqlen, dtype)
    at = seqlen // 2
    with cpu_isa(isa):
        before = packed(*clean, [seqlen], [seqlen])[0]
        for i in range(3):
            tensors = [t.clone() for t in clean]
            tensors[i][at, 0, 3] = value
            out = packed(*tensors, [seqlen], [seqlen])[0]
            scores = torch.einsum("qhd,khd->hqk", tensors[0].double(), tensors[1].double())[0]
            # nan and +inf scores poison the softmax, -inf is a weight of zero; every query that sees a value weighs it
            poisoned = (scores.isnan() | (scores == math.inf)).tril().any(-1)
            hit = poisoned if i < 2 else torch.arange(seqlen) >= at
            assert torch.equal((~out[:, 0].isfinite()).any(-1), hit), f"input {i}"
            assert torch.equal(out[:at, :], before[:at, :]) or seqlen > 100
            assert_within_contract(out[:at], before[:at].double(), before[:at], "rows before")
            assert torch.equal(out[:, 1].isfinite(), before[:, 1].isfinite())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seqlen", [1, 70, 150])
def test_scores_that_are_all_minus_inf_count_as_no_keys(isa, seqlen):
    q, k, v = inputs(seqlen, seqlen, torch.bfloat16)
    q[:, :, 0], k[:, 0, 0] = 1.0, -math.inf
    with cpu_isa(isa):
        out, lse = packed(q, k, v, [seqlen], [seqlen])
    assert (out[:, 0] == 0).all()
    assert (lse[0] == -math.inf).all()
    assert out[:, 1].isfinite().all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen", [70, 150])
def test_views_of_a_packed_projection(dtype, seqlen):
    q, k, v = randn(seqlen, 3, 3, 64, dtype=dtype).unbind(2)
    assert not q.is_contiguous()
    out = packed(q, k, v, [seqlen], [seqlen])
    expected = packed(q.contiguous(), k.contiguous(), v.contiguous(), [seqlen], [seqlen])
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])
    # every tensor in strides of its own
    heads_first = k.transpose(0, 1).contiguous().transpose(0, 1)
    wide_v = torch.zeros(seqlen, 5, 72, dtype=dtype)
    wide_v[:, 1:4, 8:] = v
    out = packed(q, heads_first, wide_v[:, 1:4, 8:], [seqlen], [seqlen])
    assert torch.equal(out[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_every_run_and_for_every_number_of_threads(dtype):
    lengths_q, lengths_k = [200, 3, 130], [200, 5000, 260]
    args = (*inputs(sum(lengths_q), sum(lengths_k), dtype), lengths_q, lengths_k)
    first, again = packed(*args), packed(*args)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        more_threads = packed(*args)
    finally:
        torch.set_num_threads(threads)
    for other in (again, more_threads):
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


def test_scale_and_empty_batch():
    q, k, v = inputs(5, 5, torch.float32)
    out, _ = packed(q, k, v, [5], [5], softmax_scale=0.5)
    expected, _ = reference.attention(q, k, v, 0.5, True)
    assert max_error(out, expected) <= FLOOR[torch.float32] * float(expected.abs().max())
    out, lse = packed(q[:0], k[:0], v[:0], [], [])
    assert out.shape == (0, 2, 64)
    assert lse.shape == (2, 0)


def test_opcheck():
    q, k, v = inputs(5, 7, torch.float32)
    args = (q, k, v, cu_seqlens([2, 3]), cu_seqlens([3, 4]), torch.tensor([3, 4], dtype=torch.int32), 3, 4, 0.1, True)
    torch.library.opcheck(torch.ops.persimmon_fast.flash_attention.default, args)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q": randn(5, 128)}, ValueError, r"q must be \[total_q, num_heads, head_dim\], got \[5, 128\]"),
        ({"q": torch.zeros(5, 2, 64, dtype=torch.int64)}, TypeError,
         "q must be float32, float16 or bfloat16, got Long"),
        ({"q": randn(5, 2, 12)}, ValueError, "head_dim must be a multiple of 8 up to 128, got 12"),
        ({"q": randn(5, 2, 136)}, ValueError, "head_dim must be a multiple of 8 up to 128, got 136"),
        ({"q": randn(5, 64, 2).transpose(1, 2)}, ValueError, "q must have a last dimension of stride 1"),
        ({"k": randn(7, 3, 64)}, ValueError,
         r"k must be \[total_k, num_heads, head_dim\] = \[-1, 2, 64\], got \[7, 3, 64\]"),
        ({"k": randn(7, 2, 64, dtype=torch.float16)}, TypeError, "k must be Float as q is, got Half"),
        ({"v": randn(6, 2, 64)}, ValueError, r"v must be .* = \[7, 2, 64\], got \[6, 2, 64\]"),
        ({"cu_q": torch.tensor([0, 2, 5])}, TypeError, "cu_seqlens_q must be Int, got Long"),
        ({"cu_q": torch.zeros(0, dtype=torch.int32)}, ValueError,
         r"cu_seqlens_q must be \[batch_size \+ 1\], got \[0\]"),
        ({"cu_k": cu_seqlens([7])}, ValueError, r"cu_seqlens_k must be \[batch_size \+ 1\] = \[3\], got \[2\]"),
        ({"used": torch.tensor([3], dtype=torch.int32)}, ValueError,
         r"seqused_k must be \[batch_size\] = \[2\], got \[1\]"),
        ({"cu_q": cu_seqlens([3, 3])}, ValueError, "cu_seqlens_q must end at the number of tokens 5, got 6"),
        ({"cu_q": torch.tensor([1, 2, 5], dtype=torch.int32)}, ValueError, "cu_seqlens_q must start at 0, got 1"),
        ({"cu_k": torch.tensor([0, 8, 7], dtype=torch.int32), "max_k": 8}, ValueError,
         "cu_seqlens_k must ascend, got 8 then 7 at 2"),
        ({"max_q": 2}, ValueError, "cu_seqlens_q holds a sequence of 3 tokens at 1, more than its max_seqlen 2"),
        ({"used": torch.tensor([3, 5], dtype=torch.int32)}, ValueError,
         r"seqused_k\[1\] must be between 0 and the 4 keys of its sequence, got 5"),
    ],
)  # fmt: skip
def test_errors_name_op_argument_expected_and_found(change, error, match):
    q, k, v = inputs(5, 7, torch.float32)
    args = {"q": q, "k": k, "v": v, "cu_q": cu_seqlens([2, 3]), "cu_k": cu_seqlens([3, 4]), "used": None,
            "max_q": 3, "max_k": 4, "scale": 0.1, "causal": True} | change  # fmt: skip
    with pytest.raises(error, match="flash_attention: " + match):
        torch.ops.persimmon_fast.flash_attention(*args.values())
