"""tests/emulator.py compiles again what has changed."""

from __future__ import annotations

import os

import emulator
import pytest


@pytest.mark.skipif(emulator.missing() is not None, reason=f"no emulator: {emulator.missing()}")
def test_a_changed_header_makes_an_object_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(emulator, "ROOT", tmp_path)
    header = tmp_path / "csrc" / "number.h"
    header.parent.mkdir()
    header.write_text("constexpr int kNumber = 1;\n")
    source = tmp_path / "csrc" / "number.cu"
    source.write_text('#include "csrc/number.h"\nint number() { return kNumber; }\n')
    step = emulator._compile_step(source, tmp_path / "number.o", [])
    emulator._run(step)
    assert emulator._is_fresh(step)
    made_ns = step.output.stat().st_mtime_ns
    os.utime(header, ns=(made_ns + 1, made_ns + 1))
    assert not emulator._is_fresh(step)
