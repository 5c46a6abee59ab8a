"""Ways to run a model that are compared with each other: what each must offer, and ours."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from persimmon_fast import GenerationConfig, PersimmonConfig, PersimmonForCausalLM
from persimmon_fast.decode_graph import StepRunner
from persimmon_fast.decode_step import Choice, Continuation
from persimmon_fast.kv_cache import PAGE_SIZE, PagedKVCache, pages_of
from persimmon_fast.token_choice import TokenChoice


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

    def decode(self, tokens: Tensor) -> list[list[int]]:
        """The most likely token after each of tokens [steps, rows, 1], step by step, on the host: there a loop that
        generates needs them."""
        return [self.step(step).argmax(-1).tolist() for step in tokens]

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
        self._generation: _GenerationStep | None = None

    def prefill(self, input_ids: Tensor, max_cache_len: int) -> Tensor:
        model = self._model
        self._cache = PagedKVCache(model.config, 1, max_cache_len, dtype=model.dtype, device=model.device)
        return model(input_ids, past_key_values=self._cache, logits_to_keep=1).logits[:, -1]

    def take_over(self, past: Past, other: Mode | None) -> None:
        generation = other._generation if isinstance(other, OurMode) else None
        self._generation = generation or _GenerationStep(self._model, past)
        self._cache = self._generation.runner.cache

    def rewind(self) -> None:
        assert self._generation is not None
        self._generation.rewind()

    def step(self, tokens: Tensor) -> Tensor:
        return self._model(tokens, past_key_values=self._cache, logits_to_keep=1).logits[:, -1]

    def decode(self, tokens: Tensor) -> list[list[int]]:
        """The step of `generate`, which as there may be enqueued before the tokens of the one before are read."""
        assert self._generation is not None
        return self._generation.decode(tokens)

    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        out = self._model.generate(input_ids, max_new_tokens=max_new_tokens, eos_token_id=None)
        assert isinstance(out, Tensor)
        return out

    def drop_cache(self) -> None:
        if self._generation is not None:
            self._generation.close()
        self._cache = self._generation = None


class _GenerationStep:
    """The decode step that `generate` runs, behind a past; on a GPU a CUDA graph."""

    def __init__(self, model: PersimmonForCausalLM, past: Past) -> None:
        self._model, self._open = model, ExitStack()
        self._context, self._rows = past.context, past.rows
        num_pages = past.rows * pages_of(past.max_cache_len)
        self.runner: StepRunner = self._open.enter_context(
            model.decode_graphs.runner(model, num_pages, past.max_cache_len, True)
        )
        _fill_pages(self.runner.cache, past)
        greedy = TokenChoice(GenerationConfig(), seed=0)
        step = self._step = self.runner.step(past.rows, greedy)
        step.load([Continuation(row, past.context, [], [0]) for row in range(past.rows)], greedy)
        self._moved = (step.position_ids, step.draw_counters, step.cache_seqlens)  # by a step
        self._start = [tensor.clone() for tensor in self._moved]
        self.rewind()

    def rewind(self) -> None:
        for tensor, start in zip(self._moved, self._start, strict=True):
            tensor.copy_(start)
        # pages stay reserved
        self.runner.cache.seqlens = [self._context] * self._rows
        self.runner.cache.num_columns = self._context

    def decode(self, tokens: Tensor) -> list[list[int]]:
        chosen: list[list[int]] = []
        pending: deque[Callable[[], list[Choice]]] = deque()
        for step in tokens:
            self._step.token_ids.copy_(step.squeeze(1))  # the same for everybody, in place of what it chose itself
            self.runner.launch(self._step)
            pending.append(self._step.results())
            if len(pending) > self.runner.num_ahead:
                chosen.append([token for token, _ in pending.popleft()()])
        return chosen + [[token for token, _ in wait()] for wait in pending]

    def close(self) -> None:
        self._open.close()
        self._model.decode_graphs.free()


def _fill_pages(cache: PagedKVCache, past: Past) -> None:
    cache.reset(past.rows)
    cache.reserve([past.max_cache_len] * past.rows)
    full, rest = divmod(past.context, PAGE_SIZE)
    table = cache.page_table(pages_of(past.max_cache_len)).long()
    for layer, pools in enumerate(zip(cache.k, cache.v, strict=True)):
        for pool, source in zip(pools, past.layers[layer], strict=True):
            for pages in table:
                tokens = source[:, : full * PAGE_SIZE].unflatten(1, (full, PAGE_SIZE))
                pool[pages[:full]] = tokens.transpose(0, 1)
                if rest:
                    pool[pages[full], :, :rest] = source[:, full * PAGE_SIZE :]
