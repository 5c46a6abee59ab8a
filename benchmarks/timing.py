"""How time is taken: rounds in which every variant runs once, after one another.

Measuring A fifty times and then B fifty times compares two states of the machine; `interleave` compares two programs.
The share of a limit is taken against the limit's own samples from the same rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

Variant = Callable[[int], object]  # takes the number of the call, by which it chooses a copy of its weights


@dataclass(frozen=True)
class Stats:
    """Order statistics of samples, in their unit."""

    n: int
    median: float
    p10: float
    p90: float
    min: float
    max: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Stats:
        if not samples:
            raise ValueError("no samples")
        ordered = sorted(samples)
        return cls(
            n=len(ordered),
            median=quantile(ordered, 0.5),
            p10=quantile(ordered, 0.1),
            p90=quantile(ordered, 0.9),
            min=ordered[0],
            max=ordered[-1],
        )

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of ascending samples, linear between neighbours."""
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


class Timer(Protocol):
    def __call__(self, variant: Variant, first_call: int, calls: int) -> float:
        """Seconds per call of `calls` calls numbered from first_call."""


class WallTimer:
    """Wall time of `calls` calls, divided by their number; on a GPU, until all of it is done."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def __call__(self, variant: Variant, first_call: int, calls: int) -> float:
        self._synchronize()
        start = time.perf_counter()
        for call in range(first_call, first_call + calls):
            variant(call)
        self._synchronize()
        return (time.perf_counter() - start) / calls


class CUDATimer:
    """Time between two events around each call, the L2 cache overwritten before it.

    The kernel that overwrites the cache also hides the launch of what is timed: the time is that of the GPU.
    Written for GPUs and not yet run on one.
    """

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._scratch = torch.empty(max(4 * l2_bytes, 256 << 20), dtype=torch.int8, device=device)

    def __call__(self, variant: Variant, first_call: int, calls: int) -> float:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for call, (start, end) in enumerate(events, first_call):
            self._scratch.zero_()
            start.record()
            variant(call)
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / calls / 1e3


@dataclass(frozen=True)
class Plan:
    """How often a variant runs: `calls` calls make a sample, and it takes part in every `stride`-th round."""

    calls: int
    stride: int


@dataclass(frozen=True)
class Budget:
    """How long a case may take.

    Args:
        seconds: aim for the rounds of one case.
        min_rounds, max_rounds: bounds that go before it.
        min_sample_seconds: a sample repeats a short call until it is about this long.
        min_slow_samples: of variants too slow to run in every round.
    """

    seconds: float = 3.0
    min_rounds: int = 7
    max_rounds: int = 50
    min_sample_seconds: float = 3e-4
    min_slow_samples: int = 2


def plan_rounds(seconds_per_call: Mapping[str, float], budget: Budget) -> tuple[int, dict[str, Plan]]:
    """(rounds, plan of each variant) that fit the budget. The first variant runs in every round; one that is much
    slower than it and would eat more than half of the budget, as the reference does on large shapes, sits out most."""
    calls = {name: max(1, math.ceil(budget.min_sample_seconds / max(t, 1e-9))) for name, t in seconds_per_call.items()}
    sample_seconds = {name: calls[name] * t for name, t in seconds_per_call.items()}
    first = next(iter(sample_seconds.values()))
    slow = {name for name, t in sample_seconds.items() if t * budget.min_rounds > budget.seconds / 2 and t > 4 * first}
    fast_seconds = sum(t for name, t in sample_seconds.items() if name not in slow)
    rounds = min(budget.max_rounds, max(budget.min_rounds, int(budget.seconds / fast_seconds)))
    plans = {}
    for name, t in sample_seconds.items():
        samples = rounds
        if name in slow:
            samples = min(rounds, max(budget.min_slow_samples, int(budget.seconds / 4 / t)))
        plans[name] = Plan(calls[name], rounds // samples)
    return rounds, plans


def interleave(
    variants: Mapping[str, Variant],
    timer: Timer,
    rounds: int,
    plans: Mapping[str, Plan] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each variant, one sample per round it takes part in.

    The order rotates from round to round, so that no variant always follows the same one. Calls are numbered
    through over all variants: with n copies of the weights, a copy was last touched n calls ago, whoever touched it.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    next_call = 0
    for round_index in range(rounds):
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            plan = plans[name] if plans else Plan(1, 1)
            if round_index % plan.stride == 0:
                samples[name].append(timer(variants[name], next_call, plan.calls))
                next_call += plan.calls
    return samples


def measure(variants: Mapping[str, Variant], timer: Timer, budget: Budget) -> dict[str, list[float]]:
    """`interleave` after one untimed call of each variant and one that tells how many rounds fit the budget."""
    estimates = {}
    for call, (name, variant) in enumerate(variants.items()):
        first = timer(variant, 2 * call, 1)
        # a first call this slow is not slow because it was the first
        estimates[name] = first if first > budget.seconds / 2 else timer(variant, 2 * call + 1, 1)
    rounds, plans = plan_rounds(estimates, budget)
    return interleave(variants, timer, rounds, plans)
