"""A whole prompt: ours, plain torch with torch.compile over its layers, and transformers, on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import counts, plain
from benchmarks.end_to_end import AGREEMENT
from benchmarks.limits import Limit
from benchmarks.modes import Mode, OurMode, UnavailableError
from benchmarks.prefill_cases import Setting, plain_layer_weights, sdpa
from benchmarks.report import console
from benchmarks.runner import BenchmarkError
from benchmarks.timing import Budget, Stats, Timer, Variant, measure
from benchmarks.transformers_modes import transformers_modes

Skip = Callable[[str, str], None]  # what, why


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class PlainMode(Mode):
    """`plain.decoder_layer` layer after layer; as long as the prompt it is one compiled graph for all of them."""

    cache_kind = "plain"

    def __init__(self, setting: Setting, backend: str | None, *, compiled: bool) -> None:
        self.name = "plain torch" + (", compiled layers" if compiled else "")
        self._setting, self._backend = setting, backend
        self._layers = [plain_layer_weights(layer) for layer in setting.torch_layers]
        self._tail: tuple[Any, ...] = ()  # of the length last seen
        self._layer: Callable[..., Any] = plain.decoder_layer
        if compiled:
            self._layer = torch.compile(plain.decoder_layer, dynamic=False, fullgraph=True)
        self._cache: list[tuple[Tensor, Tensor]] = []

    def prefill(self, input_ids: Tensor, max_cache_len: int) -> Tensor:
        setting, weights = self._setting, self._setting.weights
        if not self._tail or self._tail[0].shape[0] != input_ids.shape[1]:
            self._tail = setting.plain_tail(input_ids.shape[1])
        x = weights["model.embed_tokens.weight"][input_ids[0]]
        with sdpa(self._backend):
            for layer in self._layers:
                x, k, v = self._layer(x, *layer, *self._tail)
                self._cache.append((k, v))
        norm_weight, norm_bias = (weights[f"model.final_layernorm.{what}"] for what in ("weight", "bias"))
        x = plain.layer_norm(x[-1:], norm_weight, norm_bias, setting.config.layer_norm_eps)
        return F.linear(x, weights["lm_head.weight"])

    def drop_cache(self) -> None:
        self._cache = []


def modes_of(setting: Setting, backend: str | None, skip: Skip, *, compiled: bool) -> list[Mode]:
    modes: list[Mode] = [OurMode("persimmon_fast", setting.model, None)]
    modes += [PlainMode(setting, backend, compiled=choice) for choice in (False, True)[: 1 + compiled]]
    try:
        found = transformers_modes(setting.model, setting.weights, compiled=False, freezing=False)
        modes += [mode for mode in found if mode.is_default]
    except UnavailableError as error:
        skip("prompts, transformers", str(error))
    return modes


def prompt_section(
    setting: Setting, modes: list[Mode], num_tokens: int, limit: Limit, timer: Timer, budget: Budget, skip: Skip
) -> dict[str, Any]:
    """As a section of `end_to_end`: tokens per second until the logits of the last token are there."""
    config = setting.config
    generator = torch.Generator().manual_seed(num_tokens)
    input_ids = torch.randint(config.vocab_size, (1, num_tokens), generator=generator).to(setting.model.device)
    title = f"prompt of {num_tokens:,} tokens, logits of the last one"
    torch._dynamo.reset()  # a graph per length; past eight it would not compile
    logits: dict[str, Tensor] = {}
    for mode in modes:
        try:
            with console.status(f"{title}: {mode.name}"):  # torch.compile happens here
                logits[mode.name] = mode.prefill(input_ids, num_tokens).double()
        except Exception as error:
            if isinstance(mode, OurMode):
                raise
            skip(f"{title}, {mode.name}", first_line(error))
        mode.drop_cache()
    difference = _check(title, logits, AGREEMENT[setting.model.dtype])

    def run(mode: Mode) -> Variant:
        def variant(call: int) -> None:
            mode.prefill(input_ids, num_tokens)
            mode.drop_cache()  # one cache at a time: up to 19 GB at 16,384 tokens

        return variant

    variants = {mode.name: run(mode) for mode in modes if mode.name in logits}
    seconds = measure(variants | {"limit": limit.variant}, timer, budget)
    rate = limit.rate(seconds.pop("limit")).median
    flops = counts.prompt_flops(
        num_tokens, config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size
    )
    limit_tokens = num_tokens * rate / flops
    measured = {}
    for name, samples in seconds.items():
        rates = [num_tokens / s for s in samples]
        stats = Stats.of(rates)
        measured[name] = {
            "tokens_per_s": stats.to_dict(),
            "samples_tokens_per_s": rates,
            "limit_tokens_per_s": limit_tokens,
            "share_of_limit": stats.median / limit_tokens,
        }
        console.print(f"  {title}: {name}: {stats.median:.4g} tokens/s, {stats.median / limit_tokens:.0%} of the peak")
    return {
        "title": title, "kind": "prefill", "tokens": num_tokens, "logits_difference": difference, "variants": measured,
    }  # fmt: skip


def _check(title: str, logits: dict[str, Tensor], allowed: float) -> float:
    """The largest difference from ours, relative to the largest logit; raises where it is no rounding."""
    expected = next(iter(logits.values()))
    largest = 0.0
    for name, found in logits.items():
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= allowed:
            raise BenchmarkError(f"prefill: {title}: logits of {name} differ by {difference:.1e} of the largest")
        largest = max(largest, difference)
    return largest
