"""Queries, keys and values with the roundings of Adept's server: after projection, LayerNorm and rotation each.

The ops with which the decoder usually runs round once, after the rotation, where they can. Here each of the three steps
is an op of its own, so that what lies between them is rounded to the model's dtype. docs/rotary_precision.md
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from persimmon_fast import ops
from persimmon_fast.rope import ADEPT_DTYPE


def check_dtype(rope_precision: str, dtype: torch.dtype) -> None:
    """Adept's tables have the dtype of the model. Raises ValueError where this model has another."""
    needed = ADEPT_DTYPE[rope_precision]
    if dtype != needed:
        raise ValueError(
            f"rope_precision {rope_precision!r} is for a model in {needed}, this one is in {dtype}: load it with "
            f"dtype={needed}, or with rope_precision 'fp32' in its config"
        )


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
    **input_norm: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.qkv_norm_rope` of the same arguments, with more roundings. Row 0 of cos_sin must be the angle 0."""
    unrotated = torch.zeros_like(position_ids)  # position 0 rotates by nothing
    q, k, v = ops.qkv_norm_rope(
        x, weight, bias, None, None, None, None, cos_sin, unrotated, eps, num_heads, **input_norm
    )
    if q_weight is not None:
        q, k = ops.qk_norm_rope(q, k, q_weight, q_bias, k_weight, k_bias, cos_sin, unrotated, eps)
    q, k = ops.qk_norm_rope(q, k, None, None, None, None, cos_sin, position_ids, eps)
    return q, k, v


def qkv_norm_rope_paged(x: Tensor, *arguments: Any, **input_norm: Any) -> Tensor:
    """`ops.qkv_norm_rope_paged` of the same arguments, with more roundings. Every token must have a slot."""
    *projection, slot_mapping, k_cache, v_cache = arguments
    q, k, v = qkv_norm_rope(x, *projection, **input_norm)
    page_size = k_cache.shape[2]
    page, offset = slot_mapping // page_size, slot_mapping % page_size
    k_cache[page, :, offset] = k
    v_cache[page, :, offset] = v
    return q
