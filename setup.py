"""Builds the extension with CMake; metadata is in pyproject.toml."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_RANGE = "torch>=2.11,<2.14"


class Torch(NamedTuple):
    directory: Path
    version: str
    cuda: str  # CUDA version of the build, "" for a CPU build


def find_torch() -> Torch | None:
    """The torch to build against, read from its version.py: importing torch would cost seconds per hook."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    directory = Path(spec.origin).parent
    facts: dict[str, object] = {}
    exec((directory / "version.py").read_text(), facts)
    return Torch(directory, str(facts["__version__"]), str(facts["cuda"] or ""))


def find_tool(name: str) -> str | None:
    """Path of cmake or ninja. The pip packages' launcher scripts import a module that build isolation hides,
    so the binary inside the package is called."""
    attribute = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}[name]
    try:
        return str(Path(getattr(importlib.import_module(name), attribute)) / name)
    except (ImportError, AttributeError):  # AttributeError: our own cmake/ folder as a namespace package
        return shutil.which(name)


def cuda_archs() -> str:
    """TORCH_CUDA_ARCH_LIST, else the GPUs of this machine, else what the kernels are tuned for."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return listed.replace(" ", ";")
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
        if found.returncode == 0 and (caps := sorted(set(found.stdout.split()))):
            return ";".join(cap + "a" if cap == "9.0" else cap for cap in caps)
    return "8.0;9.0a"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(f"persimmon_fast: building needs {TORCH_RANGE}, which this environment does not have")
        cmake = find_tool("cmake")
        if cmake is None:
            raise SystemExit("persimmon_fast: building needs cmake >= 3.25 (pip install cmake)")
        # One build tree per (Python, torch), kept between commands: rebuilds stay incremental.
        default = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch.version}"
        build = Path(os.environ.get("PERSIMMON_BUILD_DIR") or default)
        stamp = build / "torch.txt"
        if stamp.exists() and stamp.read_text() != str(torch.directory):
            shutil.rmtree(build)
        build.mkdir(parents=True, exist_ok=True)
        args = [
            f"-DCMAKE_BUILD_TYPE={os.environ.get('CMAKE_BUILD_TYPE', 'Release')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_DIR={torch.directory}",
            f"-DTORCH_VERSION={torch.version}",
            f"-DTORCH_CUDA={torch.cuda}",
            f"-DPERSIMMON_CUDA={os.environ.get('PERSIMMON_CUDA', 'AUTO')}",
            f"-DPERSIMMON_CUDA_ARCHS={cuda_archs()}",
        ]
        if ninja := find_tool("ninja"):
            args += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if launcher := shutil.which("sccache") or shutil.which("ccache"):
            args += [f"-DCMAKE_{lang}_COMPILER_LAUNCHER={launcher}" for lang in ("CXX", "CUDA")]
        args += shlex.split(os.environ.get("CMAKE_ARGS", ""))

        def run(*command: object) -> None:
            subprocess.check_call([cmake, *map(str, command)])

        run("-S", ROOT, "-B", build, *args)
        stamp.write_text(str(torch.directory))
        run("--build", build, "--parallel", os.environ.get("MAX_JOBS") or os.cpu_count())
        run("--install", build, "--prefix", Path(self.get_ext_fullpath(ext.name)).resolve().parent)


def requirements() -> list[str]:
    """The binary only loads into the torch that it was built for, so the wheel asks for exactly that one."""
    torch = find_torch()
    built_against = f"torch=={torch.version.split('+')[0]}" if torch else TORCH_RANGE
    return [built_against, "numpy", "sentencepiece", "safetensors", "tqdm", "typer"]


setup(
    install_requires=requirements(),
    ext_modules=[Extension("persimmon_fast._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
