"""From a case to its measured record: which cases there are, whether results agree, rates and shares."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from benchmarks.cases import Call, Case, Prepared, Shapes
from benchmarks.limits import Limits
from benchmarks.timing import Budget, Stats, Timer, Variant, measure

FAMILIES = (
    "layer_norm",
    "qk_norm_rope",
    "qkv_norm_rope",
    "linear_residual",
    "squared_relu_mlp",
    "flash_attention",
    "paged_attention",
    "lm_head",
)
# Results must agree to this, relative to the largest value: enough to see that the same thing was computed. That it
# was computed well is the tests' business.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
# Below this a call is all overhead (Python, dispatch, waking threads) and a share of the limit says nothing.
OVERHEAD_SECONDS = 20e-6
# Held to the copy bandwidth on a GPU, where copying is slower than reading.
WRITES_WHAT_IT_READS = ("layer_norm", "add_layer_norm", "qk_norm_rope", "qk_norm_rope_")


class BenchmarkError(RuntimeError):
    """A result that would mean nothing: wrong device, disagreeing outputs, no such op."""


def family(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def all_cases(shapes: Shapes) -> Iterator[Case]:
    for name in FAMILIES:
        yield from family(name).cases(shapes)


def has_kernel(op: str, device: torch.device) -> bool:
    key = device.type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"persimmon_fast::{op}", key)


def check_agreement(case: Case, prepared: Prepared) -> float | None:
    """Largest difference between ours and the reference, relative to the largest value. Ours and the plain versions
    must all be close to the reference: a comparison with something that computes something else raises."""
    if prepared.result is None:
        return None
    allowed = TOLERANCE[prepared.dtype]
    expected = prepared.result(prepared.reference(0)).double()
    differences = {}
    for name, call in {"ours": prepared.ours, **prepared.plain}.items():
        differences[name] = float((prepared.result(call(0)).double() - expected).abs().max() / expected.abs().max())
        if not differences[name] <= allowed:
            raise BenchmarkError(
                f"{case.op}, {case.label}, {name}: result differs from the reference by {differences[name]:.2e} of "
                f"its largest value, allowed {allowed:.0e}"
            )
    return differences["ours"]


def run_case(
    case: Case, prepared: Prepared, limits: Limits, timer: Timer, budget: Budget, *, compiled: bool
) -> dict[str, Any]:
    """Measures one case; times in the result are in microseconds."""
    difference = check_agreement(case, prepared)
    variants: dict[str, Variant] = {"ours": prepared.ours, "reference": prepared.reference}
    for name, call in prepared.plain.items():
        variants[f"torch: {name}"] = call
    if compiled:
        name, call = next(iter(prepared.plain.items()))
        variants[f"torch.compile: {name}"] = Call(torch.compile(call.function, dynamic=False), call.arguments)
    rates = (limits.bytes_per_second, limits.flops_per_second)
    memory_bound = prepared.counts.is_memory_bound(*rates)
    limit = limits.matmul
    if memory_bound:
        limit = limits.copy if limits.copy is not None and case.op in WRITES_WHAT_IT_READS else limits.read
    variants["limit"] = limit.variant
    samples = measure(variants, timer, budget)

    rate = limit.rate(samples.pop("limit"))
    work = prepared.counts.num_bytes if memory_bound else prepared.counts.flops
    limit_seconds = work / rate.median
    overhead_bound = limit_seconds < OVERHEAD_SECONDS
    measured: dict[str, dict[str, Any]] = {}
    for name, seconds in samples.items():
        stats = Stats.of([1e6 * s for s in seconds])
        measured[name] = {
            "us": stats.to_dict(),
            "samples_us": [1e6 * s for s in seconds],
            "gb_per_s": prepared.counts.num_bytes / stats.median / 1e3,
            "tflop_per_s": prepared.counts.flops / stats.median / 1e6,
            "share_of_limit": None if overhead_bound else 1e6 * limit_seconds / stats.median,
        }
    torch_names = [name for name in measured if name.startswith("torch")]
    best_torch = min(torch_names, key=lambda name: measured[name]["us"]["median"])
    return {
        "op": case.op,
        "case": case.label,
        "phase": case.phase,
        "shape": case.shape,
        "bytes": prepared.counts.num_bytes,
        "flops": prepared.counts.flops,
        "bound": "overhead" if overhead_bound else "memory" if memory_bound else "compute",
        "limit": {"name": limit.name, "per_s": rate.to_dict(), "us": 1e6 * limit_seconds},
        "working_set_bytes": prepared.working_set,
        "notes": prepared.notes,
        "difference": difference,
        "variants": measured,
        "best_torch": best_torch,
        "speedup_over_torch": measured[best_torch]["us"]["median"] / measured["ours"]["us"]["median"],
    }
