"""Reads what one of Adept's model files says and where its tensors lie; executes nothing, loads no weights.

The pickle is run by torch's weights_only unpickler, which knows no code. What it asks for beyond tensors is one of:
- a class of a package that is not Python's, torch's or numpy's (Adept's, for example), or a harmless one of a short
  list: a stand-in takes its place, which keeps what it is given and does nothing. Nothing of that name is imported.
- anything else, such as `os.system` or `builtins.eval`: the file is refused.

Storages are numbers until they are needed: `torch.load` would read them all, and cannot map a file inside a tar.
Both of torch's formats are read: the zip (since 1.6) and the legacy one: five pickles, the last of them the list of
storages, then in its order each storage as an 8-byte count and its elements.

Source: torch 2.13, torch/serialization.py and torch/_weights_only_unpickler.py.
"""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch._weights_only_unpickler import Unpickler  # torch.load(weights_only=True) insists on reading the storages
from torch.serialization import safe_globals

from persimmon_fast.adept.source import Member
from persimmon_fast.checkpoint_files import (
    FLOAT_DTYPES,
    TENSOR_GLOBALS,
    CheckpointError,
    CheckpointFileError,
    pickle_globals,
    shown,
    zip_records,
)

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the legacy format
_MAX_PICKLE = 2**28  # bytes; that of the 8B model has about 100,000
_MAX_DEPTH = 12  # of dicts under "model", which has 4
_MAX_TENSORS = 10**6

# Read as they are; all of them are data. "_codecs encode" is how protocol 2 writes bytes.
_PLAIN = TENSOR_GLOBALS | {
    "_codecs encode",
    "__builtin__ set",
    "torch Size",
    "torch device",
    *(f"torch {name}" for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool")),
}
# Of Python and numpy, but harmless and plausible in arguments or states of random generators.
_STOOD_IN_FOR = {
    "argparse Namespace",
    "types SimpleNamespace",
    *(f"pathlib {name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(f"datetime {name}" for name in ("date", "datetime", "timedelta")),
    *(
        f"{module} {name}"
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    ),
    "numpy ndarray",
    "numpy dtype",
}
_CLOSED_PACKAGES = frozenset(sys.stdlib_module_names) | {
    *("torch", "numpy"),
    *("__builtin__", "copy_reg", "cPickle", "commands", "nt", "posix", "_winapi"),  # of Python 2 or another system
}


class StandIn:
    """An object of a class that is not imported. It keeps what the pickle gives it and does nothing."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any) -> StandIn:
        self = object.__new__(cls)
        self.arguments = arguments
        return self

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True)
class FileTensor:
    """A contiguous tensor in a file: its elements begin at byte `offset` of `path`."""

    path: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RankFile:
    """What one rank's file says.

    Attributes:
        member: the file.
        arguments: of the training run, by name; empty if the file has none.
        iteration: training steps, None if the file does not say.
        tensors: those under "model", by their keys joined with dots.
        foreign: classes of other packages that the pickle names and that were not imported, as "module.name".
    """

    member: Member
    arguments: Mapping[str, Any]
    iteration: int | None
    tensors: Mapping[str, FileTensor]
    foreign: tuple[str, ...]


def read_rank(member: Member) -> RankFile:
    """Reads all of one model file but its weights.

    Raises:
        CheckpointFileError: it is damaged, no such file, or its pickle asks for more than data.
    """
    try:
        with member.open() as file:
            content, locate, foreign = (
                _read_zip(member, file) if file.peek(2)[:2] == b"PK" else _read_legacy(member, file)
            )
        if not isinstance(content, dict):
            raise _wrong(member, "pickle", 'a dict with "args", "iteration" and "model"', type(content).__name__)
        if "model" not in content:
            hint = "Virtual pipeline stages are not supported." if "model0" in content else ""
            raise _wrong(member, "pickle", 'a dict with "model"', f"the keys {_keys(content)}", hint)
        tensors = {name: locate(name, tensor) for name, tensor in _flattened(member, content["model"])}
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        text = " ".join(str(error).split("WeightsUnpickler error:")[-1].split())
        found = f"{type(error).__name__}: {shown(text, 160)}"
        hint = "It is truncated or damaged: get it again."
        raise _wrong(member, "file", "a file that torch.save wrote", found, hint) from None
    arguments, iteration = content.get("args"), content.get("iteration")
    if isinstance(arguments, StandIn):
        arguments = arguments.state
    return RankFile(
        member,
        {key: value for key, value in arguments.items() if isinstance(key, str)} if isinstance(arguments, dict) else {},
        iteration if type(iteration) is int and iteration >= 0 else None,
        tensors,
        tuple(foreign),
    )


def _wrong(member: Member, key: str, expected: str, found: str, hint: str = "") -> CheckpointFileError:
    where = member.name if member.name == member.path else f"{member.path}: {member.name}"
    return CheckpointFileError(where, key, expected, found, hint)


def _keys(content: Mapping[Any, Any]) -> str:
    return ", ".join(shown(str(key), 30) for key in list(content)[:8]) or "none"


# ---- the two formats ----


class _Storages:
    """The storages of a file: keys on one side, torch's objects without data on the other."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.by_key: dict[str, torch.storage.TypedStorage] = {}
        self.key_of: dict[int, str] = {}
        self.numel: dict[str, int] = {}
        self.spans: dict[str, tuple[int, int]] = {}  # key -> (offset in the member, bytes), filled in by the format

    def load(self, persistent_id: Any) -> torch.storage.TypedStorage:
        """torch's persistent_load. Where a storage was (cpu, cuda:3) does not matter."""
        _, kind, key, _, numel, *view = persistent_id
        dtype = getattr(kind, "dtype", None)
        if not isinstance(dtype, torch.dtype) or type(key) is not str or type(numel) is not int or numel < 0:
            raise _wrong(self.member, "storage", "a dtype, a key and a number of elements", shown(repr(persistent_id)))
        if view not in ([], [None]):
            raise _wrong(
                self.member, f"storage {key}", "a storage of its own", "a view, as torch before 0.4 wrote them"
            )
        if key not in self.by_key:
            storage = torch.UntypedStorage(numel * dtype.itemsize, device="meta")
            self.by_key[key] = torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
            self.key_of[storage._cdata] = key
            self.numel[key] = numel
        elif (self.numel[key], self.by_key[key].dtype) != (numel, dtype):
            raise _wrong(self.member, f"storage {key}", "one size and dtype of a storage", "two")
        return self.by_key[key]

    def num_bytes(self, key: str) -> int:
        return self.numel[key] * self.by_key[key].dtype.itemsize

    def locate(self, name: str, tensor: torch.Tensor) -> FileTensor:
        """Where a tensor lies. torch lets one reach beyond its storage, and a storage's size differ from the file's."""
        member = self.member
        if tensor.dtype not in FLOAT_DTYPES.values():
            raise _wrong(member, name, "float32, float16 or bfloat16", str(tensor.dtype).removeprefix("torch."))
        key = self.key_of.get(tensor.untyped_storage()._cdata)
        if tensor.layout != torch.strided or key is None or not tensor.is_contiguous() or tensor.is_neg():
            raise _wrong(member, name, "a dense, contiguous tensor with data", f"strides {tensor.stride()} or none")
        if key not in self.spans or self.spans[key][1] != self.num_bytes(key):
            found = f"{self.spans[key][1]:,} of them" if key in self.spans else "no such data"
            raise _wrong(
                member, name, f"{self.num_bytes(key):,} bytes of storage {shown(key)}", found, "It is damaged."
            )
        start, size = self.spans[key]
        first = int(tensor.storage_offset()) * tensor.element_size()
        if first < 0 or first + tensor.nbytes > size:
            found = f"bytes {first:,} to {first + tensor.nbytes:,} of {size:,}"
            raise _wrong(member, name, f"a tensor inside storage {shown(key)}", found, "It is damaged.")
        return FileTensor(member.path, member.offset + start + first, tensor.dtype, tuple(tensor.shape))


def _read_zip(member: Member, file: IO[bytes]) -> tuple[Any, Any, list[str]]:
    records = zip_records(member.name, file)
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _wrong(member, "zip", "one record */data.pkl", f"{len(pickles)} among {_keys(records)}")
    prefix = pickles[0].removesuffix("data.pkl")

    def read(name: str) -> bytes:
        offset, size = records[name]
        if size > _MAX_PICKLE:
            raise _wrong(member, name, f"at most {_MAX_PICKLE:,} bytes", f"{size:,}")
        file.seek(offset)
        return file.read(size)

    order = read(prefix + "byteorder") if prefix + "byteorder" in records else b"little"
    if order != b"little":
        raise _wrong(member, "byteorder", "little", shown(repr(order)))
    storages = _Storages(member)
    with _stand_ins(member, io.BytesIO(read(pickles[0]))) as (stream, names):
        content = _unpickle(stream, storages)
    data = prefix + "data/"
    storages.spans = {name.removeprefix(data): span for name, span in records.items() if name.startswith(data)}
    return content, storages.locate, names


def _read_legacy(member: Member, file: IO[bytes]) -> tuple[Any, Any, list[str]]:
    storages = _Storages(member)
    all_names: list[str] = []

    def next_pickle() -> Any:
        with _stand_ins(member, file) as (stream, names):
            all_names.extend(names)
            return _unpickle(stream, storages)

    magic, protocol, system = next_pickle(), next_pickle(), next_pickle()
    if (magic, protocol) != (_MAGIC, _PROTOCOL):
        found = f"the numbers {shown(repr(magic))} and {shown(repr(protocol))}"
        raise _wrong(member, "file", "one that torch.save wrote", found)
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise _wrong(member, "byte order", "little-endian", shown(repr(system)))
    content, keys = next_pickle(), next_pickle()
    if not isinstance(keys, list) or any(type(key) is not str or key not in storages.by_key for key in keys):
        raise _wrong(member, "storages", "a list of those that the tensors use", shown(repr(keys)))
    position = file.tell()
    for key in keys:
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8))
        if count != storages.numel[key]:
            raise _wrong(member, f"storage {key}", f"{storages.numel[key]:,} elements", f"{count:,}", "It is damaged.")
        storages.spans[key] = (position + 8, storages.num_bytes(key))
        position += 8 + storages.num_bytes(key)
    if position > member.size:
        found = f"{member.size:,}"
        raise _wrong(member, "file", f"{position:,} bytes", found, "It is truncated: get it again.")
    return content, storages.locate, all_names


@contextmanager
def _stand_ins(member: Member, stream: IO[bytes]) -> Iterator[tuple[IO[bytes], list[str]]]:
    """Looks at the next pickle of the stream; inside the block torch's unpickler knows its stand-ins. Yields the
    stream, back at the pickle's start, and the foreign names that it has stand-ins for."""
    start = stream.tell()
    wanted = dict.fromkeys(pickle_globals(stream))
    if stream.tell() - start > _MAX_PICKLE:
        raise _wrong(member, "pickle", f"at most {_MAX_PICKLE:,} bytes", f"{stream.tell() - start:,}")
    stream.seek(start)
    names = []
    for name in wanted:
        if name in _PLAIN:
            continue
        if name not in _STOOD_IN_FOR and name.split()[0].split(".")[0] in _CLOSED_PACKAGES:
            hint = "Nothing was executed. Do not load this file with torch.load(weights_only=False)."
            found = f"one that asks for {shown(name.replace(' ', '.'))}"
            raise _wrong(member, "pickle", "a pickle of tensors and arguments", found, hint)
        names.append(name)
    classes: list[Any] = [(type(name.split()[-1], (StandIn,), {}), name.replace(" ", ".")) for name in names]
    with safe_globals(classes):
        yield stream, [name.replace(" ", ".") for name in names if name not in _STOOD_IN_FOR]


def _unpickle(stream: IO[bytes], storages: _Storages) -> Any:
    unpickler = Unpickler(stream, encoding="utf-8")
    unpickler.persistent_load = storages.load  # type: ignore[method-assign]
    return unpickler.load()


# ---- the content ----


def _flattened(member: Member, content: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(keys joined with dots, tensor) of nested dicts. A pickle can nest a dict in itself, or one in many places."""
    todo = [("", content, 0)]
    for _ in range(_MAX_TENSORS):
        if not todo:
            return
        name, value, depth = todo.pop()
        if isinstance(value, dict) and depth < _MAX_DEPTH and all(isinstance(key, str) for key in value):
            todo += [(f"{name}.{key}" if name else key, item, depth + 1) for key, item in reversed(value.items())]
        elif type(value) in (torch.Tensor, torch.nn.Parameter):
            yield name, value.detach()
        else:
            found = "dicts nested too deep" if isinstance(value, dict) and depth >= _MAX_DEPTH else type(value).__name__
            raise _wrong(member, f"model.{name}", "a tensor, or a dict of names to such", found)
    raise _wrong(member, "model", f"at most {_MAX_TENSORS:,} tensors", "more")
