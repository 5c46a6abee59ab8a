"""PEP 517 backend: setuptools, built against the torch of the environment that is installed into.

An extension that uses torch's C++ API loads only into the torch that it was compiled for. A fixed list of build
requirements would have pip put some torch into its isolated build environment, and the result would not load beside
another one. So `requires` in pyproject.toml is empty, and the hooks below look at the target environment: what it has
is used from there, and pip is asked for the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from types import ModuleType
from typing import Any

import persimmon_toolchain as toolchain

SETUPTOOLS = "setuptools>=77"  # the first to know licence expressions (PEP 639)
Settings = dict[str, Any] | None

# Runs in the target environment: its search path, and the version of what a build may need.
_PROBE = """
import importlib.metadata, json, sys
versions = {}
for name in ("setuptools", "torch", "cmake", "ninja"):
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps([[entry for entry in sys.path if entry], versions]))
"""


def _target() -> tuple[list[str], dict[str, str]]:
    """Search path and versions of the environment that is installed into.

    pip isolates a build by PYTHONPATH and PYTHONNOUSERSITE alone; sys.executable stays the target's Python.
    """
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    path, versions = json.loads(subprocess.check_output([sys.executable, "-c", _PROBE], env=env, text=True))
    return path, versions


def _setuptools_missing(versions: dict[str, str]) -> list[str]:
    return [] if toolchain.parse_version(versions.get("setuptools", "")) >= (77,) else [SETUPTOOLS]


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return _setuptools_missing(_target()[1])


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    versions = _target()[1]
    missing = _setuptools_missing(versions)
    if "torch" in versions:
        toolchain.check_torch_version(versions["torch"])  # asking pip for another one would replace the user's
    else:
        missing.append(toolchain.TORCH_RANGE)
    if toolchain.parse_version(versions.get("cmake", "")) < toolchain.CMAKE_FIRST:
        cmake = shutil.which("cmake")
        if cmake is None or toolchain.cmake_version(cmake) < toolchain.CMAKE_FIRST:
            missing.append("cmake>=3.25")
    if "ninja" not in versions and shutil.which("ninja") is None:
        missing.append("ninja")
    toolchain.find_cxx()  # before pip downloads anything
    return missing


get_requires_for_build_editable = get_requires_for_build_wheel


def _setuptools() -> ModuleType:
    """setuptools' own backend, with the target environment's packages behind those of the isolated one."""
    sys.path += [entry for entry in _target()[0] if entry not in sys.path]
    from setuptools import build_meta

    return build_meta


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    return str(_setuptools().build_sdist(sdist_directory, config_settings))


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    return str(_setuptools().prepare_metadata_for_build_wheel(metadata_directory, config_settings))


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    return str(_setuptools().prepare_metadata_for_build_editable(metadata_directory, config_settings))


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    name = str(_setuptools().build_wheel(wheel_directory, config_settings, metadata_directory))
    _show_summary()
    return name


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    name = str(_setuptools().build_editable(wheel_directory, config_settings, metadata_directory))
    _show_summary()
    return name


def _show_summary() -> None:
    """Writes what was built to the terminal that pip runs in: pip keeps a successful build's output to itself.

    pip is the parent of this process, and its standard output is where its own messages go. Nothing is written when
    that is no terminal (redirected, piped, CI), or where there is no /proc.
    """
    with contextlib.suppress(OSError):
        output = os.open(f"/proc/{os.getppid()}/fd/1", os.O_WRONLY | os.O_NOCTTY)  # unlike open("w"): empties no file
        try:
            if os.isatty(output) and toolchain.build_summary:
                os.write(output, f"\n  {toolchain.build_summary}\n  ".encode())
        finally:
            os.close(output)
