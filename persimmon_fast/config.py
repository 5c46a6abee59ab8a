"""`PersimmonConfig`: the hyper-parameters of a Persimmon model, read from and written to `config.json`.

Choices: field names are transformers'; the class defaults are Persimmon-8B. Every value is checked when a config is
made, so no other module checks it again. Keys that this package does not use are kept in `extra` and written back. The
rotary parameters are three flat fields here; the file names them twice on writing, in the nested form that
transformers 5 reads and the flat form that transformers 4 reads.

Importing this module does not import torch: dtypes are names.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from persimmon_fast.config_file import CONFIG_NAME, ConfigError, ConfigFile, describe, refuse_quantized, short
from persimmon_fast.labels import PROBLEM_TYPES, check_labels
from persimmon_fast.rope_scaling import RopeScalingError, check_rope_scaling

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

TRAINED_ROPE_THETA = 25000.0  # Adept's; transformers 5 takes 10000 where a config names none
DTYPE_NAMES = ("float32", "float16", "bfloat16")
ROPE_PRECISIONS = ("fp32", "adept_fp16", "adept_bf16")

_MAX_INT32 = 2**31 - 1  # token ids and sizes are int32 in the kernels
_MAX_POSITIONS = 2**24  # fp32 angles hold each integer position exactly up to here
_MAX_LAYERS = 4096  # far above any model, small enough to list all tensor names
_MAX_FLOAT32 = 3.4e38
_MAX_FLOAT16 = 65504


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersimmonConfig(ConfigFile):
    """Hyper-parameters of a Persimmon model; immutable, checked when made.

    Args:
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream; a multiple of `num_attention_heads`.
        intermediate_size: neurons of the MLP.
        num_hidden_layers: decoder layers.
        num_attention_heads: heads of queries, keys and values alike (Persimmon has no grouped queries).
        max_position_embeddings: longest sequence in tokens, at most 2**24 (exact in fp32).
        hidden_act: "relu2", max(x, 0)^2, the only activation Persimmon was trained with.
        layer_norm_eps: added to the variance, dimensionless, > 0.
        initializer_range: standard deviation of fresh weights.
        use_cache: whether generation keeps keys and values.
        tie_word_embeddings: whether `lm_head` is the embedding.
        qk_layernorm: whether queries and keys pass a LayerNorm per head before rotary.
        qk_layernorm_per_head: whether each head has its own weights of it; else a layer's heads share them.
        hidden_dropout, attention_dropout: probabilities in [0, 1], active in training alone.
        partial_rotary_factor: rotated fraction of a head, in (0, 1]; `rotary_dim` must come out even.
        rope_theta: base of the rotary frequencies, > 1.
        rope_scaling: None, or a mapping with "rope_type" and the keys that type takes (see `rope_scaling.py`). Treat it
            as read-only.
        rope_precision: "fp32", or "adept_bf16" or "adept_fp16": rotated as by Adept's server, whose rotary tables are
            rounded to that dtype, which must then be the model's. docs/rotary_precision.md
        bos_token_id, pad_token_id: token ids below vocab_size, or None.
        eos_token_id: one id, several (kept as a tuple), or None. `eos_token_ids` is always a tuple.
        dtype: "float32", "float16", "bfloat16" or None; a torch.dtype is accepted. What "auto" loads.
        num_labels, id2label, label2id: outputs of the classification classes and their names; what is None follows from
            the others; of nothing, two labels.
        problem_type: the loss of PersimmonForSequenceClassification, "regression", "single_label_classification" or
            "multi_label_classification"; None: it follows from num_labels and the labels' dtype.
        classifier_dropout: probability in [0, 1] of PersimmonForTokenClassification; None: hidden_dropout.
        extra: other keys of the JSON file, kept as they are. Treat it as read-only.

    Raises:
        ConfigError: (a ValueError) any value outside of what is said above, naming key, expected and found.

    Source: transformers PersimmonConfig 4.57 and 5.23; sizes and theta from Adept's release of Persimmon-8B.
    """

    model_type: ClassVar[str] = "persimmon"

    vocab_size: int = 262144
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    max_position_embeddings: int = 16384
    hidden_act: str = "relu2"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    qk_layernorm: bool = True
    qk_layernorm_per_head: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    partial_rotary_factor: float = 0.5
    rope_theta: float = TRAINED_ROPE_THETA
    rope_scaling: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    rope_precision: str = "fp32"
    bos_token_id: int | None = 1
    eos_token_id: int | Sequence[int] | None = 2
    pad_token_id: int | None = None
    dtype: str | torch.dtype | None = None
    num_labels: int | None = None
    id2label: Mapping[int, str] | None = dataclasses.field(default=None, hash=False)
    label2id: Mapping[str, int] | None = dataclasses.field(default=None, hash=False)
    problem_type: str | None = None
    classifier_dropout: float | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    # ---- what follows from the fields ----

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Leading elements of each head that are rotated; even."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def qk_layernorm_shape(self) -> tuple[int, ...]:
        """Shape of a weight or bias of qk_layernorm."""
        return (self.num_attention_heads, self.head_dim) if self.qk_layernorm_per_head else (self.head_dim,)

    @property
    def rope_type(self) -> str:
        """ "default" or the "rope_type" of `rope_scaling`."""
        return "default" if self.rope_scaling is None else str(self.rope_scaling["rope_type"])

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, possibly none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    @property
    def num_parameters(self) -> int:
        """Parameters of the causal language model; a tied head counts once."""
        hidden, inner = self.hidden_size, self.intermediate_size
        norms = 4 * hidden + (4 * math.prod(self.qk_layernorm_shape) if self.qk_layernorm else 0)
        attention = 3 * hidden * hidden + 3 * hidden + hidden * hidden + hidden
        mlp = 2 * hidden * inner + inner + hidden
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * hidden
        return tables + self.num_hidden_layers * (norms + attention + mlp) + 2 * hidden

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """`dtype` as torch's object."""
        if self.dtype is None:
            return None
        import torch

        result = getattr(torch, str(self.dtype))
        assert isinstance(result, torch.dtype)
        return result

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked like a new one. Another number of labels drops their names, other
        names set their number."""
        if "id2label" in changes:
            changes = {"num_labels": None, "label2id": None, **changes}
        elif changes.get("num_labels", self.num_labels) != self.num_labels:
            changes = {"id2label": None, "label2id": None, **changes}
        return dataclasses.replace(self, **changes)

    def get_text_config(self) -> PersimmonConfig:
        """This config, as in transformers, where a model of several parts returns its language model's."""
        return self

    def with_dtype(self, dtype: torch.dtype) -> Self:
        """A copy that names `dtype`."""
        return self.replace(dtype=dtype)

    # ---- checks ----

    def __post_init__(self) -> None:
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"):
            self._check_int(key, 1, _MAX_INT32)
        self._check_int("num_hidden_layers", 1, _MAX_LAYERS)
        self._check_int("max_position_embeddings", 1, _MAX_POSITIONS)
        for key in ("use_cache", "tie_word_embeddings", "qk_layernorm", "qk_layernorm_per_head"):
            if not isinstance(getattr(self, key), bool):
                raise self._error(key, "true or false")
        if self.qk_layernorm_per_head and not self.qk_layernorm:
            raise self._error("qk_layernorm_per_head", "false, since qk_layernorm is false")
        if self.hidden_act != "relu2":
            raise self._error("hidden_act", "'relu2', the only activation of Persimmon")
        self._check_float("layer_norm_eps", "a finite number > 0", lambda x: 0 < x <= _MAX_FLOAT32)
        self._check_float("initializer_range", "a finite number >= 0", lambda x: 0 <= x <= _MAX_FLOAT32)
        self._check_float("hidden_dropout", "a probability in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_float("attention_dropout", "a probability in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_float("partial_rotary_factor", "a fraction in (0, 1]", lambda x: 0 < x <= 1)
        self._check_float("rope_theta", "a finite number > 1", lambda x: 1 < x <= _MAX_FLOAT32)
        self._check_shape()
        self._check_token_ids()
        self._check_dtype()
        self._check_classification()
        self._check_extra()
        try:
            scaling = check_rope_scaling(
                self.rope_scaling,
                rotary_dim=self.rotary_dim,
                partial_rotary_factor=self.partial_rotary_factor,
                max_position_embeddings=self.max_position_embeddings,
            )
        except RopeScalingError as error:
            raise ConfigError(f"rope_scaling{error.key}", error.expected, short.repr(error.found)) from None
        self._set("rope_scaling", scaling)
        self._check_rope_precision()

    def _set(self, key: str, value: Any) -> None:
        object.__setattr__(self, key, value)  # frozen: only __post_init__ may

    def _error(self, key: str, expected: str) -> ConfigError:
        return ConfigError(key, expected, describe(getattr(self, key)))

    def _check_int(self, key: str, low: int, high: int) -> None:
        value = getattr(self, key)
        if type(value) is not int or not low <= value <= high:
            raise self._error(key, f"an integer in [{low}, {high}]")

    def _check_float(self, key: str, expected: str, accepts: Any) -> None:
        value = getattr(self, key)
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max or not accepts(value):
            raise self._error(key, expected)
        self._set(key, float(value))

    def _check_shape(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise self._error("hidden_size", f"a multiple of num_attention_heads = {self.num_attention_heads}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError(
                "partial_rotary_factor",
                "an even number >= 2 of rotated elements of a head",
                f"int({self.head_dim} * {self.partial_rotary_factor}) = {self.rotary_dim}",
            )
        # Byte offsets are signed 64-bit; 8 bytes for the widest copy anybody makes of a parameter.
        if self.num_parameters > (2**63 - 1) // 8:
            raise ConfigError("hidden_size", "sizes whose bytes fit in 63 bits", f"{self.num_parameters} parameters")

    def _check_rope_precision(self) -> None:
        if not isinstance(self.rope_precision, str) or self.rope_precision not in ROPE_PRECISIONS:
            raise self._error("rope_precision", f"one of {', '.join(ROPE_PRECISIONS)}")
        if self.rope_precision == "fp32":
            return
        if self.rope_type != "default":
            raise self._error("rope_precision", f"fp32 with rope type {self.rope_type}, which Adept's code lacks")
        if self.rope_precision == "adept_fp16" and self.max_position_embeddings > _MAX_FLOAT16:
            expected = f"at most {_MAX_FLOAT16} with rope_precision adept_fp16, whose positions are float16"
            raise self._error("max_position_embeddings", expected)

    def _check_token_ids(self) -> None:
        expected = f"a token id in [0, {self.vocab_size - 1}] or null"
        for key in ("bos_token_id", "pad_token_id"):
            if not self._is_token_id(getattr(self, key)):
                raise self._error(key, expected)
        eos = self.eos_token_id
        if isinstance(eos, list | tuple):
            if not eos or not all(i is not None and self._is_token_id(i) for i in eos):
                raise self._error("eos_token_id", f"{expected}, or a list of ids")
            self._set("eos_token_id", tuple(eos))
        elif not self._is_token_id(eos):
            raise self._error("eos_token_id", f"{expected}, or a list of ids")

    def _is_token_id(self, value: Any) -> bool:
        return value is None or (type(value) is int and 0 <= value < self.vocab_size)

    def _check_dtype(self) -> None:
        if self.dtype is None:
            return
        is_torch_dtype = (type(self.dtype).__module__, type(self.dtype).__name__) == ("torch", "dtype")
        name = str(self.dtype).removeprefix("torch.") if is_torch_dtype or isinstance(self.dtype, str) else ""
        if name not in DTYPE_NAMES:
            raise self._error("dtype", f"one of {', '.join(DTYPE_NAMES)}, or null")
        self._set("dtype", name)

    def _check_classification(self) -> None:
        num_labels, id2label, label2id = check_labels(self.num_labels, self.id2label, self.label2id)
        self._set("num_labels", num_labels)
        self._set("id2label", id2label)
        self._set("label2id", label2id)
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise self._error("problem_type", f"one of {', '.join(PROBLEM_TYPES)}, or null")
        if self.problem_type == "single_label_classification" and num_labels == 1:
            raise ConfigError("num_labels", "at least 2 for single_label_classification", "1")
        if self.classifier_dropout is not None:
            self._check_float("classifier_dropout", "a probability in [0, 1], or null", lambda x: 0 <= x <= 1)

    def _check_extra(self) -> None:
        if not isinstance(self.extra, Mapping) or not all(isinstance(key, str) for key in self.extra):
            raise self._error("extra", "a mapping of names to JSON values")
        taken = (JSON_KEYS | {"model_type"}) & self.extra.keys()
        if taken:
            raise ConfigError("extra", "names that are no field of the config", short.repr(sorted(taken)))
        for key, value in (("head_dim", self.head_dim), ("num_key_value_heads", self.num_attention_heads)):
            found = self.extra.get(key)
            if found is not None and (type(found) is not int or found != value):
                raise ConfigError(key, f"{value}, which the other sizes imply", describe(found))
        refuse_quantized(self.extra)
        self._set("extra", copy.deepcopy(dict(self.extra)))

    # ---- reading ----

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A config from the content of a `config.json` of transformers 4 or 5.

        A key that is absent takes the class default. If no `rope_theta` is named anywhere, 25000 is taken and a
        UserWarning says so.

        Raises:
            ConfigError: the model is none, or a value is wrong, or two places of `data` disagree.
        """
        values = dict(data)
        model_type = values.pop("model_type", None)
        if model_type not in (None, cls.model_type):
            raise ConfigError("model_type", repr(cls.model_type), describe(model_type))
        old_dtype = values.pop("torch_dtype", None)
        if values.get("dtype") is None:  # where both are given, transformers reads `dtype`
            values["dtype"] = old_dtype
        values.update(_flatten_rope({key: values.pop(key, None) for key in _ROPE_KEYS}))
        fields = {key: values.pop(key) for key in _FIELD_NAMES & values.keys()}
        if values.get("architectures") == _ARCHITECTURES:
            del values["architectures"]
        try:
            config = cls(**fields, extra=values)
        except ConfigError as error:
            if not data.get("rope_scaling") and error.key.startswith("rope_scaling"):  # as the file names it
                key = error.key.replace("rope_scaling", "rope_parameters")
                raise ConfigError(key, error.expected, error.found) from None
            raise
        if "rope_theta" not in fields:
            warnings.warn(
                f"{CONFIG_NAME} names no rope_theta: taking {TRAINED_ROPE_THETA:g}, with which Persimmon was trained "
                "(transformers 5 silently takes 10000, which rotates every position by the wrong angle). "
                f'Write "rope_theta": {TRAINED_ROPE_THETA:g} to {CONFIG_NAME} to silence this.',
                stacklevel=2,
            )
        return config

    # ---- writing ----

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`, JSON types only; `from_dict` returns an equal config.

        `rope_parameters` is for transformers 5, the top-level `rope_theta`, `rope_scaling` and
        `partial_rotary_factor` are for transformers 4; each ignores or agrees with the other's.
        """
        result = {"architectures": list(_ARCHITECTURES), **copy.deepcopy(dict(self.extra))}
        result |= {key: getattr(self, key) for key in _FIELD_NAMES}
        for key, default in _OWN_FIELDS.items():
            if result[key] == default:
                del result[key]
        result["model_type"] = self.model_type
        result["rope_scaling"] = copy.deepcopy(self.rope_scaling)
        result["rope_parameters"] = {
            **copy.deepcopy(self.rope_scaling or {"rope_type": "default"}),
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.partial_rotary_factor,
        }
        if isinstance(self.eos_token_id, tuple):
            result["eos_token_id"] = list(self.eos_token_id)
        result |= self._labels_to_dict()
        return {key: value for key, value in result.items() if value is not None or key not in _CLASSIFICATION_KEYS}

    def _labels_to_dict(self) -> dict[str, Any]:
        """None for what is not written: the number, which is that of the names, and the names that stand for none."""
        assert self.id2label is not None
        assert self.label2id is not None
        written: dict[str, Any] = dict.fromkeys(("num_labels", "id2label", "label2id"))
        if (2, self.id2label, self.label2id) != check_labels(None, None, None):
            written["id2label"] = {str(i): name for i, name in self.id2label.items()}
            written["label2id"] = dict(self.label2id)
        return written


_FIELD_NAMES = frozenset(field.name for field in dataclasses.fields(PersimmonConfig)) - {"extra"}
# unknown to transformers: written only where they say something
_OWN_FIELDS = {"qk_layernorm_per_head": False, "rope_precision": "fp32"}
_CLASSIFICATION_KEYS = frozenset({"num_labels", "id2label", "label2id", "problem_type", "classifier_dropout"})
_ROPE_KEYS = frozenset({"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"})
JSON_KEYS = _FIELD_NAMES | _ROPE_KEYS | {"torch_dtype"}  # what config.json of transformers 4 or 5 may name
_ARCHITECTURES = ["PersimmonForCausalLM"]


def _flatten_rope(named: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary fields that a config file names, from its flat (v4) and nested (v5) forms, which must agree."""
    found: dict[str, list[tuple[str, Any]]] = {"rope_theta": [], "partial_rotary_factor": [], "rope_scaling": []}
    for key in ("rope_theta", "partial_rotary_factor"):
        found[key].append((key, named[key]))
    for source in ("rope_parameters", "rope_scaling"):
        value = named[source]
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(source, "a mapping or null", describe(value))
        rest = dict(value)
        for key in ("rope_theta", "partial_rotary_factor"):
            found[key].append((f"{source}.{key}", rest.pop(key, None)))
        old_type = rest.pop("type", None)  # the name of "rope_type" before transformers 4.43
        if rest.setdefault("rope_type", old_type) is None:
            rest["rope_type"] = "default" if old_type is None else old_type
        if old_type not in (None, rest["rope_type"]):
            raise ConfigError(f"{source}.type", f"rope_type = {describe(rest['rope_type'])}", describe(old_type))
        rest = {key: item for key, item in rest.items() if item is not None}
        if value:  # an empty mapping names nothing
            found["rope_scaling"].append((source, rest))
    result = {}
    for key, places in found.items():
        places = [(place, value) for place, value in places if value is not None]
        for place, value in places[1:]:
            first_place, first = places[0]
            if value != first:
                raise ConfigError(place, f"the same as {first_place} = {short.repr(first)}", describe(value))
        if places:
            result[key] = places[0][1]
    return result


__all__ = ["ConfigError", "PersimmonConfig"]
