"""Builds and loads persimmon_fast_emu: the CUDA kernels, executed on the CPU (csrc/emu, docs/emulator.md).

Three variants of one library: `plain`; `asan`, for out-of-bounds accesses and reads of data in flight; `tsan`, for data
races. A process loads one of them: the environment variable PF_EMU_VARIANT names it (default: plain), and the
sanitizers' run-time library must be preloaded, which `sanitizer_environment` does. Needs g++ and the headers of the
CUDA toolkit; no GPU and no nvcc.

    python tests/emulator.py [variant ...]      builds them ahead of the tests

PF_EMU_LIBRARY names a library that was built before.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    "plain": ["-O2", "-ftrivial-auto-var-init=pattern"],
    "asan": [
        "-O1", "-g", "-ftrivial-auto-var-init=pattern", "-fsanitize=address,undefined", "-fsanitize-recover=address",
        "-fno-sanitize=vptr",
    ],
    "tsan": ["-O1", "-g", "-fsanitize=thread", "-Wno-tsan"],
}  # fmt: skip
COMMON = [
    "-std=c++20",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",  # a CUtensorMap is passed by value
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-DPF_EMULATE",
]
LINK = {"plain": ["-Wl,-z,defs"], "asan": ["-fsanitize=address,undefined"], "tsan": ["-fsanitize=thread"]}
# Name: the variant, and the schedule, of each run of the tests marked `emu` and `sanitize`.
RUNS = {
    "reverse": ("plain", {"PF_EMU_SCHED": "reverse", "PF_EMU_ASYNC": "late"}),
    "asan": ("asan", {"PF_EMU_ASYNC": "late"}),
    "tsan": ("tsan", {"PF_EMU_ASYNC": "late", "PF_EMU_RESIDENT": "0"}),  # 0: every block at once
}
FOLDER = ROOT / "build" / f"emulator-{sys.implementation.cache_tag}-torch{torch.__version__}"
_lock = threading.Lock()


def variant() -> str:
    return os.environ.get("PF_EMU_VARIANT", "plain")


def cuda_include() -> Path | None:
    """The folder of cuda_fp16.h."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    return next((Path(h, "include") for h in homes if h and Path(h, "include", "cuda_fp16.h").exists()), None)


def missing() -> str | None:
    """Why the emulated kernels cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "g++ was not found"
    if cuda_include() is None:
        return "CUDA's headers were not found (looked for cuda_fp16.h in CUDA_HOME, CUDA_PATH, /usr/local/cuda)"
    return None


class _Step(NamedTuple):
    output: Path
    command: list[str]
    inputs: list[Path]  # beyond those of the dependency file


def _is_fresh(step: _Step) -> bool:
    """Whether the output is newer than everything that it was made of, by the same command."""
    stamp = step.output.with_suffix(".command")
    if not step.output.exists() or not stamp.exists() or stamp.read_text() != shlex.join(step.command):
        return False
    inputs = list(step.inputs)
    dependencies = step.output.with_suffix(".d")
    if dependencies.exists():
        listed = dependencies.read_text().replace("\\\n", " ").partition(": ")[2].split()
        # ROOT / path: ccache writes paths inside CCACHE_BASEDIR relative to it
        inputs += [ROOT / path for path in listed if (ROOT / path).is_relative_to(ROOT)]
    made = step.output.stat().st_mtime_ns
    return all(path.exists() and path.stat().st_mtime_ns <= made for path in inputs)


def _run(step: _Step) -> None:
    if _is_fresh(step):
        return
    step.output.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"CCACHE_BASEDIR": str(ROOT), "CCACHE_NOHASHDIR": "1"}  # one cache for all checkouts
    result = subprocess.run(step.command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(step.command)}\n{result.stderr[:8000]}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)
    step.output.with_suffix(".command").write_text(shlex.join(step.command))


def _compile_step(source: Path, output: Path, flags: list[str], overlay: Path | None = None) -> _Step:
    torch_include = Path(torch.__file__).parent / "include"
    include = [*([f"-I{overlay}"] if overlay else []), f"-I{ROOT}", "-isystem", str(cuda_include())]
    if source.suffix == ".cpp":
        include += ["-isystem", str(torch_include), "-isystem", str(torch_include / "torch/csrc/api/include")]
    launcher = [path] if (path := shutil.which("ccache")) else []
    command = [*launcher, "g++", "-x", "c++", *COMMON, *flags, *include, "-MMD", "-MF", str(output.with_suffix(".d"))]
    return _Step(output, [*command, "-c", str(source), "-o", str(output)], [source])


def build(name: str, *, overlay: Path | None = None, changed: Sequence[str] = (), folder: Path = FOLDER) -> Path:
    """Builds a variant, what changed of it, and returns the library.

    overlay: a folder of sources that take the place of the checkout's files of the same path; then only the kernel
    files csrc/cuda/<changed>.cu are compiled with them, into `folder`, and linked with the checkout's other objects.
    """
    # The op layer is not instrumented, so its objects are shared by the variants.
    steps = [
        _compile_step(source, FOLDER / "ops" / f"{source.stem}.o", ["-O1"])
        for source in sorted((ROOT / "csrc/ops/cuda").glob("*.cpp"))
    ]
    for source in [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "csrc/emu/library.cpp"]:
        if overlay and source.stem in changed:
            replaced = overlay / source.relative_to(ROOT)
            output = folder / name / f"{source.stem}.o"
            steps.append(_compile_step(replaced if replaced.exists() else source, output, VARIANTS[name], overlay))
        else:
            steps.append(_compile_step(source, FOLDER / name / f"{source.stem}.o", VARIANTS[name]))
    with _lock, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_run, steps))
        library = folder / f"persimmon_fast_emu_{name}.so"
        objects = [step.output for step in steps]
        torch_lib = Path(torch.__file__).parent / "lib"
        libraries = [str(torch_lib / f"lib{lib}.so") for lib in ("torch", "torch_cpu", "c10")]
        command = ["g++", "-shared", *LINK[name], *map(str, objects), *libraries, f"-Wl,-rpath,{torch_lib}"]
        _run(_Step(library, [*command, "-o", str(library)], objects))
    return library


def sanitizer_environment(name: str) -> dict[str, str]:
    """What a process that loads the variant needs in its environment."""
    if name == "plain":
        return {"PF_EMU_VARIANT": name}
    # Python does not load libstdc++ at its start, and AddressSanitizer would then not find what throws exceptions.
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={library}"], text=True).strip()
        for library in (f"lib{name}.so", "libstdc++.so.6")
    ]
    return {
        "PF_EMU_VARIANT": name,
        "LD_PRELOAD": ":".join(libraries),
        "OMP_NUM_THREADS": "1",  # libgomp is not instrumented: its threads would be reported
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0:detect_stack_use_after_return=0",
        # A race is reported each time, not once per process: each launch is to throw.
        "TSAN_OPTIONS": "report_signal_unsafe=0:suppress_equal_stacks=0:suppress_equal_addresses=0:atexit_sleep_ms=0",
    }


def run_sanitize_tests(
    variant: str, settings: dict[str, str], tests: str, timeout_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs what is marked `emu` and `sanitize` of `tests` in a pytest of its own: a sanitizer must be preloaded.
    The variant must be built; stdout of the result holds both streams."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "emu and sanitize", "-p", "no:cacheprovider", tests],
        cwd=ROOT,
        env=os.environ | sanitizer_environment(variant) | settings,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=timeout_s,
    )  # fmt: skip


@functools.cache
def load() -> None:
    """Registers torch.ops.persimmon_fast_emu in this process: the library PF_EMU_LIBRARY, else the checkout's."""
    torch.ops.load_library(os.environ.get("PF_EMU_LIBRARY") or build(variant()))


if __name__ == "__main__":
    for wanted in sys.argv[1:] or VARIANTS:
        print(build(wanted))
