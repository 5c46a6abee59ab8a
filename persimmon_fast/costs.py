"""What a model costs: parameters, bytes, and the bytes that one decoded token reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from persimmon_fast.checkpoint_tensors import HEAD, expected_tensors
from persimmon_fast.config import PersimmonConfig

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_PARTS = {  # in the order of a forward pass; what a tensor's name contains
    "embedding": "embed_tokens.",
    "query, key, value": ".query_key_value.",
    "attention output": ".self_attn.dense.",
    "MLP up": ".dense_h_to_4h.",
    "MLP down": ".dense_4h_to_h.",
    "layer norms": "layernorm.",
    "head": "lm_head.",
}


@dataclass(frozen=True)
class Costs:
    """Sizes of a model in one dtype.

    Attributes:
        parameters: number of parameters by part; a tied head counts in the embedding alone.
        itemsize: bytes per element of weights and cache.
        cache_bytes_per_token: keys and values of all layers.
        weight_bytes_per_token: weights that a decode step of one sequence reads when nothing is skipped: all but the
            embedding, of which it reads one row (not counted). The head is read also where it is tied.
        skippable_bytes_per_token: of these, the down-projection's weights, which a step reads only for nonzero neurons.
    """

    parameters: dict[str, int]
    itemsize: int
    cache_bytes_per_token: int
    weight_bytes_per_token: int
    skippable_bytes_per_token: int

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    def decode_bytes(self, context: float = 0, zeros: float = 0.0) -> float:
        """Bytes that a decode step reads behind `context` cached tokens, with a share `zeros` of neurons at zero."""
        return (
            self.weight_bytes_per_token - zeros * self.skippable_bytes_per_token + context * self.cache_bytes_per_token
        )


def model_costs(config: PersimmonConfig, dtype: str) -> Costs:
    """The costs of a model of this shape in "float32", "float16" or "bfloat16"."""
    parameters = dict.fromkeys(_PARTS, 0)
    for name, shape in expected_tensors(config).items():
        if name == HEAD and config.tie_word_embeddings:
            continue
        part = next(part for part, mark in _PARTS.items() if mark in name)
        parameters[part] += math.prod(shape)
    itemsize = DTYPE_BYTES[dtype]
    head = config.vocab_size * config.hidden_size
    layers = sum(count for part, count in parameters.items() if part not in ("embedding", "head"))
    down_weights = config.num_hidden_layers * config.hidden_size * config.intermediate_size
    return Costs(
        parameters=parameters,
        itemsize=itemsize,
        cache_bytes_per_token=2 * config.num_hidden_layers * config.hidden_size * itemsize,
        weight_bytes_per_token=(layers + head) * itemsize,
        skippable_bytes_per_token=down_weights * itemsize,
    )
