"""What every benchmark program asks for, and the head of every result."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cases import DTYPES
from persimmon_fast import ops

SCHEMA = 1  # of the JSON
DEFAULT_OUT = Path(__file__).parent / "results"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=tuple(DTYPES), default="bf16", help="of weights and activations (default bf16)")
    add("--threads", type=int, metavar="N", help="of torch (default: torch's choice)")
    add("--out", type=Path, metavar="DIR", default=DEFAULT_OUT, help="where the JSON and the PNG go")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, *positive: str) -> None:
    """Ends the program where an option cannot be met; `positive`: names of further options that must be > 0."""
    for name in ("threads", *positive):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be > 0, got {value}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device here")
    if ops._FORCE_REFERENCE:
        parser.error("PERSIMMON_FAST_FORCE_REFERENCE is set: it would measure the reference instead of the kernels")


def new_result(args: argparse.Namespace, shapes: str) -> dict[str, Any]:
    """What a result says about where and how it was taken; sets torch's threads first."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return {
        "schema": SCHEMA,
        "date": machine.now(),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "machine": machine.describe(torch.device(args.device)),
        "versions": machine.versions(),
        "git": machine.git_state(),
        "shapes": shapes,
    }
