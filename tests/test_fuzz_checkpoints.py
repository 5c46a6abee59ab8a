"""A sample of the damaged checkpoints of tools/fuzz_checkpoints.py (which runs 2,000), and a check of the tool."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from fuzz_checkpoints import fuzz


def test_no_damaged_checkpoint_crashes_hangs_or_loads_with_a_fault() -> None:
    results = list(fuzz(seed=0, indices=list(range(100)), jobs=2))
    faults = [result for result in results if result["outcome"] == "fault"]
    assert not faults, faults
    outcomes = [result["outcome"] for result in results]
    assert len(outcomes) == 100
    assert outcomes.count("refused") > 60
    assert outcomes.count("loaded") > 5, "harmless damage (bits of weights) must load, or nothing is tested behind it"
    assert len({result["mutation"] for result in results}) > 20


def test_the_tool_notices_faults_crashes_and_hangs() -> None:
    results = list(fuzz(seed=0, indices=[-3, -1, -2, 0], jobs=1, time_limit=2.0))
    assert [(result["index"], result["outcome"]) for result in results[:3]] == [
        (-3, "fault"),
        (-1, "fault"),
        (-2, "fault"),
    ]
    assert [result["detail"] for result in results[:3]] == ["on purpose", "the process died", "no answer in 2 s"]
    assert results[3]["outcome"] in ("refused", "loaded"), "the next worker goes on"
