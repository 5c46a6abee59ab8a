"""What this machine can do: the limits that speeds are compared with, and its memory.

Rates are of the moment: other programs on the machine lower them, so compare only what one run measured.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch

from persimmon_fast import _C
from persimmon_fast.memory import empty_huge

_READ_BYTES = 2 * 2**30  # far more than any last-level cache holds


def read_bandwidth(num_bytes: int | None = None, repeats: int = 5) -> float:
    """Bytes per second at which all of torch's threads together read memory: median of `repeats` passes.

    Args:
        num_bytes: size of the buffer; None: 2 GiB, or a quarter of the available memory where that is less. Below
            the size of the last-level cache the result is the bandwidth of that cache.
        repeats: passes over the buffer, at least 1.
    Raises:
        ValueError: too few bytes for the threads.
    """
    if num_bytes is None:
        num_bytes = min(_READ_BYTES, available_memory() // 4)
    # written, since untouched pages are all the same zero page
    buffer = empty_huge((num_bytes,), torch.uint8).fill_(1)
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        num_read = _C.read_memory(buffer.data_ptr(), num_bytes)
        rates.append(num_read / (time.perf_counter() - start))
    return statistics.median(rates)


def matmul_flops(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations per second of torch's product of two [size, size] matrices on the CPU: median of
    `repeats` after one to warm up. A multiplication and an addition count as two."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _cgroup_bytes("memory.max")
    return physical if limit is None else min(physical, limit)


def available_memory() -> int:
    """Bytes that can still be allocated without swapping, as far as the kernel can tell."""
    available = _proc_bytes("/proc/meminfo", "MemAvailable")
    if available is None:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    return available if limit is None or used is None else min(available, max(0, limit - used))


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes; mapped weights count where they were touched."""
    # not getrusage: its ru_maxrss starts from the size of the process that started this one
    peak = _proc_bytes("/proc/self/status", "VmHWM")
    if peak is None:
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def last_level_cache() -> int | None:
    """Bytes of the largest cache of CPU 0; None where the kernel does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes, default=None)


def _proc_bytes(path: str, field: str) -> int | None:
    """A "Field:   1234 kB" line of a file under /proc."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def _cgroup_bytes(name: str) -> int | None:
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit
