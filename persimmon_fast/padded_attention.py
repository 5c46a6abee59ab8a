"""Attention together with its weights, in plain torch: what `output_attentions` and dropout of attention need.

The kernels never have the weights whole in memory. Here they are, [batch_size, num_heads, seqlen, past + seqlen] of
each layer in the padded layout: memory and time grow with the square of the length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from persimmon_fast.kv_cache import PAGE_SIZE, CacheSlots, PagedKVCache
from persimmon_fast.packing import Packing


class PaddedAttention:
    """Attention of one forward pass, for every layer in turn.

    Args:
        packing: of the new tokens.
        mask: as in `PersimmonModel.forward`.
        cache: before the new tokens are counted; None: there is none.
        dropout: probability of a weight to be dropped.
    Raises:
        ValueError: the cache holds padded sequences, and no mask says in which columns their tokens were.
    """

    def __init__(self, packing: Packing, mask: Tensor | None, cache: PagedKVCache | None, dropout: float = 0.0) -> None:
        past = cache.num_columns if cache is not None else 0
        self._packing, self._past, self._dropout = packing, past, dropout
        self.weights: list[Tensor] = []  # of the layers so far
        device = packing.kept.device if packing.kept is not None else None
        new = torch.ones(sum(packing.lengths), dtype=torch.bool, device=device)
        real = packing.unpack(new)  # [batch_size, seqlen]
        if cache is not None and past > 0:
            real = torch.cat([_past_columns(cache, mask, packing.seqlen).to(real.device), real], dim=1)
        self._real = real  # [batch_size, past + seqlen]: which columns hold a token

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(head_dim)) v without a cache; all [num_tokens, num_heads, head_dim]."""
        return self._attend(q, self._packing.unpack(k), self._packing.unpack(v))

    def over_cache(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: CacheSlots) -> Tensor:
        """The same over a layer's pages, into which the new keys and values have been written."""
        real = self._real.to(q.device)
        token = (real.cumsum(1) - 1).clamp(min=0)  # of its sequence, in each column
        page = slots.page_table.long().gather(1, token // PAGE_SIZE)
        columns = [cache[page, :, token % PAGE_SIZE] for cache in (k_cache, v_cache)]
        k, v = (torch.where(real[..., None, None], column, 0) for column in columns)
        return self._attend(q, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q packed; k, v [batch_size, past + seqlen, num_heads, head_dim], 0 at padding."""
        num_tokens, _, head_dim = q.shape
        real = self._real.to(q.device)
        query_column = torch.arange(self._past, real.shape[1], device=q.device)
        causal = torch.arange(real.shape[1], device=q.device) <= query_column[:, None]
        seen = causal & real[:, None, :] & real[:, self._past :, None]  # [batch_size, seqlen, past + seqlen]
        scores = torch.einsum("bqhd,bkhd->bhqk", self._packing.unpack(q), k) * head_dim**-0.5
        scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        weights = weights * real[:, None, self._past :, None]  # a query without keys: 0
        weights = F.dropout(weights, self._dropout)
        self.weights.append(weights)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        return self._packing.pack(out).view(num_tokens, -1, head_dim)


def _past_columns(cache: PagedKVCache, mask: Tensor | None, seqlen: int) -> Tensor:
    """[batch_size, past] bool: which columns of the earlier calls held tokens."""
    past = cache.num_columns
    if mask is not None and mask.shape[1] == past + seqlen:
        real = mask[:, :past].bool().cpu()
    else:
        real = torch.ones(cache.batch_size, past, dtype=torch.bool)
    if real.sum(1).tolist() != cache.seqlens:
        raise ValueError(
            f"output_attentions over a cache with padding needs attention_mask [batch_size={cache.batch_size}, past + "
            f"seqlen] with the {cache.seqlens} tokens of the past {past} columns marked, got {real.sum(1).tolist()}"
        )
    return real
