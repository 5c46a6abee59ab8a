"""Which persimmon_fast is tested: the installed one, or the checkout's where that has the extension built in place."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` and PYTHONPATH put the checkout first, and without _C its persimmon_fast/ would hide the
# installed package.
if not list(ROOT.glob("persimmon_fast/_C*.so")):
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def pytest_report_header() -> str:
    import torch  # noqa: F401  before _C, which needs its libraries

    import persimmon_fast
    from persimmon_fast import _C

    return f"{_C.build_summary}; running at {_C.cpu_isa()}\nfrom {Path(persimmon_fast.__file__).parent}"
