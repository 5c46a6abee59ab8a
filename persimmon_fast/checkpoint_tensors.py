"""The tensors of a Persimmon checkpoint in the Hugging Face layout: names and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from persimmon_fast.config import PersimmonConfig
from persimmon_fast.fuyu_config import FuyuConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
CLASSIFIER_HEADS = ("score.weight", "score.bias")
LANGUAGE_MODEL = "language_model."  # where Fuyu puts its Persimmon
DOWN_PROJECTION = ".mlp.dense_4h_to_h.weight"  # the suffix of the one tensor that lies transposed in memory


ModelConfig = PersimmonConfig | FuyuConfig


def text_prefix(config: ModelConfig) -> str:
    """What precedes the names of the language model's tensors."""
    return LANGUAGE_MODEL if isinstance(config, FuyuConfig) else ""


def text_tensors(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The language model's tensors, under the names that they have without a model around it."""
    prefix = text_prefix(config)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def names_in_files(config: ModelConfig, name: str) -> tuple[str, ...]:
    """The names under which a file may hold a tensor, the one that we write first.

    transformers' `save_pretrained` writes Fuyu's first names; its modules, and so their `state_dict`, have the second.
    """
    if isinstance(config, FuyuConfig):
        for ours, theirs in _FUYU_RENAMES.items():
            if name.startswith(ours):
                return name, theirs + name.removeprefix(ours)
    return (name,)


def tensors_of_class(
    config: ModelConfig, heads: Mapping[str, Sequence[int]] | None, lm_head: bool
) -> dict[str, tuple[int, ...]]:
    """`expected_tensors`, with these shapes beside them, with `lm_head.weight` or without."""
    result = expected_tensors(config) | {name: tuple(shape) for name, shape in (heads or {}).items()}
    if not lm_head:
        del result[text_prefix(config) + HEAD]
    return result


_FUYU_RENAMES = {
    LANGUAGE_MODEL + "model.": "model.language_model.",
    LANGUAGE_MODEL + "lm_head.": "lm_head.",
    "vision_embed_tokens.": "model.vision_embed_tokens.",
}


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor: 16 a layer, 12 without qk_layernorm, and 4 around them; Fuyu has two more.

    `lm_head.weight` is listed even where it is tied and a file may leave it out. Linear weights are [out, in].
    """
    if isinstance(config, FuyuConfig):
        text = config.text_config
        result: dict[str, tuple[int, ...]]
        result = {LANGUAGE_MODEL + name: shape for name, shape in expected_tensors(text).items()}
        result["vision_embed_tokens.weight"] = (text.hidden_size, config.patch_elements)
        result["vision_embed_tokens.bias"] = (text.hidden_size,)
        return result
    hidden, inner = config.hidden_size, config.intermediate_size
    linears: dict[str, tuple[int, ...]] = {
        "self_attn.query_key_value": (3 * hidden, hidden),
        "self_attn.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (inner, hidden),
        "mlp.dense_4h_to_h": (hidden, inner),
    }
    norms: dict[str, tuple[int, ...]] = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    if config.qk_layernorm:
        norms |= {f"self_attn.{x}_layernorm": config.qk_layernorm_shape for x in "qk"}
    result = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        for module, shape in linears.items():
            result[f"model.layers.{layer}.{module}.weight"] = shape
            result[f"model.layers.{layer}.{module}.bias"] = shape[:1]
        for module, shape in norms.items():
            result[f"model.layers.{layer}.{module}.weight"] = shape
            result[f"model.layers.{layer}.{module}.bias"] = shape
    result["model.final_layernorm.weight"] = (hidden,)
    result["model.final_layernorm.bias"] = (hidden,)
    result[HEAD] = (config.vocab_size, hidden)
    return result
