"""Pure-torch definition of every op: the specification that kernels are tested against.

Written for reading, not for speed. Statistics, softmax, rotary angles and sums of products are taken in fp32 (or
in fp64 for fp64 input) and rounded once, to the dtype of the input. Everything is differentiable. The decoder that
composes these functions is compared with transformers in tests/test_reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """x in the dtype of accumulation: fp32, or fp64 for fp64 input."""
    return x if x.dtype == torch.float64 else x.float()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, not yet rounded."""
    return F.linear(_wide(x), _wide(weight), None if bias is None else _wide(bias))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    wide = _wide(x)
    mean = wide.mean(-1, keepdim=True)
    variance = (wide - mean).square().mean(-1, keepdim=True)
    out = (wide - mean) * torch.rsqrt(variance + eps) * _wide(weight) + _wide(bias)
    return out.to(x.dtype)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(LayerNorm(s), s) with s = x + residual."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def apply_rope(x: Tensor, cos_sin: Tensor, position_ids: Tensor) -> Tensor:
    """Rotates dims (i, i + rotary_dim/2) of each head by the angle of its position; the other dims pass through.

    x [num_tokens, num_heads, head_dim]; cos_sin [num_positions, rotary_dim], cosines in the first half of the
    columns, sines in the second; position_ids [num_tokens]. The result is in fp32.
    """
    half = cos_sin.shape[-1] // 2
    cos, sin = _wide(cos_sin)[position_ids].unsqueeze(1).chunk(2, dim=-1)  # [num_tokens, 1, half]
    wide = _wide(x)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos_sin: Tensor,
    position_ids: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """rope(LayerNorm(q)), rope(LayerNorm(k)): LayerNorm over head_dim, no LayerNorm where its weight is None.

    q, k [num_tokens, num_heads, head_dim]; weights and biases [head_dim] or [num_heads, head_dim].
    """

    def one(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        wide = _wide(x)
        if weight is not None and bias is not None:
            wide = layer_norm(wide, weight, bias, eps)
        return apply_rope(wide, cos_sin, position_ids).to(x.dtype)

    return one(q, q_weight, q_bias), one(k, k_weight, k_bias)


def qkv_norm_rope(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos_sin: Tensor,
    position_ids: Tensor,
    eps: float,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [num_tokens, num_heads, head_dim] of x [num_tokens, hidden_size]; v is the bare projection.

    weight [num_heads * 3 * head_dim, hidden_size]: per head its q, k and v rows.
    """
    qkv = _linear(x, weight, bias).view(x.shape[0], num_heads, 3, weight.shape[0] // (3 * num_heads))
    q, k, v = qkv.unbind(2)
    q, k = qk_norm_rope(q, k, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps)
    return q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)


def write_paged(k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Writes k, v [num_tokens, num_heads, head_dim] to their slots, in place.

    caches [num_pages, num_heads, page_size, head_dim]; slot_mapping [num_tokens]: page * page_size + offset, or
    negative for a token that is not kept.
    """
    page_size = k_cache.shape[2]
    kept = slot_mapping >= 0
    page, offset = slot_mapping[kept] // page_size, slot_mapping[kept] % page_size
    k_cache[page, :, offset] = k[kept]
    v_cache[page, :, offset] = v[kept]


def attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention of one sequence. Causal: the last query sees the last key (bottom-right aligned).

    q [seqlen_q, num_heads, head_dim]; k, v [seqlen_k, num_heads, head_dim]. Returns out like q and softmax_lse
    [num_heads, seqlen_q] in fp32, the natural logarithm of the softmax denominator. A query that sees no key
    gives 0 and -inf.
    """
    scores = torch.einsum("qhd,khd->hqk", _wide(q), _wide(k)) * softmax_scale
    if causal:
        query_idx = torch.arange(q.shape[0], device=q.device) + k.shape[0] - q.shape[0]
        key_idx = torch.arange(k.shape[0], device=q.device)
        scores = scores.masked_fill(key_idx > query_idx[:, None], -math.inf)
    softmax_lse = torch.logsumexp(scores, dim=-1)
    probs = torch.exp(scores - softmax_lse.unsqueeze(-1))
    probs = torch.where(softmax_lse.unsqueeze(-1) == -math.inf, 0.0, probs)
    return torch.einsum("hqk,khd->qhd", probs, _wide(v)).to(q.dtype), softmax_lse


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """`attention` of packed sequences: sequence b owns tokens cu_seqlens[b] .. cu_seqlens[b + 1].

    seqused_k [batch_size]: only that many of a sequence's keys count. Returns out like q and softmax_lse
    [num_heads, total_q].
    """
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []
    for b in range(len(starts_q) - 1):
        end_k = starts_k[b + 1] if seqused_k is None else starts_k[b] + int(seqused_k[b])
        keys, queries = slice(starts_k[b], end_k), slice(starts_q[b], starts_q[b + 1])
        out, lse = attention(q[queries], k[keys], v[keys], softmax_scale, causal)
        outs.append(out)
        lses.append(lse)
    if not outs:
        return torch.empty_like(q), _wide(q).new_empty(q.shape[1], 0)
    return torch.cat(outs), torch.cat(lses, dim=1)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    softmax_scale: float,
) -> Tensor:
    """Causal `attention` of packed queries over paged keys; the last query of a sequence sees its whole cache.

    page_table [batch_size, max_pages]: page b, i holds keys i * page_size .. (i + 1) * page_size of sequence b.
    cache_seqlens [batch_size]: keys of each sequence, those of the queries included.
    """
    starts = cu_seqlens_q.tolist()
    page_size = k_cache.shape[2]
    outs = []
    for b, length in enumerate(cache_seqlens.tolist()):
        pages = page_table[b, : -(-length // page_size)].long()
        k, v = (
            cache[pages].transpose(1, 2).flatten(0, 1)[:length]  # [length, num_heads, head_dim]
            for cache in (k_cache, v_cache)
        )
        out, _ = attention(q[starts[b] : starts[b + 1]], k, v, softmax_scale, causal=True)
        outs.append(out)
    return torch.cat(outs) if outs else torch.empty_like(q)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x W^T + b."""
    return (_wide(residual) + _linear(x, weight, bias)).to(x.dtype)


def squared_relu_mlp(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """(residual +) relu(x U^T + b_u)^2 D^T + b_d, the hidden activation in fp32."""
    hidden = _linear(x, up_weight, up_bias).relu().square()
    out = _linear(hidden, down_weight, down_bias)
    return (out if residual is None else _wide(residual) + out).to(x.dtype)


VocabRanges = Sequence[tuple[int, int]]  # begin and end of each


def lm_head_logits(x: Tensor, weight: Tensor, vocab_ranges: VocabRanges | None = None) -> Tensor:
    """Logits [num_rows, vocab_size] in fp32; -inf outside of the ranges."""
    logits = _linear(x, weight, None)
    if vocab_ranges is None:
        return logits
    skipped = torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device)
    for begin, end in vocab_ranges:
        skipped[begin:end] = False
    return logits.masked_fill(skipped, -math.inf)


def lm_head_logprobs(x: Tensor, weight: Tensor, token_ids: Tensor, vocab_ranges: VocabRanges | None = None) -> Tensor:
    """log softmax(x W^T)[row, token_ids[row]] in fp32."""
    return lm_head_logits(x, weight, vocab_ranges).log_softmax(-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def lm_head_argmax(x: Tensor, weight: Tensor, vocab_ranges: VocabRanges | None = None) -> tuple[Tensor, Tensor]:
    """(most likely token, its log-probability) per row; the lowest id where logits are equal."""
    logits = lm_head_logits(x, weight, vocab_ranges)
    # torch.argmax does not promise which of equal maxima it returns
    is_max = logits == logits.amax(-1, keepdim=True)
    token_ids = is_max.int().argmax(-1)
    return token_ids, logits.log_softmax(-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def philox_uniform(seed: Tensor, offset: Tensor, num: int) -> Tensor:
    """[rows, num] numbers in (0, 1): (r + 1/2) / 2^32 with r word i % 4 of Philox4x32-10 under key `seed` and
    counter (i // 4, offset, 0), i < num. In fp64, where they are exact.

    seed, offset: [rows] int64; seed is split into the two key words, offset into counter words 1 and 2.
    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (SC'11).
    """
    mask = 0xFFFFFFFF
    blocks = torch.arange(-(-num // 4), device=seed.device)

    def mul_hi_lo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
        # 32 x 32 -> 64 bits in signed int64, by 16-bit halves of m
        low, high = a * (m & 0xFFFF), a * (m >> 16)
        total_low = low + ((high & 0xFFFF) << 16)
        return ((high >> 16) + (total_low >> 32)) & mask, total_low & mask

    k0, k1 = (seed & mask).unsqueeze(1), ((seed >> 32) & mask).unsqueeze(1)
    c0 = blocks.unsqueeze(0).expand(seed.shape[0], -1)
    c1 = (offset & mask).unsqueeze(1).expand_as(c0)
    c2 = ((offset >> 32) & mask).unsqueeze(1).expand_as(c0)
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        hi0, lo0 = mul_hi_lo(c0, 0xD2511F53)
        hi1, lo1 = mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    words = torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :num]
    return (words.double() + 0.5) * 2.0**-32


def penalise_repetition(logits: Tensor, penalty_ids: Tensor, repetition_penalty: Tensor) -> Tensor:
    """Logits of the tokens in penalty_ids (negative: padding) divided by the penalty where positive, multiplied
    where negative, once per token. Source: Keskar et al. 2019, CTRL, arXiv:1909.05858."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    valid = penalty_ids >= 0
    seen.scatter_reduce_(1, penalty_ids.clamp_min(0), valid, reduce="amax")
    penalty = repetition_penalty.unsqueeze(1)
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_mask(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens may be sampled, [rows, vocab_size] bool; the filters apply one after the other.

    top_k: tokens whose logit is at least the k-th largest (ties at the boundary stay); 0 or >= vocab_size: off.
    top_p: of those, the smallest set of most likely ones whose share of their probability reaches top_p (ties at
    the boundary stay); 1: off. min_p: tokens at least min_p times as likely as the most likely one; 0: off.
    """
    keep = torch.ones_like(logits, dtype=torch.bool)
    for row in range(logits.shape[0]):
        z = logits[row].double()
        ordered = z.sort(descending=True).values
        k = int(top_k[row])
        if 0 < k < z.shape[0]:
            keep[row] &= z >= ordered[k - 1]
            ordered = ordered[ordered >= ordered[k - 1]]
        if float(top_p[row]) < 1.0:
            cumulative = ordered.softmax(-1).cumsum(-1)
            count = int((cumulative < float(top_p[row])).sum()) + 1
            keep[row] &= z >= ordered[min(count, ordered.shape[0]) - 1]
        if float(min_p[row]) > 0.0:
            keep[row] &= z >= ordered[0] + math.log(float(min_p[row]))
    return keep


def lm_head_sample(
    x: Tensor,
    weight: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    penalty_ids: Tensor | None,
    repetition_penalty: Tensor | None,
    vocab_ranges: VocabRanges | None = None,
) -> tuple[Tensor, Tensor]:
    """(sampled token, its log-probability under the model) per row.

    Repetition penalty, then temperature, then top-k, top-p and min-p, then one draw: the argmax of
    z - log(E) over the kept tokens, z the filtered logits and E exponential numbers from `philox_uniform` under
    (seed, offset) -- the Gumbel-max trick, whose result does not depend on the order of evaluation. Temperature 0
    takes the most likely token. The log-probability is that of the bare logits, before penalty and filters.
    """
    logits = lm_head_logits(x, weight, vocab_ranges)
    z = logits
    if penalty_ids is not None and repetition_penalty is not None:
        z = penalise_repetition(z, penalty_ids, repetition_penalty)
    greedy = temperature == 0
    z = z / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    exponential = -torch.log1p(-philox_uniform(seeds, offsets, z.shape[1]))
    noisy = torch.where(keep_mask(z, top_k, top_p, min_p), z - exponential.log(), -math.inf)
    scores = torch.where(greedy.unsqueeze(1), z.double(), noisy)
    token_ids = (scores == scores.amax(-1, keepdim=True)).int().argmax(-1)
    return token_ids, logits.log_softmax(-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
