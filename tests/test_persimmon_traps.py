"""What is easily got wrong about Persimmon: a table of these traps, each with the test that names it.

Traps that had no test of their own have it below the table.
"""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import hf_model, max_error, randn, tiny_config

from persimmon_fast import SMALL_MODEL, PersimmonConfig, PersimmonForCausalLM, PersimmonTokenizer, ops
from persimmon_fast.generation_config import GenerationConfig
from persimmon_fast.rope import rope_cos_sin

HERE = "test_persimmon_traps.py"
TRAPS = {
    # numerics, in the order of the model
    "the class defaults are the 8B model": "test_config.py::test_defaults_are_persimmon_8b",
    "embeddings are not scaled and carry no position": f"{HERE}::test_embeddings_are_neither_scaled_nor_positioned",
    "a transformers model rounds its cosines to its dtype": f"{HERE}::test_cosines_are_not_rounded_to_the_models_dtype",
    "a cast transformers model also rounds inv_freq": f"{HERE}::test_a_cast_does_not_round_the_angles",
    "rotary angles survive a cast and back": "test_model.py::test_dtype_move_keeps_rotary_angles_and_memory_order",
    "Adept's bf16 positions are 1,025 of 16,384": "test_rotary_precision.py::test_bf16_holds_1025_of_16384_positions",
    "Adept's fp16 positions are rounded too": "test_rotary_precision.py::test_fp16_holds_5121_of_16384_positions",
    "Adept rounds q and k at each step": "test_rotary_precision.py::test_q_and_k_are_the_servers_at_every_position",
    "the projection is packed per head: q, k, v": f"{HERE}::test_projection_is_packed_per_head",
    "values are the bare projection": f"{HERE}::test_values_see_neither_layer_norm_nor_rotary",
    "LayerNorm of q and k comes before rotary": f"{HERE}::test_layer_norm_comes_before_rotary",
    "q and k share LayerNorm weights over heads, but not always": "test_qk_layernorm_per_head.py"
    "::test_heads_have_weights_of_their_own",
    "qk_layernorm may be off": "test_model.py::test_config_variants_equal_transformers",
    "rotary pairs i with i + rotary_dim / 2, not neighbours": f"{HERE}::test_rotary_pairs_halves_not_neighbours",
    "half of a head is not rotated": f"{HERE}::test_the_rest_of_a_head_is_not_rotated",
    "the cache holds k after rotary": "test_qk_layernorm_per_head.py"
    "::test_attention_and_cache_are_those_of_a_loop_over_the_heads",
    "scores are scaled by head_dim, not rotary_dim": f"{HERE}::test_softmax_scale_is_that_of_head_dim",
    "scores need fp32": f"{HERE}::test_scores_past_the_range_of_float16",
    "the squared ReLU overflows float16 past 255.94": f"{HERE}::test_squares_past_255_94_in_float16",
    "squares stay finite to 4,000": "test_squared_relu_mlp.py::test_fp16_squares_do_not_overflow_below_4000",
    "dropout is for training": f"{HERE}::test_hidden_dropout_is_for_training",
    "the last hidden state is behind the final LayerNorm": "test_model.py::test_hidden_states_equal_transformers",
    "labels are shifted inside, -100 is ignored": "test_model.py::test_loss_equals_transformers",
    "the loss is taken in fp32": f"{HERE}::test_loss_is_fp32_in_a_bfloat16_model",
    # config.json
    "there are no grouped queries": "test_config.py::test_a_file_that_contradicts_itself_is_refused",
    "the activation is relu2 alone": "test_config.py::test_nonsense_is_refused_by_name",
    "transformers 5 rotates by theta 10000 if none is named": f"{HERE}::test_theta_10000_is_nobodys_choice",
    "a missing theta is 25000, with a warning": "test_config.py::test_missing_theta_is_25000_and_says_so_once",
    "transformers 4 names rotary parameters flat": "test_config.py::test_reads_the_flat_layout_of_transformers_4",
    "transformers 5 nests them": "test_config.py::test_round_trip_through_json_and_through_transformers",
    "flat and nested may disagree": "test_config.py::test_a_file_that_contradicts_itself_is_refused",
    "dtype has two names": "test_config.py::test_dtype_wins_over_torch_dtype_as_in_transformers",
    "dynamic and longrope depend on the length": "test_config.py::test_rope_table_is_that_of_transformers",
    "the released ids are 71013, not 1 and 2": f"{HERE}::test_released_files_begin_and_end_with_71013",
    "there is no padding token": "test_tokenizer.py::test_sizes_and_special_ids",
    # checkpoints
    "every Linear but the head has a bias": "test_checkpoint.py::test_expected_tensors_of_persimmon_8b",
    "old files hold rotary buffers": "test_checkpoint.py::test_harmless_buffers_of_old_releases_are_skipped",
    "a tied head is left out": "test_checkpoint.py::test_tied_head_is_left_out_and_must_not_differ",
    "weights may lie in .bin files and shards": "test_checkpoint.py::test_loads_every_format",
    "pickles may execute code": "test_checkpoint_pickles.py::test_a_pickle_that_asks_for_more_is_refused_unread",
    "Adept's names are not transformers'": "test_checkpoint_errors.py::test_tensor_names",
    "no dtype means auto": "test_checkpoint.py::test_dtype_conversion",
    # Adept's checkpoints
    "args holds classes that nobody has": "test_adept_pickles.py"
    "::test_classes_of_modules_that_nobody_has_do_not_stand_in_the_way",
    "Adept's pickles may execute code": "test_adept_pickles.py"
    "::test_a_pickle_that_asks_for_python_torch_or_numpy_is_refused",
    "tensors saved on a GPU ask for one": "test_adept_pickles.py::test_a_file_saved_from_a_gpu_is_read_without_one",
    "conversion renames, nothing is permuted": "test_adept_convert.py"
    "::test_conversion_is_renaming_alone_no_permutation_of_qkv",
    "Adept's dicts are nested, but not all the way": "test_adept_convert.py"
    "::test_the_written_pickle_is_nested_as_adepts",
    "the releases have published sums": "test_adept_convert.py::test_a_release_is_checked_against_its_published_md5",
    "the tracker names the iteration": "test_adept_convert.py::test_the_tracker_chooses_among_iterations",
    "|ENDOFTEXT| ends a text, not sentencepiece's </s>": "test_adept_convert.py"
    "::test_the_stop_id_is_endoftext_not_sentencepieces_or_the_class_default",
    "Adept's theta is in its arguments": "test_adept_ranks.py"
    "::test_theta_is_the_arguments_not_the_10000_of_transformers",
    "Adept's files hold rotary buffers": "test_adept_ranks.py"
    "::test_rotary_buffers_are_dropped_but_must_fit_the_arguments",
    "the vocabulary is padded": "test_adept_ranks.py::test_the_vocabulary_is_what_the_embedding_has_rows_for",
    "Adept's LayerNorms of q and k may differ by head": "test_adept_ranks.py"
    "::test_norms_per_rank_or_per_head_become_norms_per_head",
    # tokenizer
    "transformers has no PersimmonTokenizer": f"{HERE}::test_files_that_name_a_tokenizer_of_transformers",
    "sentencepiece adds a space in front": "test_tokenizer.py::test_the_dummy_prefix_and_byte_fallback_are_there",
    "unknown characters become bytes": "test_tokenizer.py::test_ids_are_sentencepiece_ids",
    "transformers prepends BOS, Adept does not": f"{HERE}::test_bos_is_prepended_unless_refused",
    "chat: further turns follow a space and end with two newlines": "test_tokenizer.py::test_chat_format",
}


def _tests_of(file: str) -> set[str]:
    tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_trap_has_its_test_and_every_test_here_its_trap():
    named: dict[str, set[str]] = {}
    for place in TRAPS.values():
        file, _, name = place.partition("::")
        named.setdefault(file, set()).add(name)
    for file, names in named.items():
        assert names <= _tests_of(file), file
    assert _tests_of(HERE) - named[HERE] == {"test_every_trap_has_its_test_and_every_test_here_its_trap"}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> PersimmonForCausalLM:
    """Two layers, 3 heads of 16, rotary_dim 8; every parameter random."""
    config = tiny_config()
    ours = PersimmonForCausalLM(config).eval()
    ours.load_state_dict(hf_model(config).state_dict())
    return ours


IDS = torch.randint(160, (1, 20), generator=torch.Generator().manual_seed(1))


def cached(model: PersimmonForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v of layer 0, [20, 3, 16]."""
    cache = model(IDS, use_cache=True).past_key_values
    page = cache._pages[0][0]
    k, v = (pool[0][page, :, :20].transpose(0, 1) for pool in (cache.k, cache.v))
    return k, v


# ---- numerics ----


def test_embeddings_are_neither_scaled_nor_positioned(model):
    first = model(IDS, output_hidden_states=True).hidden_states[0]
    assert torch.equal(first, model.model.embed_tokens.weight[IDS])


def test_cosines_are_not_rounded_to_the_models_dtype(model):
    theirs = hf_model(model.config)
    cos, _ = theirs.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), torch.arange(20)[None])
    assert cos.dtype == torch.bfloat16
    table = model.to(torch.bfloat16).model.rotary(20, torch.device("cpu"))
    assert table.dtype == torch.float32
    assert not torch.equal(table, table.bfloat16().float())
    assert torch.equal(table[:20, :4].bfloat16(), cos[0, :, :4])


def test_a_cast_does_not_round_the_angles():
    """At the 8B model's theta and head size, position 1,000: theirs is off by 0.75 rad, ours by nothing."""
    config = tiny_config(num_attention_heads=1, hidden_size=64, max_position_embeddings=1001)
    theirs, ours = hf_model(config).model.rotary_emb, PersimmonForCausalLM(config)
    exact = theirs.inv_freq.clone()
    error = 1000 * (theirs.to(torch.bfloat16).inv_freq.float() - exact).abs().max()
    assert float(error) == pytest.approx(0.75, abs=0.01)
    before = ours.model.rotary(1001, torch.device("cpu")).clone()
    ours = ours.to(torch.bfloat16)
    ours.model.rotary._key = None  # make it again
    assert torch.equal(ours.model.rotary(1001, torch.device("cpu")), before)
    assert torch.equal(before[1000], torch.cat([(1000 * exact).cos(), (1000 * exact).sin()]))


def test_projection_is_packed_per_head(model):
    """[heads, 3, head_dim]: neither all queries first nor head_dim outermost."""
    linear = model.model.layers[0].self_attn.query_key_value
    linear.weight.zero_()
    linear.bias.copy_(torch.arange(144.0))
    _, v = cached(model)
    starts = torch.tensor([32.0, 80.0, 128.0])  # head h: rows 48 h + 2 * 16 and on
    assert torch.equal(v[0], starts[:, None] + torch.arange(16.0))


def test_values_see_neither_layer_norm_nor_rotary(model):
    layer = model.model.layers[0]
    x = layer.input_layernorm(model.model.embed_tokens(IDS[0]))
    expected = layer.self_attn.query_key_value(x).view(20, 3, 3, 16)[:, :, 2]
    assert max_error(cached(model)[1], expected) < 1e-5


def test_layer_norm_comes_before_rotary(model):
    layer = model.model.layers[0]
    norm = layer.self_attn.k_layernorm
    x = layer.input_layernorm(model.model.embed_tokens(IDS[0]))
    k = layer.self_attn.query_key_value(x).view(20, 3, 3, 16)[:, :, 1]
    cos, sin = model.model.rotary(20, x.device)[:20, None].chunk(2, -1)

    def rotate(t: torch.Tensor) -> torch.Tensor:
        a, b = t[..., :4], t[..., 4:8]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, t[..., 8:]], -1)

    def normalise(t: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(t, (16,), norm.weight, norm.bias, 1e-5)

    assert max_error(cached(model)[0], rotate(normalise(k))) < 1e-5
    assert max_error(cached(model)[0], normalise(rotate(k))) > 1e-2


def rotated(x: torch.Tensor, position: int, rotary_dim: int = 32) -> torch.Tensor:
    """x [head_dim] at a position of the 8B model, by the op."""
    table = rope_cos_sin(PersimmonConfig(partial_rotary_factor=rotary_dim / 64), 32)
    q = x.view(1, 1, -1)
    return ops.qk_norm_rope(q, q, None, None, None, None, table, torch.tensor([position]))[0].flatten()


@pytest.mark.parametrize("i", [0, 3, 15])
def test_rotary_pairs_halves_not_neighbours(i):
    angle = 7 * 25000 ** (-2 * i / 32)
    expected = torch.zeros(64)
    expected[i], expected[i + 16] = math.cos(angle), math.sin(angle)
    assert max_error(rotated(torch.eye(64)[i], 7), expected) < 1e-6
    expected[i], expected[i + 16] = -math.sin(angle), math.cos(angle)
    assert max_error(rotated(torch.eye(64)[i + 16], 7), expected) < 1e-6


def test_the_rest_of_a_head_is_not_rotated():
    x = randn(64)
    assert torch.equal(rotated(x, 7)[32:], x[32:])
    assert max_error(rotated(x, 7)[:32], x[:32]) > 0.1
    assert max_error(rotated(x, 7, rotary_dim=64)[32:], x[32:]) > 0.1


def test_softmax_scale_is_that_of_head_dim():
    q, k, v = (randn(1, 9, 2, 64, seed=seed) for seed in range(3))
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=0.125).transpose(1, 2)
    assert max_error(ops.flash_attention(q, k, v)[0], expected) < 1e-5


def test_scores_past_the_range_of_float16():
    """q k^T / 8 = 180,000 for the first key and less for the others: its value alone counts."""
    k = torch.full((1, 4, 1, 64), 150.0, dtype=torch.float16)
    k[:, 1:] = 149
    q, v = torch.full_like(k, 150.0), randn(1, 4, 1, 64, dtype=torch.float16)
    assert torch.equal(ops.flash_attention(q, k, v)[0], v[:, :1].expand_as(v))


@pytest.mark.parametrize("pre_activation", [255.75, 256.0, 4000.0])
def test_squares_past_255_94_in_float16(pre_activation):
    assert bool(torch.tensor(255.75).half().square().isfinite())
    assert bool(torch.tensor(256.0).half().square().isinf())
    up, down = torch.full((8, 8), pre_activation).half(), torch.full((8, 8), 2.0**-13).half()
    x = torch.eye(8).half()[:1]
    out = ops.squared_relu_mlp(x, up, None, ops.to_neuron_major(down), None)
    expected = 8 * pre_activation**2 * 2**-13
    assert max_error(out, torch.full_like(out, expected)) <= 2**-10 * expected


def test_hidden_dropout_is_for_training(model):
    dropping = PersimmonForCausalLM(tiny_config(hidden_dropout=0.5)).eval()
    dropping.load_state_dict(model.state_dict())
    assert torch.equal(dropping(IDS).logits, model(IDS).logits)
    torch.manual_seed(0)
    assert max_error(dropping.train()(IDS).logits, model(IDS).logits) > 1e-3


def test_loss_is_fp32_in_a_bfloat16_model(model):
    output = model.to(torch.bfloat16)(IDS, labels=IDS)
    assert (output.logits.dtype, output.loss.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(output.loss, F.cross_entropy(output.logits[0, :-1].float(), IDS[0, 1:]))


# ---- config.json ----


def test_theta_10000_is_nobodys_choice():
    """A circle of 16,384 positions needs theta >= 10,431, by the check in Adept's code."""
    least = math.ceil(2 * 16384 / math.pi)
    assert least == 10431
    data = {key: value for key, value in PersimmonConfig().to_dict().items() if not key.startswith("rope")}
    with pytest.warns(UserWarning, match=r"taking 25000, .*transformers 5 silently takes 10000"):
        ours = PersimmonConfig.from_dict(data)
    assert ours.rope_theta == 25000 > least
    theirs = transformers.PersimmonConfig.from_dict(data)
    if transformers.__version__.startswith("5"):
        assert theirs.rope_parameters["rope_theta"] == 10000 < least
    else:
        assert theirs.rope_theta == 25000


def test_released_files_begin_and_end_with_71013():
    released = {"model_type": "persimmon", "bos_token_id": 71013, "eos_token_id": 71013, "rope_theta": 25000.0}
    config = PersimmonConfig.from_dict(released)
    assert (config.bos_token_id, config.eos_token_ids) == (71013, (71013,))
    assert GenerationConfig.from_model_config(config).eos_token_id == 71013
    assert (PersimmonConfig().bos_token_id, PersimmonConfig().eos_token_ids) == (1, (2,))


# ---- tokenizer ----


def test_files_that_name_a_tokenizer_of_transformers(tmp_path):
    """The docs of transformers name a class that it does not have."""
    assert not hasattr(transformers, "PersimmonTokenizer")
    (tmp_path / "tokenizer.model").symlink_to(SMALL_MODEL / "tokenizer.model")
    expected = PersimmonTokenizer.from_pretrained(SMALL_MODEL).encode("import os")
    for name in ("PersimmonTokenizer", "LlamaTokenizer", "LlamaTokenizerFast"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        assert PersimmonTokenizer.from_pretrained(tmp_path).encode("import os") == expected


def test_bos_is_prepended_unless_refused():
    tokenizer = PersimmonTokenizer.from_pretrained(SMALL_MODEL)
    bare = tokenizer.encode("import os", add_bos=False)  # as Adept's server
    assert bare == tokenizer.sp.encode("import os")
    assert tokenizer.encode("import os") == [tokenizer.bos_token_id, *bare]
