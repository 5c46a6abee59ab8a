"""paged_attention on every CPU instruction set, against the reference in fp64 and flash_attention on the same keys."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, ISAS, assert_within_contract, cpu_isa, randn
from test_flash_attention import cu_seqlens, packed, plain_torch

from persimmon_fast import ops, reference


def paged_inputs(lengths_q, lengths_k, dtype, page_size=64, num_heads=2, head_dim=64):
    """q, contiguous k and v, and the same keys in shuffled pages; whatever is no key is NaN."""
    q = randn(sum(lengths_q), num_heads, head_dim, dtype=dtype, seed=1)
    k, v = (randn(sum(lengths_k), num_heads, head_dim, dtype=dtype, seed=s) for s in (2, 3))
    counts = [-(-length // page_size) for length in lengths_k]
    pages = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(4)).int()
    page_table = torch.full((len(lengths_k), max(counts, default=0) + 1), -1, dtype=torch.int32)
    caches = [torch.full((len(pages), num_heads, page_size, head_dim), float("nan"), dtype=dtype) for _ in range(2)]
    start = first = 0
    for b, (length, count) in enumerate(zip(lengths_k, counts, strict=True)):
        page_table[b, :count] = pages[first : first + count]
        first += count
        slots = page_table[b, torch.arange(length) // page_size] * page_size + torch.arange(length) % page_size
        reference.write_paged(k[start : start + length], v[start : start + length], slots.long(), *caches)
        start += length
    return q, k, v, *caches, page_table, torch.tensor(lengths_k, dtype=torch.int32)


def run(q, k_cache, v_cache, page_table, seqlens, lengths_q):
    return ops.paged_attention(
        q, k_cache, v_cache, page_table, seqlens, cu_seqlens_q=cu_seqlens(lengths_q), max_seqlen_q=max(lengths_q)
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 64, 100])
def test_matches_reference(isa, dtype, page_size):
    lengths_q, lengths_k = [1, 1, 2, 0, 5, 16, 17, 70], [1, 63, 64, 10, 65, 200, 129, 70]
    q, k, v, *cache = paged_inputs(lengths_q, lengths_k, dtype, page_size)
    with cpu_isa(isa):
        out = run(q, *cache, lengths_q)
    parts = [
        (a.double(), b.double(), c.double(), a, b, c)
        for a, b, c in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    ]
    expected = torch.cat([reference.attention(*part[:3], 0.125, True)[0] for part in parts])
    plain = torch.cat([plain_torch(*part[3:], True) for part in parts])
    assert_within_contract(out, expected, plain, f"{isa} page_size {page_size}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_contiguous_keys_bitwise(isa, dtype):
    # lengths with one query, split keys, tiles of many queries, and what bf16 leaves to torch
    lengths_q, lengths_k = [1, 3, 40, 150, 140], [2500, 70, 100, 150, 260]
    q, k, v, *cache = paged_inputs(lengths_q, lengths_k, dtype)
    with cpu_isa(isa):
        out = run(q, *cache, lengths_q)
        assert torch.equal(out, packed(q, k, v, lengths_q, lengths_k)[0])
        for b, (single, length) in enumerate(zip(q.split(lengths_q), lengths_q, strict=True)):
            alone = run(single, cache[0], cache[1], cache[2][b : b + 1], cache[3][b : b + 1], [length])
            assert torch.equal(alone, out[sum(lengths_q[:b]) : sum(lengths_q[: b + 1])])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_query_per_sequence_is_the_default(dtype):
    q, k, v, *cache = paged_inputs([1, 1, 1], [100, 3, 3000], dtype)
    out = ops.paged_attention(q, *cache)
    assert torch.equal(out, run(q, *cache, [1, 1, 1]))
    assert torch.equal(out, ops.paged_attention(q, *cache))
    expected = reference.paged_attention(
        q.double(), *(c.double() for c in cache[:2]), *cache[2:], cu_seqlens([1] * 3), 0.125
    )
    plain = torch.cat(
        [
            plain_torch(a, b, c, True)
            for a, b, c in zip(q.split(1), k.split([100, 3, 3000]), v.split([100, 3, 3000]), strict=True)
        ]
    )
    assert_within_contract(out, expected, plain, "decode")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_every_number_of_threads(dtype):
    q, _, _, *cache = paged_inputs([1, 4, 1], [5000, 2100, 7], dtype)
    out = run(q, *cache, [1, 4, 1])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(out, run(q, *cache, [1, 4, 1]))
    finally:
        torch.set_num_threads(threads)


def test_strided_queries_and_page_table():
    q, _, _, k_cache, v_cache, page_table, seqlens = paged_inputs([1, 1], [100, 200], torch.float32)
    out = ops.paged_attention(q, k_cache, v_cache, page_table, seqlens)
    wide_q, wide_table = torch.zeros(2, 2, 3, 64), torch.zeros(2, 9, dtype=torch.int32)
    wide_q[:, :, 1], wide_table[:, 2 : 2 + page_table.shape[1]] = q, page_table
    strided = wide_q[:, :, 1], k_cache, v_cache, wide_table[:, 2 : 2 + page_table.shape[1]], seqlens
    assert torch.equal(out, ops.paged_attention(*strided))


def test_empty():
    q, _, _, *cache = paged_inputs([1], [5], torch.float32)
    out = ops.paged_attention(q[:0], cache[0], cache[1], cache[2][:0], cache[3][:0])
    assert out.shape == (0, 2, 64)
    no_keys = ops.paged_attention(
        q[:0], *cache[:3], torch.zeros(1, dtype=torch.int32), cu_seqlens_q=torch.zeros(2, dtype=torch.int32)
    )
    assert no_keys.shape == (0, 2, 64)


def test_opcheck():
    q, _, _, *cache = paged_inputs([1, 3], [5, 70], torch.float32)
    cache[:2] = (cache.nan_to_num(0.0) for cache in cache[:2])  # opcheck compares the inputs with themselves
    torch.library.opcheck(torch.ops.persimmon_fast.paged_attention.default, (q, *cache, cu_seqlens([1, 3]), 3, 0.125))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q": randn(2, 128)}, ValueError, r"q must be \[total_q, num_heads, head_dim\], got \[2, 128\]"),
        ({"q": randn(2, 2, 12)}, ValueError, "head_dim must be a multiple of 8 up to 128, got 12"),
        ({"k_cache": randn(4, 3, 64, 64)}, ValueError,
         r"k_cache must be \[num_pages, num_heads, page_size, head_dim\] = \[-1, 2, -1, 64\], got \[4, 3, 64, 64\]"),
        ({"k_cache": randn(4, 2, 0, 64)}, ValueError, r"k_cache must have page_size > 0, got \[4, 2, 0, 64\]"),
        ({"k_cache": randn(4, 2, 64, 64).transpose(0, 2).contiguous().transpose(0, 2)}, ValueError,
         "k_cache must be contiguous, got strides"),
        ({"v_cache": randn(4, 2, 64, 64, dtype=torch.bfloat16)}, TypeError,
         "v_cache must be Float as q is, got BFloat16"),
        ({"v_cache": randn(4, 2, 32, 64)}, ValueError, r"v_cache must be .* got \[4, 2, 32, 64\]"),
        ({"page_table": torch.zeros(2, 3)}, TypeError, "page_table must be Int, got Float"),
        ({"seqlens": torch.ones(3, dtype=torch.int32)}, ValueError,
         r"cache_seqlens must be \[batch_size\] = \[2\], got \[3\]"),
        ({"cu_q": cu_seqlens([2])}, ValueError, r"cu_seqlens_q must be \[batch_size \+ 1\] = \[3\], got \[2\]"),
        ({"cu_q": cu_seqlens([1, 2])}, ValueError, "cu_seqlens_q holds a sequence of 2 tokens at 1"),
        ({"cu_q": cu_seqlens([1, 0])}, ValueError, "cu_seqlens_q must end at the number of tokens 2, got 1"),
        ({"seqlens": torch.tensor([5, 0], dtype=torch.int32)}, ValueError,
         r"cache_seqlens\[1\] must count the 1 queries of its sequence too, got 0"),
        ({"seqlens": torch.tensor([5, 1000], dtype=torch.int32)}, ValueError,
         r"cache_seqlens\[1\] must be at most max_pages \* page_size = \d+, got 1000"),
        ({"page_table": torch.tensor([[0, 9], [99, 1]], dtype=torch.int32)}, ValueError,
         r"page_table\[1, 0\] must be a page id below \d+, got 99"),
        ({"page_table": torch.tensor([[-1, 9], [0, 1]], dtype=torch.int32)}, ValueError,
         r"page_table\[0, 0\] must be a page id below \d+, got -1"),
    ],
)  # fmt: skip
def test_errors_name_op_argument_expected_and_found(change, error, match):
    q, _, _, *cache = paged_inputs([1, 1], [5, 70], torch.float32)
    names = ("q", "k_cache", "v_cache", "page_table", "seqlens", "cu_q", "max_q", "scale")
    args = dict(zip(names, (q, *cache, cu_seqlens([1, 1]), 1, 0.125), strict=True)) | change
    with pytest.raises(error, match="paged_attention: " + match):
        torch.ops.persimmon_fast.paged_attention(*args.values())
