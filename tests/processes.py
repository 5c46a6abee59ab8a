"""For tests that start Python anew."""

from __future__ import annotations

import os
from pathlib import Path

import persimmon_fast

TESTS = Path(__file__).resolve().parent


def environment(**changes: str) -> dict[str, str]:
    """In which a process imports the persimmon_fast that is tested, the tests' helpers, and what PYTHONPATH names.

    `python -c` also looks into its working folder first: let that be none with a persimmon_fast in it.
    """
    tested = Path(persimmon_fast.__file__).resolve().parents[1]
    given = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    path = [entry for entry in given if entry not in (TESTS.parent, tested)] + [tested, TESTS]
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, path))} | changes
