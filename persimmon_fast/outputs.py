"""What the forward passes return, with the fields and the access of transformers' outputs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from persimmon_fast.kv_cache import PagedKVCache


class ModelOutput(dict[str, Any]):
    """The fields that are not None, as attributes, by name and by index, as in transformers. A dict, which is how
    transformers' Trainer knows an output with names."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value is not None:
            super().__setitem__(name, value)
        else:
            super().pop(name, None)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """What is not None, in the order of the fields."""
        return tuple(self[f.name] for f in fields(self) if f.name in self)  # type: ignore[arg-type]


HiddenStates = tuple[Tensor | None, ...]
"""[batch_size, seqlen, hidden_size] each: the embeddings, then after each layer; the last is normalised. 0 at padding,
None where not asked for."""

Attentions = tuple[Tensor, ...]
"""[batch_size, num_heads, seqlen, past + seqlen] of each layer: the weight of each key in the output of a query. 0 at
padding."""


@dataclass(eq=False)
class BaseModelOutputWithPast(ModelOutput):
    last_hidden_state: Tensor  # [batch_size, seqlen, hidden_size], after the final LayerNorm, 0 at padding
    past_key_values: PagedKVCache | None = None
    hidden_states: HiddenStates | None = None
    attentions: Attentions | None = None


@dataclass(eq=False)
class CausalLMOutputWithPast(ModelOutput):
    loss: Tensor | None = None  # scalar fp32: mean cross-entropy of the shifted labels that are not -100
    logits: Tensor | None = None  # [batch_size, kept, vocab_size]
    past_key_values: PagedKVCache | None = None
    hidden_states: HiddenStates | None = None
    attentions: Attentions | None = None


@dataclass(eq=False)
class SequenceClassifierOutputWithPast(ModelOutput):
    loss: Tensor | None = None  # scalar fp32
    logits: Tensor | None = None  # [batch_size, num_labels]
    past_key_values: PagedKVCache | None = None
    hidden_states: HiddenStates | None = None
    attentions: Attentions | None = None


@dataclass(eq=False)
class TokenClassifierOutput(ModelOutput):
    loss: Tensor | None = None  # scalar fp32
    logits: Tensor | None = None  # [batch_size, seqlen, num_labels]
    hidden_states: HiddenStates | None = None
    attentions: Attentions | None = None
