"""qkv_norm_rope and qkv_norm_rope_paged on every backend, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, CUDA, DTYPES, ISAS, assert_within_contract, backend, randn
from test_qk_norm_rope import (
    EPS,
    GPU_BACKENDS,
    NORMS,
    NUM_POSITIONS,
    ONE_OF_EACH,
    backends_with_heads,
    kernels,
    plain,
    table,
    to,
    wide,
)

from persimmon_fast import ops, reference

NUM_ROWS = [0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 33]
NAMES = ("x", "weight", "bias", "q_weight", "q_bias", "k_weight", "k_bias", "cos_sin", "position_ids")


def inputs(
    tokens: int, hidden: int, num_heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype, norm: str | None
):
    """The arguments NAMES."""
    rows = num_heads * 3 * head_dim
    shape = (num_heads, head_dim) if norm == "per_head" else (head_dim,)
    norms = [None if norm is None else randn(*shape, dtype=dtype, seed=13 + i) for i in range(4)]
    positions = torch.randint(0, NUM_POSITIONS, (tokens,), generator=torch.Generator().manual_seed(8))
    weight = randn(rows, hidden, dtype=dtype, seed=2, scale=hidden**-0.5)
    return (
        randn(tokens, hidden, dtype=dtype, seed=1), weight, randn(rows, dtype=dtype, seed=3), *norms,
        table(rotary_dim), positions,
    )  # fmt: skip


def references(args, num_heads: int):
    """((expected q, k, v), (plain torch's q, k, v))"""
    x, weight, bias, q_weight, q_bias, k_weight, k_bias, cos_sin, positions = args
    q, k, v = F.linear(x, weight, bias).view(x.shape[0], num_heads, 3, weight.shape[0] // (3 * num_heads)).unbind(2)
    plain_qk = plain(q, q_weight, q_bias, cos_sin, positions), plain(k, k_weight, k_bias, cos_sin, positions)
    return reference.qkv_norm_rope(*wide(args), EPS, num_heads), (*plain_qk, v)


def check(args, num_heads, actual, what):
    expected, simple = references(args, num_heads)
    for name, a, e, s in zip("qkv", actual, expected, simple, strict=True):
        assert_within_contract(a, e, s, f"{name} {what}")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", NUM_ROWS)
def test_row_counts(name, dtype, tokens):
    with kernels(name) as device:
        args = to(device, inputs(tokens, 130, 3, 64, 32, dtype, "shared"))
        check(args, 3, ops.qkv_norm_rope(*args, EPS, 3), f"{name} {tokens} tokens")


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize(("name", "head_dim", "rotary_dim"), backends_with_heads())
def test_heads(name, norm, head_dim, rotary_dim):
    for tokens, dtype in ((1, torch.float32), (3, torch.bfloat16), (18, torch.float32)):
        with kernels(name) as device:
            args = to(device, inputs(tokens, 96, 2, head_dim, rotary_dim, dtype, norm))
            out = ops.qkv_norm_rope(*args, EPS, 2)
            check(args, 2, out, f"{name} {norm} head_dim {head_dim} rotary_dim {rotary_dim} tokens {tokens}")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 7, 65, 4099])
def test_hidden_sizes_strides_and_no_bias(name, dtype, hidden):
    with kernels(name) as device:
        x, weight, _, *rest = to(device, inputs(3, hidden + 40, 1, 64, 32, dtype, "shared"))
        args = (x[:, 20 : 20 + hidden], weight[:, 7 : 7 + hidden], None, *rest)
        check(args, 1, ops.qkv_norm_rope(*args, EPS, 1), f"{name} {hidden}")


# tokens, hidden_size, num_heads, head_dim, rotary_dim, norm. The product (gemm.cuh) has tiles of 64 x 64 (64 x 128
# for head_dim 128) and 128 x 128, k-tiles of 32 in 4 stages, element-wise copies where hidden_size is no multiple of 8.
TILES = [
    (1, 32, 1, 64, 32, "shared"), (63, 8, 1, 64, 32, "per_head"), (64, 128, 1, 64, 32, None),
    (65, 288, 1, 64, 34, "per_head"), (3, 35, 2, 64, 32, "per_head"), (33, 288, 1, 128, 64, "per_head"),
    (70, 32, 4, 128, 90, "shared"),
]  # fmt: skip
LARGE_TILES = [  # not of fp32; the last column tile of the first is half empty
    (128, 72, 3, 64, 16, "per_head"), (129, 288, 2, 64, 32, "shared"), (127, 40, 2, 128, 128, "per_head"),
]  # fmt: skip


@pytest.mark.sanitize
@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "case"),
    [(dtype, case) for dtype in DTYPES for case in (TILES if dtype == torch.float32 else TILES + LARGE_TILES)],
    ids=str,
)
def test_tiles(name, dtype, case):
    with kernels(name) as device:
        args = to(device, inputs(*case[:5], dtype, case[5]))
        check(args, case[2], ops.qkv_norm_rope(*args, EPS, case[2]), f"{name} {case}")


@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("op", ["qkv_norm_rope", "qkv_norm_rope_paged"])
def test_head_dims_without_a_kernel_run_the_reference_with_a_warning(name, op):
    with backend(name) as device:
        args = to(device, inputs(4, 40, 2, 80, 40, torch.bfloat16, "shared"))
        slots = torch.tensor([5, 3, 1, 0], device=device)
        caches = [torch.zeros(1, 2, 6, 80, dtype=torch.bfloat16, device=device) for _ in range(2)]
        more = (slots, *caches) if op == "qkv_norm_rope_paged" else ()
        ops._warned.clear()
        with pytest.warns(UserWarning, match=rf"{op} has kernels for a head_dim of \(64, 128\) on CUDA, not of 80"):
            out = getattr(ops, op)(*args, EPS, 2, *more)
        check(args, 2, (out, *(cache[0][:, slots].transpose(0, 1) for cache in caches)) if more else out, name)
        with pytest.raises(ValueError, match=f"^{op}: head_dim must be 64 or 128 on CUDA, got 80"):
            ops._kernel(op)(*args, EPS, 2, *more)


def paged_case(tokens: int, dtype: torch.dtype, device: str, head_dim: int = 64, page_size: int = 8):
    """Arguments, slots in random order with every fourth one negative, caches full of NaN."""
    pages = tokens // page_size + 5
    args = inputs(tokens, 100, 3, head_dim, head_dim // 2, dtype, "shared")
    slots = torch.randperm(pages * page_size, generator=torch.Generator().manual_seed(5))[:tokens]
    slots[3::4] = torch.tensor([-1, -7, -(2**40)] * tokens)[: len(slots[3::4])]
    caches = [torch.full((pages, 3, page_size, head_dim), float("nan"), dtype=dtype, device=device) for _ in range(2)]
    return to(device, args), slots.to(device), caches


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "head_dim", "page_size"),
    [
        (0, 64, 8), (1, 64, 8), pytest.param(5, 128, 1, marks=pytest.mark.sanitize), (16, 64, 3),
        pytest.param(17, 64, 8, marks=pytest.mark.sanitize), (33, 64, 16),
    ],
)  # fmt: skip
def test_paged_writes_its_slots_and_nothing_else(name, dtype, tokens, head_dim, page_size):
    with kernels(name) as device:
        args, slots, caches = paged_case(tokens, dtype, device, head_dim, page_size)
        q, k, v = ops.qkv_norm_rope(*args, EPS, 3)
        paged_q = ops.qkv_norm_rope_paged(*args, EPS, 3, slots, *caches)
        expected = [torch.full_like(cache, float("nan")) for cache in caches]
        reference.write_paged(k, v, slots, *expected)
        assert torch.equal(paged_q, q)
        for cache, target in zip(caches, expected, strict=True):
            assert torch.equal(cache.nan_to_num(nan=12345), target.nan_to_num(nan=12345))
        assert int(caches[0].isfinite().sum()) == int((slots >= 0).sum()) * 3 * head_dim


@pytest.mark.sanitize
@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("which", ["bias", "LayerNorm", "cos_sin", "k_cache", "v_cache"])
def test_alignment_changes_no_bit(name, which):
    """Of everything but x and weight, one at a time."""
    with kernels(name) as device:
        args, slots, caches = paged_case(5, torch.bfloat16, device)
        q, k, v = ops.qkv_norm_rope(*args, EPS, 3)

        def shifted(t):
            return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

        changed = list(args)
        if which == "bias":
            changed[2] = shifted(args[2])
        elif which == "LayerNorm":
            changed[3] = shifted(args[3])
        elif which == "cos_sin":
            changed[7] = shifted(args[7])
        else:
            caches["kv".index(which[0])] = shifted(caches["kv".index(which[0])])
        expected = [cache.clone() for cache in caches]
        reference.write_paged(k, v, slots, *expected)
        assert torch.equal(ops.qkv_norm_rope_paged(*changed, EPS, 3, slots, *caches), q)
        for cache, target in zip(caches, expected, strict=True):
            assert torch.equal(cache.nan_to_num(nan=12345), target.nan_to_num(nan=12345))


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("tokens", [2, 17])
def test_paged_offsets_pass_two_to_the_31_elements(name, tokens):
    """The last slot of a 4.3e9-element cache; only the pages that are touched take memory on a CPU."""
    try:
        where = "cuda" if name == "cuda" else "cpu"
        caches = [torch.empty(65537, 1, 512, 128, dtype=torch.bfloat16, device=where) for _ in range(2)]
    except RuntimeError as error:
        pytest.skip(f"no address space for two 8.6 GB caches: {error}")
    with kernels(name) as device:
        args = to(device, inputs(tokens, 32, 1, 128, 64, torch.bfloat16, None))
        slots = torch.full((tokens,), -1, device=device)
        slots[1] = 65537 * 512 - 1
        _, k, v = ops.qkv_norm_rope(*args, EPS, 1)
        ops.qkv_norm_rope_paged(*args, EPS, 1, slots, *caches)
        assert torch.equal(caches[0][-1, 0, -1], k[1, 0])
        assert torch.equal(caches[1][-1, 0, -1], v[1, 0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_bits_in_every_batch_and_run(isa, dtype):
    args = inputs(16, 1000, 5, 64, 32, dtype, "shared")
    with backend(isa):
        singles = [torch.cat(t) for t in zip(*(part(args, i, i + 1, 5) for i in range(16)), strict=True)]
        for rows in (2, 5, 16):
            for a, b, c in zip(part(args, 0, rows, 5), singles, part(args, 0, rows, 5), strict=True):
                assert torch.equal(a, b[:rows])
                assert torch.equal(a, c)


def part(args, begin: int, end: int, num_heads: int):
    """The op of some of the tokens."""
    return ops.qkv_norm_rope(args[0][begin:end], *args[1:8], args[8][begin:end], EPS, num_heads)


@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary_dim", [32, 34])
def test_neither_batch_nor_tile_nor_run_changes_a_bit(name, dtype, rotary_dim):
    """130 tokens and 2 heads make tiles of 128 x 128 on the emulator's multiprocessors, fewer make small ones; up to 16
    stream the weight, in another order."""
    with kernels(name) as device:
        args = to(device, inputs(130, 72, 2, 64, rotary_dim, dtype, "shared"))
        whole = part(args, 0, 130, 2)
        for begin, end in ((0, 130), (0, 17), (64, 129), (113, 130)):
            for a, b in zip(part(args, begin, end, 2), whole, strict=True):
                assert torch.equal(a, b[begin:end])
        few = part(args, 114, 130, 2)
        for begin, end in ((0, 16), (0, 1), (7, 8), (3, 12), (15, 16)):
            for a, b in zip(part(args, 114 + begin, 114 + end, 2), few, strict=True):
                assert torch.equal(a, b[begin:end])


@pytest.mark.parametrize("name", [CUDA])
def test_runs_on_the_current_stream(name):
    with kernels(name) as device:
        args = to(device, inputs(64, 256, 2, 64, 32, torch.bfloat16, "shared"))
        expected = ops.qkv_norm_rope(*args, EPS, 2)
        late = torch.zeros_like(args[0])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # a kernel on another stream would read the zeros
            late.copy_(args[0])
            out = ops.qkv_norm_rope(late, *args[1:], EPS, 2)
        stream.synchronize()
        assert torch.equal(out[0], expected[0])


def test_bits_do_not_depend_on_the_number_of_threads():
    args = inputs(2, 3000, 7, 64, 32, torch.bfloat16, "shared")
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(ops.qkv_norm_rope(*args, EPS, 7))
    finally:
        torch.set_num_threads(before)
    for q, k, v in outs[1:]:
        assert torch.equal(q, outs[0][0])
        assert torch.equal(k, outs[0][1])
        assert torch.equal(v, outs[0][2])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("tokens", [3, 18])
def test_nan_and_inf_reach_the_output(name, tokens):
    with kernels(name) as device:
        args = to(device, inputs(tokens, 64, 2, 64, 32, torch.float32, "shared"))
        args[0][0, 5], args[0][1, 63] = float("nan"), float("inf")
        for t in ops.qkv_norm_rope(*args, EPS, 2):
            assert t[0].isnan().all()
            assert not t[1].isfinite().any()
            assert t[2:].isfinite().all()


@pytest.mark.parametrize("tokens", [3, 18])
@pytest.mark.parametrize("norm", ["shared", None], ids=str)
def test_opcheck(tokens, norm):
    args = inputs(tokens, 24, 2, 8, 4, torch.float32, norm)
    torch.library.opcheck(torch.ops.persimmon_fast.qkv_norm_rope.default, (*args, EPS, 2))
    slots = torch.arange(tokens) + 3
    caches = [torch.zeros(6, 2, 4, 8) for _ in range(2)]
    torch.library.opcheck(torch.ops.persimmon_fast.qkv_norm_rope_paged.default, (*args, EPS, 2, slots, *caches))


ERRORS = [
    ({"x": torch.zeros(3, 24).int()}, TypeError, "x must be float32, float16 or bfloat16, got Int"),
    ({"x": randn(24)}, ValueError, r"x must be \[num_tokens, hidden_size\] .* got \[24\]"),
    ({"x": randn(3, 0)}, ValueError, r"x must have hidden_size > 0, got \[3, 0\]"),
    ({"x": randn(24, 3).t()}, ValueError, "x must have a last dimension of stride 1"),
    ({"num_heads": 0}, ValueError, "num_heads must be positive, got 0"),
    ({"num_heads": 5}, ValueError, r"weight must be \[num_heads \* 3 \* head_dim, .* with num_heads=5, got \[48, 24\]"),
    ({"weight": randn(48, 23)}, ValueError, r"weight must be .* = \[-1, 24\], got \[48, 23\]"),
    ({"weight": randn(48, 24).half()}, TypeError, "weight must be Float as x is, got Half"),
    ({"weight": randn(24, 48).t()}, ValueError, "weight must have a last dimension of stride 1"),
    ({"bias": randn(47)}, ValueError, r"bias must be \[num_heads \* 3 \* head_dim\] = \[48\], got \[47\]"),
    ({"bias": randn(48).half()}, TypeError, "bias must be Float as x is, got Half"),
    ({"num_heads": 16}, ValueError, r"q_weight must be \[head_dim=1\] or \[num_heads=16, head_dim=1\], got \[8\]"),
    ({"k_bias": None}, ValueError, "q_weight, q_bias, k_weight and k_bias must be given together or not at all"),
    ({"cos_sin": randn(50, 10)}, ValueError, r"cos_sin must have an even number of columns, 2 .. head_dim=8, got"),
    ({"position_ids": torch.zeros(2).long()}, ValueError, r"position_ids must be \[num_tokens\] = \[3\], got \[2\]"),
]
PAGED_ERRORS = [
    ({"slot_mapping": torch.zeros(3).int()}, TypeError, "slot_mapping must be Long, got Int"),
    ({"slot_mapping": torch.zeros(2).long()}, ValueError, r"slot_mapping must be \[num_tokens\] = \[3\], got \[2\]"),
    ({"k_cache": torch.zeros(6, 3, 4, 8)}, ValueError, r"k_cache must be .* = \[-1, 2, -1, 8\], got \[6, 3, 4, 8\]"),
    ({"k_cache": torch.zeros(6, 2, 4, 8).half()}, TypeError, "k_cache must be Float as x is, got Half"),
    ({"k_cache": torch.zeros(6, 4, 2, 8).transpose(1, 2)}, ValueError, "k_cache must be contiguous, got strides"),
    ({"v_cache": torch.zeros(5, 2, 4, 8)}, ValueError, r"v_cache must be .* = \[6, 2, 4, 8\], got \[5, 2, 4, 8\]"),
    ({"v_cache": torch.zeros(6, 4, 2, 8).transpose(1, 2)}, ValueError, "v_cache must be contiguous, got strides"),
]


def call_with(change: dict, paged: bool, device: str = "cpu"):
    args = dict(zip(NAMES, inputs(3, 24, 2, 8, 4, torch.float32, "shared"), strict=True))
    args |= {"eps": EPS, "num_heads": 2, "slot_mapping": torch.arange(3)}
    args |= {"k_cache": torch.zeros(6, 2, 4, 8), "v_cache": torch.zeros(6, 2, 4, 8)} | change
    op = "qkv_norm_rope_paged" if paged else "qkv_norm_rope"
    return ops._kernel(op)(*to(device, list(args.values())[: None if paged else 11]))


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize(("change", "error", "match"), ERRORS)
def test_errors_name_op_argument_expected_and_found(name, change, error, match):
    with backend(name) as device, pytest.raises(error, match="^qkv_norm_rope: " + match):
        call_with(change, paged=False, device=device)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize(("change", "error", "match"), ERRORS + PAGED_ERRORS)
def test_paged_errors_name_op_argument_expected_and_found(name, change, error, match):
    with backend(name) as device, pytest.raises(error, match="^qkv_norm_rope_paged: " + match):
        call_with(change, paged=True, device=device)


@pytest.mark.parametrize("paged", [False, True])
def test_a_cpu_refuses_positions_outside_the_table(paged):
    with pytest.raises(ValueError, match=r"position_ids\[2\] = 99 is outside the table: cos_sin"):
        call_with({"position_ids": torch.tensor([0, 1, 99])}, paged)


def test_a_cpu_refuses_slots_outside_the_cache():
    match = r"slot_mapping\[1\] = 24 is outside the cache: num_pages \* page_size = 24"
    with pytest.raises(ValueError, match=match):
        call_with({"slot_mapping": torch.tensor([0, 24, 1])}, paged=True)
