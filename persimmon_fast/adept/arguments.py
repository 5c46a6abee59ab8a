"""The arguments of Adept's training run that say what the model is, read into a `PersimmonConfig` and back.

Shapes decide what they can (layers, widths, vocabulary with its padding); arguments that say otherwise are an error.
What neither says is taken from the released models, with a warning.

Source: persimmon-ai-labs/adept-inference, megatron/arguments.py (names, defaults) and megatron/checkpointing.py (which
of them belong to a trained checkpoint).
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from persimmon_fast.adept import names
from persimmon_fast.adept.pickles import FileTensor
from persimmon_fast.checkpoint_files import CheckpointMismatchError, shown
from persimmon_fast.config import TRAINED_ROPE_THETA, PersimmonConfig
from persimmon_fast.config_file import ConfigError

QK_LAYERNORM_MODES = (
    "weights_per_layer",
    "weights_per_tensor_parallel_rank_and_layer",
    "weights_per_attention_head_and_layer",
)
ITERATION_KEY = "adept_iteration"  # in config.json, so that the way back names the folder as it was
_RELEASED_ROTARY_PCT, _RELEASED_EPSILON, _RELEASED_POSITIONS = 0.5, 1e-5, 16384


def read_config(
    file: str, arguments: Mapping[str, Any], tensors: Mapping[str, FileTensor], num_ranks: int
) -> PersimmonConfig:
    """The config of a checkpoint, without token ids and dtype.

    Args:
        file: named in errors.
        arguments: by name, as in the file.
        tensors: of one rank, by Adept's names.
        num_ranks: tensor parallel ranks.

    Raises:
        CheckpointMismatchError: arguments and tensors disagree, or the model is no Persimmon.
    """
    reader = _Reader(file, arguments)
    reader.check_kind(num_ranks)
    embedding = reader.shape(tensors, names.ADEPT_EMBEDDING, 2)
    layers = {
        int(match[1]) for name in tensors if (match := re.match(r"language_model\.encoder\.layers\.(\d{1,9})\.", name))
    }
    hidden_size = reader.agreed("hidden_size", embedding[1])
    up = reader.shape(tensors, "language_model.encoder.layers.0.mlp.dense_h_to_4h.weight", 2)
    head_dim = _head_dim(tensors)
    num_heads = reader.number("num_attention_heads", int, None if head_dim is None else hidden_size // head_dim)
    if num_heads is None:
        raise reader.error("num_attention_heads", "a number", "none, and no qk-layernorm to tell it")
    if head_dim is not None and num_heads * head_dim != hidden_size:
        raise reader.error("num_attention_heads", f"{hidden_size} / {head_dim} of q_layernorm", str(num_heads))
    kv_channels = reader.number("kv_channels", int, None)
    if kv_channels is not None and kv_channels * num_heads != hidden_size:
        raise reader.error(
            "kv_channels", f"hidden_size / num_attention_heads = {hidden_size} / {num_heads}", str(kv_channels)
        )
    head_dim = hidden_size // max(1, num_heads)
    fields = {
        "vocab_size": embedding[0] * num_ranks,
        "hidden_size": hidden_size,
        "intermediate_size": reader.agreed("ffn_hidden_size", up[0] * num_ranks),
        "num_hidden_layers": reader.agreed("num_layers", max(layers, default=-1) + 1),
        "num_attention_heads": num_heads,
        "max_position_embeddings": reader.number("max_position_embeddings", int, None)
        or reader.number("seq_length", int, _RELEASED_POSITIONS, say=True),
        "layer_norm_eps": reader.number("layernorm_epsilon", float, _RELEASED_EPSILON, say=True),
        "initializer_range": reader.number("init_method_std", float, 0.02),
        "hidden_dropout": reader.number("hidden_dropout", float, 0.0),
        "attention_dropout": reader.number("attention_dropout", float, 0.0),
        "partial_rotary_factor": reader.number("rotary_pct", float, _RELEASED_ROTARY_PCT, say=True),
        "rope_theta": reader.number("rotary_emb_base", float, TRAINED_ROPE_THETA, say=True),
        "qk_layernorm": any(
            names.is_qk_norm(names.to_hugging_face(name) or "") or ".layernorms." in name for name in tensors
        ),
        "tie_word_embeddings": names.ADEPT_HEAD not in tensors,
    }
    untied = arguments.get("untie_embeddings")
    if untied is not None and bool(untied) == fields["tie_word_embeddings"]:
        found = f"{untied!r}, {'no' if untied else 'a'} {names.ADEPT_HEAD}"
        raise reader.error("untie_embeddings", "it to say whether there is a head", found)
    try:
        return PersimmonConfig(**fields, bos_token_id=None, eos_token_id=None)
    except ConfigError as error:
        raise reader.error(error.key, error.expected, error.found) from None


def _head_dim(tensors: Mapping[str, FileTensor]) -> int | None:
    for name, tensor in tensors.items():
        if re.search(r"\.q_layernorm\.(layernorms\.0\.)?weight$", name) and len(tensor.shape) == 1:
            return tensor.shape[0] or None
    return None


class _Reader:
    """Values of the arguments, checked."""

    def __init__(self, file: str, arguments: Mapping[str, Any]) -> None:
        self.file, self.arguments = file, arguments

    def error(self, key: str, expected: str, found: str, hint: str = "") -> CheckpointMismatchError:
        return CheckpointMismatchError(self.file, f"args.{key}", expected, found, hint)

    def check_kind(self, num_ranks: int) -> None:
        """Refuses models that compute something else, and sets of files that are not all."""
        only = {
            "pos_emb": ("rotary",),
            "sq_relu": (True,),
            "apply_residual_connection_post_layernorm": (False, None),
            "pipeline_model_parallel_size": (1,),
            "tensor_model_parallel_size": (num_ranks,),
            "qk_layernorm": ("none", *QK_LAYERNORM_MODES, True, False),
        }
        for key, accepted in only.items():
            value = self.arguments.get(key, accepted[0])
            if value not in accepted:
                hint = "Are all mp_rank_ folders there?" if key.startswith("tensor") else ""
                raise self.error(key, " or ".join(repr(value) for value in accepted), shown(repr(value)), hint)

    def number(self, key: str, kind: type, default: Any, say: bool = False) -> Any:
        """A number, else the default."""
        value = self.arguments.get(key)
        if value is None:
            if say:
                warnings.warn(f"{self.file}: args name no {key}: taking {default:g}, that of the release", stacklevel=4)
            return default
        if type(value) is int or (kind is float and type(value) is float):
            return kind(value)
        raise self.error(key, "an integer" if kind is int else "a number", shown(repr(value)))

    def agreed(self, key: str, found: int) -> int:
        """What the tensors say, if the argument says the same or nothing."""
        value = self.arguments.get(key)
        if value is not None and value != found:
            raise self.error(key, f"{found}, which the tensors have", shown(repr(value)))
        return found

    def shape(self, tensors: Mapping[str, FileTensor], name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors:
            found = ", ".join(shown(key) for key in list(tensors)[:3]) or "no tensor"
            raise CheckpointMismatchError(self.file, name, "a tensor of that name", found)
        if len(tensors[name].shape) != rank:
            raise CheckpointMismatchError(self.file, name, f"{rank} dimensions", f"shape {list(tensors[name].shape)}")
        return tensors[name].shape


def inverse_frequencies(theta: float, rotary_dim: int) -> torch.Tensor:
    """The buffer rotary_emb.inv_freq: theta^(-2i / rotary_dim) for i < rotary_dim / 2, fp32."""
    return 1.0 / (theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim))


def write_arguments(config: PersimmonConfig, dtype: torch.dtype, num_ranks: int) -> argparse.Namespace:
    """The arguments that Adept's code takes from a checkpoint, for this model.

    Raises:
        ConfigError: the model has what Adept's code has no argument for.
    """
    if config.rope_scaling is not None:
        raise ConfigError("rope_scaling", "none, since Adept's code knows no scaling of positions", config.rope_type)
    theta = config.rope_theta
    return argparse.Namespace(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        kv_channels=config.head_dim,
        seq_length=config.max_position_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        pos_emb="rotary",
        rotary_pct=config.partial_rotary_factor,
        rotary_emb_base=int(theta) if theta == int(theta) else theta,
        layernorm_epsilon=config.layer_norm_eps,
        qk_layernorm=qk_layernorm_mode(config),
        untie_embeddings=not config.tie_word_embeddings,
        sq_relu=True,
        bias_gelu_fusion=False,  # Adept's MLP looks at it first
        init_method_std=config.initializer_range,
        hidden_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        tokenizer_type="SentencePiece",
        padded_vocab_size=config.vocab_size,
        tensor_model_parallel_size=num_ranks,
        pipeline_model_parallel_size=1,
    )


def qk_layernorm_mode(config: PersimmonConfig) -> str:
    """Adept's name of how queries and keys are normalised."""
    if not config.qk_layernorm:
        return "none"
    return QK_LAYERNORM_MODES[2 if config.qk_layernorm_per_head else 0]
