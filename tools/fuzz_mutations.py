"""The damage that fuzz_checkpoints.py does to a small valid checkpoint. `damage` picks one of MUTATIONS."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import pickletools
import random
import struct
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from checkpoint_helpers import FORMATS, TINY, random_tensors, write_checkpoint

from persimmon_fast import rope_scaling

CONFIG = TINY.replace(vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=1)

NASTY: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 1.5, -0.5, 0.1, 1e-300, 1e300, 1e-7),
    *(True, False, None, "", "x", "relu2", "float16", "int8", "\x00\x1b[31m", "\ud800", "a" * 5000, "../../etc/passwd"),
    *([], {}, [1], [[[]]], {"a": 1}, {"rope_type": "yarn", "factor": 2}, {"rope_type": "linear"}, {"__float__": "NaN"}),
    *(float("nan"), float("inf"), float("-inf")),
]
Folder = Path
Mutation = Callable[[Folder, Path, random.Random], None]


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


def a_weight_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")))


# ---- bytes of any file ----


def flip_bits(data: bytes, rng: random.Random, start: int, stop: int) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 50])):
        position = rng.randrange(start, max(start + 1, min(stop, len(result))))
        result[position] ^= 1 << rng.randrange(8)
    return bytes(result)


def splice(data: bytes, rng: random.Random) -> bytes:
    """Deletes, repeats, inserts, overwrites or moves a piece."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    b = min(b, a + rng.choice([1, 4, 30, 10**6]))
    junk = bytes(rng.randrange(256) for _ in range(rng.choice([1, 8, 40])))
    target = rng.randrange(len(data) + 1)
    return rng.choice(
        [
            data[:a] + data[b:],
            data[:b] + data[a:],
            data[:a] + junk + data[a:],
            data[:a] + junk + data[a + len(junk) :],
            data[:a] + b"\x00" * (b - a) + data[b:],
            data[:target] + data[a:b] + data[target:],
        ]
    )


def header_end(path: Path) -> int:
    """Where the structure that precedes the weights ends, roughly."""
    data = path.read_bytes()
    return 8 + struct.unpack("<Q", data[:8])[0] if path.suffix == ".safetensors" else 4000


def flip_header(folder: Folder, _: Path, rng: random.Random) -> None:
    path = a_weight_file(folder, rng)
    path.write_bytes(flip_bits(path.read_bytes(), rng, 0, header_end(path)))


def flip_anywhere(folder: Folder, _: Path, rng: random.Random) -> None:
    path = a_weight_file(folder, rng)
    path.write_bytes(flip_bits(path.read_bytes(), rng, 0, path.stat().st_size))


def flip_tail(folder: Folder, _: Path, rng: random.Random) -> None:
    path = a_weight_file(folder, rng)
    size = path.stat().st_size
    path.write_bytes(flip_bits(path.read_bytes(), rng, max(0, size - 3000), size))


def truncate(folder: Folder, _: Path, rng: random.Random) -> None:
    path = a_weight_file(folder, rng)
    size = path.stat().st_size
    os.truncate(path, rng.choice([0, 1, 8, size - 1, rng.randrange(size), rng.randrange(min(size, 4000))]))


def extend(folder: Folder, _: Path, rng: random.Random) -> None:
    path = a_weight_file(folder, rng)
    extra = rng.choice([b"\x00", b"junk" * rng.randrange(1, 5000), path.read_bytes()])
    path.write_bytes(path.read_bytes() + extra if rng.random() < 0.7 else extra + path.read_bytes())


def splice_bytes(folder: Folder, _: Path, rng: random.Random) -> None:
    path = a_weight_file(folder, rng)
    path.write_bytes(splice(path.read_bytes(), rng))


def exchange_files(folder: Folder, _: Path, rng: random.Random) -> None:
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


def config_json(folder: Folder, _: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    path.write_bytes(damaged_json(path.read_bytes(), rng))


def config_value(folder: Folder, _: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice([*config, "head_dim", "num_key_value_heads", "torch_dtype"])
        config[key] = rng.choice([*NASTY, 8, 16, 32, 64, 0.25, 0.75])
    path.write_text(json.dumps(config))


def config_rope(folder: Folder, _: Path, rng: random.Random) -> None:
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


def index_json(folder: Folder, _: Path, rng: random.Random) -> None:
    (path,) = folder.glob("*.index.json")
    path.write_bytes(damaged_json(path.read_bytes(), rng))


def index_map(folder: Folder, _: Path, rng: random.Random) -> None:
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


def header_json(folder: Folder, _: Path, rng: random.Random) -> None:
    path = a_weight_file(folder, rng)
    data = path.read_bytes()
    end = header_end(path)
    header = damaged_json(data[8:end], rng)
    length = len(header) if rng.random() < 0.9 else rng.choice([0, len(header) - 1, len(header) + 1, 2**40, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", length) + header + data[end:])


def header_entries(folder: Folder, _: Path, rng: random.Random) -> None:
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


# ---- pickles ----


def read_records(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def write_records(path: Path, records: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in records:
            archive.writestr(name, content)
    path.write_bytes(buffer.getvalue())


def zip_records(folder: Folder, _: Path, rng: random.Random) -> None:
    """Records dropped, doubled, renamed, exchanged, shortened or compressed."""
    path = a_weight_file(folder, rng)
    records = read_records(path)
    compression = zipfile.ZIP_STORED
    for _ in range(rng.choice([1, 1, 3])):
        i, j = rng.randrange(len(records)), rng.randrange(len(records))
        name, content = records[i]
        what = rng.randrange(7)
        if what == 0 and len(records) > 1:
            del records[i]
        elif what == 1:
            records.append((name, records[j][1]))
        elif what == 2:
            records[i] = (rng.choice([name + "x", name.replace("data/", "data/0"), "x/data.pkl", "/", "../x"]), content)
        elif what == 3:
            records[i], records[j] = (name, records[j][1]), (records[j][0], content)
        elif what == 4:
            records[i] = (name, content[: rng.randrange(len(content) + 1)])
        elif what == 5:
            records[i] = (name, splice(content, rng))
        else:
            compression = zipfile.ZIP_DEFLATED
    write_records(path, records, compression)


def pickle_bytes(folder: Folder, _: Path, rng: random.Random) -> None:
    """The pickle inside a sound zip, damaged."""
    path = a_weight_file(folder, rng)
    records = [
        (name, rng.choice([splice(data, rng), flip_bits(data, rng, 0, len(data))]) if name.endswith(".pkl") else data)
        for name, data in read_records(path)
    ]
    write_records(path, records)


def pickle_numbers(folder: Folder, _: Path, rng: random.Random) -> None:
    """Numbers of the pickle (sizes, strides, offsets, storage sizes) and its storage classes changed, opcodes sound."""
    path = a_weight_file(folder, rng)
    records = []
    for name, data in read_records(path):
        if name.endswith(".pkl"):
            numbers = [(pos, op) for op, _, pos in pickletools.genops(data) if op is not None and op.name == "BININT1"]
            result = bytearray(data)
            for pos, _op in rng.sample(numbers, rng.choice([1, 1, 2, 6])):
                assert pos is not None
                result[pos + 1] = rng.choice([0, 1, 2, 16, 24, 48, 255, rng.randrange(256)])
            data = bytes(result)
            if rng.random() < 0.2:
                data = data.replace(b"FloatStorage", rng.choice([b"LongStorage", b"HalfStorage", b"NoSuchStorage"]), 1)
        records.append((name, data))
    write_records(path, records)


class Gadget:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def gadget(sentinel: Path, rng: random.Random) -> Any:
    command = f"touch {sentinel}"
    storage = Gadget(torch.UntypedStorage, 64)
    return rng.choice(
        [
            Gadget(os.system, command),
            Gadget(subprocess.Popen, ["touch", str(sentinel)]),
            Gadget(eval, f"__import__('os').system({command!r})"),
            Gadget(exec, f"open({str(sentinel)!r}, 'w')"),
            Gadget(open, str(sentinel), "w"),
            Gadget(getattr, Gadget(__import__, "os"), "system"),
            Gadget(torch.load, str(sentinel)),
            Gadget(bytearray, 1 << 40),
            Gadget(collections.OrderedDict, [("a", Gadget(os.system, command))]),
            Gadget(torch._utils._rebuild_tensor_v2, storage, 0, (16,), (1,), False, collections.OrderedDict()),
            storage,
            Gadget(Path.touch, sentinel),
        ]
    )


def gadget_in_state_dict(folder: Folder, sentinel: Path, rng: random.Random) -> None:
    """A hostile object beside, instead of, or inside a tensor of a real state_dict."""
    path = a_weight_file(folder, rng)
    content: dict[Any, Any] = dict(torch.load(path, weights_only=True))
    name = rng.choice(list(content))
    content[rng.choice([name, "x", "model.rotary_emb.inv_freq"])] = gadget(sentinel, rng)
    legacy = rng.random() < 0.5
    torch.save(rng.choice([content, {"state_dict": content}]), path, _use_new_zipfile_serialization=not legacy)


def gadget_pickle(folder: Folder, sentinel: Path, rng: random.Random) -> None:
    """A hostile pickle as it stands, or as a record of the zip, in any protocol."""
    path = a_weight_file(folder, rng)
    data = rng.choice(
        [
            pickle.dumps(gadget(sentinel, rng), protocol=rng.randrange(6)),
            b"cos\nsystem\n(S'touch " + str(sentinel).encode() + b"'\ntR.",
            b"(S'touch " + str(sentinel).encode() + b"'\nios\nsystem\n.",  # INST instead of REDUCE
        ]
    )
    if not path.read_bytes().startswith(b"PK") or rng.random() < 0.4:
        path.write_bytes(rng.choice([data, path.read_bytes()[:200] + data, data + path.read_bytes()]))
        return
    records = read_records(path)
    what = rng.choice(["data.pkl", "constants.pkl", "version", "data/0"])
    prefix = records[0][0].split("/")[0]
    write_records(path, [(n, c) for n, c in records if not n.endswith("/" + what)] + [(f"{prefix}/{what}", data)])


def bin_objects(folder: Folder, _: Path, rng: random.Random) -> None:
    """A state_dict with inert objects that are no dense tensors of the right kind."""
    path = a_weight_file(folder, rng)
    content: dict[Any, Any] = dict(torch.load(path, weights_only=True))
    name = rng.choice(list(content))
    tensor = content[name]
    content[rng.choice([name, name, 3, ("a",), "x"])] = rng.choice(
        [
            *(
                1,
                "text",
                None,
                [tensor],
                {"a": tensor},
                tensor.double(),
                tensor.long(),
                tensor.t() if tensor.dim() == 2 else 0,
            ),
            *(tensor.to("meta"), tensor.to_sparse(), torch.nn.Parameter(tensor), tensor.expand(2, *tensor.shape)),
            *(
                tensor.to(torch.complex64),
                torch.empty(0),
                tensor[:0],
                tensor.half(),
                torch.zeros(1).expand(tensor.shape),
            ),
            *(torch._neg_view(tensor), collections.OrderedDict(a=tensor), torch.float32, torch.Size([1])),
        ]
    )
    torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.5)


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
    "any header bits": flip_header,
    "any bits": flip_anywhere,
    "any tail bits": flip_tail,
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
