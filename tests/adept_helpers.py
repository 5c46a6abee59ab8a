"""Synthetic checkpoints in Adept's original format, written by torch.save alone.

The layout, the nesting and what each tensor parallel rank holds are spelled out here once more, on purpose: the
converter's own tables are what the tests test.
"""

from __future__ import annotations

import argparse
import enum
import hashlib
import random
import sys
import tarfile
import types
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from checkpoint_helpers import TINY, random_tensors
from torch import Tensor

from persimmon_fast.config import PersimmonConfig

ITERATION = 375_000
SMALL = TINY.replace(
    vocab_size=640, hidden_size=64, num_attention_heads=4, max_position_embeddings=128, dtype="bfloat16"
)


def arguments(config: PersimmonConfig, num_ranks: int = 1, **changes: Any) -> argparse.Namespace:
    """The arguments that decide what the model is, and some that do not; None removes one."""
    values: dict[str, Any] = {
        "num_layers": config.num_hidden_layers,
        "encoder_num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.head_dim,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "pos_emb": "rotary",
        "rotary_pct": config.partial_rotary_factor,
        "rotary_emb_base": 25000,
        "layernorm_epsilon": 1e-5,
        "qk_layernorm": "weights_per_layer" if config.qk_layernorm else "none",
        "untie_embeddings": None if config.tie_word_embeddings else True,
        "sq_relu": True,
        "bf16": True,
        "fp16": False,
        "params_dtype": torch.bfloat16,
        "padded_vocab_size": config.vocab_size,
        "tensor_model_parallel_size": num_ranks,
        "pipeline_model_parallel_size": 1,
        "tokenizer_type": "SentencePiece",
        "data_path": ["1.0", "/data/a"],
        "lr": 1e-4,
        "seed": 2**70,
        "rampup": (1, 2, None),
    } | changes
    return argparse.Namespace(**{key: value for key, value in values.items() if value is not None})


def absent_module(name: str = "megatron.model.enums") -> Any:
    """A class of a module that can be pickled now and, after `forget(name)`, not imported."""
    module = types.ModuleType(name)
    model_type = enum.Enum("ModelType", {"encoder_or_decoder": 1}, module=name)

    class Options:
        def __init__(self) -> None:
            self.nested = {"a": [model_type.encoder_or_decoder]}  # type: ignore[attr-defined]

    Options.__module__, Options.__qualname__ = name, "Options"
    module.ModelType, module.Options = model_type, Options  # type: ignore[attr-defined]
    for end in range(len(name)):  # and its packages, without which it cannot be imported
        if name[end] == ".":
            sys.modules[name[:end]] = types.ModuleType(name[:end])
    sys.modules[name] = module
    return module


def forget(name: str = "megatron.model.enums") -> None:
    for loaded in [module for module in sys.modules if f"{name}.".startswith(f"{module}.")]:
        del sys.modules[loaded]


def inv_freq(config: PersimmonConfig, theta: float = 25000.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    exponents = torch.arange(0, config.rotary_dim, 2).float() / config.rotary_dim
    return (1.0 / theta**exponents).to(dtype)


def rank_tensors(config: PersimmonConfig, tensors: Mapping[str, Tensor], rank: int, num_ranks: int) -> dict[str, Any]:
    """What is under "model" in one rank's file: nested dicts around flat state dicts."""

    def part(name: str, dim: int | None) -> Tensor:
        whole = tensors[name]
        return whole.clone() if dim is None else whole.chunk(num_ranks, dim)[rank].clone()

    encoder: dict[str, Tensor] = OrderedDict()
    for layer in range(config.num_hidden_layers):
        ours, adept = f"model.layers.{layer}.", f"layers.{layer}."
        attention = f"{adept}self_attention."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            for kind in ("weight", "bias"):
                encoder[f"{adept}{norm}.{kind}"] = part(f"{ours}{norm}.{kind}", None)
        for kind in ("weight", "bias"):
            encoder[f"{attention}query_key_value.{kind}"] = part(f"{ours}self_attn.query_key_value.{kind}", 0)
            encoder[f"{adept}mlp.dense_h_to_4h.{kind}"] = part(f"{ours}mlp.dense_h_to_4h.{kind}", 0)
            for norm in ("q_layernorm", "k_layernorm") if config.qk_layernorm else ():
                encoder[f"{attention}{norm}.{kind}"] = part(f"{ours}self_attn.{norm}.{kind}", None)
        encoder[f"{attention}dense.weight"] = part(f"{ours}self_attn.dense.weight", 1)
        encoder[f"{attention}dense.bias"] = part(f"{ours}self_attn.dense.bias", None)
        encoder[f"{attention}rotary_emb.inv_freq"] = inv_freq(config)
        encoder[f"{adept}mlp.dense_4h_to_h.weight"] = part(f"{ours}mlp.dense_4h_to_h.weight", 1)
        encoder[f"{adept}mlp.dense_4h_to_h.bias"] = part(f"{ours}mlp.dense_4h_to_h.bias", None)
    for kind in ("weight", "bias"):
        encoder[f"final_layernorm.{kind}"] = part(f"model.final_layernorm.{kind}", None)
    encoder._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as state_dict() adds it
    embedding = OrderedDict(weight=part("model.embed_tokens.weight", 0))
    model: dict[str, Any] = {"language_model": {"embedding": {"word_embeddings": embedding}, "encoder": encoder}}
    if not config.tie_word_embeddings:
        model["word_embeddings_for_head"] = OrderedDict(weight=part("lm_head.weight", 0))
    return model


def random_states() -> list[dict[str, Any]]:
    """States of generators, as a training run saves them: numpy arrays and byte tensors among them."""
    state = {"random_rng_state": random.Random(0).getstate(), "np_rng_state": np.random.RandomState(0).get_state()}
    return [state | {"torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {"a": torch.get_rng_state()}}]


def contents(
    config: PersimmonConfig, tensors: Mapping[str, Tensor], num_ranks: int = 1, **changes: Any
) -> list[dict[str, Any]]:
    """What each rank's file holds; changes are those of the arguments."""
    return [
        {
            "args": arguments(config, num_ranks, **changes),
            "checkpoint_version": 3.0,
            "iteration": ITERATION,
            "model": rank_tensors(config, tensors, rank, num_ranks),
            "rng_state": random_states(),
            "optimizer": {"step": torch.zeros(3, dtype=torch.float64), "exp_avg": [torch.zeros(5)]},
        }
        for rank in range(num_ranks)
    ]


def write_ranks(folder: Path, files: list[dict[str, Any]], form: str = "zip", tokenizer: bytes | None = None) -> Path:
    """A release's folder: tracker, vocabulary, one file a rank. form: zip or legacy."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    if tokenizer is not None:
        (folder / "adept_vocab.model").write_bytes(tokenizer)
        (folder / "adept_vocab.vocab").write_text("plain text\n")
    for rank, content in enumerate(files):
        path = folder / f"iter_{ITERATION:07}" / f"mp_rank_{rank:02}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return folder


def write_adept(
    folder: Path,
    config: PersimmonConfig = SMALL,
    num_ranks: int = 1,
    form: str = "zip",
    tokenizer: bytes | None = None,
    **changes: Any,
) -> dict[str, Tensor]:
    """Writes a random model; returns its tensors by our names."""
    tensors = random_tensors(config, config.torch_dtype or torch.float32)
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    write_ranks(folder, contents(config, tensors, num_ranks, **changes), form, tokenizer)
    return tensors


def tar_of(folder: Path) -> tuple[Path, str]:
    """folder as folder.tar, and its MD5."""
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        archive.add(folder, folder.name)
    return path, hashlib.md5(path.read_bytes()).hexdigest()


def sentencepiece_model(symbols: tuple[str, ...] = ("|ENDOFTEXT|",), size: int = 400) -> bytes:
    """A Unigram model with byte fallback; the symbols come before the pieces that training finds."""
    import io

    out = io.BytesIO()
    words = ["persimmon", "fruit", "tree", "season", "river", "stone", "autumn", "orchard", "basket", "ladder"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(words[i:] + words[:i]) for i in range(len(words))),
        model_writer=out,
        model_type="unigram",
        vocab_size=size,
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=list(symbols),
        minloglevel=2,
    )
    return out.getvalue()
