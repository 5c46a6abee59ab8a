"""What a good PyTorch programmer writes to decode this model on a GPU, after gpt-fast: plain functions over a static
cache, and one compiled graph per step. The strongest opponent there that needs no kernel of its own.

Source: gpt-fast (pytorch-labs, 2023), for the idea of one static graph per token; nothing of it is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.modes import Mode, Past
from persimmon_fast import PersimmonConfig
from persimmon_fast.rope import rope_cos_sin


class StaticModel:
    """One decode step as a function of tokens and position, whose shapes never change.

    Args:
        weights: of `transformers_modes.row_major_weights`.
    """

    def __init__(self, config: PersimmonConfig, weights: dict[str, Tensor]) -> None:
        self._config, self._weights = config, weights
        self._cache: list[tuple[Tensor, Tensor]] = []
        self._cos_sin = torch.empty(0)

    def set_cache(self, cache: list[tuple[Tensor, Tensor]]) -> None:
        """k and v [rows, num_heads, max_cache_len, head_dim] of each layer."""
        self._cache = cache
        self._cos_sin = rope_cos_sin(self._config, cache[0][0].shape[2], None, cache[0][0].device)
        for tensor in (*(pool for pools in cache for pool in pools), self._cos_sin):
            torch._dynamo.mark_static_address(tensor)  # lets a CUDA graph write to it

    def drop_cache(self) -> None:
        self._cache = []

    def __call__(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Logits [rows, vocab_size] after tokens [rows, 1] at position [1] of every row."""
        config, weights = self._config, self._weights
        max_cache_len = self._cache[0][0].shape[2]
        visible = (torch.arange(max_cache_len, device=position.device) <= position).view(1, 1, 1, -1)
        cos, sin = self._cos_sin[position].chunk(2, dim=-1)
        x = weights["model.embed_tokens.weight"][tokens.squeeze(1)]
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}"
            x = x + self._attention(self._norm(x, f"{name}.input_layernorm"), layer, position, visible, cos, sin)
            inner = self._linear(self._norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp.dense_h_to_4h")
            x = x + self._linear(inner.relu().square(), f"{name}.mlp.dense_4h_to_h")
        return F.linear(self._norm(x, "model.final_layernorm"), weights["lm_head.weight"])

    def _attention(self, x: Tensor, layer: int, position: Tensor, visible: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        config, name = self._config, f"model.layers.{layer}.self_attn"
        heads = self._linear(x, f"{name}.query_key_value").view(-1, config.num_attention_heads, 3, config.head_dim)
        q, k, v = heads.unbind(2)
        if config.qk_layernorm:
            q, k = self._norm(q, f"{name}.q_layernorm"), self._norm(k, f"{name}.k_layernorm")
        q, k = (_rotate(part, cos, sin).unsqueeze(2) for part in (q, k))
        keys, values = self._cache[layer]
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v.unsqueeze(2))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)
        return self._linear(out.flatten(1), f"{name}.dense")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self._config.layer_norm_eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [rows, num_heads, head_dim], cos and sin [1, rotary_dim / 2] fp32: halves of the first rotary_dim are pairs."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second = a.float() * cos - b.float() * sin, b.float() * cos + a.float() * sin
    return torch.cat([first.to(x.dtype), second.to(x.dtype), rest], dim=-1)


class StaticMode(Mode):
    """The step above, compiled with max-autotune: one CUDA graph, products by whichever kernel is fastest.

    The weights are held by the compiled function as they are by a module. Not run on a GPU yet.
    """

    cache_kind = "hand-made"
    in_prefill = in_generate = False

    def __init__(self, config: PersimmonConfig, weights: dict[str, Tensor], *, compiled: bool) -> None:
        self.name = "hand-made static model" + (", compiled" if compiled else "")
        self._model, self._compiled = StaticModel(config, weights), compiled
        self._step: Callable[..., Any] = self._model
        self._context = self._position = 0
        if compiled:
            for tensor in weights.values():
                torch._dynamo.mark_static_address(tensor)

    def take_over(self, past: Past, other: Mode | None) -> None:
        assert other is None, "no second mode of this kind"
        self._context = self._position = past.context
        cache = []
        for layer in range(len(past.layers)):
            pools = []
            for source in past.batch(layer):
                pool = source.new_zeros(*source.shape[:2], past.max_cache_len, source.shape[3])
                pool[:, :, : past.context] = source
                pools.append(pool)
            cache.append((pools[0], pools[1]))
        self._model.set_cache(cache)
        if self._compiled:
            self._step = torch.compile(self._model.__call__, mode="max-autotune", fullgraph=True, dynamic=False)

    def rewind(self) -> None:
        self._position = self._context

    def step(self, tokens: Tensor) -> Tensor:
        position = torch.tensor([self._position], device=tokens.device)
        self._position += 1
        logits: Tensor = self._step(tokens, position)
        return logits

    def drop_cache(self) -> None:
        self._step = self._model
        self._model.drop_cache()
