"""flash_attention on every backend, against the reference in fp64 and torch's SDPA."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKENDS,
    CUDA,
    DTYPES,
    EMU,
    EMU_SM90,
    FLOOR,
    ISAS,
    assert_within_contract,
    backend,
    cpu_isa,
    emulator_counts,
    max_error,
    randn,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from persimmon_fast import ops, reference

# (queries, keys) of one sequence: empty, around one tile of keys, around one block of queries, q != kv both ways
LENGTHS = [(0, 0), (0, 5), (3, 0), (1, 1), (1, 200), (3, 65), (5, 64), (63, 63), (64, 64), (65, 65), (17, 200), (9, 4)]
# CPU: bf16 on AMX leaves these to torch's kernel where it is faster. CUDA: more than one block of 128 queries, at least
# 5 tiles of keys, which is twice the stages + 1; the last has blocks and rows without keys.
LONG = [(200, 200), (130, 300), (300, 140)]
GPU_KERNELS = [EMU, EMU_SM90, CUDA]
BACKENDS = [*BACKENDS, EMU_SM90]
# fp16 and bf16 are one CUDA source: under the sanitizers, which take time, bf16 is enough.
SANITIZED_DTYPES = [
    pytest.param(dtype, id=str(dtype), marks=[] if dtype == torch.float16 else [pytest.mark.sanitize])
    for dtype in DTYPES
]


def kernel_depends_on_strides(name: str) -> bool:
    """sm_90a: rows that TMA cannot address are left to the kernel for any GPU, which sums in another order."""
    return name == "emu_sm90" or (name == "cuda" and torch.cuda.get_device_capability() == (9, 0))


def assert_same_results(name, actual, expected, dtype):
    if kernel_depends_on_strides(name) and dtype != torch.float32:
        assert_within_contract(actual, expected.double(), expected, "another kernel")
    else:
        assert torch.equal(actual, expected)


def cu_seqlens(lengths, device="cpu") -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def inputs(total_q, total_k, dtype, num_heads=2, head_dim=64, seed=1, device="cpu"):
    totals = (total_q, total_k, total_k)
    return [randn(total, num_heads, head_dim, dtype=dtype, seed=seed + i).to(device) for i, total in enumerate(totals)]


def packed(q, k, v, lengths_q, lengths_k, **kwargs):
    return ops.flash_attention(
        q, k, v, cu_seqlens_q=cu_seqlens(lengths_q, q.device), cu_seqlens_k=cu_seqlens(lengths_k, q.device),
        max_seqlen_q=max(lengths_q, default=0), max_seqlen_k=max(lengths_k, default=0), **kwargs,
    )  # fmt: skip


def plain_torch(q, k, v, causal):
    """torch's own attention of one sequence in the dtype of q, [seqlen_q, num_heads, head_dim]."""
    mask = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device)
    if causal:
        mask = mask.tril(k.shape[0] - q.shape[0])
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), attn_mask=mask)
    return out.transpose(0, 1).nan_to_num(0.0)  # rows without keys


def check(q, k, v, causal, what, softmax_scale=None):
    out, lse = packed(q, k, v, [len(q)], [len(k)], causal=causal, softmax_scale=softmax_scale)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
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


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_matches_reference(name, dtype, causal):
    with backend(name) as device:
        for seqlen_q, seqlen_k in [*LENGTHS, *LONG]:
            check(*inputs(seqlen_q, seqlen_k, dtype, device=device), causal, f"{name} {seqlen_q}x{seqlen_k}")


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 80, 128])
def test_head_dims(name, dtype, head_dim):
    with backend(name):
        for seqlen_q, seqlen_k in [(1, 70), (6, 70), (70, 70), (128, 128)]:
            check(*inputs(seqlen_q, seqlen_k, dtype, head_dim=head_dim), True, f"{name} {seqlen_q}x{seqlen_k}")


@pytest.mark.parametrize("name", GPU_KERNELS)
@pytest.mark.parametrize("dtype", SANITIZED_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_every_gpu_kernel(name, dtype, head_dim, causal):
    # Two blocks of queries, 5 tiles and more of keys, blocks without keys; one head
    lengths = [(129, 140), (20, 321), (127, 31)] if dtype != torch.float32 else [(6, 33), (9, 4)]
    with backend(name) as device:
        for seqlen_q, seqlen_k in lengths:
            tensors = inputs(seqlen_q, seqlen_k, dtype, num_heads=1, head_dim=head_dim, device=device)
            check(*tensors, causal, f"{name} {seqlen_q}x{seqlen_k}")


@pytest.mark.parametrize("name", GPU_KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen", [1, 31, 32, 33, 63, 65, 127, 128, 129])
def test_tile_edges(name, dtype, seqlen):
    with backend(name) as device:
        for head_dim in (64, 128):
            check(*inputs(seqlen, seqlen, dtype, num_heads=1, head_dim=head_dim, device=device), True, f"{head_dim}")
            check(*inputs(5, seqlen, dtype, num_heads=1, head_dim=head_dim, device=device), False, f"5, {head_dim}")


@pytest.mark.parametrize("isa", ISAS)
def test_few_queries_over_many_keys_are_split(isa):
    with cpu_isa(isa):
        for seqlen_q in (1, 4, 16):
            check(*inputs(seqlen_q, 4500, torch.float32), True, f"{isa} {seqlen_q} queries")
        # A split that some queries do not see at all: its weight is zero there
        check(*inputs(4, 2050, torch.float32), True, f"{isa} short last split")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(name, dtype):
    with backend(name) as device:
        q, k, v = inputs(70, 70, dtype, device=device)
        check(q * 30, k * 30, v, True, "scores of some thousands")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.5, 0.0, pytest.param(-0.25, marks=pytest.mark.sanitize)])
def test_softmax_scale(name, dtype, scale):
    with backend(name) as device:
        check(*inputs(20, 40, dtype, device=device), True, f"{name} scale {scale}", softmax_scale=scale)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", SANITIZED_DTYPES)
def test_maximum_that_grows_from_tile_to_tile(name, dtype):
    with backend(name) as device:
        q, k, v = inputs(3, 200, dtype, device=device)
        for growth in (0.01, 0.1):  # the CUDA kernel follows a maximum only in steps
            k[:, :, 0] = (torch.arange(200, device=device) * growth)[:, None]
            q[:, :, 0] = 8.0
            check(q, k, v, True, f"{name} {growth} per key")
            check(q, k.flip(0), v, True, f"{name} {-growth} per key")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_varlen_is_the_sequences_one_by_one(name, dtype):
    lengths_q, lengths_k = [5, 0, 150, 1, 64], [9, 3, 150, 300, 64]
    if name not in ISAS:
        lengths_q, lengths_k = [5, 0, 130, 1], [9, 3, 50, 70]
    with backend(name) as device:
        q, k, v = inputs(sum(lengths_q), sum(lengths_k), dtype, num_heads=2 if name in ISAS else 1, device=device)
        out, lse = packed(q, k, v, lengths_q, lengths_k)
        parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), lengths_q, lengths_k, strict=True)
        singles = [packed(a, b, c, [n], [m]) for a, b, c, n, m in parts]
    assert torch.equal(out, torch.cat([single[0] for single in singles]))
    assert torch.equal(lse, torch.cat([single[1] for single in singles], dim=1))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batched_layout_against_sdpa(name, dtype):
    with backend(name) as device:
        q, k, v = (randn(3, 96, 2, 64, dtype=dtype, seed=s).to(device) for s in range(3))
        out, lse = ops.flash_attention(q, k, v)
    assert lse.shape == (3, 2, 96)
    with sdpa_kernel(SDPBackend.MATH):
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]
        plain = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
        expected = F.scaled_dot_product_attention(*(t.double() for t in heads_first), is_causal=True).transpose(1, 2)
    assert_within_contract(out, expected, plain, "batched")
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 8
    above = torch.ones(96, 96, dtype=torch.bool, device=device).triu(1)
    expected_lse = scores.masked_fill(above, -math.inf).logsumexp(-1)
    assert max_error(lse, expected_lse) <= FLOOR[torch.float32] * float(expected_lse.abs().max())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", SANITIZED_DTYPES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_keys_beyond_seqused_are_never_read(name, dtype, causal):
    lengths_q, lengths_k, used = [4, 150, 2], [70, 200, 66], [65, 150, 0]
    if name not in ISAS:
        lengths_q, lengths_k, used = [4, 20, 2], [70, 80, 66], [65, 30, 0]
    q, k, v = inputs(sum(lengths_q), sum(lengths_k), dtype, num_heads=2 if name in ISAS else 1)
    starts = cu_seqlens(lengths_k).tolist()
    kept = torch.cat([torch.arange(s, s + n) for s, n in zip(starts[:-1], used, strict=True)])
    with backend(name) as device:
        expected = packed(*(t.to(device) for t in (q, k[kept], v[kept])), lengths_q, used, causal=causal)
        for poisoned in (k, v):
            clean = poisoned[kept]
            poisoned.fill_(float("nan"))[kept] = clean
        seqused_k = torch.tensor(used, dtype=torch.int32, device=device)
        tensors = [t.to(device) for t in (q, k, v)]
        out = packed(*tensors, lengths_q, lengths_k, seqused_k=seqused_k, causal=causal)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])
    assert (out[0][-2:] == 0).all()
    assert (out[1][:, -2:] == -math.inf).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen", [4, 70, 200])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_queries_that_see_them_and_no_other(name, dtype, seqlen, value):
    at = seqlen // 2
    with backend(name) as device:
        clean = inputs(seqlen, seqlen, dtype, device=device)
        before = packed(*clean, [seqlen], [seqlen])[0]
        for i in range(3):
            tensors = [t.clone() for t in clean]
            tensors[i][at, 0, 3] = value
            out = packed(*tensors, [seqlen], [seqlen])[0]
            scores = torch.einsum("qhd,khd->hqk", tensors[0].double(), tensors[1].double())[0]
            # nan and +inf scores poison the softmax, -inf is a weight of zero; every query that sees a value weighs it
            poisoned = (scores.isnan() | (scores == math.inf)).tril().any(-1)
            hit = poisoned if i < 2 else torch.arange(seqlen, device=device) >= at
            assert torch.equal((~out[:, 0].isfinite()).any(-1), hit), f"input {i}"
            # Where torch's kernel or the exact repetition of a row steps in, not the same bits
            exact = name in ISAS and seqlen <= 100
            assert torch.equal(out[:at, :], before[:at, :]) or not exact
            assert_within_contract(out[:at], before[:at].double(), before[:at], "rows before")
            assert torch.equal(out[:, 1].isfinite(), before[:, 1].isfinite())


@pytest.mark.sanitize
@pytest.mark.parametrize("name", GPU_KERNELS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_value_that_a_query_does_not_see_is_not_weighed(name, head_dim):
    with backend(name) as device:
        q, k, v = inputs(40, 50, torch.bfloat16, num_heads=1, head_dim=head_dim, device=device)
        v[45, 0, 7] = float("nan")
        finite = packed(q, k, v, [40], [50])[0].isfinite().all(-1)[:, 0]
        assert torch.equal(finite, torch.arange(40, device=device) < 35)
        check(q[:35].clone(), k[:45], v[:45], True, "up to the value")
        expected = packed(q[:35].clone(), k[:45], v[:45], [35], [45])[0]
        assert_within_contract(packed(q, k, v, [40], [50])[0][:35], expected.double(), expected, "rows before")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("seqlen", [1, 70, 150])
def test_scores_that_are_all_minus_inf_count_as_no_keys(name, seqlen):
    with backend(name) as device:
        q, k, v = inputs(seqlen, seqlen, torch.bfloat16, device=device)
        q[:, :, 0], k[:, 0, 0] = 1.0, -math.inf
        out, lse = packed(q, k, v, [seqlen], [seqlen])
    assert (out[:, 0] == 0).all()
    assert (lse[0] == -math.inf).all()
    assert out[:, 1].isfinite().all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen", [70, 150])
def test_views_of_a_packed_projection(name, dtype, seqlen):
    with backend(name) as device:
        q, k, v = randn(seqlen, 3, 3, 64, dtype=dtype).to(device).unbind(2)
        assert not q.is_contiguous()
        out = packed(q, k, v, [seqlen], [seqlen])
        expected = packed(q.contiguous(), k.contiguous(), v.contiguous(), [seqlen], [seqlen])
        assert torch.equal(out[0], expected[0])
        assert torch.equal(out[1], expected[1])
        # every tensor in strides of its own
        heads_first = k.transpose(0, 1).contiguous().transpose(0, 1)
        wide_v = torch.zeros(seqlen, 5, 72, dtype=dtype, device=device)
        wide_v[:, 1:4, 8:] = v
        out = packed(q, heads_first, wide_v[:, 1:4, 8:], [seqlen], [seqlen])
        assert torch.equal(out[0], expected[0])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", SANITIZED_DTYPES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_alignment_changes_no_result(name, dtype, which):
    with backend(name) as device:
        tensors = inputs(20, 70, dtype, num_heads=1, device=device)
        expected = packed(*tensors, [20], [70])
        odd_strides = torch.zeros(len(tensors[which]) + 1, 1, 66, dtype=dtype, device=device)[1:, :, 1:65]
        tensors[which] = odd_strides.copy_(tensors[which])
        assert tensors[which].data_ptr() % 16 != 0
        out = packed(*tensors, [20], [70])
    assert_same_results(name, out[0], expected[0], dtype)
    assert max_error(out[1], expected[1]) <= (FLOOR[torch.float32] * 10 if kernel_depends_on_strides(name) else 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_every_number_of_threads(dtype):
    lengths_q, lengths_k = [200, 3, 130], [200, 5000, 260]
    args = (*inputs(sum(lengths_q), sum(lengths_k), dtype), lengths_q, lengths_k)
    first = packed(*args)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        more_threads = packed(*args)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first[0], more_threads[0])
    assert torch.equal(first[1], more_threads[1])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_every_run(name, dtype):
    with backend(name) as device:
        args = (*inputs(133, 260, dtype, device=device), [3, 130], [130, 130])
        first, again = packed(*args), packed(*args)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("name", [EMU])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_matrix_loads_have_no_bank_conflicts(name, head_dim):
    with backend(name):
        args = inputs(130, 150, torch.bfloat16, num_heads=1, head_dim=head_dim)
        counts = emulator_counts(lambda: packed(*args, [130], [150]))
    assert counts["ldmatrix_wavefronts"] == counts["ldmatrix_wavefronts_ideal"] > 0


@pytest.mark.parametrize("name", BACKENDS)
def test_empty_batch(name):
    with backend(name) as device:
        q, k, v = inputs(0, 0, torch.float32, device=device)
        out, lse = packed(q, k, v, [], [])
        assert out.shape == (0, 2, 64)
        assert lse.shape == (2, 0)
        out, lse = packed(q, k, v, [0, 0], [0, 0])
        assert out.shape == (0, 2, 64)


@pytest.mark.parametrize("name", GPU_KERNELS)
def test_launches_that_are_refused(name):
    with backend(name) as device:
        kernel = ops._kernel("flash_attention")
        q, k, v = inputs(2, 2, torch.float32, head_dim=72, device=device)
        starts = cu_seqlens([2], device)
        with pytest.raises(ValueError, match="flash_attention: head_dim must be 64 or 128 on CUDA, got 72"):
            kernel(q, k, v, starts, starts, None, 2, 2, 1.0, True)
        q = torch.zeros(1, 2**16, 64, dtype=torch.float16, device=device)
        starts = torch.zeros(2**16 + 1, dtype=torch.int32, device=device)
        message = r"flash_attention: batch_size 65536 x num_heads 65536 .* 4294967296 blocks, .* fewer than 2\^31"
        with pytest.raises(ValueError, match=message):
            kernel(q, q, q, starts, starts, None, 1, 1, 1.0, True)


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
