"""The build: what it asks of pip, its error messages, its packaging; and the CUDA sources where nvcc is found.

Runs in a checkout, beside which build_backend/ lies; nothing here needs a GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import persimmon_build
import persimmon_toolchain as toolchain
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BACKEND = ROOT / "build_backend"
HERE = toolchain.Torch(
    Path(torch.__file__).parent, torch.__version__, torch.version.cuda or "", torch.version.git_version
)
KNOWN = {"75", "80", "86", "89", "90", "100", "120"}


def run_hook(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a hook of the backend as pip does: in a process of its own, in the source folder."""
    env = {**os.environ, "PYTHONPATH": str(BACKEND), **environment}
    return subprocess.run(
        [sys.executable, "-c", f"import persimmon_build; {code}"],
        cwd=cwd, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


# ---- What pip is asked for ----


def test_an_environment_with_everything_asks_for_nothing(monkeypatch):
    versions = {"setuptools": "84.2.1", "torch": "2.13.0", "cmake": "4.0.1", "ninja": "1.13"}
    monkeypatch.setattr(persimmon_build, "_target", lambda: ([], versions))
    assert persimmon_build.get_requires_for_build_wheel() == []


def test_an_empty_environment_asks_for_what_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setattr(persimmon_build, "_target", lambda: ([], {"setuptools": "65.5.0"}))
    program(tmp_path / "cmake", "echo cmake version 3.16.3")
    monkeypatch.setenv("CXX", shutil.which("c++") or "c++")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert persimmon_build.get_requires_for_build_wheel() == [
        "setuptools>=77", "torch>=2.11,<2.14", "cmake>=3.25", "ninja",
    ]  # fmt: skip
    assert persimmon_build.get_requires_for_build_sdist() == ["setuptools>=77"]


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("2.10.0+cu128", "too old"), ("1.13", "too old"), ("2.14.0", "too new"), ("2.14.0.dev20260101+cpu", "too new")],
)
def test_a_torch_that_does_not_fit_is_an_error_and_not_replaced(monkeypatch, version, verdict):
    monkeypatch.setattr(persimmon_build, "_target", lambda: ([], {"setuptools": "84", "torch": version}))
    with pytest.raises(SystemExit, match=rf"torch {re.escape(version)} .* {verdict}: .*\n  Fix: pip install 'torch>=2"):
        persimmon_build.get_requires_for_build_wheel()


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.12.1", "2.13.0+cpu"])
def test_every_torch_of_the_range_fits(version):
    toolchain.check_torch_version(version)


# ---- Errors: one message each, no traceback ----


def assert_one_error(result: subprocess.CompletedProcess[str], problem: str, fix: str) -> None:
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert re.search(rf"persimmon_fast: .*{problem}.*\n  Fix: .*{fix}", result.stderr), result.stderr


def test_no_compiler(tmp_path):
    result = run_hook("persimmon_build.get_requires_for_build_wheel()", PATH=str(tmp_path), CXX="")
    assert_one_error(result, r"no C\+\+ compiler was found", r"install g\+\+ 12 or newer")


def test_compiler_that_is_not_there():
    result = run_hook("persimmon_build.get_requires_for_build_wheel()", CXX="g++-99")
    assert_one_error(result, r"CXX=g\+\+-99 is not a program", r"install g\+\+ 12 or newer")


def test_old_compiler(tmp_path):
    old = program(
        tmp_path / "g++",
        'case "$*" in *--version*) echo g++ 9.4.0;; *) echo error: unrecognized option -std=c++20 >&2; exit 1;; esac',
    )
    result = run_hook("persimmon_build.get_requires_for_build_wheel()", CXX=old)
    assert_one_error(result, r"\(g\+\+ 9.4.0\) does not compile C\+\+20 .*unrecognized option", "or set CXX")


def test_old_or_missing_cmake(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "find_tool", lambda name: None)
    with pytest.raises(SystemExit, match=r"CMake was not found\n  Fix: pip install 'cmake>=3.25'"):
        toolchain.find_cmake()
    old = program(tmp_path / "cmake", "echo cmake version 3.16.3")
    monkeypatch.setattr(toolchain, "find_tool", lambda name: old)
    with pytest.raises(SystemExit, match=r"CMake 3\.16\.3 .* is too old, 3\.25 or newer .*\n  Fix: pip install 'cmake"):
        toolchain.find_cmake()


# ---- CUDA choices ----


@pytest.mark.parametrize(
    ("arch_list", "expected"),
    [
        ("8.0;8.6;8.9;9.0a+PTX", ("80-real", "86-real", "89-real", "90a-real", "90-virtual")),
        ("8.0 9.0", ("80-real", "90a-real")),
        ("7.0,7.5,8.0+PTX", ("80-real", "80-virtual")),
        ("12.0;10.0a", ("120-real", "100a-real")),
        ("8.0;8.0", ("80-real",)),
    ],
)
def test_arch_list(arch_list, expected):
    assert toolchain.cuda_architectures(arch_list, KNOWN) == expected


@pytest.mark.parametrize(
    ("arch_list", "problem"),
    [
        ("Ampere", "'Ampere' is not a compute capability"),
        ("8.0;sm_90", "'sm_90' is not"),
        ("8.0;9.9", "does not compile for '9.9', it knows 7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0"),
        ("7.0 7.5", "names no GPU that the kernels run on"),
    ],
)
def test_nonsense_arch_list(arch_list, problem):
    with pytest.raises(SystemExit, match=rf"TORCH_CUDA_ARCH_LIST.*{problem}.*\n  Fix: write compute capabilities"):
        toolchain.cuda_architectures(arch_list, KNOWN)


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "problem", "fix"),
    [
        ("", "release 13.0, V13", "is a CPU build", "install a CUDA build of torch"),
        ("13.0", "", "nvcc was not found", "install the CUDA toolkit"),
        ("13.0", "broken", "nvcc does not run", "install the CUDA toolkit"),
        ("13.0", "release 11.8, V11", "nvcc 11.8 .* is too old", "CUDA toolkit 12.0 or newer"),
        ("13.0", "release 12.4, V12", "differ in their major version", "put an nvcc 13.x on PATH"),
    ],
)
def test_cuda_that_cannot_be_built(monkeypatch, tmp_path, torch_cuda, nvcc, problem, fix):
    """PERSIMMON_CUDA=ON names the problem and the fix; AUTO builds without CUDA and keeps the problem as its reason."""
    path = program(tmp_path / "nvcc", f"echo {nvcc}") if nvcc else None
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: path)
    wanted = HERE._replace(cuda=torch_cuda)
    monkeypatch.setenv("PERSIMMON_CUDA", "ON")
    with pytest.raises(SystemExit, match=rf"PERSIMMON_CUDA=ON, but .*{problem}.*\n  Fix: .*{fix}"):
        toolchain.find_cuda(wanted)
    monkeypatch.setenv("PERSIMMON_CUDA", "AUTO")
    found = toolchain.find_cuda(wanted)
    assert found.mode == "OFF"
    assert re.search(problem, found.reason)


def test_cuda_modes(monkeypatch, tmp_path):
    nvcc = program(tmp_path / "nvcc", 'case "$1" in --version) echo release 13.0;; *) echo sm_80 sm_90;; esac')
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: nvcc)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    for wanted, torch_cuda, mode in [("AUTO", "13.0", "ON"), ("ON", "13.0", "ON"), ("KERNELS", "", "KERNELS")]:
        monkeypatch.setenv("PERSIMMON_CUDA", wanted)
        assert toolchain.find_cuda(HERE._replace(cuda=torch_cuda)) == (mode, nvcc, ("90a-real",), "")
    monkeypatch.setenv("PERSIMMON_CUDA", "OFF")
    assert toolchain.find_cuda(HERE._replace(cuda="13.0")).mode == "OFF"
    monkeypatch.setenv("PERSIMMON_CUDA", "MAYBE")
    with pytest.raises(SystemExit, match="PERSIMMON_CUDA=MAYBE is unknown\n  Fix: set it to AUTO"):
        toolchain.find_cuda(HERE)


# ---- Packaging ----


def test_the_wheel_asks_for_the_torch_it_was_built_against(tmp_path):
    result = run_hook(f"print(persimmon_build.prepare_metadata_for_build_wheel({str(tmp_path)!r}))")
    assert result.returncode == 0, result.stderr
    metadata = next(tmp_path.glob("*.dist-info")).joinpath("METADATA").read_text()
    assert f"\nRequires-Dist: torch=={HERE.release}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_sdist_holds_every_source(tmp_path):
    result = run_hook(f"print(persimmon_build.build_sdist({str(tmp_path)!r}))")
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = {"pyproject.toml", "setup.py", "CMakeLists.txt", "LICENSE"}
    for folder in ("csrc", "cmake", "build_backend", "persimmon_fast"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        sources |= {str(path.relative_to(ROOT)) for path in files if path.suffix not in (".so", ".pyc")}
    assert not sources - packed


def test_summary_reaches_the_terminal_of_pip(tmp_path):
    pexpect = pytest.importorskip("pexpect")
    hook = "import persimmon_build as b, persimmon_toolchain as t; t.build_summary = 'all'; b._show_summary()"
    installer = tmp_path / "installer.py"  # as pip does, it captures what the hook prints
    installer.write_text(
        "import os, subprocess, sys\n"
        f"env = {{**os.environ, 'PYTHONPATH': {str(BACKEND)!r}}}\n"
        f"subprocess.run([sys.executable, '-c', {hook!r}], env=env, capture_output=True, check=True)\n"
    )
    assert b"all" in pexpect.spawn(sys.executable, [str(installer)], timeout=30).read()
    assert subprocess.check_output([sys.executable, installer]) == b""  # a pipe: not written
    log = tmp_path / "log.txt"
    with log.open("w") as stream:
        print("from pip", file=stream, flush=True)
        subprocess.run([sys.executable, installer], stdout=stream, check=True)
    assert log.read_text() == "from pip\n"  # a file: neither written nor emptied
