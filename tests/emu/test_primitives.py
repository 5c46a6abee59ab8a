"""What each primitive computes, and that no schedule or policy changes it or raises an alarm, under each sanitizer."""

from __future__ import annotations

import os
import subprocess
import sys

import clean_kernels
import emulator
import kernel_library
import pytest


@pytest.mark.parametrize("check", clean_kernels.CHECKS, ids=lambda check: check.__name__)
def test_primitive(library, check):
    library.configure(resident=4, architecture=90)
    check(library)


@pytest.mark.parametrize(
    "configuration", clean_kernels.configurations(), ids=lambda c: f"{c['sched']}-{c['async_policy']}"
)
def test_correct_kernels_raise_no_alarm(library, configuration):
    clean_kernels.check_all(library, configuration)


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_correct_kernels_raise_no_alarm_under_a_sanitizer(plain_path, variant):
    path = kernel_library.build(variant)
    run = subprocess.run(
        [sys.executable, clean_kernels.__file__, str(path)], capture_output=True, text=True, check=False,
        env=os.environ | emulator.sanitizer_environment(variant),
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-8000:]
    assert "WARNING" not in run.stderr
    assert "ERROR" not in run.stderr


def test_seed_decides_the_random_schedule(library):
    """The same seed runs the same interleaving, another one another."""

    def switches(seed: int) -> int:
        library.configure("random", seed=seed, resident=4)
        before = library.stats().switches
        clean_kernels.grid_barrier(library)
        return library.stats().switches - before

    first = [switches(seed) for seed in range(5)]
    assert first == [switches(seed) for seed in range(5)]
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sched": "lifo"}, "sched must be fifo, reverse, random, warp or pct, got 'lifo'"),
        ({"async_policy": "never"}, "async must be late, early or random, got 'never'"),
        ({"resident": -1}, r"resident must be 0 \(all blocks\) to 4096, got -1"),
    ],
)
def test_unknown_setting_is_refused(library, setting, message):
    with pytest.raises(ValueError, match=message):
        library.configure(**setting)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PF_EMU_SCHED", "lifo", "sched must be"),
        ("PF_EMU_ASYNC", "never", "async must be"),
        ("PF_EMU_SEED", "one", "PF_EMU_SEED must be a number, got 'one'"),
        ("PF_EMU_RESIDENT", "-1", "resident must be"),
        ("PF_EMU_MAX_SHARED_BYTES", "512", "dynamic shared memory; a block may use 512"),
    ],
)
def test_environment_variables_are_read(plain_path, variable, value, message):
    code = "import sys, kernel_library as k; k.Library(sys.argv[1]).run('array_beyond_the_launch')"
    run = subprocess.run(
        [sys.executable, "-c", code, str(plain_path)], capture_output=True, text=True, check=False,
        env=os.environ | {variable: value, "PYTHONPATH": str(kernel_library.HERE)},
    )  # fmt: skip
    assert run.returncode != 0
    assert message in run.stderr
