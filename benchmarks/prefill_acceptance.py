"""Three ratios that say whether prefill is as fast as the machine allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.prefill_cases import BARE, COMPILED, OURS, SDPA_BACKENDS
from benchmarks.report import console

Case = dict[str, Any]  # a record of `prefill.run_contest`
WANTED = {"gemm": 1.00, "layer": 1.08, "attention": 1.05}  # least ratios on an H100


def acceptance(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Ratios of the median time of a rival to that of ours, above 1 where ours is faster; None: not measured.

    gemm: to torch.mm, geometric mean over all products, an op of two products counting twice. attention: to the best
    backend of SDPA, one entry per length. layer: to torch.compile with the best backend.
    """
    of_part = {part: [case for case in cases if case["part"] == part] for part in WANTED}
    gemms = of_part["gemm"]
    rows = sorted({case["tokens"] for case in gemms})
    products = sum(case["products"] for case in gemms if case["tokens"] == rows[0])
    ratios = [ratio(case, BARE) for case in gemms for _ in range(case["products"])]
    measured = [r for r in ratios if r is not None]
    label = f"{products} products with their epilogues, {', '.join(f'{n:,}' for n in rows)} rows, geometric mean"
    entries = [
        # the mean of some of them would be another figure
        _entry("gemm", label, BARE, geometric_mean(measured) if ratios and len(measured) == len(ratios) else None)
    ]
    for case in of_part["attention"]:
        best = best_sdpa(case)
        entries.append(_entry("attention", case["case"], best, ratio(case, best)))
    for case in of_part["layer"]:
        entries.append(_entry("layer", case["case"], COMPILED, ratio(case, COMPILED)))
    return [entry for entry in entries if of_part[entry["part"]]]


def _entry(part: str, label: str, rival: str | None, value: float | None) -> dict[str, Any]:
    return {"part": part, "case": label, "rival": rival, "ratio": value, "wanted": WANTED[part]}


def median_us(case: Case, variant: str) -> float:
    us: float = case["variants"][variant]["us"]["median"]
    return us


def ratio(case: Case, rival: str | None) -> float | None:
    """Median of a rival over that of ours; None where the rival did not run."""
    if rival is None or rival not in case["variants"]:
        return None
    return median_us(case, rival) / median_us(case, OURS)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def best_sdpa(case: Case) -> str | None:
    """The fastest backend of an attention case; None: none ran."""
    return min((n for n in SDPA_BACKENDS if n in case["variants"]), key=lambda n: median_us(case, n), default=None)


def best_sdpa_near(cases: Sequence[Case], tokens: int) -> str | None:
    """The fastest backend at the measured length closest to `tokens`; None: attention was not measured."""
    attention = [case for case in cases if case["part"] == "attention"]
    return best_sdpa(min(attention, key=lambda case: abs(case["tokens"] - tokens))) if attention else None


def print_acceptance(entries: Sequence[dict[str, Any]], device: str) -> None:
    wanted = "" if device == "cuda" else "; the figures wanted are those of an H100"
    console.print(f"\nratios to ours, above 1 where ours is faster{wanted}")
    for entry in entries:
        value = "not measured, see above" if entry["ratio"] is None else f"{entry['ratio']:.3f}"
        rival = entry["rival"] or "SDPA"
        console.print(f"  {entry['part']}: {entry['case']}, {rival} / ours: {value} (wanted {entry['wanted']:.2f})")
