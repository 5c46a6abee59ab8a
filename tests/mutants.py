"""Seeded bugs in the CUDA kernels, each of which the emulated tests must find: a test of the tests.

    python tests/mutants.py [part of a name ...]     tries all of them, or those named; exit status 1 if one survives

A mutant is one edit of one source. Its kernel file is compiled with the edit, linked with the other objects, and the
tests marked `emu` and `sanitize` of its family run against it: under a reverse schedule with late copies, then, while
nothing was found, under AddressSanitizer, then under ThreadSanitizer with all blocks resident.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import emulator

ROOT = emulator.ROOT
FAMILIES = [
    "layer_norm",
    "stream",
    "linear_residual",
    "lm_head",
    "sample",
    "qk_norm_rope",
    "qkv_norm_rope",
    "squared_relu_mlp",
    "squared_relu_down",
    "gemm_sm90",
    "flash_attention",
    "flash_attention_sm90",
    "paged_attention",
]
TIMEOUT_S = 300  # an endless loop is found too


class Mutant(NamedTuple):
    """What is wrong, and the edit: `old` occurs once in `file` and becomes `new`."""

    what: str
    old: str
    new: str
    file: str = ""  # "": csrc/cuda/<family>.cu
    tests: str = ""  # the family's test file, "": tests/test_<family>.py
    # The kernel files that are compiled with it, (): <family>.cu. Of a function of a header that several of them hold
    # the linker takes the first, in alphabetical order.
    kernels: tuple[str, ...] = ()


def mutants(family: str) -> list[Mutant]:
    return importlib.import_module(f"mutations.{family}").MUTANTS


def all_names() -> list[str]:
    """family/number of every mutant."""
    return [f"{family}/{number}" for family in FAMILIES for number in range(len(mutants(family)))]


def lookup(name: str) -> tuple[str, Mutant]:
    family, _, number = name.partition("/")
    return family, mutants(family)[int(number)]


def write_overlay(name: str) -> Path:
    """A folder that holds the edited file at its place."""
    family, mutant = lookup(name)
    file = mutant.file or f"csrc/cuda/{family}.cu"
    source = (ROOT / file).read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(
            f"mutant {name} ({mutant.what}): {file} holds {source.count(mutant.old)} of {mutant.old!r}, not 1"
        )
    overlay = emulator.FOLDER / "mutants" / name
    path = overlay / file
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in overlay.glob("csrc/**/*.*"):  # by an earlier mutant of this number
        if left != path:
            left.unlink()
    edited = source.replace(mutant.old, mutant.new)
    if not path.exists() or path.read_text() != edited:
        path.write_text(edited)
    return overlay


def found_by(name: str) -> tuple[str, str] | None:
    """The run that finds the mutant and what it printed; None when it survives."""
    family, mutant = lookup(name)
    overlay = write_overlay(name)
    for run, (variant, settings) in emulator.RUNS.items():
        library = emulator.build(variant, overlay=overlay, changed=mutant.kernels or (family,), folder=overlay)
        try:
            settings = settings | {"PF_EMU_LIBRARY": str(library)}
            tests = f"tests/{mutant.tests or f'test_{family}.py'}"
            result = emulator.run_sanitize_tests(variant, settings, tests, timeout_s=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return run, f"did not end in {TIMEOUT_S} s"
        if result.returncode in (2, 3, 4, 5):  # pytest's own errors
            raise RuntimeError(f"mutant {name}: pytest could not run\n{result.stdout[-4000:]}")
        if result.returncode != 0:
            return run, result.stdout
    return None


def main(parts: list[str]) -> int:
    names = [name for name in all_names() if not parts or any(part in name for part in parts)]
    survivors = []
    for name in names:
        found = found_by(name)
        reason = next((line for line in (found[1] if found else "").splitlines() if line.startswith("E  ")), "")
        print(f"{name:28s} {found[0] if found else 'SURVIVES':9s} {lookup(name)[1].what}  {reason[:120]}", flush=True)
        if not found:
            survivors.append(name)
    print(f"{len(names) - len(survivors)} of {len(names)} found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:]))
