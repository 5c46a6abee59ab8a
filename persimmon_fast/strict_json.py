"""JSON objects read strictly: what a reader could understand in two ways is an error.

`json.loads` keeps the last of two equal keys, accepts NaN and Infinity, turns 1e999 into infinity and fails with
RecursionError on deep nesting. Configs, shard indices and safetensors headers come from strangers, so each of these is
refused here with a `JSONFormatError` that says where.
"""

import json
import math
import os
from collections import Counter
from typing import Any, NoReturn

MAX_BYTES = 100_000_000  # as safetensors limits its headers; real files hold a few hundred KB
MAX_DEPTH = 64

GIT_LFS_PREFIX = b"version https://git-lfs.github.com/spec/"
GIT_LFS_HINT = "a Git LFS pointer, not the file itself: run `git lfs pull` in the folder or download it again"


class JSONFormatError(ValueError):
    """The text is not one JSON object with distinct keys and finite numbers.

    Attributes:
        expected, found: the two halves of the message, which does not name the file.
    """

    def __init__(self, expected: str, found: str) -> None:
        self.expected, self.found = expected, found
        super().__init__(f"expected {expected}, found {found}")


def parse_object(data: bytes) -> dict[str, Any]:
    """Returns the JSON object in `data` (UTF-8, with or without a byte order mark).

    Raises:
        JSONFormatError: not UTF-8, not JSON, not an object, a key twice in one object, a number that is not finite,
            nesting deeper than MAX_DEPTH.
    """
    if data.startswith(GIT_LFS_PREFIX):
        raise JSONFormatError("JSON", GIT_LFS_HINT)
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_distinct_keys,
            parse_float=_finite_float,
            parse_constant=_refuse_constant,
        )
    except JSONFormatError:
        raise
    except UnicodeDecodeError as error:
        raise JSONFormatError("JSON in UTF-8", f"byte {error.start} undecodable") from None
    except RecursionError:
        raise JSONFormatError(f"at most {MAX_DEPTH} nested levels", "more") from None
    except ValueError as error:  # includes json.JSONDecodeError and integers of more than 4,300 digits
        raise JSONFormatError("JSON", f"garbage: {error}") from None
    if not isinstance(value, dict):
        raise JSONFormatError("a JSON object", f"{type(value).__name__}")
    if _depth_exceeds(value, MAX_DEPTH):
        raise JSONFormatError(f"at most {MAX_DEPTH} nested levels", "more")
    return value


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`parse_object` of a file of at most MAX_BYTES bytes. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise JSONFormatError(f"at most {MAX_BYTES:,} bytes of JSON", "more")
    return parse_object(data)


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        [(key, count)] = Counter(key for key, _ in pairs).most_common(1)
        raise JSONFormatError("each key once", f"{key[:80]!r} {count} times in one object")
    return result


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JSONFormatError("finite numbers", f"{text[:40]}")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise JSONFormatError("finite numbers", f"{text}")


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
