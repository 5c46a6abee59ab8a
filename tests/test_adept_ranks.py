"""What Adept's arguments say, what tensor parallel ranks hold, and what happens where these contradict each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adept_helpers import ITERATION, SMALL, contents, inv_freq, write_adept, write_ranks
from checkpoint_helpers import assert_same_bits, random_tensors
from torch import Tensor

from persimmon_fast import PersimmonForCausalLM, adept
from persimmon_fast.checkpoint import CheckpointMismatchError, load_checkpoint
from persimmon_fast.config import PersimmonConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*no sentencepiece model", "ignore:.*qk_layernorm_per_head")
ENCODER = ("language_model", "encoder")
Q_NORM = "layers.0.self_attention.q_layernorm.weight"


def refused(files: list[dict[str, Any]], folder: Path, match: str) -> None:
    write_ranks(folder / "a", files)
    with pytest.raises(CheckpointMismatchError, match=match):
        adept.to_hugging_face(folder / "a", folder / "b")
    assert sorted(path.name for path in folder.iterdir()) == ["a"]


def encoder(content: dict[str, Any]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = content["model"]["language_model"]["encoder"]
    return result


# ---- arguments ----


def test_theta_is_the_arguments_not_the_10000_of_transformers(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL, torch.bfloat16)
    for theta in (25000, 50000):
        files = contents(SMALL, tensors, rotary_emb_base=theta)
        encoder(files[0]).update({k: inv_freq(SMALL, theta) for k in encoder(files[0]) if "inv_freq" in k})
        write_ranks(tmp_path / f"a{theta}", files)
        adept.to_hugging_face(tmp_path / f"a{theta}", tmp_path / f"b{theta}")
        assert PersimmonConfig.from_pretrained(tmp_path / f"b{theta}").rope_theta == theta


def test_arguments_reach_the_config(tmp_path: Path) -> None:
    write_adept(
        tmp_path / "a", layernorm_epsilon=1e-6, max_position_embeddings=4096, hidden_dropout=0.1, init_method_std=0.006
    )
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    config = PersimmonConfig.from_pretrained(tmp_path / "b")
    assert (config.layer_norm_eps, config.max_position_embeddings) == (1e-6, 4096)
    assert (config.hidden_dropout, config.initializer_range) == (0.1, 0.006)


def test_the_rotated_part_is_the_arguments_rotary_pct(tmp_path: Path) -> None:
    config = SMALL.replace(partial_rotary_factor=0.25)
    expected = write_adept(tmp_path / "a", config)
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    assert PersimmonConfig.from_pretrained(tmp_path / "b").rotary_dim == 4
    assert_same_bits(load_checkpoint(tmp_path / "b", config), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_dtype_is_that_of_the_tensors_not_params_dtype(dtype: str, tmp_path: Path) -> None:
    expected = write_adept(tmp_path / "a", SMALL.replace(dtype=dtype), params_dtype=torch.bfloat16)
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    assert PersimmonConfig.from_pretrained(tmp_path / "b").dtype == dtype
    assert_same_bits(load_checkpoint(tmp_path / "b", SMALL, dtype=None), expected)


def test_arguments_that_are_missing_come_from_the_release_with_a_warning(tmp_path: Path) -> None:
    """An args that is no object at all is the same as an empty one; the heads follow from q_layernorm."""
    files = contents(SMALL, random_tensors(SMALL, torch.bfloat16))
    files[0]["args"] = None
    write_ranks(tmp_path / "a", files)
    with pytest.warns(UserWarning, match="args name no") as caught:
        adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    said = " ".join(str(warning.message) for warning in caught)
    for what in (
        "rotary_emb_base: taking 25000",
        "rotary_pct: taking 0.5",
        "layernorm_epsilon: taking 1e-05",
        "seq_length: taking 16384",
    ):
        assert what in said
    config = PersimmonConfig.from_pretrained(tmp_path / "b")
    assert (config.rope_theta, config.num_attention_heads, config.max_position_embeddings) == (25000, 4, 16384)


def test_rotary_buffers_are_dropped_but_must_fit_the_arguments(tmp_path: Path) -> None:
    files = contents(SMALL, random_tensors(SMALL, torch.bfloat16))
    write_ranks(tmp_path / "good", files)
    adept.to_hugging_face(tmp_path / "good", tmp_path / "hf")
    assert not [name for name in load_checkpoint(tmp_path / "hf", SMALL) if "inv_freq" in name]
    key = "layers.1.self_attention.rotary_emb.inv_freq"
    encoder(files[0])[key] = inv_freq(SMALL, theta=10000)
    match = f"{key}: expected that of rotary_emb_base 25000 for 8 rotated elements, found 4 values"
    refused(files, tmp_path / "theta", match)
    encoder(files[0])[key] = inv_freq(SMALL.replace(partial_rotary_factor=1.0))
    refused(files, tmp_path / "part", f"{key}: .* found 8 values")


def test_the_vocabulary_is_what_the_embedding_has_rows_for(tmp_path: Path) -> None:
    """padded_vocab_size depends on the ranks of the training run: shapes decide."""
    expected = write_adept(tmp_path / "a", num_ranks=2, padded_vocab_size=600)
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    assert PersimmonConfig.from_pretrained(tmp_path / "b").vocab_size == 640
    assert_same_bits(load_checkpoint(tmp_path / "b", SMALL), expected)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_layers": 3}, "args.num_layers: expected 2, which the tensors have, found 3"),
        ({"hidden_size": 128}, "args.hidden_size: expected 64, which the tensors have, found 128"),
        ({"ffn_hidden_size": 256}, "args.ffn_hidden_size: expected 48, which the tensors have, found 256"),
        ({"num_attention_heads": 8}, "args.num_attention_heads: expected 64 / 16 of q_layernorm, found 8"),
        ({"kv_channels": 32}, "args.kv_channels: expected hidden_size / num_attention_heads = 64 / 4, found 32"),
        ({"num_attention_heads": "4"}, "args.num_attention_heads: expected an integer, found '4'"),
        ({"pos_emb": "alibi"}, "args.pos_emb: expected 'rotary', found 'alibi'"),
        ({"sq_relu": False}, "args.sq_relu: expected True, found False"),
        (
            {"apply_residual_connection_post_layernorm": True},
            "args.apply_residual_connection_post_layernorm: expected False",
        ),
        ({"pipeline_model_parallel_size": 2}, "args.pipeline_model_parallel_size: expected 1, found 2"),
        ({"qk_layernorm": "other"}, "args.qk_layernorm: expected 'none' or 'weights_per_layer' or"),
        (
            {"untie_embeddings": False},
            "args.untie_embeddings: expected it to say whether there is a head, found False, a",
        ),
        ({"rotary_pct": 0.01}, "args.partial_rotary_factor: expected an even number"),
        ({"layernorm_epsilon": float("nan")}, "args.layer_norm_eps: expected a finite number"),
        ({"rotary_emb_base": [1]}, r"args.rotary_emb_base: expected a number, found '\[1\]'|found \[1\]"),
    ],
)
def test_arguments_that_contradict_the_tensors_or_name_another_model(
    changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    refused(contents(SMALL, random_tensors(SMALL, torch.bfloat16), **changes), tmp_path, match)


def test_heads_that_nothing_tells(tmp_path: Path) -> None:
    config = SMALL.replace(qk_layernorm=False)
    files = contents(config, random_tensors(config, torch.bfloat16), num_attention_heads=None)
    refused(files, tmp_path, "args.num_attention_heads: expected a number, found none, and no qk-layernorm to tell it")


# ---- names and shapes ----


def test_names_of_older_files_that_adepts_loader_takes(tmp_path: Path) -> None:
    """ "transformer" for "encoder" and "attention" for "self_attention"."""
    tensors = random_tensors(SMALL, torch.bfloat16)
    files = contents(SMALL, tensors)
    inner = files[0]["model"]["language_model"]
    inner["transformer"] = {k.replace(".self_attention.", ".attention."): v for k, v in inner.pop("encoder").items()}
    write_ranks(tmp_path / "a", files)
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    assert_same_bits(load_checkpoint(tmp_path / "b", SMALL), tensors)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda e: e.pop("layers.1.mlp.dense_4h_to_h.bias"),
            "layers.1.mlp.dense_4h_to_h.bias: expected a tensor of shape",
        ),
        (
            lambda e: e.update({"layers.0.extra.weight": torch.ones(3).bfloat16()}),
            "layers.0.extra.weight: expected the tensors of",
        ),
        (
            lambda e: e.update({"final_layernorm.weight": torch.ones(3).bfloat16()}),
            r"final_layernorm.weight: expected shape \[64\]",
        ),
        (lambda e: e.update({Q_NORM: torch.ones(16)}), "q_layernorm.weight: expected torch.bfloat16, as rank 0 has"),
        (lambda e: e.update({"layers.0.mlp.dense_h_to_4h.weight": torch.ones(3).bfloat16()}), "expected 2 dimensions"),
        (lambda e: e.update({"layers.0.attention.dense.bias": torch.ones(64).bfloat16()}), "expected each tensor once"),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[dict[str, Tensor]], Any], match: str, tmp_path: Path) -> None:
    files = contents(SMALL, random_tensors(SMALL, torch.bfloat16), num_ranks=2)
    rank = 1 if "rank 0" in match else 0
    change(encoder(files[rank]))
    refused(files, tmp_path, match)


def test_a_norm_of_all_heads_beside_one_of_a_head(tmp_path: Path) -> None:
    files = contents(SMALL, random_tensors(SMALL, torch.bfloat16))
    one = Q_NORM.replace(".weight", ".layernorms.0.weight")
    encoder(files[0])[one] = encoder(files[0])[Q_NORM].clone()
    refused(files, tmp_path, f"{one}: expected the tensors of a Persimmon with 2 layers, found it")


# ---- ranks ----


@pytest.mark.parametrize(
    "name", ["final_layernorm.weight", "layers.1.input_layernorm.bias", "layers.0.self_attention.dense.bias"]
)
def test_replicated_tensors_must_be_the_same_in_every_rank(name: str, tmp_path: Path) -> None:
    files = contents(SMALL, random_tensors(SMALL, torch.bfloat16), num_ranks=4)
    encoder(files[2])[name][3] += 1
    refused(
        files,
        tmp_path,
        rf"mp_rank_02/model_optim_rng.pt: language_model.encoder.{re.escape(name)}: expected the values of",
    )


def test_ranks_of_different_iterations_do_not_merge(tmp_path: Path) -> None:
    files = contents(SMALL, random_tensors(SMALL, torch.bfloat16), num_ranks=2)
    files[1]["iteration"] = 1
    refused(
        files,
        tmp_path,
        f"mp_rank_01/model_optim_rng.pt: iteration: expected {ITERATION}, as in .*, found 1. These ranks",
    )


def test_ranks_that_cannot_share_the_heads(tmp_path: Path) -> None:
    config = SMALL.replace(vocab_size=642)
    refused(
        contents(config, random_tensors(config, torch.bfloat16), num_ranks=3),
        tmp_path,
        "args.num_attention_heads: expected a multiple of the 3 ranks, found 4",
    )


# ---- the LayerNorms of queries and keys ----


def with_norm_mode(mode: str, num_ranks: int, differ: bool) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Ranks in one of Adept's modes, and the [num_heads, head_dim] (or [head_dim]) weights that they mean."""
    tensors = random_tensors(SMALL, torch.bfloat16)
    files = contents(SMALL, tensors, num_ranks, qk_layernorm=mode)
    heads, dim = SMALL.num_attention_heads, SMALL.head_dim
    for name in [name for name in tensors if "q_layernorm" in name or "k_layernorm" in name]:
        rows = tensors[name].expand(heads, dim).clone()
        if differ and mode == "weights_per_attention_head_and_layer":
            rows = torch.randn(heads, dim, generator=torch.Generator().manual_seed(len(name))).bfloat16()
        elif differ:
            rows = torch.cat([tensors[name].expand(heads // num_ranks, dim) + rank for rank in range(num_ranks)])
        tensors[name] = rows if differ else rows[0]
        adept_name = name.removeprefix("model.").replace("self_attn", "self_attention")
        module, _, kind = adept_name.rpartition(".")
        for rank, content in enumerate(files):
            mine = rows.chunk(num_ranks)[rank]
            del encoder(content)[adept_name]
            if mode == "weights_per_attention_head_and_layer":
                encoder(content).update({f"{module}.layernorms.{i}.{kind}": row.clone() for i, row in enumerate(mine)})
            else:
                encoder(content)[adept_name] = mine[0].clone()
    return files, tensors


_MODES = ("weights_per_layer", "weights_per_tensor_parallel_rank_and_layer", "weights_per_attention_head_and_layer")


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("mode", _MODES)
def test_norms_that_all_heads_share_make_an_ordinary_checkpoint(mode: str, num_ranks: int, tmp_path: Path) -> None:
    files, tensors = with_norm_mode(mode, num_ranks, differ=False)
    write_ranks(tmp_path / "a", files)
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    config = PersimmonConfig.from_pretrained(tmp_path / "b")
    assert not config.qk_layernorm_per_head
    assert_same_bits(load_checkpoint(tmp_path / "b", config), tensors)


@pytest.mark.parametrize(
    ("mode", "num_ranks"), [(_MODES[1], 2), (_MODES[1], 4), (_MODES[2], 1), (_MODES[2], 2), (_MODES[2], 4)]
)
def test_norms_per_rank_or_per_head_become_norms_per_head(mode: str, num_ranks: int, tmp_path: Path) -> None:
    files, tensors = with_norm_mode(mode, num_ranks, differ=True)
    write_ranks(tmp_path / "a", files)
    with pytest.warns(UserWarning, match="qk_layernorm_per_head.* transformers refuses"):
        adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    config = PersimmonConfig.from_pretrained(tmp_path / "b")
    assert config.qk_layernorm_per_head
    assert_same_bits(load_checkpoint(tmp_path / "b", config), tensors)
    adept.to_adept(tmp_path / "b", tmp_path / "c", num_ranks=num_ranks)
    file = f"iter_{ITERATION:07}/mp_rank_{num_ranks - 1:02}/model_optim_rng.pt"
    back = torch.load(tmp_path / "c" / file, weights_only=False)
    assert back["args"].qk_layernorm == _MODES[2]
    last = tensors["model.layers.1.self_attn.k_layernorm.bias"][-1]
    key = f"layers.1.self_attention.k_layernorm.layernorms.{4 // num_ranks - 1}.bias"
    assert torch.equal(encoder(back)[key], last)
    adept.to_hugging_face(tmp_path / "c", tmp_path / "d")
    assert (tmp_path / "d" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_one_head_that_differs_in_one_tensor_makes_all_norms_per_head(tmp_path: Path) -> None:
    files, tensors = with_norm_mode(_MODES[2], 1, differ=False)
    encoder(files[0])["layers.1.self_attention.k_layernorm.layernorms.3.bias"][0] += 1
    write_ranks(tmp_path / "a", files)
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    config = PersimmonConfig.from_pretrained(tmp_path / "b")
    loaded = load_checkpoint(tmp_path / "b", config)
    for name in [name for name in tensors if "q_layernorm" in name or "k_layernorm" in name]:
        rows = tensors[name].expand(4, 16).clone()
        rows[3, 0] += name == "model.layers.1.self_attn.k_layernorm.bias"
        assert torch.equal(loaded[name], rows)


def test_a_model_with_norms_per_head_runs(tmp_path: Path) -> None:
    files, _ = with_norm_mode(_MODES[2], 2, differ=True)
    write_ranks(tmp_path / "a", files)
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    model = PersimmonForCausalLM.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 640)
    assert torch.isfinite(logits).all()
