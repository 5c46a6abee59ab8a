"""Writers that stream: a safetensors file and torch's zip format, tensor by tensor, block by block.

The files are those that `safetensors.torch.save_file` and `torch.save` make of the same content, up to alignment, but
no tensor is ever whole in memory.

Source: safetensors' format description (header, order); torch 2.13, torch/serialization.py (records of the zip).
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any

import torch

from persimmon_fast.adept import names
from persimmon_fast.adept.rows import LazyTensor, blocks
from persimmon_fast.checkpoint_files import FLOAT_DTYPES

_CODES = {dtype: code for code, dtype in FLOAT_DTYPES.items()}
_STORAGE_CLASSES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_ALIGNMENT = 64  # of storages in torch's zip, so that they can be mapped

Progress = Callable[[int], object]  # called with the number of bytes just written


def safetensors_order(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """The order of tensors in a file: wide dtypes first, so that all are aligned, then by name."""
    return sorted(tensors, key=lambda name: (-_rank(tensors[name].dtype), name))


def _rank(dtype: torch.dtype) -> int:
    return [torch.float16, torch.bfloat16, torch.float32].index(dtype)  # safetensors' own order of dtypes


def safetensors_header(tensors: Mapping[str, LazyTensor]) -> bytes:
    """Everything before the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in safetensors_order(tensors):
        tensor = tensors[name]
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(file: IO[bytes], tensors: Mapping[str, LazyTensor], progress: Progress) -> None:
    file.write(safetensors_header(tensors))
    for name in safetensors_order(tensors):
        _write_rows(file, tensors[name], progress)


def _write_rows(file: IO[bytes], tensor: LazyTensor, progress: Progress) -> None:
    written = 0
    for block in blocks(tensor.rows):
        file.write(block.data)
        written += block.nbytes
        progress(block.nbytes)
    assert written == tensor.nbytes


# ---- torch ----


class _Storage:
    """What the pickle holds in place of a tensor's bytes."""

    def __init__(self, key: str, tensor: LazyTensor) -> None:
        self.key, self.tensor = key, tensor


class TensorPickler(pickle.Pickler):
    """Pickles LazyTensors as torch.save pickles tensors, each in a storage of its own; `storages` collects them."""

    def __init__(self, file: IO[bytes], *legacy_view: None) -> None:
        super().__init__(file, protocol=2)
        self.storages: dict[str, LazyTensor] = {}
        self._legacy_view = legacy_view  # the legacy format's persistent ids have a sixth element

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        tensor = obj.tensor
        numel = torch.Size(tensor.shape).numel()
        return ("storage", _STORAGE_CLASSES[tensor.dtype], obj.key, "cpu", numel, *self._legacy_view)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, LazyTensor):
            return NotImplemented
        storage = _Storage(str(len(self.storages)), obj)
        self.storages[storage.key] = obj
        strides = [torch.Size(obj.shape[dim + 1 :]).numel() for dim in range(len(obj.shape))]
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, tuple(strides), False, OrderedDict())


def model_content(tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """Adept's tensors in its nesting: dicts of modules around flat state dicts."""
    content: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *modules, last = names.nested_keys(name)
        inner = content
        for depth, key in enumerate(modules, start=1):
            inner = inner.setdefault(key, OrderedDict() if depth == len(modules) else {})
        inner[last] = tensor
    return content


def write_torch(file: IO[bytes], content: Any, progress: Progress) -> None:
    """torch's zip format (since 1.6) of nested containers that may hold LazyTensors."""
    pickled = io.BytesIO()
    pickler = TensorPickler(pickled)
    pickler.dump(content)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_record(archive, "data.pkl"), pickled.getvalue())
        archive.writestr(_record(archive, "byteorder"), b"little")
        for key, tensor in pickler.storages.items():
            with archive.open(_record(archive, f"data/{key}"), "w", force_zip64=True) as record:
                _write_rows(record, tensor, progress)
        archive.writestr(_record(archive, "version"), b"3\n")


def _record(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The head of a record whose data will be aligned, by a field that readers skip."""
    info = zipfile.ZipInfo(f"model_optim_rng/{name}")  # with the date 1980-01-01: equal content, equal files
    assert archive.fp is not None
    header = 30 + len(info.filename) + 4 + (20 if name.startswith("data/") else 0)  # 20: sizes of 64 bits
    padding = -(archive.fp.tell() + header) % _ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
    return info
