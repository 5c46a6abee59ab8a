"""Saving checkpoints: all or nothing, and what happens to the files that were there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import (
    EMBEDDING,
    HEAD,
    NORM,
    TINY,
    assert_same_bits,
    file_bytes,
    random_tensors,
    write_checkpoint,
    write_sparse,
)

import persimmon_fast.checkpoint_save
from persimmon_fast.checkpoint import (
    CheckpointMismatchError,
    CheckpointSaveError,
    expected_tensors,
    load_checkpoint,
    save_checkpoint,
)

# ---- saving ----


def test_save_keeps_foreign_files_and_replaces_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    tensors = random_tensors(TINY)
    write_checkpoint(folder, TINY, tensors, "safetensors_shards")
    write_checkpoint(folder, TINY, tensors, "bin")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(CheckpointSaveError, match=r"a: config.json: expected no checkpoint .*Pass overwrite=True"):
        save_checkpoint(folder, TINY, tensors)
    save_checkpoint(folder, TINY, tensors, overwrite=True)
    assert sorted(file_bytes(folder)) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert (folder / "tokenizer.model").read_bytes() == b"pieces"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_save_beside_a_tokenizer_needs_no_overwrite(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"pieces")
    save_checkpoint(tmp_path / "a", TINY, random_tensors(TINY))
    assert sorted(file_bytes(tmp_path / "a")) == ["config.json", "model.safetensors", "tokenizer.model"]
    modes = {path.stat().st_mode for path in (tmp_path / "a").glob("[cm]*")}
    assert len(modes) == 1, "weights are readable to whom config.json is"


def test_save_refuses_folders_that_hold_more(tmp_path: Path) -> None:
    (tmp_path / "a" / "photos").mkdir(parents=True)
    with pytest.raises(
        CheckpointSaveError, match="photos: expected plain files in the folder to replace, found a subf"
    ):
        save_checkpoint(tmp_path / "a", TINY, random_tensors(TINY), overwrite=True)
    (tmp_path / "b").write_text("x")
    with pytest.raises(CheckpointSaveError, match="b: folder: expected a folder or nothing, found a file"):
        save_checkpoint(tmp_path / "b", TINY, random_tensors(TINY), overwrite=True)


def test_save_through_a_link_and_into_new_parents(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x" / "y", TINY, random_tensors(TINY))
    (tmp_path / "link").symlink_to(tmp_path / "x" / "y")
    tensors = random_tensors(TINY, seed=1)
    save_checkpoint(tmp_path / "link", TINY, tensors, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert_same_bits(load_checkpoint(tmp_path / "x" / "y", TINY), tensors)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_failed_save_leaves_everything_as_it_was(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = persimmon_fast.checkpoint_save
    if not can_exchange:
        monkeypatch.setattr(module, "_exchange", lambda a, b: False)
    tensors = random_tensors(TINY)
    save_checkpoint(tmp_path / "a", TINY, tensors, max_shard_size="20KB")
    before = file_bytes(tmp_path / "a")
    calls = []

    def full_disk(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        original(*arguments, **options)

    original = module.save_file
    monkeypatch.setattr(module, "save_file", full_disk)
    for target in ("a", "b"):
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(
                tmp_path / target, TINY, random_tensors(TINY, seed=1), max_shard_size="20KB", overwrite=True
            )
    assert file_bytes(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    monkeypatch.setattr(module, "save_file", original)
    save_checkpoint(tmp_path / "a", TINY, random_tensors(TINY, seed=1), overwrite=True)
    assert_same_bits(load_checkpoint(tmp_path / "a", TINY), random_tensors(TINY, seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_appears_meanwhile_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = persimmon_fast.checkpoint_save
    save_checkpoint(tmp_path / "a", TINY, random_tensors(TINY))

    def write_too(*arguments: Any, **options: Any) -> None:
        (tmp_path / "a" / "notes.txt").write_text("mine")
        original(*arguments, **options)

    original = module.save_file
    monkeypatch.setattr(module, "save_file", write_too)
    save_checkpoint(tmp_path / "a", TINY, random_tensors(TINY), overwrite=True)
    assert [path.read_text() for path in tmp_path.rglob("notes.txt")] == ["mine"]


KILL_SCRIPT = """
import os, random, signal, sys, threading, time
from pathlib import Path
import torch, tqdm
from checkpoint_helpers import TINY, random_tensors
from persimmon_fast.checkpoint import expected_tensors, load_checkpoint, save_checkpoint
from persimmon_fast.config import PersimmonConfig

# Not tqdm's own, which is shared with the forked processes: one of them may be killed while it holds it.
tqdm.tqdm.set_lock(threading.RLock())
torch.set_num_threads(1)
config = TINY.replace(hidden_size=128, intermediate_size=512)
folder = Path(sys.argv[1]) / "model"
delays, seen, killed_inside = random.Random(0), set(), 0
for trial in range(25):
    child = os.fork()
    if child == 0:  # saves checkpoints full of 1, 2, 3, ... over each other until it is killed
        value = 100 * trial
        while True:
            value += 1
            tensors = {name: torch.full(shape, float(value)) for name, shape in expected_tensors(config).items()}
            save_checkpoint(folder, config, tensors, max_shard_size="500KB", overwrite=True)
    time.sleep(delays.uniform(0.005, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    killed_inside += any(".saving-" in path.name for path in folder.parent.iterdir())
    if folder.exists():
        assert PersimmonConfig.from_pretrained(folder) == config
        weights = load_checkpoint(folder, config)
        values = {float(x) for tensor in weights.values() for x in (tensor.min(), tensor.max())}
        assert len(values) == 1, values
        seen |= values
    else:
        assert not seen, "the checkpoint was there and is gone"
print(killed_inside, len(seen))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and needs the exchange of folders in one step")
def test_kill_during_save_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", textwrap.dedent(KILL_SCRIPT), str(tmp_path)]
    output = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    killed_inside, distinct = (int(word) for word in output.stdout.split())
    assert killed_inside > 5, "the kills must hit saves that are under way"
    assert distinct > 5


def test_save_copies_aliases_and_any_strides(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    tensors[HEAD] = tensors[EMBEDDING]
    tensors["model.layers.0.mlp.dense_h_to_4h.weight"] = torch.randn(32, 96)[:, ::2].t()
    tensors["model.final_layernorm.bias"] = torch.ones(1).expand(32)
    tensors["model.layers.0.input_layernorm.bias"] = torch.nn.Parameter(torch.ones(32))
    save_checkpoint(tmp_path / "a", TINY, tensors)
    assert_same_bits(load_checkpoint(tmp_path / "a", TINY), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), rf"{NORM}: expected a tensor of shape \[16\], found none of that name"),
        (lambda t: t.update(x=t[NORM]), r"x: expected no such tensor, found 1 unexpected"),
        (lambda t: t.update({NORM: torch.ones(17)}), rf"{NORM}: expected shape \[16\], found \[17\]"),
        (lambda t: t.update({NORM: torch.ones(16).long()}), r"expected float32, .* with data, found torch.int64"),
        (lambda t: t.update({NORM: torch.ones(16, device="meta")}), r"with data, found a meta tensor"),
    ],
)
def test_save_checks_the_tensors_first(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    change(tensors)
    with pytest.raises(CheckpointMismatchError, match=message):
        save_checkpoint(tmp_path / "a", TINY, tensors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "count"), [("1GB", 1), (10**9, 1), ("20 kb", 6), ("20KiB", 5), ("0.02MB", 6), (1, 36)]
)
def test_shard_sizes(size: int | str, count: int, tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    save_checkpoint(tmp_path / "a", TINY, tensors, max_shard_size=size)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == count
    if count > 1:
        index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_parameters": TINY.num_parameters, "total_size": 4 * TINY.num_parameters}


@pytest.mark.parametrize("size", [0, -1, "5", "GB", "0GB", "5 XB", 1.5, None])
def test_shard_sizes_that_are_none(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_shard_size must be bytes > 0 or such as '5GB', got"):
        save_checkpoint(tmp_path / "a", TINY, random_tensors(TINY), max_shard_size=size)


def test_sparse_files_of_the_helpers_are_valid(tmp_path: Path) -> None:
    write_sparse(tmp_path / "model.safetensors", expected_tensors(TINY), "F32", 4)
    assert not any(tensor.any() for tensor in load_checkpoint(tmp_path, TINY).values())
