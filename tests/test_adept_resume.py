"""A conversion that is interrupted, short of disk or raced; and what it needs of memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adept_helpers import SMALL, contents, tar_of, write_adept, write_ranks
from checkpoint_helpers import file_bytes, random_tensors

from persimmon_fast import adept
from persimmon_fast.adept import work, write
from persimmon_fast.adept.rows import CHUNK_BYTES
from persimmon_fast.checkpoint import CheckpointSaveError, expected_tensors
from persimmon_fast.config import PersimmonConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*no sentencepiece model")
SHARDS = 3  # of SMALL at 100 KB


class Interruption(BaseException):
    """As KeyboardInterrupt."""


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The next conversion ends in the middle of file number `after` (from 0)."""
    left = [after]
    real = write.write_safetensors

    def broken(file: Any, tensors: Any, progress: Any) -> None:
        if left[0] == 0:
            file.write(b"the beginning of a file")
            raise Interruption
        left[0] -= 1
        real(file, tensors, progress)

    monkeypatch.setattr(write, "write_safetensors", broken)


def to_hf(source: Path, target: Path) -> adept.Conversion:
    return adept.to_hugging_face(source, target, max_shard_size="100KB")


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_conversion_goes_on_and_ends_with_the_same_bytes(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adept(tmp_path / "a", num_ranks=2)
    to_hf(tmp_path / "a", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(Interruption):
            to_hf(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    files = tmp_path / ".b.converting" / "files"
    done = {path: path.stat().st_ino for path in files.glob("*.safetensors")} if files.exists() else {}
    assert len(done) == after
    assert to_hf(tmp_path / "a", tmp_path / "b").resumed == (after > 0)
    assert {inode for inode in done.values()} <= {path.stat().st_ino for path in (tmp_path / "b").iterdir()}
    assert file_bytes(tmp_path / "b") == file_bytes(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "whole"]


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conversion of folder/a to folder/b that ended after two files; returns its files."""
    write_adept(folder / "a")
    to_hf(folder / "a", folder / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(Interruption):
            to_hf(folder / "a", folder / "b")
    return folder / ".b.converting" / "files"


def test_a_file_that_lost_bytes_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = interrupted(tmp_path, monkeypatch)
    first = sorted(files.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-1])
    (files / "model-00003-of-00003.safetensors.part").write_bytes(b"of a run that was killed")
    (files / "stray").touch()
    assert to_hf(tmp_path / "a", tmp_path / "b").resumed
    assert file_bytes(tmp_path / "b") == file_bytes(tmp_path / "whole")


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"plan": 3, "files": []}'])
def test_a_damaged_state_begins_anew(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = interrupted(tmp_path, monkeypatch)
    (files.parent / "state.json").write_text(state)
    (files / "stray").write_text("of somebody")
    assert not to_hf(tmp_path / "a", tmp_path / "b").resumed
    assert file_bytes(tmp_path / "b") == file_bytes(tmp_path / "whole")


def test_another_source_or_shard_size_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, monkeypatch)
    tensors = random_tensors(SMALL, torch.bfloat16, seed=1)
    write_ranks(tmp_path / "a", contents(SMALL, tensors))
    assert not to_hf(tmp_path / "a", tmp_path / "b").resumed
    adept.to_hugging_face(tmp_path / "a", tmp_path / "c", max_shard_size="100KB")
    assert file_bytes(tmp_path / "b") == file_bytes(tmp_path / "c")
    assert file_bytes(tmp_path / "b") != file_bytes(tmp_path / "whole")


def test_a_process_that_is_killed_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    """As a power cut for the process: no handler runs."""
    write_adept(tmp_path / "a")
    to_hf(tmp_path / "a", tmp_path / "whole")
    script = f"""
import os
from persimmon_fast.adept import convert, write
real, left = write.write_safetensors, [2]
def broken(file, tensors, progress):
    real(file, tensors, progress)
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
write.write_safetensors = broken
convert.to_hugging_face({str(tmp_path / "a")!r}, {str(tmp_path / "b")!r}, max_shard_size="100KB")
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", script], timeout=120).returncode == 9
    assert not (tmp_path / "b").exists()
    assert to_hf(tmp_path / "a", tmp_path / "b").resumed
    assert file_bytes(tmp_path / "b") == file_bytes(tmp_path / "whole")


def test_the_way_back_resumes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adept(tmp_path / "a")
    adept.to_hugging_face(tmp_path / "a", tmp_path / "hf")
    adept.to_adept(tmp_path / "hf", tmp_path / "whole", num_ranks=2)
    with monkeypatch.context() as patch:
        real = write.write_torch

        def broken(file: Any, content: Any, progress: Any) -> None:
            real(file, content, progress)
            if file.name.endswith("mp_rank_01/model_optim_rng.pt.part"):
                raise Interruption

        patch.setattr(write, "write_torch", broken)
        with pytest.raises(Interruption):
            adept.to_adept(tmp_path / "hf", tmp_path / "b", num_ranks=2)
    assert adept.to_adept(tmp_path / "hf", tmp_path / "b", num_ranks=2).resumed
    trees = [
        {str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in tmp_path.glob("[bw]*")
    ]
    assert len(trees[0]) == 3
    assert trees[0] == trees[1]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adept(tmp_path / "a")
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=work._SPARE_BYTES + 256_000))
    with pytest.raises(
        CheckpointSaveError, match=r"disk: expected 67,365,\d{3} bytes free on its disk, found 67,364,864"
    ):
        to_hf(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_two_conversions_to_one_folder(tmp_path: Path) -> None:
    write_adept(tmp_path / "a")
    with (
        work.WorkFolder(tmp_path / "b", "the other"),
        pytest.raises(CheckpointSaveError, match="b: folder: expected one conversion to it, found one that is running"),
    ):
        to_hf(tmp_path / "a", tmp_path / "b")
    to_hf(tmp_path / "a", tmp_path / "b")


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adept(tmp_path / "a")
    real = write.write_safetensors

    def slow(file: Any, tensors: Any, progress: Any) -> None:
        real(file, tensors, progress)
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / "mine").touch()

    monkeypatch.setattr(write, "write_safetensors", slow)
    with pytest.raises(CheckpointSaveError, match="found a folder with mine"):
        to_hf(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine"]


# ---- memory ----

_MEASURE = """
import sys, threading, time
from persimmon_fast import adept

def anonymous_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, stop = [0], threading.Event()
def watch():
    while not stop.wait(0.001):
        peak[0] = max(peak[0], anonymous_bytes())

before = anonymous_bytes()
thread = threading.Thread(target=watch)
thread.start()
exec(sys.argv[1])
stop.set()
thread.join()
print(peak[0] - before)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """150 MB in two ranks: embedding and head of 67 MB each, in a tar, in the legacy format."""
    folder = tmp_path_factory.mktemp("wide")
    config = PersimmonConfig(
        vocab_size=65536,
        hidden_size=512,
        intermediate_size=8192,
        num_hidden_layers=1,
        num_attention_heads=8,
        dtype="bfloat16",
    )
    tensors = {
        name: torch.arange(math.prod(shape), dtype=torch.int32).remainder(65_521).bfloat16().reshape(shape)
        for name, shape in expected_tensors(config).items()
    }
    write_ranks(folder / "a", contents(config, tensors, num_ranks=2), "legacy")
    tar_of(folder / "a")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_peak_memory_is_below_a_fifth_more_than_the_largest_shard(wide: Path) -> None:
    """It is far below: a block at a time, whatever the shard. Both directions; torch's own start is not counted."""
    commands = {
        "hf": f"adept.to_hugging_face({str(wide / 'a.tar')!r}, {str(wide / 'hf')!r}, max_shard_size='70MB')",
        "back": f"adept.to_adept({str(wide / 'hf')!r}, {str(wide / 'back')!r}, num_ranks=2)",
    }
    peaks = {
        name: int(subprocess.check_output([sys.executable, "-W", "ignore", "-c", _MEASURE, command], timeout=120))
        for name, command in commands.items()
    }
    shards = {path.name: path.stat().st_size for path in (wide / "hf").glob("*.safetensors")}
    assert len(shards) == 3
    largest = max(shards.values())
    assert largest > 67e6
    for name, peak in peaks.items():
        assert 4 * CHUNK_BYTES > peak > 0, (name, peak)
        assert peak < 1.2 * largest, (name, peak, largest)
    index = json.loads((wide / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] > 150e6
    shutil.rmtree(wide / "a")
    for rank in range(2):
        assert (wide / "back" / f"iter_0375000/mp_rank_{rank:02}/model_optim_rng.pt").stat().st_size > 75e6
