"""A name on the Hugging Face Hub where a checkpoint folder is asked for.

A folder that exists is taken as it is. A name such as "adept/persimmon-8b-base" that is no folder is downloaded by
huggingface_hub, an optional package that is imported then alone, into its cache, or found there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

CONFIG_FILES = ("config.json",)
TOKENIZER_FILES = (
    "*.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)
_MODEL_FILES = ("config.json", "generation_config.json")
# In the order of preference: the second form is looked for where there is no file of the first.
_WEIGHT_FILES = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class HubError(OSError):
    """A name on the Hub that gave no files. `name`: the name; the message says what to do."""

    def __init__(self, name: str, problem: str, remedy: str) -> None:
        self.name = name
        super().__init__(f"{name}: no such folder here, and as a name on the Hugging Face Hub: {problem}. {remedy}")


def model_folder(name: str | os.PathLike[str], **options: Any) -> str:
    """`folder_of` with config, generation config and weights."""
    if not _is_downloaded(name):
        return os.fspath(name)
    for patterns in _WEIGHT_FILES:
        folder = folder_of(name, (*_MODEL_FILES, *patterns), **options)
        if any(Path(folder).glob(patterns[0])):
            return folder
    remedy = f"Name a model that has them; if it does, run `{download_command(str(name))}` and give that folder."
    raise HubError(str(name), "found neither model*.safetensors nor pytorch_model*.bin", remedy)


def folder_of(
    name: str | os.PathLike[str],
    files: tuple[str, ...],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> str:
    """The folder that `name` means.

    Args:
        name: a folder, or "organisation/model" on the Hub. What is neither is returned as it is.
        files: patterns of the files that are needed.
        revision: branch, tag or commit; None: main. cache_dir: None: huggingface_hub's. token: of an account, True: the
            stored one; None: the stored one where there is one. local_files_only: look into the cache alone.
    Raises:
        HubError: huggingface_hub is not installed, or it could not get the files.
    """
    if not _is_downloaded(name):
        return os.fspath(name)
    repository = str(name)
    try:
        from huggingface_hub import snapshot_download  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        problem = "huggingface_hub, which would download it, is not installed"
        raise HubError(
            repository, problem, "Run `pip install huggingface_hub`, or copy the model's folder here."
        ) from None
    try:
        return str(
            snapshot_download(
                repository,
                revision=revision,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                token=token,
                local_files_only=local_files_only,
                allow_patterns=list(files),
            )
        )
    except Exception as error:  # the libraries below it raise errors of their own
        raise HubError(repository, *_explained(error, repository, revision)) from error


def _is_downloaded(name: str | os.PathLike[str]) -> bool:
    return isinstance(name, str) and not os.path.exists(name) and _REPOSITORY.fullmatch(name) is not None


def _explained(error: Exception, repository: str, revision: str | None) -> tuple[str, str]:
    """(problem, remedy). The classes are told by name: huggingface_hub has moved them between its modules."""
    names = {cls.__name__ for cls in type(error).__mro__}
    page = f"https://huggingface.co/{repository}"
    if "GatedRepoError" in names:
        return "access is granted on request", f"Ask for it on {page}, then run `hf auth login` or give token=."
    if "RevisionNotFoundError" in names:
        return f"it has no revision {revision!r}", f"Choose one that {page}/tree/main lists."
    if "LocalEntryNotFoundError" in names or "OfflineModeIsEnabled" in names:
        by_hand = f"run `{download_command(repository)}` where there is one, and give that folder"
        remedy = f"Get a connection (HF_HUB_OFFLINE and local_files_only forbid one), or {by_hand}."
        return "it is not in the cache, and there is no connection to download it", remedy
    if "RepositoryNotFoundError" in names or "HFValidationError" in names:
        return "there is no such model, or it is private", "Check the name; for a private one, run `hf auth login`."
    first_line = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first_line}", f"Run `{download_command(repository)}` and give that folder."


def download_command(repository: str) -> str:
    """What a person types to get a folder."""
    return f"hf download {repository} --local-dir {repository.split('/')[1]}"
