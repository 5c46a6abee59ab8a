"""`config.json`: reading and writing it, and the error that its readers raise. The model's own fields are in config.py
and fuyu_config.py.

Importing this module does not import torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from persimmon_fast import strict_json
from persimmon_fast.hub import CONFIG_FILES, download_command, folder_of

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_NAME = "config.json"

_Config = TypeVar("_Config")

short = reprlib.Repr()
short.maxstring = short.maxother = 100
short.maxlevel = 3


class ConfigError(ValueError):
    """A configuration that describes no model of this package.

    Attributes:
        file: path of the file it came from, or None.
        key: the offending key.
        expected, found: the two halves of the message.
    """

    def __init__(self, key: str, expected: str, found: str, file: str | None = None) -> None:
        self.key, self.expected, self.found, self.file = key, expected, found, file
        where = f"{file}: " if file else ""
        super().__init__(f"{where}{key}: expected {expected}, found {found}")

    def in_file(self, file: str) -> ConfigError:
        """The same error with the file named."""
        return ConfigError(self.key, self.expected, self.found, file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigFile(ABC):
    """Hyper-parameters, checked when made and stored as `config.json`."""

    @classmethod
    @abstractmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A config from the content of a `config.json`."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`, JSON types only; `from_dict` returns an equal config."""

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked like a new one."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> Self:
        """`from_dict` of a file. Errors name it.

        Raises:
            ConfigError: there is no such file, or it is not a JSON object, or `from_dict` refuses it.
        """
        return _read_file(os.fspath(path), cls.from_dict)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **hub_options: Any) -> Self:
        """The config of a checkpoint folder, `folder/config.json`.

        Args:
            folder: or a name on the Hugging Face Hub. hub_options: revision, cache_dir, token, local_files_only, as in
                `hub.folder_of`.
        Raises:
            ConfigError: as `from_json_file`; a folder that does not exist gets a hint how to download one.
            HubError: a name on the Hub could not be downloaded.
        """
        return read_config_folder(folder_of(folder, CONFIG_FILES, **hub_options), cls.from_dict)

    def to_json_string(self) -> str:
        """`to_dict` as indented JSON with sorted keys."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `folder/config.json`, making the folder; an existing file is replaced in one step."""
        path = Path(folder) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{CONFIG_NAME}.tmp-{os.getpid()}")
        try:
            temporary.write_text(self.to_json_string(), encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_config_folder(folder: str | os.PathLike[str], from_dict: Callable[[Mapping[str, Any]], _Config]) -> _Config:
    """What `from_dict` makes of `folder/config.json`. Raises ConfigError as `ConfigFile.from_pretrained`."""
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        found = f"{'a file' if os.path.exists(folder) else 'nothing'} there{download_hint(folder)}"
        raise ConfigError("folder", f"a folder that holds {CONFIG_NAME}", found, folder)
    return _read_file(os.path.join(folder, CONFIG_NAME), from_dict)


def _read_file(file: str, from_dict: Callable[[Mapping[str, Any]], _Config]) -> _Config:
    try:
        return from_dict(strict_json.read_object(file))
    except strict_json.JSONFormatError as error:
        raise ConfigError("file", error.expected, error.found, file) from None
    except OSError as error:
        raise ConfigError("file", "a readable file", error.strerror or type(error).__name__, file) from None
    except ConfigError as error:
        raise error.in_file(file) from None


def refuse_quantized(extra: Mapping[str, Any]) -> None:
    """Raises ConfigError where the other keys of a config say that the weights are quantised."""
    found = extra.get("quantization_config")
    if found is not None:
        raise ConfigError("quantization_config", "none: quantised checkpoints are not supported", describe(found))


def download_hint(folder: str) -> str:
    """What to add to "no such folder": how to get a model if `folder` looks like a name on the Hugging Face Hub."""
    parts = folder.split("/")
    if len(parts) != 2 or not all(parts) or parts[0].startswith("."):
        return ""
    return (
        f"; is this a name on the Hugging Face Hub? Nothing is downloaded here: run "
        f"`{download_command(folder)}` and give that folder"
    )


def describe(value: Any) -> str:
    """A value as an error message shows it: short, with its type where the type is the news."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = short.repr(value)
    except ValueError:  # an integer too long to print
        text = "a huge number"
    return text if isinstance(value, str) or value is None else f"{text} ({type(value).__name__})"
