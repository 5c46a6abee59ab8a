"""The emulated CUDA kernels under AddressSanitizer, ThreadSanitizer and an adversarial schedule.

Each run is a pytest of its own over the tests marked `emu` and `sanitize`: a sanitizer must be preloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulator
import pytest

RUNS = {
    "reverse": ("plain", {"PF_EMU_SCHED": "reverse", "PF_EMU_ASYNC": "late"}),
    "asan": ("asan", {"PF_EMU_ASYNC": "late"}),
    "tsan": ("tsan", {"PF_EMU_ASYNC": "late", "PF_EMU_RESIDENT": "0"}),  # 0: every block at once
}


@pytest.mark.skipif(emulator.missing() is not None, reason=f"no emulator: {emulator.missing()}")
@pytest.mark.parametrize("run", RUNS)
def test_kernels_are_clean(run):
    variant, settings = RUNS[run]
    emulator.build(variant)  # before the sanitizer is preloaded into compilers
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "emu and sanitize", "-p", "no:cacheprovider",
         str(Path(__file__).parent)],
        env=os.environ | emulator.sanitizer_environment(variant) | settings,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-12000:]
