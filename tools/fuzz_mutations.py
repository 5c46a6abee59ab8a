"""The damage that fuzz_checkpoints.py does to a small valid checkpoint. `damage` picks one of MUTATIONS."""

from __future__ import annotations

import json
import os
import random
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from checkpoint_helpers import FORMATS, TINY, random_tensors, write_checkpoint
from fuzz_bytes import a_weight_file, flip_bits, splice
from fuzz_pickles import (
    bin_objects,
    gadget_in_state_dict,
    gadget_pickle,
    pickle_bytes,
    pickle_numbers,
    zip_records,
)

from persimmon_fast import rope_scaling

CONFIG = TINY.replace(vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=1)

NASTY: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 1.5, -0.5, 0.1, 1e-300, 1e300, 1e-7),
    *(True, False, None, "", "x", "relu2", "float16", "int8", "\x00\x1b[31m", "\ud800", "a" * 5000, "../../etc/passwd"),
    *([], {}, [1], [[[]]], {"a": 1}, {"rope_type": "yarn", "factor": 2}, {"rope_type": "linear"}, {"__float__": "NaN"}),
    *(float("nan"), float("inf"), float("-inf")),
]
Mutation = Callable[[Path, Path, random.Random], None]


@cache
def valid(form: str) -> dict[str, bytes]:
    """The files of the valid checkpoint in one format."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), CONFIG, random_tensors(CONFIG), form)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def damage(folder: Path, sentinel: Path, rng: random.Random) -> str:
    """Writes a damaged checkpoint. Gadgets, if they run, create `sentinel`. Returns what was done."""
    name = rng.choice(list(MUTATIONS))
    form = rng.choice(APPLIES_TO[name.split(" ")[0]])
    for file, content in valid(form).items():
        (folder / file).write_bytes(content)
    MUTATIONS[name](folder, sentinel, rng)
    return f"{name} ({form})" if name.startswith("any") else name


# ---- bytes of any file ----


def header_end(path: Path) -> int:
    """Where the structure that precedes the weights ends, roughly."""
    data = path.read_bytes()
    return 8 + struct.unpack("<Q", data[:8])[0] if path.suffix == ".safetensors" else 4000


def flips(where: str) -> Mutation:
    """Bits of a weight file flipped in its header, in its last 3,000 bytes or anywhere."""

    def flip(folder: Path, _: Path, rng: random.Random) -> None:
        path = a_weight_file(folder, rng)
        size = path.stat().st_size
        start, stop = {"header": (0, header_end(path)), "tail": (max(0, size - 3000), size), "file": (0, size)}[where]
        path.write_bytes(flip_bits(path.read_bytes(), rng, start, stop))

    return flip


def truncate(folder: Path, _: Path, rng: random.Random) -> None:
    path = a_weight_file(folder, rng)
    size = path.stat().st_size
    os.truncate(path, rng.choice([0, 1, 8, size - 1, rng.randrange(size), rng.randrange(min(size, 4000))]))


def extend(folder: Path, _: Path, rng: random.Random) -> None:
    path = a_weight_file(folder, rng)
    extra = rng.choice([b"\x00", b"junk" * rng.randrange(1, 5000), path.read_bytes()])
    path.write_bytes(path.read_bytes() + extra if rng.random() < 0.7 else extra + path.read_bytes())


def splice_bytes(folder: Path, _: Path, rng: random.Random) -> None:
    path = a_weight_file(folder, rng)
    path.write_bytes(splice(path.read_bytes(), rng))


def exchange_files(folder: Path, _: Path, rng: random.Random) -> None:
    """Deletes, empties, replaces by another file, a folder, a link or a Git LFS pointer."""
    paths = sorted(folder.iterdir())
    path, other = rng.choice(paths), rng.choice(paths)
    content = other.read_bytes()
    path.unlink()
    what = rng.randrange(6)
    if what == 1:
        path.write_bytes(b"")
    elif what == 2:
        path.write_bytes(content)
    elif what == 3:
        path.mkdir()
    elif what == 4:
        path.symlink_to(rng.choice(["/nonexistent", "/dev/null", path.name]))
    elif what == 5:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


# ---- JSON: config.json, the index, the header of safetensors ----


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Changes, removes, adds, renames or doubles something somewhere in a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        if rng.random() < 0.5 and isinstance(value[key], dict | list):
            return {**value, key: mutate_json(value[key], rng)}
        what = rng.randrange(6)
        if what <= 2:
            return {**value, key: rng.choice([*NASTY, *value.values()])}
        result = dict(value)
        if what == 3:
            del result[key]
        elif what == 4:
            result[rng.choice([key + "x", key[:-1], key.upper(), "", "rope_theta", "head_dim"])] = result.pop(key)
        else:
            result[rng.choice(["extra", "type", "quantization_config", "x\n"])] = rng.choice(NASTY)
        return result
    if isinstance(value, list) and value and rng.random() < 0.8:
        result_list = list(value)
        result_list[rng.randrange(len(value))] = rng.choice([*NASTY, 4, 8, 16, 64])
        return result_list
    return rng.choice(NASTY)


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """The text of a JSON file after a change of its structure or of its bytes."""
    what = rng.randrange(10)
    if what == 0:
        return splice(data, rng)
    if what == 1:
        return flip_bits(data, rng, 0, len(data))
    if what == 2:  # a member twice, with another value
        value = json.loads(data)
        key = rng.choice(list(value))
        member = json.dumps({key: rng.choice([value[key], *NASTY])})[1:-1]
        return data.rstrip()[:-1].rstrip() + b"," + member.encode() + b"}"
    if what == 3:
        return b'{"a":' * 10**5 if rng.random() < 0.5 else b"[" * 500 + b"]" * 500
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        value = mutate_json(value, rng)
    return json.dumps(value).encode()


def config_json(folder: Path, _: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    path.write_bytes(damaged_json(path.read_bytes(), rng))


def config_value(folder: Path, _: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice([*config, "head_dim", "num_key_value_heads", "torch_dtype"])
        config[key] = rng.choice([*NASTY, 8, 16, 32, 64, 0.25, 0.75])
    path.write_text(json.dumps(config))


def config_rope(folder: Path, _: Path, rng: random.Random) -> None:
    """A rope type with its keys filled from plausible and absurd numbers."""
    keys = (
        *(
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "truncate",
        ),
        *("mscale_all_dim", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    )
    plausible: list[Any] = [1, 2, 4.0, 8, 0.5, 64, 4096, 1e-6, 1e6, 1e25, True, [1.0, 2.0], [1.0] * 4, [0.5, 0.0]]
    types = ["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "su", "mrope"]
    rope: dict[str, Any] = {"rope_type": rng.choice(types)}
    required, optional = rope_scaling._KEYS.get(rope["rope_type"], ((), ()))
    for key in {*required, *rng.sample(optional, rng.randrange(len(optional) + 1))}:
        rope[key] = (
            [rng.choice(plausible[:10]) for _ in range(2)] if key.endswith("t_factor") else rng.choice(plausible)
        )
    for key in rng.sample(keys, rng.choice([0, 0, 1, 2])):
        rope[key] = rng.choice(plausible + NASTY)
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    config["rope_scaling"] = rope
    del config["rope_parameters"]
    if rng.random() < 0.3:
        config["partial_rotary_factor"] = rng.choice([0.25, 0.75, 1, 1.0, 0.1])
    path.write_text(json.dumps(config))


def index_json(folder: Path, _: Path, rng: random.Random) -> None:
    (path,) = folder.glob("*.index.json")
    path.write_bytes(damaged_json(path.read_bytes(), rng))


def index_map(folder: Path, _: Path, rng: random.Random) -> None:
    """Names and files of the weight map exchanged, or pointing elsewhere."""
    (path,) = folder.glob("*.index.json")
    index = json.loads(path.read_bytes())
    weights = index["weight_map"]
    files = sorted(set(weights.values()))
    outside = [
        "../" + files[0],
        "/" + files[0],
        "./" + files[0],
        folder.name,
        "config.json",
        "..",
        "",
        files[0] + "\x00",
    ]
    for _ in range(rng.choice([1, 2, 10])):
        name = rng.choice(list(weights))
        weights[name] = rng.choice([*files, *outside, *NASTY])
        if rng.random() < 0.3:
            weights[rng.choice([name + "x", "", *weights])] = weights.pop(name)
    path.write_text(json.dumps(index))


def header_json(folder: Path, _: Path, rng: random.Random) -> None:
    path = a_weight_file(folder, rng)
    data = path.read_bytes()
    end = header_end(path)
    header = damaged_json(data[8:end], rng)
    length = len(header) if rng.random() < 0.9 else rng.choice([0, len(header) - 1, len(header) + 1, 2**40, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", length) + header + data[end:])


def header_entries(folder: Path, _: Path, rng: random.Random) -> None:
    """Tensors of the header renamed, dropped, given other shapes, dtypes or offsets that may or may not fit."""
    path = a_weight_file(folder, rng)
    data = path.read_bytes()
    end = header_end(path)
    header, body = json.loads(data[8:end]), data[end:]
    for _ in range(rng.choice([1, 1, 2, 5])):
        name, other = (rng.choice([name for name in header if name != "__metadata__"]) for _ in range(2))
        info = header[name]
        if len(info["data_offsets"]) != 2:
            continue  # damaged in an earlier round
        begin, stop = info["data_offsets"]
        what = rng.randrange(10)
        if what == 0:
            header[rng.choice([name + "x", "module." + name, name.replace("model.", ""), ""])] = header.pop(name)
        elif what == 1 and len(header) > 3:
            del header[name]
        elif what == 2:
            info["shape"] = rng.choice([info["shape"][::-1], [*info["shape"], 1], [0], [], [2**63], [-1], [1.5]])
        elif what == 3:
            info["dtype"] = rng.choice(
                ["F16", "BF16", "F64", "I32", "U8", "F8_E4M3", "BOOL", "C64", "f32", "", 3, None]
            )
        elif what == 4:
            shift = rng.choice([1, -1, 4, -4, 2**63, len(body)])
            info["data_offsets"] = [begin + shift, stop + shift]
        elif what == 5:
            info["data_offsets"] = rng.choice(
                [[stop, begin], [begin, stop + 4], [begin], [], [begin, 2**64], ["0", "4"]]
            )
        elif what == 6:
            header[other]["data_offsets"] = [begin, stop]
        elif what == 7:  # half the bytes under another dtype: a sound header, but wrong dtypes
            info["dtype"], info["shape"] = (
                "BF16",
                [2 * size if i == 0 else size for i, size in enumerate(info["shape"])],
            )
        elif what == 8:  # exchange two tensors of equal shape or not
            header[name], header[other] = header[other], header[name]
        else:  # an extra tensor with bytes of its own
            header["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
            body += bytes(4)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


# The first word of a mutation says which formats it applies to.
APPLIES_TO: dict[str, tuple[str, ...]] = {
    "any": FORMATS,
    "config": FORMATS,
    "safetensors": ("safetensors", "safetensors_shards"),
    "index": ("safetensors_shards", "bin_shards"),
    "zip": ("bin", "bin_shards"),
    "bin": ("bin", "bin_shards", "bin_legacy"),
}
MUTATIONS: dict[str, Mutation] = {
    "any header bits": flips("header"),
    "any bits": flips("file"),
    "any tail bits": flips("tail"),
    "any truncation": truncate,
    "any extension": extend,
    "any splice": splice_bytes,
    "any file exchanged": exchange_files,
    "config json": config_json,
    "config value": config_value,
    "config rope": config_rope,
    "safetensors header json": header_json,
    "safetensors header entries": header_entries,
    "index json": index_json,
    "index map": index_map,
    "zip records": zip_records,
    "zip pickle bytes": pickle_bytes,
    "zip pickle numbers": pickle_numbers,
    "bin gadget in state_dict": gadget_in_state_dict,
    "bin gadget pickle": gadget_pickle,
    "bin objects": bin_objects,
}
