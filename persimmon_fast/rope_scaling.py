"""The rope types of transformers 5.23: which keys each one takes and which values make sense.

    type          required                                   optional
    default       -                                          -
    linear        factor                                     -
    dynamic       factor                                     -
    yarn          factor                                     original_max_position_embeddings, attention_factor,
                                                             beta_fast, beta_slow, mscale, mscale_all_dim, truncate
    longrope      short_factor, long_factor                  original_max_position_embeddings, factor, attention_factor
    llama3        factor, low_freq_factor, high_freq_factor  original_max_position_embeddings
    proportional  -                                          factor

`rope.py` turns them into frequencies. Torch-free, so that a config can be checked without importing torch.
"""

from collections.abc import Mapping
from typing import Any

_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        ("original_max_position_embeddings", "factor", "attention_factor"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "proportional": ((), ("factor",)),
}
ROPE_TYPES = tuple(_KEYS)


class RopeScalingError(ValueError):
    """`key` is "" for the mapping itself or ".name"; `expected` and `found` complete the message."""

    def __init__(self, key: str, expected: str, found: Any) -> None:
        self.key, self.expected, self.found = key, expected, found
        super().__init__(f"rope_scaling{key}: expected {expected}, found {found!r}")


def check_rope_scaling(
    scaling: Any, *, rotary_dim: int, partial_rotary_factor: float, max_position_embeddings: int
) -> dict[str, Any] | None:
    """Checks `rope_scaling` and returns it in its one canonical form.

    Args:
        scaling: None or a mapping with "rope_type" and the keys of that type.
        rotary_dim: rotated elements of a head, even, >= 2.
        partial_rotary_factor: rotated fraction of a head.
        max_position_embeddings: longest sequence in tokens; the default of `original_max_position_embeddings`.

    Returns:
        None for "default"; else a new dict with plain ints, floats and lists and without null values.

    Raises:
        RopeScalingError: no mapping, unknown type, a key missing, unknown or with a value that makes no sense.
    """
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise RopeScalingError("", "a mapping or null", scaling)
    result = {key: value for key, value in scaling.items() if value is not None}
    rope_type = result.get("rope_type")
    if not isinstance(rope_type, str) or rope_type not in _KEYS:
        raise RopeScalingError(".rope_type", f"one of {', '.join(ROPE_TYPES)}", rope_type)
    required, optional = _KEYS[rope_type]
    for key in required:
        if key not in result:
            raise RopeScalingError(f".{key}", f"a value, which rope_type {rope_type!r} requires", None)
    for key in result:
        if key not in ("rope_type", *required, *optional):
            takes = ", ".join((*required, *optional)) or "none"
            raise RopeScalingError(f".{key}", f"no such key: rope_type {rope_type!r} takes {takes}", result[key])
    if "original_max_position_embeddings" in optional:
        result.setdefault("original_max_position_embeddings", max_position_embeddings)
    for key in result:
        if key != "rope_type":
            result[key] = _check_value(key, result[key], rotary_dim)
    _check_together(rope_type, result, rotary_dim, partial_rotary_factor)
    return None if rope_type == "default" else result


def _check_value(key: str, value: Any, rotary_dim: int) -> Any:
    if key == "truncate":
        if not isinstance(value, bool):
            raise RopeScalingError(f".{key}", "true or false", value)
        return value
    if key == "original_max_position_embeddings":
        # 2, not 1: longrope divides by its logarithm
        if type(value) is not int or not 2 <= value <= 2**24:
            raise RopeScalingError(f".{key}", "an integer in [2, 2**24]", value)
        return value
    if key in ("short_factor", "long_factor"):
        count = rotary_dim // 2
        if not isinstance(value, list | tuple) or len(value) != count:
            raise RopeScalingError(f".{key}", f"a list of rotary_dim / 2 = {count} numbers", value)
        return [_number(f".{key}[{i}]", 1e-30, 1e30, item) for i, item in enumerate(value)]
    if key == "factor":  # as many times longer as positions can be counted; dynamic loses its 1 beyond 2**53
        return _number(f".{key}", 1, 2**24, value)
    if key in ("mscale", "mscale_all_dim"):
        return _number(f".{key}", 0, 1e30, value)
    return _number(f".{key}", 1e-30, 1e30, value)  # a range in which fp32 neither overflows nor divides by zero


def _number(key: str, low: float, high: float, value: Any) -> float:
    if type(value) not in (int, float) or not low <= value <= high:
        raise RopeScalingError(key, f"a number in [{low}, {high}]", value)
    return float(value)


def _check_together(rope_type: str, scaling: dict[str, Any], rotary_dim: int, partial_rotary_factor: float) -> None:
    if rope_type == "dynamic" and rotary_dim == 2:
        raise RopeScalingError(".rope_type", "rotary_dim > 2 (it divides by rotary_dim - 2)", rope_type)
    if rope_type == "proportional" and partial_rotary_factor != 1:
        # It rotates whole heads, with frequency 0 beyond the fraction. transformers' Persimmon splits the head at the
        # fraction as well and then fails on the shapes, so there is no model to agree with.
        raise RopeScalingError(
            ".rope_type",
            f"another type: 'proportional' needs partial_rotary_factor 1, not {partial_rotary_factor}",
            rope_type,
        )
    if rope_type == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        expected = f"more than low_freq_factor = {scaling['low_freq_factor']}"
        raise RopeScalingError(".high_freq_factor", expected, scaling["high_freq_factor"])
    if rope_type == "yarn" and scaling.get("beta_fast", 32.0) < scaling.get("beta_slow", 1.0):
        expected = f"at least beta_slow = {scaling.get('beta_slow', 1.0)}"
        raise RopeScalingError(".beta_fast", expected, scaling.get("beta_fast", 32.0))
