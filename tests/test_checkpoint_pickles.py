"""Pickled checkpoints (`pytorch_model*.bin`) that lie about their storages or ask for more than tensors."""

from __future__ import annotations

import collections
import os
import pickletools
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import DOWN, NORM, TINY, assert_same_bits, random_tensors, write_checkpoint

from persimmon_fast.checkpoint import CheckpointFileError, load_checkpoint


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def uninitialised(shape: tuple[int, ...]) -> Call:
    """A tensor over fresh memory, which torch's weights_only allows."""
    arguments = (Call(torch.UntypedStorage, 4096), 0, shape, (1,), False, collections.OrderedDict())
    return Call(torch._utils._rebuild_tensor_v2, *arguments)


@pytest.mark.parametrize("form", ["bin", "bin_legacy", "bin_shards"])
@pytest.mark.parametrize("name", [NORM, "model.rotary_emb.inv_freq"])
@pytest.mark.parametrize(
    ("gadget", "asks_for"),
    [
        (lambda mark: Call(os.system, f"touch {mark}"), "posix.system"),
        (lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"), "__builtin__.eval"),
        (lambda mark: Call(open, str(mark), "w"), "io.open"),
        (lambda mark: Call(Path.touch, mark), "__builtin__.getattr|pathlib.Path.touch|pathlib.PosixPath"),
        (lambda mark: Call(bytearray, 1 << 40), "__builtin__.bytearray"),
        (lambda mark: uninitialised((16,)), "torch.storage.UntypedStorage"),
        (lambda mark: torch.ones(16).to("meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (lambda mark: torch.ones(16).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_a_pickle_that_asks_for_more_is_refused_unread(
    gadget: Callable[[Path], Any], asks_for: str, name: str, form: str, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    write_checkpoint(tmp_path / "a", TINY, random_tensors(TINY) | {name: gadget(mark)}, form)
    with pytest.raises(
        CheckpointFileError, match=rf"pickle: expected a pickle of tensors alone, .* asks for ({asks_for})"
    ):
        load_checkpoint(tmp_path / "a", TINY)
    assert not mark.exists()


@pytest.mark.parametrize("form", ["bin", "bin_legacy"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda t: [1, 2], "pickle: expected a dict of tensor names to tensors, found list"),
        (lambda t: t | {3: t[NORM]}, "pickle: expected a dict of tensor names to tensors, found a key of type int"),
        (lambda t: t | {NORM: 1.0}, f"{NORM}: expected a tensor, found float"),
        (lambda t: t | {NORM: torch._neg_view(t[NORM])}, f"{NORM}: expected a dense tensor with data, found layout"),
        (lambda t: {"model": t, "step": 3}, "model: expected a tensor, found a dict. Save what lies under 'model' as"),
    ],
)
def test_pickles_of_other_things(
    content: Callable[[dict[str, Any]], Any], message: str, form: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, TINY, {}, form)
    tensors = content(random_tensors(TINY))
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    with pytest.raises(CheckpointFileError, match=f"pytorch_model.bin: {message}"):
        load_checkpoint(tmp_path, TINY)


def test_parameters_and_an_ordered_dict_are_fine(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    parameters = collections.OrderedDict((name, torch.nn.Parameter(tensor)) for name, tensor in tensors.items())
    write_checkpoint(tmp_path, TINY, {}, "bin")
    torch.save(parameters, tmp_path / "pytorch_model.bin")
    assert_same_bits(load_checkpoint(tmp_path, TINY), tensors)


# ---- zip files ----


def rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records:
            archive.writestr(name, change(name, content))


def with_storage_size(pickled: bytes, old: int, new: int) -> bytes:
    """The first persistent id (storage, class, key, device, old) of the pickle with another number of elements."""
    operations = [(op.name, argument, position) for op, argument, position in pickletools.genops(pickled)]
    for (name, argument, position), (after, *_) in pairwise(operations):
        if (name, argument, after) == ("BININT1", old, "TUPLE"):
            assert position is not None
            return pickled[: position + 1] + bytes([new]) + pickled[position + 2 :]
    raise AssertionError("no such storage")


@pytest.mark.parametrize("claimed", [17, 33, 255])
def test_a_storage_larger_than_its_record_is_refused(claimed: int, tmp_path: Path) -> None:
    """torch alone loads this: the shape still fits, but the storage takes in what lies behind it in the file."""
    write_checkpoint(tmp_path, TINY, random_tensors(TINY), "bin")
    path = tmp_path / "pytorch_model.bin"
    rewrite(path, lambda name, data: with_storage_size(data, 16, claimed) if name.endswith(".pkl") else data)
    torch.load(path, weights_only=True, mmap=True)
    with pytest.raises(
        CheckpointFileError, match="storages: expected each tensor's storage to be one record of the zip"
    ):
        load_checkpoint(tmp_path, TINY)


def test_a_shortened_record_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, random_tensors(TINY), "bin")
    rewrite(tmp_path / "pytorch_model.bin", lambda name, data: data[:-4] if name.endswith("/data/3") else data)
    with pytest.raises(
        CheckpointFileError, match="storages: expected each tensor's storage to be one record of the zip"
    ):
        load_checkpoint(tmp_path, TINY)


def test_a_zip_written_by_another_tool_loads_unless_compressed(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    write_checkpoint(tmp_path, TINY, tensors, "bin")
    rewrite(tmp_path / "pytorch_model.bin", lambda name, data: data)  # loses torch's alignment of records
    loaded = load_checkpoint(tmp_path, TINY)
    assert_same_bits(loaded, tensors)
    assert all(tensor.data_ptr() % 4 == 0 for tensor in loaded.values())
    assert loaded[DOWN].stride() == (1, 32)
    rewrite(tmp_path / "pytorch_model.bin", lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointFileError, match="expected an uncompressed zip record, found a compressed one"):
        load_checkpoint(tmp_path, TINY)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_twice_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, random_tensors(TINY), "bin")
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data/0"))
        archive.writestr(name, bytes(100))
    with pytest.raises(CheckpointFileError, match=f"{name}: expected each zip record once, found two of that name"):
        load_checkpoint(tmp_path, TINY)
