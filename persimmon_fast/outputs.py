"""What the forward passes return, with the fields and the access of transformers' outputs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from persimmon_fast.kv_cache import PagedKVCache


class ModelOutput:
    """Attribute, string and index access to the fields that are not None, as in transformers."""

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self[key] for key in self.keys())

    def keys(self) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]  # type: ignore[arg-type]

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    last_hidden_state: Tensor  # [batch_size, seqlen, hidden_size], after the final LayerNorm, 0 at padding
    past_key_values: PagedKVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # embeddings, then after each layer; the last is normalised


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    loss: Tensor | None = None  # scalar fp32: mean cross-entropy of the shifted labels that are not -100
    logits: Tensor | None = None  # [batch_size, kept, vocab_size]
    past_key_values: PagedKVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
