"""The labels of the classification classes: `num_labels`, `id2label` and `label2id` of a config, made to agree.

Torch-free, so that a config can be checked without importing torch.
"""

from collections.abc import Mapping
from typing import Any

from persimmon_fast.config_file import ConfigError, describe

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
_DEFAULT_NUM_LABELS = 2  # transformers'
_MAX_LABELS = 2**20


def _default_names(num_labels: int) -> dict[int, str]:
    """The names that transformers gives to labels that have none."""
    return {i: f"LABEL_{i}" for i in range(num_labels)}


def check_labels(num_labels: Any, id2label: Any, label2id: Any) -> tuple[int, dict[int, str], dict[str, int]]:
    """What the three fields mean, with None for those that are not named.

    Raises:
        ConfigError: naming the field.
    """
    if num_labels is not None and (type(num_labels) is not int or not 1 <= num_labels <= _MAX_LABELS):
        raise ConfigError("num_labels", f"an integer in [1, {_MAX_LABELS}]", describe(num_labels))
    names = None if id2label is None else _names(id2label)
    if names is None:
        names = _default_names(_DEFAULT_NUM_LABELS if num_labels is None else num_labels)
    if num_labels not in (None, len(names)):
        raise ConfigError("id2label", f"num_labels = {num_labels} names (or none)", f"{len(names)} names")
    if label2id is None:
        return len(names), names, _inverse(names)
    if not isinstance(label2id, Mapping) or not all(isinstance(name, str) for name in label2id):
        raise ConfigError("label2id", "a mapping of names to label ids", describe(label2id))
    ids = {name: _label_id(value) for name, value in label2id.items()}
    if None in ids.values():
        raise ConfigError("label2id", "a mapping of names to label ids", describe(label2id))
    if ids == _inverse(_default_names(len(ids))):  # transformers writes them beside the names of others
        ids = dict(_inverse(names))
    return len(names), names, {name: i for name, i in ids.items() if i is not None}


def _inverse(names: Mapping[int, str]) -> dict[str, int]:
    return {name: i for i, name in names.items()}


def _names(id2label: Any) -> dict[int, str]:
    """The mapping with integer keys: JSON has strings alone."""
    expected = "a mapping of the label ids 0, 1, ... to names"
    if not isinstance(id2label, Mapping):
        raise ConfigError("id2label", expected, describe(id2label))
    names = {_label_id(key): name for key, name in id2label.items()}
    if set(names) != set(range(len(id2label))) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ConfigError("id2label", expected, describe(dict(id2label)))
    return {i: names[i] for i in range(len(names))}


def _label_id(value: Any) -> int | None:
    if type(value) is int:
        return value
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else None
