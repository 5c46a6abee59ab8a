"""The weight files of a checkpoint folder: which ones there are, what their headers say, and their tensors, mapped.

Nothing here knows Persimmon. `open_checkpoint` finds the files (transformers' names), reads and cross-checks every
header, and allocates no weights; `WeightFile.view` and `WeightFile.read` hand out tensors afterwards.

Mappings are private: torch maps safetensors files and zip `.bin` files copy-on-write (MAP_PRIVATE), so writing into a
tensor changes neither the file nor what another process sees; it costs memory for the touched pages alone. As with
every mapping, a file that somebody truncates in place while it is mapped ends the process with SIGBUS; replacing files
by rename, as `save_checkpoint` does, is safe.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import stat
import struct
import warnings
import zipfile
from dataclasses import dataclass
from typing import IO, Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from persimmon_fast import strict_json
from persimmon_fast.config_file import download_hint

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors' codes

# Buffers that older releases of transformers wrote and that hold nothing a config does not say: skipped without a word.
HARMLESS_EXTRAS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|self_attn\.(masked_bias|bias))$"
)


def shown(name: str, length: int = 80) -> str:
    """A name from a file as a message may hold it: short, without control characters."""
    return name if len(name) <= length and name.isprintable() else repr(name)[:length]


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or saved as it is.

    Attributes:
        file: path of the file or folder at fault.
        key: the tensor or part of the file at fault.
        expected, found: the two halves of the message; what to do follows.
    """

    def __init__(self, file: str, key: str, expected: str, found: str, hint: str = "") -> None:
        self.file, self.key, self.expected, self.found, self.hint = file, shown(key), expected, found, hint
        super().__init__(f"{file}: {self.key}: expected {expected}, found {found}" + (f". {hint}" if hint else ""))


class CheckpointNotFoundError(CheckpointError):
    """The folder, or a file that it must hold, is not there."""


class CheckpointFileError(CheckpointError):
    """A file is damaged, truncated, contradicts itself or its index, or is not what its name says."""


class CheckpointMismatchError(CheckpointError):
    """The files are sound but their tensors are not those of the config: names, shapes or dtypes."""


class NonFiniteWeightError(CheckpointError):
    """A weight is NaN or infinite (`check_finite=True`)."""


class CheckpointSaveError(CheckpointError):
    """The folder cannot be saved to without losing something."""


@dataclass(frozen=True)
class Header:
    """What a file says about one tensor. `dtype` is a name where it is none of FLOAT_DTYPES."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]


class WeightFile(Protocol):
    """One opened weight file.

    Attributes:
        path: where it lies.
        headers: every tensor's header, by name.
    """

    path: str
    headers: dict[str, Header]

    def view(self, name: str) -> Tensor:
        """The tensor as a contiguous view of the private mapping; a copy where that is impossible."""

    def read(self, name: str) -> Tensor:
        """The tensor for one use: for safetensors, pages read through it are given back when it dies."""


def open_checkpoint(folder: str) -> dict[str, WeightFile]:
    """Finds the weight files of `folder`, checks all their headers, and says which file holds which tensor.

    safetensors come before `.bin` where both are there, as in transformers.

    Raises:
        CheckpointNotFoundError: no such folder, no weights in it, a shard or an index missing.
        CheckpointFileError: see there.
    """
    names = _list_folder(folder)
    for kind, (stem, suffix) in {"safetensors": ("model", ".safetensors"), "pickle": ("pytorch_model", ".bin")}.items():
        open_file = SafetensorsFile if kind == "safetensors" else PickleFile
        single, index = stem + suffix, f"{stem}{suffix}.index.json"
        shards = [name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+{re.escape(suffix)}", name)]
        if single in names and index in names:
            raise CheckpointFileError(
                folder, index, "one checkpoint in the folder", f"{single} beside an index", "Delete the stale one."
            )
        if single in names:
            file: WeightFile = open_file(_regular_file(folder, single))
            return dict.fromkeys(file.headers, file)
        if index in names:
            return _open_shards(folder, index, suffix, open_file)
        if shards:
            raise CheckpointNotFoundError(
                folder, index, f"the index of {len(shards)} shards such as {shards[0]}", "no such file"
            )
    raise CheckpointNotFoundError(
        folder,
        "weights",
        "model.safetensors, pytorch_model.bin, or shards of either with their .index.json",
        _listing(names),
        _weights_hint(names),
    )


def _list_folder(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except NotADirectoryError:
        raise CheckpointNotFoundError(folder, "folder", "a checkpoint folder", "a file", "Give its folder.") from None
    except FileNotFoundError:
        hint = download_hint(folder).removeprefix("; ")
        raise CheckpointNotFoundError(folder, "folder", "a checkpoint folder", "nothing there", hint) from None
    except OSError as error:
        raise CheckpointNotFoundError(folder, "folder", "a readable folder", str(error.strerror)) from None


def _listing(names: list[str]) -> str:
    if not names:
        return "an empty folder"
    return ", ".join(shown(name) for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _weights_hint(names: list[str]) -> str:
    if "latest_checkpointed_iteration.txt" in names or any(re.fullmatch(r"iter_\d+|mp_rank_\d+", n) for n in names):
        return "This is Adept's original release: `persimmon-fast convert` makes a Hugging Face folder of it."
    if any(name.endswith(".gguf") for name in names):
        return "GGUF files are llama.cpp's; get the Hugging Face checkpoint."
    if any(name.startswith("adapter_model") for name in names):
        return "This is a PEFT adapter: merge it into its base model and save that."
    return ""


def _regular_file(folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    try:
        mode = os.stat(path).st_mode
    except OSError:
        raise CheckpointNotFoundError(path, "file", "a weight file", "a broken link or unreadable file") from None
    if not stat.S_ISREG(mode):
        raise CheckpointFileError(path, "file", "a regular file", "a folder or a device")
    return path


def _open_shards(folder: str, index: str, suffix: str, open_file: type[Any]) -> dict[str, WeightFile]:
    index_path = _regular_file(folder, index)
    weight_map = _read_weight_map(index_path, suffix)
    missing = sorted(name for name in set(weight_map.values()) if not os.path.exists(os.path.join(folder, name)))
    if missing:
        count = len(set(weight_map.values()))
        raise CheckpointNotFoundError(
            index_path, "weight_map", f"{count} shards in the folder", f"{len(missing)} missing: {_listing(missing)}"
        )
    shards = {name: open_file(_regular_file(folder, name)) for name in sorted(set(weight_map.values()))}
    owner: dict[str, WeightFile] = {}
    for shard in shards.values():
        for name in shard.headers:
            if name in owner:
                found = f"it in {os.path.basename(owner[name].path)} too"
                raise CheckpointFileError(shard.path, name, "each tensor in one shard", found)
            owner[name] = shard
    for name, holder in owner.items():
        indexed = weight_map.get(name)
        if indexed != os.path.basename(holder.path) and not HARMLESS_EXTRAS.search(name):
            found = f"{indexed} there" if indexed else "no such name there"
            raise CheckpointFileError(holder.path, name, f"{index} to name this shard", found)
    for name, shard_name in weight_map.items():
        if name not in owner:
            raise CheckpointFileError(index_path, name, f"the tensor in {shard_name}", "no such tensor there")
    return owner


def _read_weight_map(path: str, suffix: str) -> dict[str, str]:
    try:
        index = strict_json.read_object(path)
    except strict_json.JSONFormatError as error:
        raise CheckpointFileError(path, "file", error.expected, error.found) from None
    except OSError as error:
        raise CheckpointNotFoundError(path, "file", "a readable file", str(error.strerror)) from None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = "none" if "weight_map" not in index else f"{shown(repr(weight_map))} ({type(weight_map).__name__})"
        raise CheckpointFileError(path, "weight_map", "a mapping of tensor names to files", found)
    for name, file in weight_map.items():
        plain = isinstance(file, str) and re.fullmatch(r"[^/\\\0]+", file) and not file.startswith(".")
        if not plain or not file.endswith(suffix):
            expected = f"the name of a *{suffix} file in the same folder"
            raise CheckpointFileError(path, f"weight_map[{shown(name)}]", expected, shown(repr(file)))
    return weight_map


def _refuse_git_lfs(path: str) -> None:
    with open(path, "rb") as file:
        if file.read(len(strict_json.GIT_LFS_PREFIX)) == strict_json.GIT_LFS_PREFIX:
            raise CheckpointFileError(path, "file", "weights", strict_json.GIT_LFS_HINT)


class SafetensorsFile:
    """A safetensors file. The library checks offsets, overlaps, holes and sizes; duplicate names are checked here."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            _refuse_git_lfs(path)
            self._file = cast(Any, safe_open(path, framework="pt", device="cpu"))
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                strict_json.parse_object(file.read(length))
        except (SafetensorError, strict_json.JSONFormatError) as error:
            expected = "a whole safetensors header and the bytes it announces"
            found = f"{os.path.getsize(path):,} bytes: {shown(str(error), 300)}"
            hint = "The file is truncated or damaged: get it again."
            raise CheckpointFileError(path, "header", expected, found, hint) from None
        except OSError as error:
            raise CheckpointNotFoundError(path, "file", "a readable file", str(error.strerror or error)) from None
        self.headers: dict[str, Header] = {}
        for name in self._file.keys():  # noqa: SIM118 (safe_open is no mapping)
            info = self._file.get_slice(name)
            code = info.get_dtype()
            self.headers[name] = Header(FLOAT_DTYPES.get(code, code), tuple(info.get_shape()))

    def view(self, name: str) -> Tensor:
        return self._aligned(self._file.get_tensor(name))

    def read(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt", device="cpu") as file:  # a mapping of its own
            return self._aligned(file.get_tensor(name))

    @staticmethod
    def _aligned(tensor: Tensor) -> Tensor:
        # Another writer's file may start a tensor at an odd byte, which typed loads must not see.
        return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


# All that a pickled state_dict of dense tensors asks for. torch's own list for weights_only is longer, and some of it
# (bytearray, UntypedStorage) lets a file allocate what it likes or pass uninitialised memory for weights.
TENSOR_GLOBALS = {"collections OrderedDict"} | {
    *(f"torch._utils {name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")),
    *(f"torch {name}Storage" for name in ("Float", "Half", "BFloat16", "Double", "ComplexFloat", "Bool")),
    *(f"torch {name}Storage" for name in ("Long", "Int", "Short", "Char", "Byte")),
}


def pickle_globals(stream: IO[bytes]) -> list[str]:
    """Reads one pickle without running it: the classes and functions that it names, as "module name", in order."""
    return [str(argument) for opcode, argument, _ in pickletools.genops(stream) if opcode.name == "GLOBAL"]


def zip_records(path: str, file: IO[bytes]) -> dict[str, tuple[int, int]]:
    """Name -> (offset, bytes) of each record's data, each uncompressed, inside the file and named once."""
    records: dict[str, tuple[int, int]] = {}
    length = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name = info.filename
            if name in records:
                raise CheckpointFileError(path, name, "each zip record once", "two of that name")
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise CheckpointFileError(path, name, "an uncompressed zip record", "a compressed one")
            file.seek(info.header_offset)
            signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
            offset = info.header_offset + 30 + name_length + extra_length
            if signature != b"PK\x03\x04" or offset + info.file_size > length:
                raise CheckpointFileError(path, name, "the zip record inside the file", "it beyond the end")
            if name.endswith(".pkl"):
                archive.read(info)  # compares its CRC
            records[name] = (offset, info.file_size)
    return records


class PickleFile:
    """A `torch.save` file holding a flat dict of tensors, read with `weights_only=True`: nothing in it is executed.

    Zip files are mapped. Files of torch before 1.6 cannot be: they are read whole, before their headers are known.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            _refuse_git_lfs(path)
            with open(path, "rb") as file:
                is_zip = file.read(4) == b"PK\x03\x04"
                file.seek(0)
                for _ in range(0 if is_zip else 5):  # magic number, version, system, content, names of storages
                    self._check_globals(file)
            records = self._check_zip() if is_zip else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about its own old file format
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise self._refusal(error) from None
        self._tensors = self._checked(content)
        if records is not None:
            self._check_storages(records)
        self._shared = _overlapping(self._tensors)
        self.headers = {
            name: Header(t.dtype if t.dtype in FLOAT_DTYPES.values() else str(t.dtype), tuple(t.shape))
            for name, t in self._tensors.items()
        }

    def view(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if name in self._shared or tensor.data_ptr() % tensor.element_size():
            return tensor.clone(memory_format=torch.contiguous_format)
        return tensor.contiguous()

    def read(self, name: str) -> Tensor:
        tensor = self.view(name)
        del self._tensors[name]  # a file that was read whole shrinks as it is used
        return tensor

    def _check_globals(self, stream: IO[bytes]) -> None:
        """Refuses a pickle that names a class or function that tensors do not need."""
        refused = [name for name in pickle_globals(stream) if name not in TENSOR_GLOBALS]
        if refused:
            found = f"one that asks for {shown(refused[0].replace(' ', '.'))}"
            hint = "Nothing was executed. Save the plain state_dict(), better as safetensors."
            raise CheckpointFileError(self.path, "pickle", "a pickle of tensors alone", found, hint)

    def _refusal(self, error: Exception) -> CheckpointFileError:
        text = " ".join(str(error).split("WeightsUnpickler error:")[-1].split())
        found = f"{type(error).__name__}: {shown(text, 160)}"
        expected = "a file written by torch.save(model.state_dict(), ...)"
        return CheckpointFileError(self.path, "file", expected, found, "It is truncated or damaged: get it again.")

    def _checked(self, content: Any) -> dict[str, Tensor]:
        expected = "a dict of tensor names to tensors"
        if not isinstance(content, dict):
            raise CheckpointFileError(self.path, "pickle", expected, type(content).__name__)
        for name, value in content.items():
            if not isinstance(name, str):
                raise CheckpointFileError(self.path, "pickle", expected, f"a key of type {type(name).__name__}")
            if isinstance(value, dict):
                hint = f"Save what lies under {name!r} as a file of its own."
                raise CheckpointFileError(self.path, name, "a tensor", "a dict", hint)
            if type(value) not in (Tensor, torch.nn.Parameter):
                raise CheckpointFileError(self.path, name, "a tensor", type(value).__name__)
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_neg():
                found = f"layout {value.layout}, device {value.device}, dtype {value.dtype}"
                raise CheckpointFileError(self.path, name, "a dense tensor with data", found)
        return {name: value.detach() for name, value in content.items()}

    def _check_zip(self) -> set[tuple[int, int]]:
        """(offset, bytes) of each record's data; no pickle among them asks for more than tensors."""
        with open(self.path, "rb") as file:
            records = zip_records(self.path, file)
            for name, (offset, size) in records.items():
                if name.endswith(".pkl"):
                    file.seek(offset)
                    self._check_globals(io.BytesIO(file.read(size)))
        return set(records.values())

    def _check_storages(self, records: set[tuple[int, int]]) -> None:
        """Every mapped storage must be exactly one record of the zip.

        torch takes a storage's size from the pickle and its start from the zip, and compares neither with the record's
        own size, so a damaged size would silently take in bytes of the neighbours. The mapping's address is unknown
        here but is a whole page, and one storage that is a record gives it away.
        """
        storages = {
            (storage.data_ptr(), storage.nbytes())
            for storage in (tensor.untyped_storage() for tensor in self._tensors.values())
            if storage.nbytes()
        }
        if not storages:
            return
        start, size = min(storages)
        bases = {start - offset for offset, record_size in records if record_size == size}
        for base in bases:
            if base % 4096 == 0 and all((ptr - base, nbytes) in records for ptr, nbytes in storages):
                return
        expected = "each tensor's storage to be one record of the zip"
        raise CheckpointFileError(
            self.path, "storages", expected, "sizes that differ", "The file is damaged: get it again."
        )


def _overlapping(tensors: dict[str, Tensor]) -> set[str]:
    """Names of tensors that share memory with one that lies before them (two names of one tied weight, for example)."""
    spans = []
    for name, tensor in tensors.items():
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size(), name))
    shared, end = set(), 0
    for start, stop, name in sorted(spans):
        if start < end:
            shared.add(name)
        end = max(end, stop)
    return shared
