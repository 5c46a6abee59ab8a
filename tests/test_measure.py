"""Measurements of this machine: that they measure what they say."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from helpers import ISAS, cpu_isa

from persimmon_fast import _C, measure


@pytest.mark.parametrize("threads", [1, 2])
def test_read_bandwidth_is_that_of_a_memory(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rate = measure.read_bandwidth(2**26 + 12345, repeats=3)
    finally:
        torch.set_num_threads(before)
    assert 1e8 < rate < 1e12 * threads  # a loop that the compiler removed would be far above


@pytest.mark.parametrize("isa", ISAS)
def test_read_memory_reads_whole_steps_of_unaligned_memory(isa: str) -> None:
    step = 2048 * torch.get_num_threads()
    memory = torch.ones(4 * step + 1, dtype=torch.uint8)
    with cpu_isa(isa):
        assert _C.read_memory(memory.data_ptr() + 1, 4 * step) == 4 * step
        assert _C.read_memory(memory.data_ptr(), 4 * step - 1) == 3 * step
    with pytest.raises(ValueError, match=rf"read_memory: expected bytes >= {step} .* got {step - 1}"):
        _C.read_memory(memory.data_ptr(), step - 1)


def test_memory_figures_are_consistent() -> None:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert resident <= measure.peak_memory() <= measure.total_memory()
    assert 0 < measure.available_memory() <= measure.total_memory()
    assert math.isfinite(measure.matmul_flops(torch.float32, size=64, repeats=1))
