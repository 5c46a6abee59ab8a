"""paged_attention on every backend, against the reference in fp64 and flash_attention on the same keys."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, EMU, ISAS, assert_within_contract, backend, cpu_isa, emulator_counts, randn
from test_flash_attention import (
    BACKENDS,
    GPU_KERNELS,
    SANITIZED_DTYPES,
    assert_same_results,
    cu_seqlens,
    packed,
    plain_torch,
)

from persimmon_fast import ops, reference


def paged_inputs(lengths_q, lengths_k, dtype, page_size=64, num_heads=2, head_dim=64, device="cpu"):
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
    tensors = (q, k, v, *caches, page_table, torch.tensor(lengths_k, dtype=torch.int32))
    return [tensor.to(device) for tensor in tensors]


def run(q, k_cache, v_cache, page_table, seqlens, lengths_q):
    starts = cu_seqlens(lengths_q, q.device)
    return ops.paged_attention(
        q, k_cache, v_cache, page_table, seqlens, cu_seqlens_q=starts, max_seqlen_q=max(lengths_q)
    )


def check(lengths_q, lengths_k, dtype, what, device, **shape):
    q, k, v, *cache = paged_inputs(lengths_q, lengths_k, dtype, device=device, **shape)
    out = run(q, *cache, lengths_q)
    parts = list(zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True))
    expected = torch.cat(
        [reference.attention(*(t.double() for t in part), q.shape[-1] ** -0.5, True)[0] for part in parts]
    )
    plain = torch.cat([plain_torch(*part, True) for part in parts])
    assert_within_contract(out, expected, plain, f"{what} {lengths_q} {lengths_k} {shape}")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 64, 100])
def test_matches_reference(name, dtype, page_size):
    with backend(name) as device:
        # the CUDA kernels: for few queries, for many
        check([1, 1, 2, 0, 5, 16], [1, 63, 64, 10, 65, 200], dtype, name, device, page_size=page_size, num_heads=1)
        check([2, 0, 17, 40], [129, 3, 65, 40], dtype, name, device, page_size=page_size, num_heads=1)


@pytest.mark.parametrize("name", GPU_KERNELS)
@pytest.mark.parametrize("dtype", SANITIZED_DTYPES[1:])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ([1], [255]),  # one split, room for more
        ([1], [1100]),  # six splits, the last one short
        ([3, 1, 0], [1100, 5, 1]),  # six splits, one, no queries
        ([16], [577]),  # the last split holds one key, which the first queries do not see
    ],
)
def test_keys_are_split(name, dtype, head_dim, lengths_q, lengths_k):
    with backend(name) as device:
        check(lengths_q, lengths_k, dtype, name, device, head_dim=head_dim, num_heads=1)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", GPU_KERNELS)
@pytest.mark.parametrize("page_size", [1, 24, 128])
@pytest.mark.parametrize("lengths_q", [[2], [17]])
def test_pages_of_any_size(name, page_size, lengths_q):
    with backend(name) as device:
        check(lengths_q, [130], torch.bfloat16, name, device, page_size=page_size, num_heads=2)


@pytest.mark.parametrize("name", GPU_KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_keys", [16, 17, 63, 64, 65, 127, 129, 511, 512, 513])
def test_edges_of_slices_and_splits(name, dtype, num_keys):
    with backend(name) as device:
        for page_size in (64, 24, 512):
            check([1], [num_keys], dtype, name, device, page_size=page_size, num_heads=2)
            check([7], [num_keys], dtype, name, device, page_size=page_size, num_heads=1)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_contiguous_keys_bitwise(name, dtype):
    # lengths with one query, split keys, tiles of many queries, and what bf16 leaves to torch
    lengths_q, lengths_k = [1, 3, 40, 150, 140], [2500, 70, 100, 150, 260]
    if name not in ISAS:
        lengths_q, lengths_k = [1, 3, 40, 130], [250, 70, 100, 130]
    with backend(name) as device:
        q, k, v, *cache = paged_inputs(lengths_q, lengths_k, dtype, device=device)
        out = run(q, *cache, lengths_q)
        assert torch.equal(out, packed(q, k, v, lengths_q, lengths_k)[0])
        for b, (single, length) in enumerate(zip(q.split(lengths_q), lengths_q, strict=True)):
            if name not in ISAS and length <= 16:
                continue  # alone they are a case for the CUDA kernel that splits keys
            alone = run(single, cache[0], cache[1], cache[2][b : b + 1], cache[3][b : b + 1], [length])
            assert torch.equal(alone, out[sum(lengths_q[:b]) : sum(lengths_q[: b + 1])])


@pytest.mark.parametrize("name", GPU_KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_page_size_changes_no_bit(name, dtype):
    with backend(name) as device:
        outs = []
        for page_size in (64, 16, 128):
            q, _, _, *cache = paged_inputs([3, 1], [90, 700], dtype, page_size, num_heads=1, device=device)
            outs.append(run(q, *cache, [3, 1]))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", SANITIZED_DTYPES)
def test_one_launch_serves_every_length(name, dtype):
    """As a captured step does: the same arguments each time, a page table wider than needed, and lengths that grow on
    the device. The bits are those of a table that ends with the sequence."""
    lengths_k = [1, 1100]
    with backend(name) as device:
        q, k, v, *caches, table, seqlens = paged_inputs([1, 1], lengths_k, dtype, num_heads=1, device=device)
        table = F.pad(table, (0, 32 - table.shape[1]), value=-1)
        table[0] = table[1]
        for num_keys in (1, 63, 64, 65, 128, 129, 255, 256, 257, 384, 385, 512, 577, 800, 1099, 1100):
            seqlens[0] = num_keys
            out = ops.paged_attention(q, *caches, table, seqlens)
            num_pages = -(-num_keys // 64)
            ending = [table[:, :num_pages].contiguous(), seqlens.clamp(max=num_keys)]
            assert torch.equal(out[0], ops.paged_attention(q, *caches, *ending)[0]), num_keys
            part = (q[:1], k[1 : 1 + num_keys], v[1 : 1 + num_keys])
            expected = reference.attention(*(t.double() for t in part), q.shape[-1] ** -0.5, True)[0]
            assert_within_contract(out[:1], expected, plain_torch(*part, True), f"{name} {num_keys}")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_query_per_sequence_is_the_default(name, dtype):
    lengths_k = [100, 3, 3000] if name in ISAS else [100, 3, 600]
    with backend(name) as device:
        q, k, v, *cache = paged_inputs([1, 1, 1], lengths_k, dtype, device=device)
        out = ops.paged_attention(q, *cache)
        assert torch.equal(out, run(q, *cache, [1, 1, 1]))
    expected = reference.paged_attention(
        q.double(), *(c.double() for c in cache[:2]), *cache[2:], cu_seqlens([1] * 3, device), 0.125
    )
    parts = zip(q.split(1), k.split(lengths_k), v.split(lengths_k), strict=True)
    plain = torch.cat([plain_torch(a, b, c, True) for a, b, c in parts])
    assert_within_contract(out, expected, plain, "decode")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("num_keys", [60, pytest.param(600, marks=pytest.mark.sanitize)])
def test_nan_and_inf_reach_the_queries_that_see_them_and_no_other(name, dtype, value, num_keys):
    with backend(name) as device:
        q, _, _, *cache = paged_inputs([9], [num_keys], dtype, num_heads=2, device=device)
        before = run(q, *cache, [9])
        at = num_keys - 4  # seen by queries 5 to 8
        page, slot = int(cache[2][0, at // 64]), at % 64
        for i in range(2):
            caches = [t.clone() for t in cache[:2]]
            caches[i][page, 0, slot, 3] = value
            out = run(q, *caches, *cache[2:], [9])
            # a key of infinity is a score of infinity where its sign is that of the query, else a weight of zero
            seen = torch.arange(9, device=device) >= 5
            hit = seen & ((value != value) | (i == 1) | (q[:, 0, 3] > 0))
            assert torch.equal((~out[:, 0].isfinite()).any(-1), hit), f"cache {i}"
            assert_within_contract(out[:5], before[:5].double(), before[:5], "queries before")
            assert torch.equal(out[:, 1], before[:, 1])


# bf16 on AMX: up to 16 queries, which is what a step with drafted tokens needs; elsewhere one path takes up to 4
@pytest.mark.parametrize(
    ("isa", "dtype", "num_queries"),
    [(isa, dtype, 4) for isa in ISAS for dtype in DTYPES]
    + [("amx", torch.bfloat16, num_queries) for num_queries in (5, 9, 16) if "amx" in ISAS],
    ids=str,
)
@pytest.mark.parametrize(("num_keys", "head_dim"), [(70, 64), (2060, 128), (129, 96)])
def test_a_query_has_the_bits_that_it_has_alone(isa, dtype, num_queries, num_keys, head_dim):
    with cpu_isa(isa):
        q, _, _, *cache, seqlens = paged_inputs([num_queries], [num_keys], dtype, num_heads=2, head_dim=head_dim)
        together = run(q, *cache, seqlens, [num_queries])
        for i in range(num_queries):
            alone = run(q[i : i + 1], *cache, seqlens - (num_queries - 1 - i), [1])
            assert torch.equal(together[i], alone[0]), f"query {i}"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.5, -0.25, 0.0])
def test_softmax_scale(name, dtype, scale):
    with backend(name) as device:
        q, k, v, *cache = paged_inputs([3], [600], dtype, num_heads=1, device=device)
        out = ops.paged_attention(q, *cache, cu_seqlens_q=cu_seqlens([3], device), max_seqlen_q=3, softmax_scale=scale)
        expected = reference.attention(q.double(), k.double(), v.double(), scale, True)[0]
        plain = plain_torch((q.double() * scale * 8).to(dtype), k, v, True)
        assert_within_contract(out, expected, plain, f"{name} {scale}")


@pytest.mark.parametrize("name", [EMU])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_matrix_loads_have_no_bank_conflicts(name, head_dim):
    q, _, _, *cache = paged_inputs([3], [150], torch.bfloat16, num_heads=1, head_dim=head_dim)
    with backend(name):
        counts = emulator_counts(lambda: run(q, *cache, [3]))
    assert counts["ldmatrix_wavefronts"] == counts["ldmatrix_wavefronts_ideal"] > 0


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


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths_q", [[1, 4, 1], [20, 4, 1]])
def test_same_bits_on_every_run(name, dtype, lengths_q):
    with backend(name) as device:
        q, _, _, *cache = paged_inputs(lengths_q, [500, 300, 7], dtype, num_heads=1, device=device)
        assert torch.equal(run(q, *cache, lengths_q), run(q, *cache, lengths_q))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_queries_and_page_table(name, dtype):
    with backend(name) as device:
        q, _, _, k_cache, v_cache, page_table, seqlens = paged_inputs([1, 1], [100, 200], dtype, device=device)
        out = ops.paged_attention(q, k_cache, v_cache, page_table, seqlens)
        wide_q = torch.zeros(2, 2, 3, 64, dtype=dtype, device=device)
        wide_table = torch.zeros(2, 9, dtype=torch.int32, device=device)
        strided_table = wide_table[:, 2 : 2 + page_table.shape[1]]
        wide_q[:, :, 1] = q
        strided_table.copy_(page_table)
        assert torch.equal(out, ops.paged_attention(wide_q[:, :, 1], k_cache, v_cache, strided_table, seqlens))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", SANITIZED_DTYPES)
@pytest.mark.parametrize("lengths_q", [[1, 3], [17, 2]])
def test_alignment_changes_no_result(name, dtype, lengths_q):
    with backend(name) as device:
        q, _, _, *cache = paged_inputs(lengths_q, [30, 100], dtype, num_heads=1, device=device)
        out = run(q, *cache, lengths_q)
        for i in range(2):
            shifted = torch.empty(cache[i].numel() + 1, dtype=dtype, device=device)[1:].view(cache[i].shape)
            assert shifted.copy_(cache[i]).data_ptr() % 16 != 0
            assert_same_results(name, run(q, *cache[:i], shifted, *cache[i + 1 :], lengths_q), out, dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(name, dtype):
    with backend(name) as device:
        q, _, _, *cache = paged_inputs([1], [5], dtype, device=device)
        out = ops.paged_attention(q[:0], cache[0], cache[1], cache[2][:0], cache[3][:0])
        assert out.shape == (0, 2, 64)
        zeros = torch.zeros(2, dtype=torch.int32, device=device)
        assert ops.paged_attention(q[:0], *cache[:3], zeros[:1], cu_seqlens_q=zeros).shape == (0, 2, 64)


@pytest.mark.parametrize("name", GPU_KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_pages", [1, 12])
def test_a_query_over_an_empty_cache_gives_zeros(name, dtype, max_pages):
    # A CPU refuses it; a GPU cannot look, and padding of a batch may look so.
    with backend(name) as device:
        q, _, _, *cache = paged_inputs([1, 1], [5, 700], dtype, device=device)
        table = cache[2][:, :max_pages].contiguous()
        out = run(q, *cache[:2], table, torch.zeros(2, dtype=torch.int32, device=device), [1, 1])
        assert (out == 0).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("name", GPU_KERNELS)
@pytest.mark.parametrize("length_q", [3, 20])
def test_a_max_seqlen_q_that_is_too_small_spoils_its_sequence_alone(name, length_q):
    # A CPU refuses it; a GPU cannot look, and the tile and the partial results have no room for the other queries.
    with backend(name) as device:
        q, _, _, *cache = paged_inputs([1, length_q], [600, 600], torch.bfloat16, num_heads=1, device=device)
        expected = run(q[:1], *cache[:2], cache[2][:1], cache[3][:1], [1])
        out = ops.paged_attention(q, *cache, cu_seqlens_q=cu_seqlens([1, length_q], device))
        assert torch.equal(out[:1], expected)


@pytest.mark.parametrize("name", GPU_KERNELS)
def test_max_seqlen_q_is_not_negative(name):
    with backend(name) as device:
        q, _, _, *cache = paged_inputs([1], [5], torch.bfloat16, device=device)
        with pytest.raises(ValueError, match="max_seqlen_q must not be negative, got -300"):
            ops.paged_attention(q, *cache, max_seqlen_q=-300)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")
def test_number_of_splits(tmp_path):
    cases = {  # batch_size, num_heads, capacity, multiprocessors: splits
        (1, 64, 16384, 132): 6,  # 3 blocks on each of 132 multiprocessors, 64 heads
        (1, 64, 16384, 108): 5,
        (1, 64, 640, 132): 5,  # at least 128 keys each
        (1, 64, 255, 132): 1,
        (1, 64, 256, 132): 2,
        (16, 64, 16384, 132): 1,  # the batch fills the GPU
        (1, 1, 1 << 20, 132): 396,
        (0, 64, 16384, 132): 128,
        (1, 64, 0, 132): 1,
        (1 << 20, 64, 1 << 20, 132): 1,
    }
    calls = "".join(f'std::printf("%lld ", (long long)paged_attention_num_splits{case});' for case in cases)
    source = tmp_path / "splits.cpp"
    source.write_text(
        '#include <cstdio>\n#include "csrc/cuda/paged_attention_splits.h"\n'
        f"using namespace persimmon_fast::cuda;\nint main() {{ {calls} }}\n"
    )
    root = Path(__file__).resolve().parents[1]
    subprocess.run(["g++", "-std=c++17", f"-I{root}", str(source), "-o", str(tmp_path / "splits")], check=True)
    printed = subprocess.run([str(tmp_path / "splits")], capture_output=True, text=True, check=True).stdout
    assert [int(word) for word in printed.split()] == list(cases.values())


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
