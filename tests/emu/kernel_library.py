"""Builds and calls the emulator's test kernels (*.cu in this folder). Needs no torch.

python tests/emu/kernel_library.py LIBRARY FAULTS    runs faults in a process of its own (test_faults.py)
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SCHEDULES = ("fifo", "reverse", "random", "warp", "pct")
ASYNC_POLICIES = ("late", "early", "random")


class _Args(ctypes.Structure):
    _fields_ = (("pointers", ctypes.c_void_p * 4), ("numbers", ctypes.c_int64 * 4))


class Stats(ctypes.Structure):
    """Counts since the library was loaded (struct Stats in csrc/emu/machine.h)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "launches", "blocks", "switches", "warp_operations", "mmas", "wgmmas", "ldmatrix_wavefronts",
            "ldmatrix_wavefronts_ideal", "stmatrix_wavefronts", "stmatrix_wavefronts_ideal",
        )
    )  # fmt: skip


class KernelError(RuntimeError):
    pass


class Library:
    def __init__(self, path: Path | str) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.run_case.restype = ctypes.c_char_p
        self._library.configure.restype = ctypes.c_char_p
        self._library.stats.restype = Stats

    def configure(
        self, sched: str = "fifo", async_policy: str = "late", seed: int = 1, resident: int = 1, architecture: int = 80
    ) -> None:
        message = self._library.configure(
            sched.encode(), async_policy.encode(), ctypes.c_uint64(seed), resident, architecture
        )
        if message is not None:
            raise ValueError(message.decode())

    def run(self, name: str, *arrays: np.ndarray, numbers: tuple[int, ...] = (), broken: bool = False) -> None:
        """Runs the case on up to four arrays; raises KernelError with the message of a fault."""
        args = _Args()
        args.pointers[: len(arrays)] = [array.ctypes.data for array in arrays]
        args.numbers[: len(numbers)] = numbers
        args.numbers[3] = broken
        message = self._library.run_case(name.encode(), ctypes.byref(args))
        if message is not None:
            raise KernelError(message.decode())

    def stats(self) -> Stats:
        return self._library.stats()


def build(variant: str) -> Path:
    import emulator

    folder = emulator.ROOT / "build" / f"emulator-tests-{variant}"
    include = [f"-I{emulator.ROOT}", "-isystem", str(emulator.cuda_include())]
    objects = []
    for source in sorted(HERE.glob("*.cu")):
        output = folder / f"{source.stem}.o"
        command = ["g++", "-x", "c++", *emulator.COMMON, *emulator.VARIANTS[variant], *include, "-MMD", "-MF",
                   str(output.with_suffix(".d")), "-c", str(source), "-o", str(output)]  # fmt: skip
        emulator._run(emulator._Step(output, command, [source]))
        objects.append(output)
    library = folder / "emulator_tests.so"
    command = ["g++", "-shared", *emulator.LINK[variant], *map(str, objects), "-o", str(library)]
    emulator._run(emulator._Step(library, command, objects))
    return library


def new_arrays() -> list[np.ndarray]:
    """What each fault gets: 2 KB of zeros four times."""
    return [np.zeros(512, np.int32) for _ in range(4)]


def run_fault(library: Library, name: str, number: int, broken: bool) -> tuple[str | None, list[np.ndarray]]:
    """The message of the fault, or None, and the arrays that the kernel has changed."""
    arrays = new_arrays()
    arrays[2][:] = 1 if name == "dependent_launch" else 0
    try:
        library.run(name, *arrays, numbers=(number,), broken=broken)
    except KernelError as error:
        return str(error), arrays
    return None, arrays


def main(path: str, settings: str) -> None:
    """settings: JSON list of [case, number, configuration]. Prints, per case: [message as it should be, message broken,
    message as it should be, once more]."""
    library = Library(path)
    results = []
    for name, number, configuration in json.loads(settings):
        library.configure(**configuration)
        results.append([run_fault(library, name, number, broken)[0] for broken in (False, True, False)])
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
