"""Prefill alone: every product with its epilogue, attention, a decoder layer and whole prompts.

    python benchmarks/run.py prefill                           # CPU: four layers, short prompts
    python benchmarks/run.py prefill --device cuda             # Persimmon-8B: all 36 layers, up to 16,384 tokens
    python benchmarks/run.py prefill --device cuda --parts gemm attention

Products are compared with bare torch.mm of the same shapes, attention with every backend of torch's SDPA that takes
it, layer and prompt with plain torch under torch.compile. The matmul peak is taken first, last and in every round.
The last lines are three ratios: products to torch.mm (geometric mean), layer to torch.compile, attention to the best
SDPA. What cannot run here is listed with the reason.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import command_line, report
from benchmarks.cases import DTYPES
from benchmarks.limits import Limit, matmul_limit
from benchmarks.models import DECODER_OPS, describe, full_config, random_model, slice_config
from benchmarks.prefill_acceptance import acceptance, best_sdpa_near, print_acceptance
from benchmarks.prefill_cases import (
    COMPILED,
    GEMMS,
    OURS,
    Contest,
    Program,
    Setting,
    attention_contest,
    gemm_contest,
    layer_contest,
)
from benchmarks.prefill_prompts import Skip, first_line, modes_of, prompt_section
from benchmarks.report import console
from benchmarks.runner import TOLERANCE, BenchmarkError, has_kernel
from benchmarks.timing import Budget, CUDATimer, Stats, Timer, WallTimer, measure
from persimmon_fast import PersimmonConfig

PARTS = ("gemm", "attention", "layer", "prompt")

# Persimmon-8B in 16 bits: weights 18.8 GB and the down-projections once more in torch's order, 4.8. With a prompt of
# 16,384 tokens torch's own keys and values, views of packed projections, hold 36 x 537 MB = 19.3, ours and
# transformers' half of that, one at a time; activations of a layer, and what is compared in fp32 and fp64, up to 6.
# Work: that prompt is 317 TFLOP, under a second at half of an H100's peak, a case takes about 3 s, and 13 graphs of 10
# to 20 s each to compile are most of the run: about 5 minutes. All of this is arithmetic, not run on a GPU yet.
_FULL_BYTES = 55e9


@dataclass(frozen=True)
class Sizes:
    """Tokens that each part runs with; matmul: of the peak's square matrices, None: as `matmul_limit` chooses."""

    rows: tuple[int, ...]
    seqlens: tuple[int, ...]
    layer: int
    prompts: tuple[int, ...]
    matmul: int | None


ON_CUDA = Sizes((512, 2048, 16384), (2048, 8192, 16384), 2048, (512, 2048, 16384), None)
ON_CPU = Sizes((128, 512), (512, 2048), 512, (128, 512), 2048)
SMALL = Sizes((64, 150), (150, 256), 150, (64, 150), 256)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py prefill", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    command_line.add_options(parser)
    add = parser.add_argument
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--small", action="store_true", help="four layers of the shape of the small model, short inputs")
    shape.add_argument("--slice", action="store_true", help="on CUDA too four layers of the 8B shape instead of all")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help=f"only these of {', '.join(PARTS)}")
    add("--no-compile", action="store_true", help="nothing that torch.compile takes seconds to minutes for")
    add("--seconds", type=float, metavar="S", help="aim for the rounds of one case (default 3)")
    args = parser.parse_args(argv)
    command_line.check_options(parser, args, "seconds")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    started = time.perf_counter()
    skipped: list[dict[str, str]] = []
    device = torch.device(args.device)
    name, config = _model(args, skipped)
    result = command_line.new_result(args, name)
    result |= {"ops": [], "end_to_end": None, "prefill": None, "skipped": skipped}
    report.print_header(result)
    if missing := [op for op in DECODER_OPS if not has_kernel(op, device)]:
        skipped.append({"op": "prefill", "reason": f"no {device.type} kernel in this build for {', '.join(missing)}"})
    else:
        with torch.no_grad():
            PrefillBenchmark(args, config, skipped).run(args.parts, result)
    result["seconds"] = round(time.perf_counter() - started, 1)
    report.print_tables(result)
    report.write(result, args.out, _stem(args, name))
    if result["prefill"]:
        print_acceptance(result["prefill"]["acceptance"], args.device)
    return 0


def _stem(args: argparse.Namespace, name: str) -> str:
    """Name of the result files; a run of some parts does not overwrite a run of all."""
    parts = [] if set(args.parts) == set(PARTS) else args.parts
    return "-".join([args.device, args.dtype, {"Persimmon-8B": "full"}.get(name, name), "prefill", *parts])


def _model(args: argparse.Namespace, skipped: list[dict[str, str]]) -> tuple[str, PersimmonConfig]:
    if args.small:
        return "small", slice_config(small=True)
    if args.device == "cuda" and not args.slice:
        needed = _FULL_BYTES * DTYPES[args.dtype].itemsize / 2
        free = torch.cuda.mem_get_info()[0]
        if needed <= free:
            return "Persimmon-8B", full_config()
        reason = f"about {needed / 1e9:.0f} GB do not fit into the {free / 1e9:.0f} GB that are free: four layers run"
        skipped.append({"op": "prefill: all 36 layers", "reason": reason})
    return "slice", slice_config(small=False)


class PrefillBenchmark:
    """The model, the clocks and the peak of one run."""

    def __init__(self, args: argparse.Namespace, config: PersimmonConfig, skipped: list[dict[str, str]]) -> None:
        device, self._dtype = torch.device(args.device), DTYPES[args.dtype]
        self._skipped, self._compiled = skipped, not args.no_compile
        self._sizes = SMALL if args.small else ON_CUDA if args.device == "cuda" else ON_CPU
        model, workspace = random_model(config, self._dtype, device)
        for parameter in model.parameters():  # biases of zero would hide an epilogue that forgets them
            if parameter.dim() == 1:
                parameter.data.add_(workspace.randn(parameter.shape[0]), alpha=0.1)
        self._setting = Setting(model, workspace)
        self._peak = matmul_limit(self._dtype, device, self._sizes.matmul)
        self._timer: Timer = CUDATimer(device) if args.device == "cuda" else WallTimer(device)
        self._prompt_timer = WallTimer(device)  # the host is part of what a prompt costs
        self._budget = Budget(seconds=args.seconds or 3.0, min_rounds=5)
        if not self._compiled:
            self._skip("torch.compile", "--no-compile")

    def run(self, parts: list[str], result: dict[str, Any]) -> None:
        """Fills result["prefill"], and result["end_to_end"] with the prompts."""
        peak = {"first": self._peak_now("first")}
        cases = self._cases(parts)
        model = describe(self._setting.model)
        if "prompt" in parts:
            result["end_to_end"] = {"model": model, "sections": self._prompts(cases)}
        peak["last"] = self._peak_now("last")
        result["prefill"] = {
            "model": model,
            "peak_flops_per_s": {when: Stats.of(rates).to_dict() for when, rates in peak.items()},
            "peak_samples_flops_per_s": peak,
            "cases": cases,
            "acceptance": acceptance(cases),
        }

    def _peak_now(self, when: str) -> list[float]:
        """Samples of the peak in flops per second."""
        seconds = measure({"peak": self._peak.variant}, self._timer, Budget(seconds=1.0, min_rounds=5))
        rates = [self._peak.work / s for s in seconds["peak"]]
        console.print(f"matmul peak {when}: {Stats.of(rates).median / 1e12:.4g} TFLOP/s in torch.mm")
        return rates

    def _cases(self, parts: list[str]) -> list[dict[str, Any]]:
        setting, sizes = self._setting, self._sizes
        cases: list[dict[str, Any]] = []
        if "gemm" in parts:
            cases += [self._measure(gemm_contest(setting, gemm, rows)) for rows in sizes.rows for gemm in GEMMS]
        if "attention" in parts:
            cases += [self._measure(attention_contest(setting, seqlen)) for seqlen in sizes.seqlens]
        if "layer" in parts:
            cases.append(self._measure(layer_contest(setting, sizes.layer, best_sdpa_near(cases, sizes.layer))))
        return cases

    def _measure(self, contest: Contest) -> dict[str, Any]:
        torch._dynamo.reset()  # a graph per case; past eight it would not compile
        record = run_contest(
            contest, self._dtype, self._peak, self._timer, self._budget, self._skip, compiled=self._compiled
        )
        gc.collect()
        report.print_prefill_progress(record)
        return record

    def _prompts(self, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        longest = max(self._sizes.prompts)
        modes = modes_of(self._setting, best_sdpa_near(cases, longest), self._skip, compiled=self._compiled)
        return [
            prompt_section(self._setting, modes, tokens, self._peak, self._prompt_timer, self._budget, self._skip)
            for tokens in self._sizes.prompts
        ]

    def _skip(self, what: str, reason: str) -> None:
        self._skipped.append({"op": f"prefill: {what}", "reason": reason})


def run_contest(
    contest: Contest, dtype: torch.dtype, peak: Limit, timer: Timer, budget: Budget, skip: Skip, *, compiled: bool
) -> dict[str, Any]:
    """The record of a case. A rival that raises is left out and passed to `skip`; results that differ raise."""
    programs, difference = _that_run(contest, dtype, skip, compiled=compiled)
    samples = measure({name: p.run for name, p in programs.items()} | {"limit": peak.variant}, timer, budget)
    rate = peak.rate(samples.pop("limit"))
    variants = {}
    for name, seconds in samples.items():
        stats = Stats.of([1e6 * s for s in seconds])
        variants[name] = {
            "us": stats.to_dict(),
            "samples_us": [1e6 * s for s in seconds],
            "tflop_per_s": contest.flops / stats.median / 1e6,
            "share_of_limit": 1e6 * contest.flops / rate.median / stats.median,
        }
    return {
        "part": contest.part,
        "case": contest.label,
        "tokens": contest.tokens,
        "products": contest.products,
        "flops": contest.flops,
        "limit_flops_per_s": rate.to_dict(),
        "difference": difference,
        "variants": variants,
    }


def _that_run(contest: Contest, dtype: torch.dtype, skip: Skip, *, compiled: bool) -> tuple[dict[str, Program], float]:
    """The programs that run here, and the largest difference between a result and what is expected, relative to the
    largest value."""
    expected = contest.expected().double()
    allowed = TOLERANCE[dtype]
    programs: dict[str, Program] = {}
    largest = 0.0
    for name, program in contest.programs.items():
        if name == COMPILED and not compiled:
            continue
        if program.is_last_resort and not all(other.startswith(OURS) for other in programs):
            continue
        try:
            with console.status(f"{contest.label}: {name}"):  # torch.compile happens here
                out = program.run(0)
        except Exception as error:  # whatever a compiler or a backend makes of it
            if name.startswith(OURS):
                raise
            skip(f"{contest.label}, {name}", first_line(error))
            continue
        programs[name] = program
        if program.result is not None:
            found = program.result(out).double()
            difference = float((found - expected).abs().max() / expected.abs().max())
            if not difference <= allowed:
                raise BenchmarkError(
                    f"prefill: {contest.label}, {name}: result differs by {difference:.2e} of the largest value, "
                    f"allowed {allowed:.0e}"
                )
            largest = max(largest, difference)
    return programs, largest
