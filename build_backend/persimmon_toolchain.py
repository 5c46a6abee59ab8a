"""Finds what a build needs -- torch, compilers, CMake -- and says how to get what is missing.

Used by setup.py and by the PEP 517 backend beside this file. Standard library only: it runs before anything is
installed. Every function that cannot find a usable thing ends the build with one message that names the fix.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple, NoReturn

Version = tuple[int, ...]

TORCH_RANGE = "torch>=2.11,<2.14"
TORCH_FIRST, TORCH_END = (2, 11), (2, 14)
CMAKE_FIRST = (3, 25)
NVCC_FIRST = (12, 0)  # the first to know sm_90a
# Without a list and without a GPU: A100 code, which 8.6 and 8.9 run too, H100 code, and PTX for what comes later.
DEFAULT_CUDA_ARCHS = "8.0;9.0a+PTX"

build_summary = ""  # set by setup.py at the end of a build


def fail(problem: str, fix: str) -> NoReturn:
    """Ends the build. SystemExit, because pip and setuptools print its text alone, without a traceback."""
    raise SystemExit(f"\npersimmon_fast: {problem}\n  Fix: {fix}")


def parse_version(text: str) -> Version:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def output_of(*command: str) -> str:
    """What a command prints on both streams; "" when it cannot be run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout + result.stderr


# ---- torch ----


class Torch(NamedTuple):
    directory: Path
    version: str  # "2.13.0+cpu"
    cuda: str  # the CUDA version that torch was built with, "" for a CPU build
    git: str  # the commit it was built from

    @property
    def release(self) -> str:
        """The version without its build label, as a wheel can require it: "2.13.0"."""
        return self.version.partition("+")[0]


def check_torch_version(version: str) -> None:
    found = parse_version(version)
    if not TORCH_FIRST <= found < TORCH_END:
        fail(
            f"torch {version} in this environment is too {'old' if found < TORCH_FIRST else 'new'}: "
            f"this release builds against {TORCH_RANGE}",
            f"pip install '{TORCH_RANGE}', or install into a new virtual environment",
        )


def find_torch() -> Torch | None:
    """The torch to build against. Read from its version.py: importing torch would cost seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    directory = Path(spec.origin).parent
    facts: dict[str, object] = {}
    exec((directory / "version.py").read_text(), facts)
    torch = Torch(directory, str(facts["__version__"]), str(facts["cuda"] or ""), str(facts["git_version"]))
    check_torch_version(torch.version)
    return torch


# ---- CMake, Ninja ----


def cmake_version(path: str) -> Version:
    return parse_version(output_of(path, "--version").partition("version ")[2])


def find_tool(name: str) -> str | None:
    """Path of "cmake" or "ninja": that of the pip package, else one on PATH.

    The packages' launcher scripts import a module that pip's build isolation hides, so the binary is called.
    """
    attribute = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}[name]
    try:
        return str(Path(getattr(importlib.import_module(name), attribute)) / name)
    except (ImportError, AttributeError):  # AttributeError: the folder cmake/ of this repository, as a namespace
        return shutil.which(name)


def find_cmake() -> str:
    path = find_tool("cmake")
    fix = "pip install 'cmake>=3.25'"
    if path is None:
        fail("CMake was not found", fix)
    found = cmake_version(path)
    if found < CMAKE_FIRST:
        fail(f"CMake {'.'.join(map(str, found))} ({path}) is too old, 3.25 or newer is needed", fix)
    return path


# ---- C++ compiler ----

_CXX_PROBE = """
#include <concepts>
template <std::floating_point T> constexpr T twice(T x) { return x + x; }
constexpr _Float16 half = static_cast<_Float16>(twice(1.5f));
"""


def find_cxx() -> str:
    """The C++ compiler command ($CXX may carry arguments), checked for what the kernels use."""
    install = "install g++ 12 or newer (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or set CXX"
    command = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "")
    if not command:
        fail("no C++ compiler was found (looked for c++, g++, clang++ and $CXX)", install)
    if shutil.which(shlex.split(command)[0]) is None:
        fail(f"CXX={command} is not a program that can be run", install)
    probe = subprocess.run(
        [*shlex.split(command), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
        input=_CXX_PROBE,
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode != 0:
        version = output_of(*shlex.split(command), "--version").partition("\n")[0]
        reason = next((line for line in probe.stderr.splitlines() if "error" in line), probe.stderr.strip())
        fail(f"{command} ({version}) does not compile C++20 with _Float16: {reason}", install)
    return command


def check_python_headers() -> None:
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        fail(f"Python's C headers are missing ({include}/Python.h)", "Debian, Ubuntu: apt install python3-dev")


# ---- CUDA ----


class Cuda(NamedTuple):
    mode: str  # ON, OFF or KERNELS (see CMakeLists.txt)
    nvcc: str  # path, "" when OFF
    architectures: tuple[str, ...]  # in the form of CMAKE_CUDA_ARCHITECTURES
    reason: str  # why OFF


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = os.pathsep.join(f"{home}/bin" for home in homes if home)
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=folders)


def nvcc_version(nvcc: str) -> Version:
    return parse_version(output_of(nvcc, "--version").partition("release ")[2])


def cuda_arch_list() -> str:
    """TORCH_CUDA_ARCH_LIST, else the GPUs of this machine, else the default."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        return listed
    caps = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
    return ";".join(sorted({cap for cap in caps if re.fullmatch(r"\d+\.\d", cap)})) or DEFAULT_CUDA_ARCHS


def cuda_architectures(arch_list: str, known: set[str]) -> tuple[str, ...]:
    """CMAKE_CUDA_ARCHITECTURES for a list in the form of TORCH_CUDA_ARCH_LIST.

    "8.0;9.0+PTX" -> ("80-real", "90a-real", "90-virtual"). Entries below 8.0 (no bfloat16) are left out, as lists
    that container images set contain them. 9.0 becomes 9.0a: every 9.0 GPU runs it, and only it has wgmma and TMA.
    PTX is emitted without the suffix, because newer GPUs refuse PTX that has one.

    Args:
        known: what nvcc compiles for, as {"80", "86", ...}.
    """
    example = "write compute capabilities such as TORCH_CUDA_ARCH_LIST='8.0;8.6;9.0a+PTX', or unset it"
    architectures: list[str] = []
    for entry in re.split(r"[;,\s]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            fail(f"TORCH_CUDA_ARCH_LIST: '{entry}' is not a compute capability", example)
        major, minor, suffix, ptx = match.groups()
        if int(major) < 8:
            continue
        number = major + minor
        if number not in known:
            fail(
                f"TORCH_CUDA_ARCH_LIST: this nvcc does not compile for '{entry}', "
                f"it knows {', '.join(f'{cap[:-1]}.{cap[-1]}' for cap in sorted(known, key=int))}",
                example,
            )
        architectures.append(f"{number}{'a' if number == '90' else suffix}-real")
        if ptx:
            architectures.append(f"{number}-virtual")
    if not architectures:
        fail(f"TORCH_CUDA_ARCH_LIST='{arch_list}' names no GPU that the kernels run on (8.0 or newer)", example)
    return tuple(dict.fromkeys(architectures))


def find_cuda(torch: Torch) -> Cuda:
    """What PERSIMMON_CUDA (AUTO, ON, OFF, KERNELS) means here. AUTO never fails: it says why there is no CUDA."""
    wanted = os.environ.get("PERSIMMON_CUDA", "AUTO").upper()
    if wanted not in ("AUTO", "ON", "OFF", "KERNELS"):
        fail(f"PERSIMMON_CUDA={wanted} is unknown", "set it to AUTO (the default), ON, OFF or KERNELS")
    if wanted == "OFF":
        return Cuda("OFF", "", (), "PERSIMMON_CUDA=OFF")
    nvcc = find_nvcc()
    version = nvcc_version(nvcc) if nvcc else ()
    release = ".".join(map(str, version[:2]))
    problem, fix = "", ""
    if wanted != "KERNELS" and not torch.cuda:
        problem = f"torch {torch.version} is a CPU build"
        fix = "install a CUDA build of torch first (pytorch.org/get-started), or leave PERSIMMON_CUDA unset"
    elif not version:
        problem = f"{nvcc} does not run" if nvcc else "nvcc was not found"
        fix = "install the CUDA toolkit and put nvcc on PATH or set CUDA_HOME, or leave PERSIMMON_CUDA unset"
    elif version < NVCC_FIRST:
        problem = f"nvcc {release} ({nvcc}) is too old"
        fix = "install CUDA toolkit 12.0 or newer"
    elif wanted != "KERNELS" and version[0] != parse_version(torch.cuda)[0]:
        problem = f"nvcc {release} and torch's CUDA {torch.cuda} differ in their major version"
        fix = f"put an nvcc {torch.cuda.partition('.')[0]}.x on PATH or in CUDA_HOME"
    if problem:
        if wanted == "AUTO":
            return Cuda("OFF", "", (), problem)
        fail(f"PERSIMMON_CUDA={wanted}, but {problem}", fix)
    assert nvcc is not None
    known = set(re.findall(r"sm_(\d+)", output_of(nvcc, "--list-gpu-code")))
    return Cuda("KERNELS" if wanted == "KERNELS" else "ON", nvcc, cuda_architectures(cuda_arch_list(), known), "")
