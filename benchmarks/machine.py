"""What a result must say about where it was taken."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from persimmon_fast import _C, __version__, measure

ROOT = Path(__file__).resolve().parents[1]
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def _first_line(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip().splitlines()[0]
    except (OSError, IndexError):
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _size(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def caches() -> dict[str, int]:
    """Bytes of the caches that core 0 sees: {"L1d": ..., "L2": ..., "L3": ...}; empty where Linux does not tell."""
    found = {}
    for index in sorted(_CACHES.glob("index*")):
        level, kind, size = (_first_line(index / name) for name in ("level", "type", "size"))
        if level and kind and size and kind != "Instruction":
            found[f"L{level}" + ("d" if kind == "Data" and level == "1" else "")] = _size(size)
    return found


def describe(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches_bytes": caches(),
        "memory_bytes": measure.total_memory(),
        "memory_available_bytes": measure.available_memory(),
        "load_average": os.getloadavg(),
        "cpu_isa": _C.cpu_isa(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernel": platform.release(),
        "transparent_huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": _command("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"),
        }
    return facts


def versions() -> dict[str, str | None]:
    def installed(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {
        "persimmon_fast": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": installed("transformers"),
        "python": platform.python_version(),
        "compiler": _C.compiler,
    }


def git_state() -> dict[str, Any]:
    """Commit of the source tree and whether tracked files differ from it; None where it is no checkout."""
    commit = _command("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _command("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if commit is None else bool(changes)}


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _command(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
