"""Damage to bytes, whatever they mean."""

from __future__ import annotations

import random
from pathlib import Path


def a_weight_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")))


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
