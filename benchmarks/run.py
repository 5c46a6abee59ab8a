"""Measures every op and the whole decoder against the limits of this machine, plain torch and transformers.

    python benchmarks/run.py                      # Persimmon-8B shapes, bf16, all ops and end to end
    python benchmarks/run.py --quick              # a subset, under two minutes
    python benchmarks/run.py --op squared_relu_mlp end_to_end --dtype fp32
    python benchmarks/run.py decode               # decoding alone: contexts, batches, shares of zeros (decode --help)
    python benchmarks/run.py prefill              # prefill alone: products, attention, layer, prompts (prefill --help)

Writes a table to the terminal, a JSON with every sample and a PNG to --out. How it is measured: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch

# Last, so that an installed persimmon_fast, which has the compiled extension, goes before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import command_line, decode, end_to_end, prefill, report, runner
from benchmarks.cases import DTYPES, PERSIMMON_8B, SMALL, Case, Workspace
from benchmarks.limits import measure_limits
from benchmarks.timing import Budget, CUDATimer, Timer, WallTimer
from persimmon_fast import measure

END_TO_END = "end_to_end"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = sorted({case.op for case in runner.all_cases(PERSIMMON_8B)})
    add = parser.add_argument
    command_line.add_options(parser)
    add("--op", nargs="+", metavar="NAME", choices=[*names, END_TO_END], action="extend",
        help=f"only these: {', '.join([*names, END_TO_END])}")  # fmt: skip
    add("--quick", action="store_true", help="fewer shapes, fewer rounds, a smaller working set; no torch.compile")
    add("--small", action="store_true", help="shapes of the small model that ships with the package")
    add("--compile", action="store_true", help="also measure torch.compile of the plain version of each op")
    add("--thorough", action="store_true",
        help="end to end also with torch.compile and weight freezing (minutes, three times the memory)")  # fmt: skip
    add("--seconds", type=float, metavar="S", help="aim for the rounds of one case (default 3, quick 0.6)")
    add("--working-set", type=float, metavar="GB",
        help="memory to rotate over (default: three times the last-level cache, at least 1 GB; quick 0.3)")  # fmt: skip
    args = parser.parse_args(argv)
    command_line.check_options(parser, args, "seconds", "working_set")
    return args


def working_set_bytes(args: argparse.Namespace) -> int:
    if args.working_set:
        return int(args.working_set * 1e9)
    if args.quick:
        return 300_000_000
    return min(max(1_000_000_000, 3 * (measure.last_level_cache() or 0)), measure.total_memory() // 8)


def budget_of(args: argparse.Namespace) -> Budget:
    if args.quick:
        return Budget(seconds=args.seconds or 0.6, min_rounds=3, max_rounds=20, min_slow_samples=1)
    return Budget(seconds=args.seconds or 3.0)


def stem(args: argparse.Namespace) -> str:
    """Name of the result files; a run of some ops does not overwrite a run of all."""
    parts = [args.device, args.dtype, *(flag for flag in ("small", "quick") if getattr(args, flag)), *(args.op or [])]
    return "-".join(parts)


def measure_ops(args: argparse.Namespace, timer: Timer, budget: Budget, result: dict[str, Any]) -> None:
    """Fills result["ops"], result["limits"] and result["skipped"]."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    shapes = SMALL if args.small else PERSIMMON_8B
    wanted = [
        case
        for case in runner.all_cases(shapes)
        if (not args.op or case.op in args.op) and (case.quick or not args.quick)
    ]
    workspace = Workspace(device, dtype, working_set_bytes(args))
    limits = measure_limits(workspace.block, dtype, timer, budget, 512 if args.small and args.quick else None)
    result["limits"] = {
        "read_bytes_per_s": limits.samples["read bandwidth"],
        "matmul_flops_per_s": limits.samples["matmul peak"],
        "copy_bytes_per_s": limits.samples.get("copy bandwidth"),
    }
    report.print_limits(limits)
    for case in wanted:
        if not runner.has_kernel(case.op, device):
            reason = f"no {device.type} kernel in this build"
            if {"op": case.op, "reason": reason} not in result["skipped"]:
                result["skipped"].append({"op": case.op, "reason": reason})
            continue
        result["ops"].append(measure_case(case, workspace, limits, timer, budget, compiled=args.compile))
        report.print_progress(result["ops"][-1])


def measure_case(case: Case, workspace: Workspace, *args: Any, **options: Any) -> dict[str, Any]:
    prepared = case.prepare(workspace)
    record = runner.run_case(case, prepared, *args, **options)
    del prepared
    gc.collect()  # gigabytes of the case, before the next one allocates its own
    return record


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["decode"]:
        return decode.main(arguments[1:])
    if arguments[:1] == ["prefill"]:
        return prefill.main(arguments[1:])
    args = parse(arguments)
    started = time.perf_counter()
    result = command_line.new_result(args, (SMALL if args.small else PERSIMMON_8B).name)
    result |= {"limits": None, "ops": [], "end_to_end": None, "skipped": []}
    device = torch.device(args.device)
    timer: Timer = CUDATimer(device) if args.device == "cuda" else WallTimer(device)
    report.print_header(result)
    if not args.op or set(args.op) - {END_TO_END}:
        with torch.inference_mode():
            measure_ops(args, timer, budget_of(args), result)
    if not args.op or END_TO_END in args.op:
        # No gradients but ordinary parameters, as both models' users have them: with weights that are inference
        # tensors, torch multiplies the last token by an expanded copy of transformers' head (0.9 s of a prefill).
        with torch.no_grad():
            result["end_to_end"] = end_to_end.run(args, device, result["skipped"])
    result["seconds"] = round(time.perf_counter() - started, 1)
    report.print_tables(result)
    report.write(result, args.out, stem(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
