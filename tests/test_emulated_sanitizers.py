"""The emulated CUDA kernels under AddressSanitizer, ThreadSanitizer and an adversarial schedule."""

from __future__ import annotations

import emulator
import pytest


@pytest.mark.skipif(emulator.missing() is not None, reason=f"no emulator: {emulator.missing()}")
@pytest.mark.parametrize("run", emulator.RUNS)
def test_kernels_are_clean(run):
    variant, settings = emulator.RUNS[run]
    emulator.build(variant)  # before the sanitizer is preloaded into compilers
    result = emulator.run_sanitize_tests(variant, settings, "tests")
    assert result.returncode == 0, result.stdout[-12000:]
