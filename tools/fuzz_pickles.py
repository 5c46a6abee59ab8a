"""Damage to `torch.save` files: zip records, the pickle inside, and gadgets that must not run."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import random
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import torch
from fuzz_bytes import a_weight_file, flip_bits, splice


def read_records(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def write_records(path: Path, records: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in records:
            archive.writestr(name, content)
    path.write_bytes(buffer.getvalue())


def zip_records(folder: Path, _: Path, rng: random.Random) -> None:
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


def pickle_bytes(folder: Path, _: Path, rng: random.Random) -> None:
    """The pickle inside a sound zip, damaged."""
    path = a_weight_file(folder, rng)
    records = [
        (name, rng.choice([splice(data, rng), flip_bits(data, rng, 0, len(data))]) if name.endswith(".pkl") else data)
        for name, data in read_records(path)
    ]
    write_records(path, records)


def pickle_numbers(folder: Path, _: Path, rng: random.Random) -> None:
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


def gadget_in_state_dict(folder: Path, sentinel: Path, rng: random.Random) -> None:
    """A hostile object beside, instead of, or inside a tensor of a real state_dict."""
    path = a_weight_file(folder, rng)
    content: dict[Any, Any] = dict(torch.load(path, weights_only=True))
    name = rng.choice(list(content))
    content[rng.choice([name, "x", "model.rotary_emb.inv_freq"])] = gadget(sentinel, rng)
    legacy = rng.random() < 0.5
    torch.save(rng.choice([content, {"state_dict": content}]), path, _use_new_zipfile_serialization=not legacy)


def gadget_pickle(folder: Path, sentinel: Path, rng: random.Random) -> None:
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


def bin_objects(folder: Path, _: Path, rng: random.Random) -> None:
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
