"""`FuyuConfig`: the hyper-parameters of a Fuyu model, a Persimmon that also reads image patches.

Choices: the language model's hyper-parameters are a `PersimmonConfig`, which checks them. config.json is read in its
flat form (the language model's keys at the top) and in its nested form (`text_config`). It is written nested, with the
few keys at the top that transformers 4 reads there.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from persimmon_fast.config import JSON_KEYS, PersimmonConfig
from persimmon_fast.config_file import (
    ConfigError,
    ConfigFile,
    describe,
    read_config_folder,
    refuse_quantized,
    short,
)

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

_MAX_INT32 = 2**31 - 1
_ARCHITECTURES = ["FuyuForCausalLM"]
# Beside a `text_config`, transformers reads these of the language model's keys at the top as well. (4.57 writes all of
# them there, with Fuyu-8B's values for what `text_config` decides.)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_WRITTEN_TWICE = ("hidden_size", "initializer_range", "use_cache", "tie_word_embeddings", "dtype", *_TOKEN_IDS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuyuConfig(ConfigFile):
    """Hyper-parameters of a Fuyu model; immutable, checked when made. The defaults are Fuyu-8B.

    Args:
        text_config: of the language model; its dtype and initializer_range are those of the vision layer too.
        patch_size: height and width of an image patch in pixels.
        num_channels: colour channels of a pixel.
        image_token_id: the token whose embedding is replaced by that of an image patch.
        extra: other keys of the JSON file, kept as they are. Treat it as read-only.

    Raises:
        ConfigError: (a ValueError) any value outside of what is said above, naming key, expected and found.

    Source: transformers FuyuConfig 4.57 and 5.23.
    """

    model_type: ClassVar[str] = "fuyu"

    text_config: PersimmonConfig = dataclasses.field(default_factory=PersimmonConfig)
    patch_size: int = 30
    num_channels: int = 3
    image_token_id: int = 71011
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def patch_elements(self) -> int:
        """Values of a flattened patch: patch_size^2 * num_channels."""
        return self.patch_size**2 * self.num_channels

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return self.text_config.torch_dtype

    def get_text_config(self) -> PersimmonConfig:
        """The language model's config, as in transformers."""
        return self.text_config

    def with_dtype(self, dtype: torch.dtype) -> Self:
        """A copy that names `dtype`."""
        return self.replace(text_config=self.text_config.with_dtype(dtype))

    def __post_init__(self) -> None:
        if not isinstance(self.text_config, PersimmonConfig):
            raise ConfigError("text_config", "a PersimmonConfig", describe(self.text_config))
        for key in ("patch_size", "num_channels"):
            self._check_int(key, 1, _MAX_INT32)
        if self.patch_elements > _MAX_INT32:
            raise ConfigError("patch_size", f"patches of at most {_MAX_INT32} values", str(self.patch_elements))
        self._check_int("image_token_id", 0, self.text_config.vocab_size - 1)
        if not isinstance(self.extra, Mapping) or not all(isinstance(key, str) for key in self.extra):
            raise ConfigError("extra", "a mapping of names to JSON values", describe(self.extra))
        taken = (_FIELD_NAMES | JSON_KEYS | {"model_type"}) & self.extra.keys()
        if taken:
            raise ConfigError("extra", "names that are no field of the config", short.repr(sorted(taken)))
        refuse_quantized(self.extra)
        object.__setattr__(self, "extra", copy.deepcopy(dict(self.extra)))  # frozen: only __post_init__ may

    def _check_int(self, key: str, low: int, high: int) -> None:
        value = getattr(self, key)
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(key, f"an integer in [{low}, {high}]", describe(value))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A config from the content of a `config.json` of transformers 4 or 5, flat or with `text_config`.

        Raises:
            ConfigError: the model is no Fuyu, or a value is wrong; a key in `text_config` is named with that prefix.
        """
        values = dict(data)
        model_type = values.pop("model_type", None)
        if model_type not in (None, cls.model_type):
            raise ConfigError("model_type", repr(cls.model_type), describe(model_type))
        if values.get("architectures") == _ARCHITECTURES:
            del values["architectures"]
        top = {key: values.pop(key) for key in JSON_KEYS & values.keys()}
        nested = values.pop("text_config", None)
        own = {key: values.pop(key) for key in _FIELD_NAMES & values.keys()}
        if nested is None:
            text = PersimmonConfig.from_dict(top)
        elif not isinstance(nested, Mapping):
            raise ConfigError("text_config", "a mapping or null", describe(nested))
        else:
            try:
                text = PersimmonConfig.from_dict(_merged(top, nested))
            except ConfigError as error:
                raise ConfigError(f"text_config.{error.key}", error.expected, error.found) from None
        return cls(**own, text_config=text, extra=values)

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`, JSON types only, for transformers 4 and 5; `from_dict` returns an equal
        config."""
        text = self.text_config.to_dict()
        result = {"architectures": list(_ARCHITECTURES), **copy.deepcopy(dict(self.extra))}
        result |= {key: text[key] for key in _WRITTEN_TWICE}
        result |= {key: getattr(self, key) for key in _FIELD_NAMES}
        return result | {"model_type": self.model_type, "text_config": text}


_FIELD_NAMES = frozenset(field.name for field in dataclasses.fields(FuyuConfig)) - {"extra", "text_config"}


def _merged(top: Mapping[str, Any], nested: Mapping[str, Any]) -> dict[str, Any]:
    """`text_config` with the keys beside it that count, as in transformers: its head is tied where the top says so."""
    result = {key: top[key] for key in _TOKEN_IDS if key in top} | dict(nested)
    if top.get("tie_word_embeddings") is not None:
        result["tie_word_embeddings"] = top["tie_word_embeddings"]
    for key in ("dtype", "torch_dtype"):
        if top.get(key) is not None:
            result |= {"dtype": top[key], "torch_dtype": None}
            break
    return result


def read_config(folder: str | os.PathLike[str]) -> PersimmonConfig | FuyuConfig:
    """The config of a checkpoint folder, of the class that its model_type names.

    Raises:
        ConfigError: as `PersimmonConfig.from_pretrained`.
    """

    def from_dict(data: Mapping[str, Any]) -> PersimmonConfig | FuyuConfig:
        is_fuyu = data.get("model_type") == FuyuConfig.model_type
        return FuyuConfig.from_dict(data) if is_fuyu else PersimmonConfig.from_dict(data)

    return read_config_folder(folder, from_dict)
