"""Tensors of more than 2^31 elements: every offset of every CUDA kernel must be 64-bit. Needs a GPU with 40 GB."""

from __future__ import annotations

import pytest
import torch
from helpers import CUDA, assert_within_contract
from test_squared_relu_mlp import plain as plain_squared_relu_mlp

from persimmon_fast import ops, reference

pytestmark = [CUDA.marks[0], CUDA.marks[1]]
DTYPE = torch.bfloat16
LIMIT = 2**31
HIDDEN, HEADS, HEAD_DIM = 4096, 64, 64
ROWS = LIMIT // HIDDEN + 40


@pytest.fixture(autouse=True)
def memory():
    free, _ = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    if free < 40e9:
        pytest.skip(f"needs 40 GB of free GPU memory, found {free / 1e9:.0f}")
    yield
    torch.cuda.empty_cache()


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """bf16 on the GPU; made in slices, since the generator's own scratch would double it."""
    out = torch.empty(shape, dtype=DTYPE, device="cuda")
    for piece in out.flatten().split(2**28):
        piece.normal_(std=scale)
    return out


def rows_around_the_limit(num_rows: int) -> torch.Tensor:
    """The first rows, those where 2^31 elements are passed, and the last ones."""
    crossing = LIMIT // HIDDEN
    return torch.tensor([0, 1, crossing - 1, crossing, crossing + 1, num_rows - 1], device="cuda")


def norm_weights():
    return normal(HEAD_DIM), normal(HEAD_DIM), normal(HEAD_DIM), normal(HEAD_DIM)


def table() -> torch.Tensor:
    positions = torch.arange(2048).float()
    angles = positions[:, None] / 25000 ** (torch.arange(0, 16).float() / 16)
    return torch.cat([angles.cos(), angles.sin()], dim=1).cuda()


def assert_rows(actual, expected_fn, *inputs, plain_fn=None):
    """inputs: already cut to the rows that are compared."""
    expected = expected_fn(*(t.float() if t.is_floating_point() else t for t in inputs))
    plain = (plain_fn or expected_fn)(*inputs)
    assert_within_contract(actual, expected.to(actual.device), plain, "rows around 2^31 elements")


def test_layer_norm():
    x, weight, bias = normal(ROWS, HIDDEN), normal(HIDDEN), normal(HIDDEN)
    kept = rows_around_the_limit(ROWS)
    assert_rows(ops.layer_norm(x, weight, bias)[kept], reference.layer_norm, x[kept], weight, bias, 1e-5)


def test_more_rows_than_thread_blocks_are_refused():
    one = torch.ones(1, dtype=DTYPE, device="cuda")
    with pytest.raises(ValueError, match=r"layer_norm: the tensors are too large for one launch .2\^31 - 1 thread"):
        ops.layer_norm(one.expand(2**33, 1), one, one)  # four rows to a block; the output alone is 17 GB


def test_add_layer_norm():
    x, residual, weight, bias = normal(ROWS, HIDDEN), normal(ROWS, HIDDEN), normal(HIDDEN), normal(HIDDEN)
    kept = rows_around_the_limit(ROWS)
    out, total = ops.add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total[kept], x[kept] + residual[kept])
    assert_rows(out[kept], reference.layer_norm, total[kept], weight, bias, 1e-5)


def test_qk_norm_rope():
    q, k = normal(ROWS, HEADS, HEAD_DIM), normal(ROWS, HEADS, HEAD_DIM)
    weights, cos_sin = norm_weights(), table()
    positions = torch.arange(ROWS, device="cuda") % 2048
    kept = rows_around_the_limit(ROWS)
    new_q, new_k = ops.qk_norm_rope(q, k, *weights, cos_sin, positions)
    for actual, index in ((new_q, 0), (new_k, 1)):
        assert_rows(
            actual[kept],
            lambda q, k, qw, qb, kw, kb, c, p, index=index: reference.qk_norm_rope(q, k, qw, qb, kw, kb, c, p, 1e-5)[
                index
            ],
            q[kept], k[kept], *weights, cos_sin, positions[kept],
        )  # fmt: skip


def test_qkv_norm_rope():
    x, weight, bias = normal(ROWS, 64), normal(3 * HIDDEN, 64, scale=0.1), normal(3 * HIDDEN)
    weights, cos_sin = norm_weights(), table()
    positions = torch.arange(ROWS, device="cuda") % 2048
    kept = rows_around_the_limit(ROWS)
    made = ops.qkv_norm_rope(x, weight, bias, *weights, cos_sin, positions, 1e-5, HEADS)
    for index, actual in enumerate(made):
        assert_rows(
            actual[kept],
            lambda *a, index=index: reference.qkv_norm_rope(*a, 1e-5, HEADS)[index],
            x[kept], weight, bias, *weights, cos_sin, positions[kept],
        )  # fmt: skip


def test_qkv_norm_rope_paged():
    num_pages = LIMIT // (HEADS * 64 * HEAD_DIM) + 2
    x, weight, bias = normal(6, 128), normal(3 * HIDDEN, 128, scale=0.1), normal(3 * HIDDEN)
    weights, cos_sin = norm_weights(), table()
    positions = torch.arange(6, device="cuda")
    slots = torch.tensor([0, 5, (num_pages - 1) * 64 - 1, (num_pages - 2) * 64, num_pages * 64 - 1, -1], device="cuda")
    k_cache, v_cache = (torch.zeros(num_pages, HEADS, 64, HEAD_DIM, dtype=DTYPE, device="cuda") for _ in range(2))
    ops.qkv_norm_rope_paged(
        x, weight, bias, *weights, cos_sin, positions, 1e-5, HEADS, slots, k_cache, v_cache
    )  # fmt: skip
    _, k, v = ops.qkv_norm_rope(x, weight, bias, *weights, cos_sin, positions, 1e-5, HEADS)
    for cache, expected in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[slots[:5] // 64, :, slots[:5] % 64], expected[:5])


def test_linear_residual():
    x, weight, bias = normal(ROWS, 64), normal(HIDDEN, 64, scale=0.1), normal(HIDDEN)
    residual = normal(ROWS, HIDDEN)
    kept = rows_around_the_limit(ROWS)
    out = ops.linear_residual(x, weight, bias, residual)
    assert_rows(out[kept], reference.linear_residual, x[kept], weight, bias, residual[kept])


def test_squared_relu_mlp():
    rows, intermediate = LIMIT // 16384 + 40, 16384
    x, up, up_bias = normal(rows, 64), normal(intermediate, 64, scale=0.1), normal(intermediate)
    down, down_bias = ops.to_neuron_major(normal(64, intermediate, scale=0.01)), normal(64)
    kept = torch.tensor([0, 1, LIMIT // 16384 - 1, LIMIT // 16384, rows - 1], device="cuda")
    out = ops.squared_relu_mlp(x, up, up_bias, down, down_bias, x)
    inputs = (x[kept], up, up_bias, down, down_bias, x[kept])
    assert_rows(out[kept], reference.squared_relu_mlp, *inputs, plain_fn=plain_squared_relu_mlp)


def test_flash_attention():
    seqlen = 1024
    batch = LIMIT // (HIDDEN * seqlen) + 2
    q, k, v = (normal(batch, seqlen, HEADS, HEAD_DIM) for _ in range(3))
    out, _ = ops.flash_attention(q, k, v)
    last, _ = ops.flash_attention(q[-1:].clone(), k[-1:].clone(), v[-1:].clone())
    assert torch.equal(out[-1:], last)


@pytest.mark.parametrize("num_queries", [1, 40])
def test_paged_attention(num_queries):
    num_pages = LIMIT // (HEADS * 64 * HEAD_DIM) + 4
    k_cache, v_cache = (normal(num_pages, HEADS, 64, HEAD_DIM) for _ in range(2))
    q = normal(num_queries, HEADS, HEAD_DIM)
    last_pages = torch.arange(num_pages - 4, num_pages, dtype=torch.int32, device="cuda")
    lengths = torch.tensor([250], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, num_queries], dtype=torch.int32, device="cuda")
    arguments = {"cu_seqlens_q": starts, "max_seqlen_q": num_queries}
    out = ops.paged_attention(q, k_cache, v_cache, last_pages[None], lengths, **arguments)
    few = torch.arange(4, dtype=torch.int32, device="cuda")
    expected = ops.paged_attention(q, k_cache[-4:].clone(), v_cache[-4:].clone(), few[None], lengths, **arguments)
    assert torch.equal(out, expected)


def test_lm_head():
    vocab = LIMIT // HIDDEN + 100
    x, weight = normal(3, HIDDEN), normal(vocab, HIDDEN, scale=0.02)
    weight[-2] = x[0]  # by far the largest product
    tokens, _ = ops.lm_head_argmax(x, weight)
    assert tokens[0] == vocab - 2
    wanted = torch.tensor([vocab - 1, vocab - 2, 0], device="cuda")
    logits = x.float() @ weight.float().t()
    expected = logits.log_softmax(-1)[torch.arange(3), wanted]
    assert torch.allclose(ops.lm_head_logprobs(x, weight, wanted), expected, atol=1e-2)
    ones = torch.ones(3, device="cuda")
    zeros = torch.zeros(3, dtype=torch.int64, device="cuda")
    drawn, _ = ops.lm_head_sample(x, weight, ones, zeros.int() + 1, ones, 0 * ones, zeros, zeros)
    assert torch.equal(drawn, tokens)
