"""What is asked for in huge pages, and the layout of the down-projection."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from persimmon_fast import memory

MIB = 1 << 20
SMAPS = Path("/proc/self/smaps")
THP = Path("/sys/kernel/mm/transparent_hugepage")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The arguments of every madvise: address, bytes, advice."""
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *arguments: calls.append(arguments))
    return calls


def unaligned(num_bytes: int) -> Tensor:
    """Begins 12 bytes behind the beginning of a page."""
    buffer = torch.empty(num_bytes + 2 * mmap.PAGESIZE, dtype=torch.uint8)
    begin = -buffer.data_ptr() % mmap.PAGESIZE + 12
    return buffer[begin : begin + num_bytes]


@pytest.mark.parametrize("num_bytes", [4 * MIB, 5 * MIB + 3])
def test_the_pages_that_hold_the_tensor(asked, num_bytes):
    tensor = unaligned(num_bytes)
    assert memory.use_huge_pages(tensor) is tensor
    assert asked == [(tensor.data_ptr() - 12, num_bytes + 12, mmap.MADV_HUGEPAGE)]


@pytest.mark.parametrize("tensor", [torch.empty(4 * MIB - 1, dtype=torch.uint8), torch.empty(MIB, 8, device="meta")])
def test_nothing_for_small_tensors_and_other_devices(asked, tensor):
    assert memory.use_huge_pages(tensor) is tensor
    assert not asked


def test_nothing_where_the_system_has_no_such_advice(monkeypatch):
    monkeypatch.setattr(memory, "_madvise", memory._madvise.__wrapped__)  # without what it remembers
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    tensor = torch.empty(4 * MIB, dtype=torch.uint8)
    assert memory.use_huge_pages(tensor) is tensor


def flags(address: int) -> list[str]:
    """What the system knows of the mapping that holds the address (proc(5), VmFlags)."""
    here = False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif here and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(not THP.exists() or "VmFlags" not in SMAPS.read_text(), reason="needs transparent huge pages")
def test_the_system_takes_it():
    with mmap.mmap(-1, 8 * MIB) as fresh:
        tensor = torch.frombuffer(fresh, dtype=torch.uint8)[100:]
        assert "hg" not in flags(tensor.data_ptr())
        memory.use_huge_pages(tensor)
        assert "hg" in flags(tensor.data_ptr())
        del tensor  # holds the mapping


def test_empty_huge(asked):
    tensor = memory.empty_huge([3, MIB], torch.float16)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, MIB), torch.float16, True)
    assert [num_bytes - tensor.nbytes for _, num_bytes, _ in asked] == [tensor.data_ptr() % mmap.PAGESIZE]


@pytest.mark.parametrize("columns", [slice(None), slice(1, -2)])
def test_one_row_per_neuron(asked, columns):
    weight = torch.arange(700 * 3000.0).view(700, 3000)[:, columns]
    laid_out = memory.to_neuron_major(weight)
    assert laid_out.stride() == (1, 700)
    assert torch.equal(laid_out, weight)
    assert len(asked) == 1
    assert memory.to_neuron_major(laid_out) is laid_out
    assert len(asked) == 1
