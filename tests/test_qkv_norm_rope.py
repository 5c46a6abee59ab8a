"""qkv_norm_rope and qkv_norm_rope_paged on every CPU instruction set, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, ISAS, assert_within_contract, cpu_isa, randn
from test_qk_norm_rope import EPS, HEADS, NORMS, NUM_POSITIONS, plain, table, wide

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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", NUM_ROWS)
def test_row_counts(isa, dtype, tokens):
    args = inputs(tokens, 130, 3, 64, 32, dtype, "shared")
    with cpu_isa(isa):
        out = ops.qkv_norm_rope(*args, EPS, 3)
    check(args, 3, out, f"{isa} {tokens} tokens")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), HEADS)
def test_heads(isa, norm, head_dim, rotary_dim):
    for tokens, dtype in ((1, torch.float32), (3, torch.bfloat16), (18, torch.float32)):
        args = inputs(tokens, 96, 2, head_dim, rotary_dim, dtype, norm)
        with cpu_isa(isa):
            out = ops.qkv_norm_rope(*args, EPS, 2)
        check(args, 2, out, f"{isa} {norm} head_dim {head_dim} rotary_dim {rotary_dim} tokens {tokens}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 7, 65, 4099])
def test_hidden_sizes_strides_and_no_bias(isa, dtype, hidden):
    x, weight, _, *rest = inputs(3, hidden + 40, 2, 16, 8, dtype, "shared")
    args = (x[:, 20 : 20 + hidden], weight[:, 7 : 7 + hidden], None, *rest)
    with cpu_isa(isa):
        out = ops.qkv_norm_rope(*args, EPS, 2)
    check(args, 2, out, f"{isa} {hidden}")


def paged_case(tokens: int, dtype: torch.dtype, pages: int = 9, page_size: int = 8):
    """Arguments, caches full of NaN, slots in random order with every fourth one negative."""
    args = inputs(tokens, 100, 3, 64, 32, dtype, "shared")
    slots = torch.randperm(pages * page_size, generator=torch.Generator().manual_seed(5))[:tokens]
    slots[3::4] = torch.tensor([-1, -7, -(2**40)] * tokens)[: len(slots[3::4])]
    caches = [torch.full((pages, 3, page_size, 64), float("nan"), dtype=dtype) for _ in range(2)]
    return args, slots, caches


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5, 16, 17, 33])
def test_paged_writes_its_slots_and_nothing_else(isa, dtype, tokens):
    args, slots, caches = paged_case(tokens, dtype)
    with cpu_isa(isa):
        q, k, v = ops.qkv_norm_rope(*args, EPS, 3)
        paged_q = ops.qkv_norm_rope_paged(*args, EPS, 3, slots, *caches)
    expected = [torch.full_like(cache, float("nan")) for cache in caches]
    reference.write_paged(k, v, slots, *expected)
    assert torch.equal(paged_q, q)
    for cache, target in zip(caches, expected, strict=True):
        assert torch.equal(cache.nan_to_num(nan=12345), target.nan_to_num(nan=12345))
    assert int(caches[0].isfinite().sum()) == int((slots >= 0).sum()) * 3 * 64


@pytest.mark.parametrize("tokens", [2, 17])
def test_paged_offsets_pass_two_to_the_31_elements(tokens):
    """The last slot of a 4.3e9-element cache; only the pages that are touched take memory."""
    try:
        caches = [torch.empty(65537, 1, 512, 128, dtype=torch.bfloat16) for _ in range(2)]
    except RuntimeError as error:
        pytest.skip(f"no address space for two 8.6 GB caches: {error}")
    args = inputs(tokens, 32, 1, 128, 64, torch.bfloat16, None)
    slots = torch.full((tokens,), -1)
    slots[1] = 65537 * 512 - 1
    _, k, v = ops.qkv_norm_rope(*args, EPS, 1)
    ops.qkv_norm_rope_paged(*args, EPS, 1, slots, *caches)
    assert torch.equal(caches[0][-1, 0, -1], k[1, 0])
    assert torch.equal(caches[1][-1, 0, -1], v[1, 0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_bits_in_every_batch_and_run(isa, dtype):
    args = inputs(16, 1000, 5, 64, 32, dtype, "shared")

    def part(begin: int, end: int):
        return ops.qkv_norm_rope(args[0][begin:end], *args[1:8], args[8][begin:end], EPS, 5)

    with cpu_isa(isa):
        singles = [torch.cat(t) for t in zip(*(part(i, i + 1) for i in range(16)), strict=True)]
        for rows in (2, 5, 16):
            for a, b, c in zip(part(0, rows), singles, part(0, rows), strict=True):
                assert torch.equal(a, b[:rows])
                assert torch.equal(a, c)


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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [3, 18])
def test_nan_and_inf_reach_the_output(isa, tokens):
    args = inputs(tokens, 64, 2, 16, 8, torch.float32, "shared")
    args[0][0, 5], args[0][1, 63] = float("nan"), float("inf")
    with cpu_isa(isa):
        out = ops.qkv_norm_rope(*args, EPS, 2)
    for t in out:
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
    ({"position_ids": torch.tensor([0, 1, 99])}, ValueError, r"position_ids\[2\] = 99 is outside the table: cos_sin"),
]
PAGED_ERRORS = [
    ({"slot_mapping": torch.zeros(3).int()}, TypeError, "slot_mapping must be Long, got Int"),
    ({"slot_mapping": torch.zeros(2).long()}, ValueError, r"slot_mapping must be \[num_tokens\] = \[3\], got \[2\]"),
    (
        {"slot_mapping": torch.tensor([0, 24, 1])},
        ValueError,
        r"slot_mapping\[1\] = 24 is outside the cache: num_pages \* page_size = 24",
    ),
    ({"k_cache": torch.zeros(6, 3, 4, 8)}, ValueError, r"k_cache must be .* = \[-1, 2, -1, 8\], got \[6, 3, 4, 8\]"),
    ({"k_cache": torch.zeros(6, 2, 4, 8).half()}, TypeError, "k_cache must be Float as x is, got Half"),
    ({"k_cache": torch.zeros(6, 4, 2, 8).transpose(1, 2)}, ValueError, "k_cache must be contiguous, got strides"),
    ({"v_cache": torch.zeros(5, 2, 4, 8)}, ValueError, r"v_cache must be .* = \[6, 2, 4, 8\], got \[5, 2, 4, 8\]"),
    ({"v_cache": torch.zeros(6, 4, 2, 8).transpose(1, 2)}, ValueError, "v_cache must be contiguous, got strides"),
]


def call_with(change: dict, paged: bool):
    args = dict(zip(NAMES, inputs(3, 24, 2, 8, 4, torch.float32, "shared"), strict=True))
    args |= {"eps": EPS, "num_heads": 2, "slot_mapping": torch.arange(3)}
    args |= {"k_cache": torch.zeros(6, 2, 4, 8), "v_cache": torch.zeros(6, 2, 4, 8)} | change
    if paged:
        return torch.ops.persimmon_fast.qkv_norm_rope_paged(*args.values())
    return torch.ops.persimmon_fast.qkv_norm_rope(*list(args.values())[:11])


@pytest.mark.parametrize(("change", "error", "match"), ERRORS)
def test_errors_name_op_argument_expected_and_found(change, error, match):
    with pytest.raises(error, match="^qkv_norm_rope: " + match):
        call_with(change, paged=False)


@pytest.mark.parametrize(("change", "error", "match"), ERRORS + PAGED_ERRORS)
def test_paged_errors_name_op_argument_expected_and_found(change, error, match):
    with pytest.raises(error, match="^qkv_norm_rope_paged: " + match):
        call_with(change, paged=True)
