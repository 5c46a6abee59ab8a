"""Importing persimmon_fast: cheap, without side effects, and with a clear error where the extension does not load."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import persimmon_fast
from persimmon_fast import _C

PACKAGE = Path(persimmon_fast.__file__).parent


def python(code: str, folder: Path = PACKAGE.parent) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process that finds persimmon_fast in `folder`."""
    env = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def test_the_package_alone_loads_nothing_heavy():
    result = python("import persimmon_fast, sys; assert not {'torch', 'numpy', 'sentencepiece'} & set(sys.modules)")
    assert result.returncode == 0, result.stderr


def test_every_public_name_loads_without_cuda_and_in_little_time():
    # CPU time, because a busy machine stretches the clock: 0.05 s when this was written, torch itself 0.9 s
    code = """
import time, torch
start = time.process_time()
import persimmon_fast, sys
for name in persimmon_fast.__all__:
    getattr(persimmon_fast, name)
assert not torch.cuda.is_initialized()
assert "transformers" not in sys.modules
print(time.process_time() - start)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.3


def test_versions_agree():
    try:
        installed = importlib.metadata.version("persimmon_fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("persimmon_fast is built in place, not installed")
    assert installed == persimmon_fast.__version__


def test_the_module_was_built_for_this_torch():
    assert _C.torch_version == torch.__version__
    assert _C.build_summary.startswith(f"persimmon_fast {persimmon_fast.__version__}: CPU kernels scalar")
    assert _C.build_summary.endswith(f"torch {torch.__version__}")


@pytest.fixture
def copy_without_module(tmp_path):
    shutil.copytree(
        PACKAGE, tmp_path / "persimmon_fast", ignore=shutil.ignore_patterns("*.so", "assets", "__pycache__")
    )
    return tmp_path


def test_a_source_folder_says_what_to_do(copy_without_module):
    result = python("import persimmon_fast.ops", copy_without_module)
    assert "holds no compiled module for Python" in result.stderr
    assert "or build here: pip install -e ." in result.stderr


def test_a_module_for_another_torch_says_what_to_do(copy_without_module):
    # Not a library at all: the loader refuses it as it refuses one with undefined symbols.
    module = copy_without_module / "persimmon_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.write_bytes(b"not a library")
    result = python("import persimmon_fast.ops", copy_without_module)
    assert f"the compiled module does not load beside torch {torch.__version__}" in result.stderr
    assert "pip install --force-reinstall --no-deps" in result.stderr
