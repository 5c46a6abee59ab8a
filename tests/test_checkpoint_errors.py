"""Checkpoints that must not load: every refusal by its message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import (
    DOWN,
    EMBEDDING,
    FORMATS,
    HEAD,
    NORM,
    TINY,
    assert_same_bits,
    random_tensors,
    read_raw,
    write_checkpoint,
    write_raw,
)

import persimmon_fast.checkpoint_save
from persimmon_fast.checkpoint import (
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    NonFiniteWeightError,
    load_checkpoint,
)
from persimmon_fast.config import PersimmonConfig

# ---- refusals: folders and files ----


def refused(folder: Path, kind: type[CheckpointError], pattern: str, config: PersimmonConfig = TINY) -> CheckpointError:
    with pytest.raises(kind, match=pattern) as caught:
        load_checkpoint(folder, config)
    error = caught.value
    assert str(error).startswith(f"{error.file}: {error.key}: expected {error.expected}, found {error.found}")
    assert str(folder) in error.file
    return error


def test_folders_without_a_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "none", CheckpointNotFoundError, "expected a checkpoint folder, found nothing there$")
    with pytest.raises(CheckpointNotFoundError, match=r"run `hf download adept/persimmon-8b-chat --local-dir"):
        load_checkpoint("adept/persimmon-8b-chat", TINY)
    refused(tmp_path, CheckpointNotFoundError, "weights: expected model.safetensors, .* found an empty folder")
    (tmp_path / "README.md").write_text("x")
    refused(tmp_path, CheckpointNotFoundError, r"found README.md$")
    refused(tmp_path / "README.md", CheckpointNotFoundError, "found a file. Give its folder")
    (tmp_path / "iter_0375000").mkdir()
    refused(tmp_path, CheckpointNotFoundError, "This is Adept's original release")
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, CheckpointFileError, "model.safetensors: file: expected a regular file, found a folder")
    (tmp_path / "model.safetensors").rmdir()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    refused(tmp_path, CheckpointNotFoundError, "found a broken link")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_git_lfs_pointers(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(tmp_path, CheckpointFileError, rf"{re.escape(name)}: file: .* found a Git LFS pointer.* `git lfs pull`")


def test_safetensors_come_before_bin_and_two_of_a_kind_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    write_checkpoint(tmp_path, TINY, tensors)
    write_checkpoint(tmp_path, TINY, random_tensors(TINY, seed=1), "bin")
    assert_same_bits(load_checkpoint(tmp_path, TINY), tensors)
    write_checkpoint(tmp_path, TINY, tensors, "safetensors_shards")
    refused(tmp_path, CheckpointFileError, "model.safetensors beside an index. Delete the stale one")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1, "half"])
@pytest.mark.parametrize("form", FORMATS)
def test_truncated_files(form: str, keep: int | str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, random_tensors(TINY), form)
    path = max((p for p in tmp_path.iterdir() if p.suffix in (".bin", ".safetensors")), key=lambda p: p.name)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if keep == "half" else keep])
    refused(tmp_path, CheckpointFileError, rf"^{re.escape(str(path))}: .*(truncated or damaged)")


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BAD_HEADERS: dict[str, tuple[Any, bytes, int | None, str]] = {
    "longer_than_file": ({}, b"", 1000, "header"),
    "longer_than_memory": ({}, b"", 2**63, "too large"),
    "not_json": (b"{hello", b"", None, "JSON"),
    "not_utf8": (b"{\xff}", b"", None, "UTF-8"),
    "list": (b"[]", b"", None, "JSON"),
    "deep": (b'{"a":' * 5000 + b"1" + b"}" * 5000, b"", None, "recursion"),
    "overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12), None, "offset"),
    "hole": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, bytes(20), None, "offset"),
    "out_of_range": ({"a": entry("F32", [2], 0, 8)}, bytes(4), None, "not fully covered"),
    "trailing_bytes": ({"a": entry("F32", [2], 0, 8)}, bytes(9), None, "not fully covered"),
    "size_is_not_shape": ({"a": entry("F32", [3], 0, 8)}, bytes(8), None, ""),
    "overflowing_shape": ({"a": entry("F32", [2**40, 2**40], 0, 8)}, bytes(8), None, "overflow"),
    "negative_shape": ({"a": entry("F32", [-2], 0, 8)}, bytes(8), None, "-2"),
    "unknown_dtype": ({"a": entry("F99", [2], 0, 8)}, bytes(8), None, "F99"),
    "name_twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
        None,
        "'a' 2 times",
    ),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_safetensors_headers(name: str, tmp_path: Path) -> None:
    header, body, length, message = BAD_HEADERS[name]
    write_raw(tmp_path / "model.safetensors", header, body, length)
    refused(tmp_path, CheckpointFileError, f"model.safetensors: header: expected a whole safetensors.*{message}")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "model.safetensors") -> None:
    path = folder / f"{name}.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


SHARD = "model-00002-of-00003.safetensors"
BAD_INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], type[CheckpointError], str]] = {
    **{
        f"points_to_{value!r}": (
            lambda index, value=value: index["weight_map"].update({HEAD: value}),
            CheckpointFileError,
            r"weight_map\[lm_head.weight\]: expected the name of a \*.safetensors file in the same folder, found",
        )
        for value in ("../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "", ".", "x.bin", 3, None, ["x"])
    },
    "missing_shard": (
        lambda index: index["weight_map"].update({HEAD: "model-00004-of-00004.safetensors"}),
        CheckpointNotFoundError,
        "weight_map: expected 4 shards in the folder, found 1 missing: model-00004-of-00004.safetensors",
    ),
    "wrong_shard": (
        lambda index: index["weight_map"].update({HEAD: SHARD}),
        CheckpointFileError,
        "lm_head.weight: expected model.safetensors.index.json to name this shard, found model-00002-of-00003",
    ),
    "name_left_out": (
        lambda index: index["weight_map"].pop(HEAD),
        CheckpointFileError,
        "lm_head.weight: expected model.safetensors.index.json to name this shard, found no such name there",
    ),
    "name_added": (
        lambda index: index["weight_map"].update({"x": SHARD}),
        CheckpointFileError,
        f"x: expected the tensor in {SHARD}, found no such tensor there",
    ),
    "empty": (lambda index: index.update(weight_map={}), CheckpointFileError, "weight_map: expected a mapping"),
    "list": (lambda index: index.update(weight_map=[1]), CheckpointFileError, "weight_map: expected a mapping"),
    "none": (lambda index: index.pop("weight_map"), CheckpointFileError, "weight_map: expected a mapping.*found none"),
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_indexes(name: str, tmp_path: Path) -> None:
    change, kind, message = BAD_INDEXES[name]
    write_checkpoint(tmp_path, TINY, random_tensors(TINY), "safetensors_shards")
    edit_index(tmp_path, change)
    refused(tmp_path, kind, message)


def test_shards_without_index_and_tensors_in_two_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, random_tensors(TINY), "safetensors_shards")
    shard, body = read_raw(tmp_path / SHARD)
    last = tmp_path / "model-00003-of-00003.safetensors"
    header, _ = read_raw(last)
    write_raw(last, shard, body)
    edit_index(tmp_path, lambda index: [index["weight_map"].pop(name) for name in header if name != "__metadata__"])
    edit_index(tmp_path, lambda index: index["weight_map"].update({EMBEDDING: last.name}))
    refused(
        tmp_path, CheckpointFileError, f"{last.name}: .*: expected each tensor in one shard, found it in {SHARD} too"
    )
    (tmp_path / "model.safetensors.index.json").write_text("{")
    refused(tmp_path, CheckpointFileError, "index.json: file: expected JSON, found garbage")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(
        tmp_path, CheckpointNotFoundError, "expected the index of 3 shards such as model-00001-of-00003.safetensors"
    )


# ---- refusals: tensors ----


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def prefixed(prefix: str, instead_of: str = "") -> Callable[[dict[str, Any]], Any]:
    def change(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix(instead_of)] = tensors.pop(name)

    return change


BAD_NAMES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda t: t.pop(NORM), rf"expected the 36 of a Persimmon with 2 layers, found 1 missing \({NORM}\)"),
    "unexpected": (lambda t: t.update(x=t[NORM].clone()), r"found 1 unexpected \(x\)"),
    "renamed": (renamed(NORM, NORM.replace("norm", "nrom")), rf"1 unexpected \(.*nrom.bias, meant to be {NORM}\?\)"),
    "many": (lambda t: [t.pop(n) for n in list(t)[:9]], r"9 missing \(([^,]*, ){4}[^,]* and 4 more\)"),
    "control_characters": (lambda t: t.update({"a\x1b[31m\n": t[NORM].clone()}), r"1 unexpected \('a\\x1b\[31m\\n'\)"),
    "long": (lambda t: t.update({"a" * 10_000: t[NORM].clone()}), r"1 unexpected \('a{79}\)"),
    "ddp": (prefixed("module."), r"36 names start with 'module.' where .*: DistributedDataParallel adds it"),
    "compiled": (prefixed("_orig_mod."), r"'_orig_mod.' .*torch.compile adds it"),
    "fuyu_v4": (prefixed("language_model."), r"'language_model.' .*Fuyu puts its Persimmon there"),
    "fuyu_v5": (
        prefixed("model.language_model.", "model."),
        r"'model.language_model.' .*Fuyu puts its Persimmon there",
    ),
    "transformer": (prefixed("transformer.", "model."), r"'transformer.' .*rename the tensors"),
    "headless": (lambda t: (t.pop(HEAD), prefixed("", "model.")(t)), r"the model without its head was saved"),
    "adept": (
        lambda t: t.update({"language_model.encoder.layers.0.self_attention.dense.weight": t.pop(NORM)}),
        "These are Adept's original names",
    ),
    "more_layers": (
        lambda t: t.update({"model.layers.39.mlp.dense_4h_to_h.bias": t[NORM].clone()}),
        "num_hidden_layers is 2, the weights go up to layer 39",
    ),
    "no_qk_layernorm": (
        lambda t: [t.pop(name) for name in list(t) if "q_layernorm" in name or "k_layernorm" in name],
        "Is qk_layernorm false for this model",
    ),
    "tied": (lambda t: t.pop(HEAD), "set tie_word_embeddings to true in config.json"),
}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("name", BAD_NAMES)
def test_tensor_names(name: str, form: str, tmp_path: Path) -> None:
    change, message = BAD_NAMES[name]
    tensors = random_tensors(TINY)
    change(tensors)
    write_checkpoint(tmp_path, TINY, tensors, form)
    refused(tmp_path, CheckpointMismatchError, message)


def test_unwanted_qk_layernorm(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, random_tensors(TINY))
    config = TINY.replace(qk_layernorm=False)
    refused(tmp_path, CheckpointMismatchError, "config.json says that qk_layernorm is false", config)


@pytest.mark.parametrize("form", FORMATS)
def test_shapes(form: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, random_tensors(TINY), form)
    message = r"embed_tokens.weight: expected shape \[62, 32\], found \[61, 32\] \(and 1 more tensors\)"
    refused(tmp_path, CheckpointMismatchError, message, TINY.replace(vocab_size=62))
    tensors = random_tensors(TINY)
    tensors[DOWN] = tensors[DOWN].t().contiguous()
    write_checkpoint(tmp_path, TINY, tensors, form)
    refused(tmp_path, CheckpointMismatchError, rf"{DOWN}: expected shape \[32, 48\], found \[48, 32\]")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64])
def test_dtypes_in_files(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    tensors[NORM] = tensors[NORM].to(dtype)
    write_checkpoint(tmp_path, TINY, tensors, form)
    refused(tmp_path, CheckpointMismatchError, rf"{NORM}: expected dtype float32, float16 or bfloat16, found")


def test_float8_in_files(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    tensors[NORM] = tensors[NORM].to(torch.float8_e4m3fn)
    write_checkpoint(tmp_path / "a", TINY, tensors)
    refused(tmp_path / "a", CheckpointMismatchError, "expected dtype float32, float16 or bfloat16, found F8_E4M3")
    write_checkpoint(tmp_path / "b", TINY, tensors, "bin")
    refused(tmp_path / "b", CheckpointFileError, "a pickle of tensors alone, found one that asks for torch._utils._reb")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", [EMBEDDING, DOWN, NORM])
def test_check_finite(name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persimmon_fast.checkpoint, "_FINITE_CHUNK", 100)  # several blocks, the last one ragged
    tensors = random_tensors(TINY)
    write_checkpoint(tmp_path, TINY, tensors, form)
    load_checkpoint(tmp_path, TINY, check_finite=True)
    flat = tensors[name].view(-1)
    middle = flat.numel() // 2 + 1  # not in the first block
    flat[-2], flat[-1], flat[middle] = float("inf"), float("-inf"), float("nan")
    write_checkpoint(tmp_path, TINY, tensors, form)
    load_checkpoint(tmp_path, TINY)
    first = [int(i) for i in torch.unravel_index(torch.tensor(middle), tensors[name].shape)]
    message = f"{name}: expected finite weights, found 3 of {flat.numel()} NaN or infinite, the first at {first}: nan"
    with pytest.raises(NonFiniteWeightError, match=re.escape(message)):
        load_checkpoint(tmp_path, TINY, check_finite=True)


def test_check_finite_sees_overflow_of_conversion(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    tensors[NORM][5] = 70_000
    write_checkpoint(tmp_path, TINY, tensors)
    load_checkpoint(tmp_path, TINY, dtype=torch.bfloat16, check_finite=True)
    with pytest.raises(
        NonFiniteWeightError, match=r"the first at \[5\]: inf. They are stored as torch.float32, read as"
    ):
        load_checkpoint(tmp_path, TINY, dtype=torch.float16, check_finite=True)
