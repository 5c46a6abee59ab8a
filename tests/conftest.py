"""Which persimmon_fast is tested: the installed one, or the checkout's where that has the extension built in place."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it: no test asks the network

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` and PYTHONPATH put the checkout first, and without _C its persimmon_fast/ would hide the
# installed package.
if not list(ROOT.glob("persimmon_fast/_C*.so")):
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def has_cuda() -> bool:
    """Whether tests marked `cuda` can run: a device, and CUDA kernels in the build."""
    import torch

    from persimmon_fast import _C

    return torch.cuda.is_available() and bool(_C.cuda_archs)


def pytest_report_header() -> list[str]:
    import torch  # noqa: F401  before _C, which needs its libraries

    import persimmon_fast
    from persimmon_fast import _C

    lines = [f"{_C.build_summary}; running at {_C.cpu_isa()}", f"from {Path(persimmon_fast.__file__).parent}"]
    if not has_cuda():
        lines.append("no CUDA device, or no CUDA kernels in the build: tests marked `cuda` are deselected")
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A thousand lines of skipped CUDA tests would hide the other skips."""
    if has_cuda():
        return
    deselected = [item for item in items if item.get_closest_marker("cuda")]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]


@pytest.fixture
def kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run, not their definitions in torch."""
    from persimmon_fast import ops

    monkeypatch.setattr(ops, "_warn_once", lambda message: pytest.fail(f"a slow path: {message}"))
