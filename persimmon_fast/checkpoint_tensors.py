"""The tensors of a Persimmon checkpoint in the Hugging Face layout: names and shapes."""

from __future__ import annotations

from persimmon_fast.config import PersimmonConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
DOWN_PROJECTION = ".mlp.dense_4h_to_h.weight"  # the suffix of the one tensor that lies transposed in memory


def expected_tensors(config: PersimmonConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor: 16 a layer, 12 without qk_layernorm, and 4 around them.

    `lm_head.weight` is listed even where it is tied and a file may leave it out. Linear weights are [out, in].
    """
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
    result: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
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
