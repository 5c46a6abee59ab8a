"""Ways to run a model that are compared with each other: what each must offer, and ours."""

from __future__ import annotations

import torch
from torch import Tensor

from persimmon_fast import PersimmonConfig, PersimmonForCausalLM, ops
from persimmon_fast.kv_cache import PAGE_SIZE, PagedKVCache


class UnavailableError(RuntimeError):
    """Something that the comparison needs is not installed."""


class Past:
    """Keys and values of `context` tokens that no model computed: normal numbers, the same for every sequence of a
    batch, each of which keeps its own copy. What a decode step costs does not depend on them, and a prefill of 16,384
    tokens takes longer than everything that is measured behind it.

    Args:
        rows: sequences. steps: tokens that will follow, at most.
    """

    def __init__(
        self, config: PersimmonConfig, rows: int, context: int, steps: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows, self.context, self.max_cache_len = rows, context, context + steps
        shape = (2, config.num_attention_heads, context, config.head_dim)
        generator = torch.Generator(device).manual_seed(2)
        self.layers = [
            torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
            for _ in range(config.num_hidden_layers)
        ]

    def batch(self, layer: int) -> tuple[Tensor, Tensor]:
        """k and v [rows, num_heads, context, head_dim], views that repeat."""
        k, v = self.layers[layer].unsqueeze(1).expand(-1, self.rows, -1, -1, -1)
        return k, v


class Mode:
    """A way to run a model: prefill a cache or take over a past, then step by step; or generate.

    Attributes:
        zeros: which biases it runs with, see `models.UpBiases`.
        in_prefill, in_generate: whether it takes part there; modes that differ in decode steps alone do not.
        cache_kind: modes of one kind can share a cache.
        is_default: whether it is what transformers' `generate` does when nothing else is asked for.
        is_same_model: whether its logits must be ours.
    """

    name: str
    zeros: float | None = None
    in_prefill = True
    in_generate = True
    cache_kind: str
    is_default = False
    is_same_model = True

    def prefill(self, input_ids: Tensor, max_cache_len: int) -> Tensor:
        """Starts a new cache with input_ids [1, seqlen]; the last token's logits [1, vocab_size]."""
        raise NotImplementedError

    def take_over(self, past: Past, other: Mode | None) -> None:
        """Starts with the keys and values of past; in the cache of `other`, a mode of the same kind, if given."""
        raise NotImplementedError

    def rewind(self) -> None:
        """Back to where `take_over` left the cache."""
        raise NotImplementedError

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [rows, vocab_size] after one more token [rows, 1]."""
        raise NotImplementedError

    def next_tokens(self, tokens: Tensor) -> list[int]:
        """The most likely token after each of tokens [rows, 1], on the host, as a loop that generates needs it."""
        ids: list[int] = self.step(tokens).argmax(-1).tolist()
        return ids

    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy, never stopping early: [1, seqlen + max_new_tokens]."""
        raise NotImplementedError

    def drop_cache(self) -> None:
        """Frees the memory of the cache."""
        raise NotImplementedError


class OurMode(Mode):
    """persimmon_fast; `zeros` says which biases of the up-projections it runs with."""

    cache_kind = "paged"

    def __init__(self, name: str, model: PersimmonForCausalLM, zeros: float | None) -> None:
        self.name, self._model, self.zeros = name, model, zeros
        self._cache: PagedKVCache | None = None
        self._context = 0

    def prefill(self, input_ids: Tensor, max_cache_len: int) -> Tensor:
        model = self._model
        self._cache = self._new_cache(1, max_cache_len)
        return model(input_ids, past_key_values=self._cache, logits_to_keep=1).logits[:, -1]

    def take_over(self, past: Past, other: Mode | None) -> None:
        self._context = past.context
        if isinstance(other, OurMode):
            self._cache = other._cache
            return
        cache = self._cache = self._new_cache(past.rows, past.max_cache_len)
        cache.num_columns = past.context
        slots = cache.append([past.context] * past.rows)
        full, rest = divmod(past.context, PAGE_SIZE)
        for layer, pools in enumerate(zip(cache.k, cache.v, strict=True)):
            for pool, source in zip(pools, past.layers[layer], strict=True):
                for pages in slots.page_table.long():
                    tokens = source[:, : full * PAGE_SIZE].unflatten(1, (full, PAGE_SIZE))
                    pool[pages[:full]] = tokens.transpose(0, 1)
                    if rest:
                        pool[pages[full], :, :rest] = source[:, full * PAGE_SIZE :]

    def rewind(self) -> None:
        assert self._cache is not None
        self._cache.drop_last([length - self._context for length in self._cache.seqlens])
        self._cache.num_columns = self._context

    def step(self, tokens: Tensor) -> Tensor:
        return self._model(tokens, past_key_values=self._cache, logits_to_keep=1).logits[:, -1]

    def next_tokens(self, tokens: Tensor) -> list[int]:
        """The step of `generate`: the head reduces its logits where it makes them."""
        assert self._cache is not None
        hidden = self._model._decode_step(tokens.tolist(), self._cache)
        ids: list[int] = ops.lm_head_argmax(hidden, self._model.lm_head.weight)[0].tolist()
        return ids

    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        out = self._model.generate(input_ids, max_new_tokens=max_new_tokens, eos_token_id=None)
        assert isinstance(out, Tensor)
        return out

    def drop_cache(self) -> None:
        self._cache = None

    def _new_cache(self, rows: int, capacity: int) -> PagedKVCache:
        model = self._model
        return PagedKVCache(model.config, rows, capacity, dtype=model.dtype, device=model.device)
