"""Adept's checkpoints to the Hugging Face layout and back. The tests' names say what a release holds and what must
not go wrong; `adept_helpers` writes the files with torch.save alone."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adept_helpers
import pytest
import torch
from adept_helpers import ITERATION, SMALL, contents, tar_of, write_adept, write_ranks
from checkpoint_helpers import assert_same_bits, file_bytes, random_tensors
from cli_helpers import run
from torch import Tensor

from persimmon_fast import PersimmonForCausalLM, PersimmonTokenizer, adept
from persimmon_fast.adept import source
from persimmon_fast.checkpoint import (
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    load_checkpoint,
    save_checkpoint,
)
from persimmon_fast.config import PersimmonConfig
from persimmon_fast.config_file import ConfigError
from persimmon_fast.generation_config import GenerationConfig

RANK_0 = f"iter_{ITERATION:07}/mp_rank_00/model_optim_rng.pt"
pytestmark = pytest.mark.filterwarnings("ignore:.*no sentencepiece model")


@pytest.fixture(scope="module")
def vocabulary() -> bytes:
    return adept_helpers.sentencepiece_model(("x1", "|ENDOFTEXT|"))


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in content.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def convert(path: Path, target: Path, **options: Any) -> dict[str, Tensor]:
    """The tensors of the converted folder."""
    done = adept.to_hugging_face(path, target, **options)
    return load_checkpoint(target, PersimmonConfig.from_pretrained(target), dtype=None) if done else {}


# ---- there and back ----


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_merging_the_ranks_gives_the_model_that_was_split(num_ranks: int, form: str, tmp_path: Path) -> None:
    expected = write_adept(tmp_path / "a", num_ranks=num_ranks, form=form)
    assert_same_bits(convert(tmp_path / "a", tmp_path / "b", max_shard_size="100KB"), expected)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_adept_hf_ours_hf_adept_is_bit_equal(num_ranks: int, vocabulary: bytes, tmp_path: Path) -> None:
    write_adept(tmp_path / "adept", num_ranks=num_ranks, tokenizer=vocabulary)
    adept.to_hugging_face(tmp_path / "adept", tmp_path / "hf")
    model = PersimmonForCausalLM.from_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "ours")
    PersimmonTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "ours")
    for name in ("hf", "ours"):
        adept.to_adept(tmp_path / name, tmp_path / f"back_{name}", num_ranks=num_ranks)
    assert file_tree(tmp_path / "back_hf") == file_tree(tmp_path / "back_ours")
    back = tmp_path / "back_ours"
    assert (back / "adept_vocab.model").read_bytes() == vocabulary
    assert (back / "latest_checkpointed_iteration.txt").read_text() == str(ITERATION)
    for rank in range(num_ranks):
        file = f"iter_{ITERATION:07}/mp_rank_{rank:02}/model_optim_rng.pt"
        before, after = (torch.load(tmp_path / f / file, weights_only=False) for f in ("adept", "back_ours"))
        assert_same_bits(flat(after["model"]), flat(before["model"]))
        assert after["iteration"] == before["iteration"]
        stated = {key: value for key, value in vars(before["args"]).items() if hasattr(after["args"], key)}
        assert stated.items() <= vars(after["args"]).items()
        assert len(stated) == 21
        assert after["args"].bias_gelu_fusion is False  # Adept's MLP looks at it before sq_relu


def file_tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_written_pickle_is_nested_as_adepts(tmp_path: Path) -> None:
    """language_model.encoder is one flat state dict, embedding and head hold dicts: the dicts of `before`."""
    write_adept(tmp_path / "a")
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    adept.to_adept(tmp_path / "b", tmp_path / "c")
    before, after = (torch.load(tmp_path / f / RANK_0, weights_only=False)["model"] for f in "ac")

    def shape(value: Any) -> Any:
        return {key: shape(item) for key, item in value.items()} if isinstance(value, dict) else type(value)

    assert shape(before) == shape(after)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_is_written_for_adept(mmap: bool, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", SMALL, random_tensors(SMALL, torch.bfloat16))
    adept.to_adept(tmp_path / "a", tmp_path / "b")
    loaded = torch.load(tmp_path / "b" / f"iter_{1:07}/mp_rank_00/model_optim_rng.pt", mmap=mmap, weights_only=False)
    tensors = flat(loaded["model"])
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())
    expected = random_tensors(SMALL, torch.bfloat16)["model.layers.1.mlp.dense_4h_to_h.weight"]
    assert torch.equal(tensors["language_model.encoder.layers.1.mlp.dense_4h_to_h.weight"], expected)


@pytest.mark.parametrize("dtypes", [("bfloat16",), ("float32",), ("float16", "bfloat16", "float32")])
def test_the_files_are_those_of_save_checkpoint(dtypes: tuple[str, ...], tmp_path: Path) -> None:
    tensors = random_tensors(SMALL, torch.bfloat16)
    tensors = {name: t.to(getattr(torch, dtypes[i % len(dtypes)])) for i, (name, t) in enumerate(tensors.items())}
    write_ranks(tmp_path / "a", contents(SMALL, tensors))
    done = adept.to_hugging_face(tmp_path / "a", tmp_path / "b", max_shard_size="100KB")
    save_checkpoint(tmp_path / "c", done.config, tensors, max_shard_size="100KB")
    written, expected = file_bytes(tmp_path / "b"), file_bytes(tmp_path / "c")
    assert len(expected) > 4
    assert expected.items() <= written.items()
    assert written.keys() - expected.keys() == {"generation_config.json"}


def test_transformers_runs_the_converted_model(vocabulary: bytes, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_adept(tmp_path / "a", tokenizer=vocabulary)
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    theirs = transformers.PersimmonForCausalLM.from_pretrained(tmp_path / "b")
    ours = PersimmonForCausalLM.from_pretrained(tmp_path / "b")
    assert theirs.config.rope_parameters["rope_theta"] == 25000
    assert theirs.generation_config.eos_token_id == ours.generation_config.eos_token_id == 4
    assert_same_bits(dict(ours.state_dict()), {k: v for k, v in theirs.state_dict().items() if "rotary" not in k})


def test_tied_embeddings_have_no_head_on_either_side(tmp_path: Path) -> None:
    config = SMALL.replace(tie_word_embeddings=True)
    expected = write_adept(tmp_path / "a", config)
    assert_same_bits(convert(tmp_path / "a", tmp_path / "b"), expected)
    assert PersimmonConfig.from_pretrained(tmp_path / "b").tie_word_embeddings
    adept.to_adept(tmp_path / "b", tmp_path / "c")
    assert list(torch.load(tmp_path / "c" / RANK_0, weights_only=False)["model"]) == ["language_model"]


def test_a_model_without_qk_layernorm(tmp_path: Path) -> None:
    expected = write_adept(tmp_path / "a", SMALL.replace(qk_layernorm=False), num_ranks=2)
    assert_same_bits(convert(tmp_path / "a", tmp_path / "b"), expected)
    assert not PersimmonConfig.from_pretrained(tmp_path / "b").qk_layernorm
    adept.to_adept(tmp_path / "b", tmp_path / "c")
    assert torch.load(tmp_path / "c" / RANK_0, weights_only=False)["args"].qk_layernorm == "none"


def test_conversion_is_renaming_alone_no_permutation_of_qkv(tmp_path: Path) -> None:
    """Row r of query_key_value (head, then q, k, v) stays row r, also across ranks."""
    tensors = random_tensors(SMALL, torch.bfloat16)
    name = "model.layers.0.self_attn.query_key_value.bias"
    tensors[name] = torch.arange(3 * SMALL.hidden_size).bfloat16()
    write_ranks(tmp_path / "a", contents(SMALL, tensors, num_ranks=4))
    assert torch.equal(convert(tmp_path / "a", tmp_path / "b")[name], tensors[name])


# ---- where the files are ----


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_tar_is_read_in_place(num_ranks: int, form: str, vocabulary: bytes, tmp_path: Path) -> None:
    expected = write_adept(tmp_path / "a", num_ranks=num_ranks, form=form, tokenizer=vocabulary)
    tar, md5 = tar_of(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    assert_same_bits(convert(tar, tmp_path / "b", md5=md5.upper()), expected)
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == vocabulary
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b"]


@pytest.mark.parametrize("below", ["", f"iter_{ITERATION:07}", f"iter_{ITERATION:07}/mp_rank_00", RANK_0, ".."])
def test_any_folder_of_a_release_or_its_file_will_do(below: str, vocabulary: bytes, tmp_path: Path) -> None:
    expected = write_adept(tmp_path / "release" / "a", tokenizer=vocabulary)
    assert_same_bits(convert(tmp_path / "release" / "a" / below, tmp_path / "b"), expected)
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == vocabulary


def test_a_file_of_any_name_beside_its_vocabulary_will_do(vocabulary: bytes, tmp_path: Path) -> None:
    expected = write_adept(tmp_path / "a")
    (tmp_path / "a" / RANK_0).rename(tmp_path / "persimmon.pt")
    (tmp_path / "tokenizer.model").write_bytes(vocabulary)
    assert_same_bits(convert(tmp_path / "persimmon.pt", tmp_path / "b"), expected)
    assert PersimmonConfig.from_pretrained(tmp_path / "b").extra == {"adept_iteration": ITERATION}
    assert (tmp_path / "b" / "tokenizer.model").is_file()


def test_the_tracker_chooses_among_iterations(tmp_path: Path) -> None:
    write_adept(tmp_path / "a")
    other = tmp_path / "a" / "iter_0000100" / "mp_rank_00"
    other.mkdir(parents=True)
    shutil.copy(tmp_path / "a" / RANK_0, other)
    (tmp_path / "a" / "latest_checkpointed_iteration.txt").write_text("100\n")
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    assert PersimmonConfig.from_pretrained(tmp_path / "b").extra == {"adept_iteration": 100}
    (tmp_path / "a" / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(CheckpointFileError, match="expected one of the iterations 0000100, 0375000, found 'release'"):
        adept.to_hugging_face(tmp_path / "a", tmp_path / "c")


def refused(path: Path, kind: type[Exception], match: str, **options: Any) -> None:
    target = path.parent / "refused"
    with pytest.raises(kind, match=match):
        adept.to_hugging_face(path, target, **options)
    assert not target.exists()
    assert not list(path.parent.glob(".refused*"))


def test_a_release_is_checked_against_its_published_md5(tmp_path: Path) -> None:
    """The sums of Adept's README; a tar under a published name that is another file is refused, whatever it holds."""
    assert source.PUBLISHED_MD5 == {
        "8b_base_model_release.tar": "cd0320cba9efad9ccd18e9ec4d16ae1b",
        "8b_chat_model_release.tar": "663aeace07269c44e90f4e8bcd07f32a",
    }
    for name, md5 in source.PUBLISHED_MD5.items():
        write_adept(tmp_path / name.removesuffix(".tar"))
        tar, found = tar_of(tmp_path / name.removesuffix(".tar"))
        refused(tar, CheckpointFileError, f"{name}: MD5: expected {md5}, found {found}. The download is incomplete")
        assert adept.to_hugging_face(tar, tmp_path / f"hf_{name}", md5=found).num_ranks == 1
    refused(tmp_path / "8b_base_model_release", CheckpointFileError, "expected a file, found a folder", md5="0" * 32)


def test_what_is_no_checkpoint_of_adepts(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", CheckpointNotFoundError, "expected Adept's release tar .* found nothing there")
    (tmp_path / "empty").mkdir()
    refused(
        tmp_path / "empty", CheckpointNotFoundError, r"expected iter_\*/mp_rank_\*/model_optim_rng.pt .* found no file"
    )
    save_checkpoint(tmp_path / "hf", SMALL, random_tensors(SMALL))
    refused(tmp_path / "hf", CheckpointNotFoundError, "This is a Hugging Face folder: --to adept converts it")
    (tmp_path / "text").write_text("hello")
    refused(tmp_path / "text", CheckpointFileError, "expected a tar, found")
    write_adept(tmp_path / "a")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a", "a")
    refused(tmp_path / "a.tar.gz", CheckpointFileError, "expected a tar, .* must be decompressed first")


def test_a_truncated_tar(tmp_path: Path) -> None:
    write_adept(tmp_path / "a")
    tar, _ = tar_of(tmp_path / "a")
    tar.write_bytes(tar.read_bytes()[:100_000])
    refused(tar, CheckpointFileError, "expected the whole file in the tar, found 100,000 bytes, .* too few")


def test_a_tar_that_holds_a_file_twice(tmp_path: Path) -> None:
    """tar would take the last."""
    write_adept(tmp_path / "a")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a", "a")
        archive.add(tmp_path / "a" / RANK_0, f"./a/{RANK_0}")
    refused(tmp_path / "a.tar", CheckpointFileError, f"{RANK_0}: expected each file once and whole, found two")


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    write_adept(tmp_path / "a")
    (tmp_path / "b").mkdir()
    os.symlink(tmp_path / "a" / f"iter_{ITERATION:07}", tmp_path / "b" / f"iter_{ITERATION:07}")
    tar, _ = tar_of(tmp_path / "b")
    refused(tar, CheckpointNotFoundError, "model files: expected iter_")


def test_a_rank_is_missing(tmp_path: Path) -> None:
    write_adept(tmp_path / "a", num_ranks=4)
    shutil.rmtree(tmp_path / "a" / f"iter_{ITERATION:07}" / "mp_rank_03")
    refused(
        tmp_path / "a",
        CheckpointMismatchError,
        "args.tensor_model_parallel_size: expected 3, found 4. Are all mp_rank_",
    )
    shutil.rmtree(tmp_path / "a" / f"iter_{ITERATION:07}" / "mp_rank_01")
    refused(tmp_path / "a", CheckpointNotFoundError, "mp_rank_01: expected 3 ranks, found 2 of them")


def test_pipeline_parallel_stages_are_refused(tmp_path: Path) -> None:
    write_adept(tmp_path / "a")
    (tmp_path / "a" / f"iter_{ITERATION:07}" / "mp_rank_00").rename(
        tmp_path / "a" / f"iter_{ITERATION:07}/mp_rank_00_000"
    )
    refused(tmp_path / "a", CheckpointFileError, "found a pipeline parallel stage. Merge the pipeline stages")


# ---- the tokenizer and the ids ----


def test_the_stop_id_is_endoftext_not_sentencepieces_or_the_class_default(vocabulary: bytes, tmp_path: Path) -> None:
    """HF's class says bos 1, eos 2; the models were trained with |ENDOFTEXT| (71013 in the release, 4 here)."""
    write_adept(tmp_path / "a", tokenizer=vocabulary)
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    config = PersimmonConfig.from_pretrained(tmp_path / "b")
    assert (config.bos_token_id, config.eos_token_id) == (4, 4)
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {"bos_token_id": 4, "eos_token_id": 4}
    assert GenerationConfig.from_pretrained(tmp_path / "b", config).eos_token_ids == (4,)
    tokenizer = PersimmonTokenizer.from_pretrained(tmp_path / "b")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (4, 4, 128)
    assert tokenizer.convert_ids_to_tokens(4) == "|ENDOFTEXT|"


def test_the_dummy_prefix_of_sentencepiece_survives(vocabulary: bytes, tmp_path: Path) -> None:
    """The model file is copied, so ids are sentencepiece's own, with the leading space mark."""
    write_adept(tmp_path / "a", tokenizer=vocabulary)
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == vocabulary
    tokenizer = PersimmonTokenizer.from_pretrained(tmp_path / "b")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("fruit", add_bos=False))[0].startswith("\u2581")


def test_transformers_makes_the_same_ids_of_the_result(vocabulary: bytes, tmp_path: Path) -> None:
    """Of `tokenizer.model` alone, AutoTokenizer of transformers 5 drops BOS and the dummy prefix."""
    from transformers import AutoTokenizer

    write_adept(tmp_path / "a", tokenizer=vocabulary)
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "b"), PersimmonTokenizer.from_pretrained(tmp_path / "b")
    for text in ("fruit", " two  spaces", "human: fruit\n\nadept:", ""):
        assert theirs(text).input_ids == ours.encode(text), text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (4, 4)


def test_bos_is_prepended_as_in_transformers_not_as_in_adepts_code(vocabulary: bytes, tmp_path: Path) -> None:
    write_adept(tmp_path / "a", tokenizer=vocabulary)
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    tokenizer = PersimmonTokenizer.from_pretrained(tmp_path / "b")
    assert tokenizer.encode("fruit") == [4, *tokenizer.encode("fruit", add_bos=False)]


def test_without_the_piece_the_end_is_sentencepieces_own(tmp_path: Path) -> None:
    """As in Adept's tokenizer."""
    write_adept(tmp_path / "a", tokenizer=adept_helpers.sentencepiece_model(()))
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    config = PersimmonConfig.from_pretrained(tmp_path / "b")
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


@pytest.mark.filterwarnings("default:.*no sentencepiece model")
def test_without_a_tokenizer_a_warning_says_what_ends_a_text(tmp_path: Path) -> None:
    write_adept(tmp_path / "a")
    with pytest.warns(UserWarning, match="no token ends a text: set eos_token_id in config.json"):
        adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    assert PersimmonConfig.from_pretrained(tmp_path / "b").eos_token_id is None
    release = SMALL.replace(vocab_size=262144, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    write_adept(tmp_path / "c", release)
    with pytest.warns(UserWarning, match=r"texts end with \|ENDOFTEXT\| = 71013, as in the release"):
        adept.to_hugging_face(tmp_path / "c", tmp_path / "d")
    config = PersimmonConfig.from_pretrained(tmp_path / "d")
    assert (config.bos_token_id, config.eos_token_id) == (71013, 71013)


def test_a_vocabulary_beyond_the_embedding_is_refused(vocabulary: bytes, tmp_path: Path) -> None:
    write_adept(tmp_path / "a", SMALL.replace(vocab_size=128), tokenizer=vocabulary)
    refused(tmp_path / "a", CheckpointMismatchError, "pieces: expected at most the 128 pieces .* found 291")


# ---- what Adept's format cannot hold, and the command ----


def test_to_adept_refuses_what_the_format_cannot_say(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", SMALL, random_tensors(SMALL))
    with pytest.raises(ConfigError, match="num_attention_heads: expected a multiple of the 3 ranks, found 4"):
        adept.to_adept(tmp_path / "a", tmp_path / "b", num_ranks=3)
    scaled = SMALL.replace(rope_scaling={"rope_type": "linear", "factor": 2.0})
    save_checkpoint(tmp_path / "c", scaled, random_tensors(scaled))
    with pytest.raises(ConfigError, match="rope_scaling: expected none, since Adept's code knows no scaling"):
        adept.to_adept(tmp_path / "c", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_command_converts_both_ways(vocabulary: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adept(tmp_path / "a", num_ranks=2, tokenizer=vocabulary)
    assert run("convert", tmp_path / "a", tmp_path / "b", "--max-shard-size", "100KB") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "257.0 kB of bfloat16, 2 layers, 2 tensor parallel ranks, theta 25,000" in " ".join(captured.err.split())
    assert "end of text 4" in captured.err
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) == 3
    assert run("convert", tmp_path / "b", tmp_path / "c", "--to", "adept", "--tensor-parallel", 2, "-q") == 0
    assert capsys.readouterr().err == ""
    assert run("convert", tmp_path / "c", tmp_path / "d", "-q", "--max-shard-size", "100KB") == 0
    assert file_bytes(tmp_path / "b") == file_bytes(tmp_path / "d")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "gguf"], "--to must be hf or adept, got 'gguf'"),
        (["--md5", "abc"], "--md5 must be 32 hexadecimal digits"),
        (["--tensor-parallel", "2"], "add --to adept"),
        (["--to", "adept", "--tensor-parallel", "0"], "must be at least 1"),
        (["--to", "adept", "--md5", "0" * 32], "--md5 is for Adept's tars"),
    ],
)
def test_wrong_options(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", tmp_path / "a", tmp_path / "b", *options) == 2
    assert message in capsys.readouterr().err


def test_a_target_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    write_adept(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("x")
    for back in (False, True):
        with pytest.raises(
            CheckpointSaveError, match="b: folder: expected a new or empty folder, found a folder with mine"
        ):
            (adept.to_adept if back else adept.to_hugging_face)(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "mine").unlink()
    adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "config.json").is_file()


def test_loading_adepts_folder_names_the_command(tmp_path: Path) -> None:
    write_adept(tmp_path / "a")
    with pytest.raises(CheckpointError, match="persimmon-fast convert"):
        load_checkpoint(tmp_path / "a", SMALL)
