"""Loads the compiled module _C, which registers the ops, or says why it does not load.

torch comes first: _C links against its libraries.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sysconfig
from pathlib import Path

import torch


def _explain(error: ImportError) -> str:
    folder = Path(__file__).resolve().parent
    if not (folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
        return (
            f"persimmon_fast: {folder} holds no compiled module for Python {platform.python_version()}. In a source "
            "folder, run Python from another one to use the installed package, or build here: pip install -e ."
        )
    try:
        required = importlib.metadata.requires("persimmon_fast") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    built_for = next((item for item in required if item.startswith("torch==")), "another torch")
    return (
        f"persimmon_fast: the compiled module does not load beside torch {torch.__version__}; it was built for "
        f"{built_for}. Build it again for this torch: pip install --force-reinstall --no-deps <source> ({error})"
    )


try:
    from persimmon_fast import _C
except ImportError as error:
    raise ImportError(_explain(error)) from error

__all__ = ["_C"]
