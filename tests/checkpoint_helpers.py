"""Small checkpoints for the checkpoint tests and the fuzzer: writing them in each format, and raw safetensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from persimmon_fast.checkpoint import expected_tensors
from persimmon_fast.config import PersimmonConfig

TINY = PersimmonConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    dtype="float32",
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.layers.0.mlp.dense_4h_to_h.weight"
NORM = "model.layers.1.self_attn.q_layernorm.bias"
FORMATS = ("safetensors", "safetensors_shards", "bin", "bin_legacy", "bin_shards")


def random_tensors(config: PersimmonConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Weights of every name and shape, normal numbers, contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in expected_tensors(config).items()}


def write_checkpoint(
    folder: Path, config: PersimmonConfig, tensors: Mapping[str, Any], form: str = "safetensors"
) -> Path:
    """config.json and the weights in one of FORMATS, written by safetensors and torch alone (not by our writer)."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    stem, suffix = ("model", ".safetensors") if form.startswith("safetensors") else ("pytorch_model", ".bin")

    def write(name: str, part: Mapping[str, Any]) -> None:
        if suffix == ".bin":
            torch.save(dict(part), folder / name, _use_new_zipfile_serialization=form != "bin_legacy")
        else:
            save_file(dict(part), folder / name, metadata={"format": "pt"})

    if not form.endswith("_shards"):
        write(stem + suffix, tensors)
        return folder
    names, weight_map = list(tensors), {}
    cuts = [0, len(names) // 3, 2 * len(names) // 3, len(names)]
    for number in range(3):
        shard = f"{stem}-{number + 1:05}-of-00003{suffix}"
        part = names[cuts[number] : cuts[number + 1]]
        write(shard, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return folder


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file, unchecked."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path: Path, header: Mapping[str, Any] | bytes, body: bytes, length: int | None = None) -> None:
    """A safetensors file from its parts, unchecked; `length` lies about the header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def write_sparse(path: Path, shapes: Mapping[str, Sequence[int]], dtype: str = "BF16", item: int = 2) -> None:
    """A valid safetensors file of zeros that takes no disk space, however large."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * item
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file's content, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def storage_spans(tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, int]]:
    """First and one-past-last address of each dense tensor."""
    for tensor in tensors.values():
        yield tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
