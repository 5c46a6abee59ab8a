"""What a good PyTorch programmer writes for each op: the dtype's own kernels, no copy that can be avoided.

These are the baselines that ours are compared with; the definitions in `persimmon_fast.reference` compute in fp32 and
are slower. Rotary cosines and sines are expected in the dtype, as transformers passes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, (x.shape[-1],), weight, bias, eps), total


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [num_tokens, num_heads, head_dim]; cos, sin [num_tokens, 1, rotary_dim / 2]."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    head_dim = (q.shape[-1],)
    q = F.layer_norm(q, head_dim, q_weight, q_bias, eps)
    k = F.layer_norm(k, head_dim, k_weight, k_bias, eps)
    return rope(q, cos, sin), rope(k, cos, sin)


def qk_norm_rope_(q: Tensor, k: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    new_q, new_k = qk_norm_rope(q, k, *rest)  # type: ignore[arg-type]
    return q.copy_(new_q), k.copy_(new_k)


def qkv_norm_rope(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = F.linear(x, weight, bias).view(x.shape[0], num_heads, 3, -1).unbind(2)
    q, k = qk_norm_rope(q, k, q_weight, q_bias, k_weight, k_bias, cos, sin, eps)
    return q, k, v


def qkv_norm_rope_cached(*args: object) -> Tensor:
    """`qkv_norm_rope` that writes k and v at their positions of a contiguous cache [num_heads, seqlen, head_dim]."""
    *projection, positions, k_cache, v_cache = args
    q, k, v = qkv_norm_rope(*projection)  # type: ignore[arg-type]
    k_cache.index_copy_(1, positions, k.transpose(0, 1))  # type: ignore[attr-defined]
    v_cache.index_copy_(1, positions, v.transpose(0, 1))  # type: ignore[attr-defined]
    return q


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """q [batch_size, num_heads, seqlen_q, head_dim]; k, v [batch_size, num_heads, seqlen_k, head_dim]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return residual + F.linear(x, weight, bias)


def squared_relu_mlp(
    x: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor, residual: Tensor
) -> Tensor:
    return residual + F.linear(F.linear(x, up_weight, up_bias).relu_().square_(), down_weight, down_bias)


def decoder_layer(
    x: Tensor,
    input_norm_weight: Tensor,
    input_norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    dense_weight: Tensor,
    dense_bias: Tensor,
    post_norm_weight: Tensor,
    post_norm_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [num_tokens, hidden_size] of one sequence; also returns k and v, which are the cache as they are."""
    norms = (q_weight, q_bias, k_weight, k_bias)
    normalised = layer_norm(x, input_norm_weight, input_norm_bias, eps)
    q, k, v = qkv_norm_rope(normalised, qkv_weight, qkv_bias, *norms, cos, sin, eps, num_heads)
    queries, keys, values = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
    out = attention(queries, keys, values, None, True)[0].transpose(0, 1).flatten(1)
    x = linear_residual(out, dense_weight, dense_bias, x)
    normalised = layer_norm(x, post_norm_weight, post_norm_bias, eps)
    return squared_relu_mlp(normalised, up_weight, up_bias, down_weight, down_bias, x), k, v


def lm_head_argmax(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight).float()
    best, token_ids = logits.max(-1)
    return token_ids, best - logits.logsumexp(-1)


def lm_head_logprobs(x: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    logits = F.linear(x, weight).float()
    return logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def lm_head_sample(x: Tensor, weight: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """One draw at a temperature, without filters."""
    logits = F.linear(x, weight).float()
    token_ids = (logits / temperature.unsqueeze(1)).softmax(-1).multinomial(1)
    return token_ids.squeeze(1), logits.gather(-1, token_ids).squeeze(-1) - logits.logsumexp(-1)


def lm_head_sample_filtered(
    x: Tensor, weight: Tensor, temperature: Tensor, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Top-k, then top-p among those k: nothing but the head itself touches the vocabulary more than twice."""
    logits = F.linear(x, weight).float()
    kept, ids = (logits / temperature.unsqueeze(1)).topk(top_k)
    probs = kept.softmax(-1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)
    token_ids = ids.gather(-1, probs.multinomial(1))
    return token_ids.squeeze(1), logits.gather(-1, token_ids).squeeze(-1) - logits.logsumexp(-1)
