"""Decoding alone: tokens per second over context, batch and share of zeros, beside whoever else decodes this model.

    python benchmarks/run.py decode                                   # the slice, everything
    python benchmarks/run.py decode --contexts 128 2048 --batches 1 --zeros 0 0.9 --no-transformers
    python benchmarks/run.py decode --full --checkpoint /data/persimmon   # all 36 layers, weights mapped from files

A cell is a context and a batch. Its sequences begin with keys and values that no model computed (`modes.Past`), and
every variant decodes the same tokens from there, again and again: a sample is a few steps, then the cache is wound
back. Ours runs at several shares of zeros after relu^2, which shifted biases of the up-projections make; 0 % is the
dense case by construction. The others read every weight whatever the zeros are: they run on the dense biases, and must
agree with ours there, and transformers once more at every other share.

Bytes of a step: every weight but the embedding, less the rows of the down-projections whose neuron is zero in the
whole batch, and the keys and values of all sequences. The limit is the bytes over the read bandwidth of the rounds.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import command_line, counts, report
from benchmarks.cases import DTYPES
from benchmarks.limits import read_limit
from benchmarks.llama_cpp_mode import MAX_CONTEXT, LlamaCppMode
from benchmarks.models import (
    DECODER_OPS,
    UpBiases,
    describe,
    full_config,
    load_checkpoint_model,
    random_model,
    slice_config,
    write_random_checkpoint,
)
from benchmarks.modes import Mode, OurMode, Past, UnavailableError
from benchmarks.report import console
from benchmarks.runner import BenchmarkError, has_kernel
from benchmarks.static_model import StaticMode
from benchmarks.timing import Budget, Stats, Variant, WallTimer, measure
from benchmarks.transformers_modes import row_major_weights, transformers_modes
from persimmon_fast import PersimmonForCausalLM
from persimmon_fast import measure as machine_limits

AGREEMENT = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # of logits, relative to the largest
_SPARE_BYTES = 2.0e9  # for everything that is neither weight nor cache

_READS_PER_SAMPLE = 8  # of the read limit, 0.5 GB each


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py decode", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    command_line.add_options(parser)
    add = parser.add_argument
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--small", action="store_true", help="four layers of the shape of the small model")
    shape.add_argument("--full", action="store_true", help="Persimmon-8B whole: 18.8 GB in 16 bits")
    add("--checkpoint", type=Path, metavar="DIR",
        help="--full with weights mapped from this folder; random ones are written there if there is none")  # fmt: skip
    add("--contexts", type=int, nargs="+", metavar="N", help="cached tokens (default 128 2048 16384)")
    add("--batches", type=int, nargs="+", metavar="N", help="sequences (default 1 4 16; --full on a CPU 1)")
    add("--zeros", type=float, nargs="+", metavar="SHARE", help="after relu^2 (default 0 0.5 0.9 0.95)")
    add("--no-transformers", action="store_true", help="ours alone, of what runs on torch")
    add("--no-compile", action="store_true", help="nothing that torch.compile takes minutes for")
    add("--quick", action="store_true", help="context 128, one sequence, zeros 0 and 0.9, no compile, few rounds")
    add("--seconds", type=float, metavar="S", help="aim for the rounds of one cell (default 20, quick 3)")
    args = parser.parse_args(argv)
    command_line.check_options(parser, args, "seconds")
    if args.checkpoint and not args.full:
        parser.error("--checkpoint needs --full")
    args.stem = _stem(args)
    whole = (128,) if args.quick else (128, 2048) if args.small else (128, 2048, 16384)
    args.contexts = args.contexts or list(whole)
    args.batches = args.batches or ([1] if args.quick or (args.full and args.device == "cpu") else [1, 4, 16])
    args.zeros = args.zeros or ([0.0, 0.9] if args.quick else [0.0, 0.5, 0.9, 0.95])
    for name, low, high in (("contexts", 1, 16_000_000), ("batches", 1, 4096), ("zeros", 0, 0.999)):
        for value in getattr(args, name):
            if not low <= value <= high:
                parser.error(f"--{name} must lie in {low} .. {high}, got {value}")
    # the dense case is what everything else is compared with
    args.zeros = sorted({0.0, *args.zeros})
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    started = time.perf_counter()
    result = command_line.new_result(args, "Persimmon-8B" if args.full else "slice")
    result |= {"ops": [], "end_to_end": None, "decode": None, "skipped": []}
    report.print_header(result)
    with torch.no_grad():
        result["decode"] = run(args, result["skipped"])
    result["seconds"] = round(time.perf_counter() - started, 1)
    report.print_tables(result)
    report.write(result, args.out, args.stem)
    return 0


def _stem(args: argparse.Namespace) -> str:
    """Name of the result files; a run of some cells does not overwrite a run of all."""
    parts = [args.device, args.dtype, "full" if args.full else "small" if args.small else "slice", "decode"]
    parts += ["quick"] * args.quick
    for name in ("contexts", "batches", "zeros"):
        if values := getattr(args, name):
            parts.append("_".join([name, *(f"{value:g}" for value in values)]))
    return "-".join(parts)


@dataclass(frozen=True)
class Cell:
    """`rows` sequences of `context` cached tokens each."""

    context: int
    rows: int

    @property
    def label(self) -> str:
        return f"context {self.context:,}, {'1 sequence' if self.rows == 1 else f'{self.rows} sequences'}"


class DecodeBenchmark:
    """The model, its rivals, the clock and the limit of one run."""

    def __init__(self, args: argparse.Namespace, skipped: list[dict[str, str]]) -> None:
        self.device, self.dtype, self._skipped = torch.device(args.device), DTYPES[args.dtype], skipped
        self.model, block = _model_and_block(args, self.device, self.dtype)
        self.config = self.model.config
        self._generator = torch.Generator().manual_seed(1)
        with console.status("biases for each share of zeros"):
            self.biases = UpBiases(self.model, self._tokens(64), args.zeros)
        self._timer = WallTimer(self.device)
        self._read = read_limit(lambda: block)
        self._budget = Budget(seconds=args.seconds or (3.0 if args.quick else 20.0), min_rounds=3 if args.quick else 5)
        self._steps = 16 if self.device.type == "cuda" else 4  # of a sample
        self.difference = 0.0  # the largest so far between logits of two modes, relative to the largest logit
        self.ours = [
            OurMode("persimmon_fast, " + (f"{zeros:.0%} zeros" if zeros else "dense"), self.model, zeros)
            for zeros in args.zeros
        ]
        self.rivals = self._rivals(args, compiled=not (args.quick or args.no_compile))

    def cell(self, cell: Cell) -> dict[str, Any] | None:
        """The section of a cell; None where its cache does not fit."""
        steps = self._steps
        modes = self._that_fit(cell, steps)
        if not modes:
            return None
        torch._dynamo.reset()  # a graph per cell; past eight it would run uncompiled
        past = Past(self.config, cell.rows, cell.context, steps, self.dtype, self.device)
        kinds: dict[str, Mode] = {}
        for mode in modes:
            mode.take_over(past, kinds.get(mode.cache_kind))
            kinds.setdefault(mode.cache_kind, mode)
        del past
        tokens = self._tokens(cell.rows * steps).view(steps, cell.rows, 1)
        self._check_agreement(modes, tokens[0])
        zeros = {mode.zeros: self._zeros(mode, tokens[0]) for mode in self.ours}
        seconds = measure(
            {mode.name: self._variant(mode, tokens) for mode in modes}
            # llama.cpp's threads spin on for a while after a call, and slow down what comes next
            | {"rest": lambda call: time.sleep(0.1), "limit": self._limit},
            self._timer,
            self._budget,
        )
        del seconds["rest"]
        for mode in modes:
            mode.drop_cache()
        gc.collect()
        return self._section(cell, modes, zeros, seconds)

    def _variant(self, mode: Mode, tokens: Tensor) -> Variant:
        def variant(call: int) -> None:
            self.biases.use(mode.zeros)
            mode.rewind()
            mode.decode(tokens)

        return variant

    def _limit(self, call: int) -> None:
        """Reads for about as long as a sample decodes: the first moments after a rest are slower."""
        for part in range(_READS_PER_SAMPLE):
            self._read.variant(call * _READS_PER_SAMPLE + part)

    def _section(
        self,
        cell: Cell,
        modes: list[Mode],
        zeros: dict[float | None, tuple[float, float]],
        seconds: dict[str, list[float]],
    ) -> dict[str, Any]:
        rate = self._read.rate([s / _READS_PER_SAMPLE for s in seconds.pop("limit")])
        dense_bytes = self._step_bytes(cell, 0.0)
        variants = {}
        for mode in modes:
            samples = [cell.rows * self._steps / s for s in seconds[mode.name]]
            stats = Stats.of(samples)
            is_ours = isinstance(mode, OurMode)
            mean_zeros, common_zeros = zeros[mode.zeros] if is_ours else (0.0, 0.0)
            step_bytes = self._step_bytes(cell, common_zeros)
            limit, dense_limit = (cell.rows * rate.median / b for b in (step_bytes, dense_bytes))
            variants[mode.name] = {
                "tokens_per_s": stats.to_dict(),
                "samples_tokens_per_s": samples,
                "bytes_per_token": step_bytes / cell.rows,
                "limit_tokens_per_s": limit,
                "share_of_limit": stats.median / limit,
                "share_of_dense_limit": stats.median / dense_limit,
                "zeros": mean_zeros if is_ours else None,
                "zeros_common_to_batch": common_zeros if is_ours else None,
            }
            console.print(f"  {cell.label}: {mode.name}: {stats.median:.4g} tokens/s, {stats.median / limit:.0%}")
        return {
            "title": f"decode, {cell.label}",
            "kind": "decode",
            "context": cell.context,
            "batch_size": cell.rows,
            "steps_per_sample": self._steps,
            "read_bytes_per_s": rate.to_dict(),
            "logits_difference": self.difference,
            "transformers_default": next((mode.name for mode in modes if mode.is_default), None),
            "variants": variants,
        }

    def _step_bytes(self, cell: Cell, skipped: float) -> float:
        config = self.config
        cached = cell.context + (self._steps - 1) / 2  # tokens that lie in the cache before a step, on average
        return counts.decode_step(
            self.model.num_parameters(),
            config.vocab_size * config.hidden_size,
            config.num_hidden_layers * config.hidden_size * config.intermediate_size,
            skipped,
            2 * cached * cell.rows * config.num_hidden_layers * config.hidden_size,
            self.dtype.itemsize,
        ).num_bytes

    # ---- are the results worth comparing ----

    def _check_agreement(self, modes: list[Mode], tokens: Tensor) -> None:
        """All modes must give the same logits on the same biases, up to the roundings of their orders, and the fast
        way to the next token one of the best of them."""
        others = [mode for mode in modes if mode.is_same_model and not isinstance(mode, OurMode)]
        for ours in self.ours:
            self.biases.use(ours.zeros)
            ours.rewind()
            expected = ours.step(tokens).double()
            scale = float(expected.abs().max())
            for mode in others if ours.zeros == 0 else others[:1]:
                with console.status(f"{mode.name}: first step"):  # torch.compile happens here
                    mode.rewind()
                    self._compare(mode.name, mode.step(tokens).double() - expected, scale)
            for mode in [ours, *others] if ours.zeros == 0 else [ours]:
                mode.rewind()
                chosen = torch.tensor(mode.decode(tokens.unsqueeze(0))[0], device=self.device)
                best = expected.max(-1).values
                self._compare(f"the best token of {mode.name}", best - expected.gather(1, chosen[:, None])[:, 0], scale)

    def _compare(self, name: str, difference: Tensor, scale: float) -> None:
        relative = float(difference.abs().max()) / scale
        self.difference = max(self.difference, relative)
        if not relative <= AGREEMENT[self.dtype]:
            raise BenchmarkError(f"decode: logits of {name} differ by {relative:.1e} of the largest")

    def _zeros(self, mode: OurMode, tokens: Tensor) -> tuple[float, float]:
        """(mean share of zeros, share that is zero in all rows) of one step; raises unless it is what was asked for."""
        self.biases.use(mode.zeros)
        mode.rewind()
        zeros, common = self.biases.count(lambda: mode.step(tokens))
        assert mode.zeros is not None
        allowed = 0.05 if mode.zeros else 0.0
        if abs(zeros - mode.zeros) > allowed:
            raise BenchmarkError(f"decode: {mode.name} has {zeros:.2%} zeros")
        return zeros, common

    # ---- what runs ----

    def _rivals(self, args: argparse.Namespace, *, compiled: bool) -> list[Mode]:
        rivals: list[Mode] = []
        if not args.no_transformers or (compiled and self.device.type == "cuda"):
            reason = self._too_large("a second copy of the down-projections", self._down_bytes(), _SPARE_BYTES)
            if reason is not None:
                self._skip("what runs on torch", reason)
            else:
                rivals += self._torch_rivals(args, compiled=compiled)
        weight_bytes = self.model.num_parameters() * self.dtype.itemsize
        try:
            if reason := self._too_large("llama.cpp's copy of the weights", weight_bytes, _SPARE_BYTES):
                self._skip("llama.cpp", reason)
            else:
                rivals.append(LlamaCppMode(self.model))
        except UnavailableError as error:
            self._skip("llama.cpp", str(error))
        for mode in rivals:
            mode.zeros = 0.0
        return rivals

    def _torch_rivals(self, args: argparse.Namespace, *, compiled: bool) -> list[Mode]:
        weights = row_major_weights(self.model)
        rivals: list[Mode] = []
        if not args.no_transformers:
            try:
                rivals += transformers_modes(self.model, weights, compiled=compiled, freezing=False)
            except UnavailableError as error:
                self._skip("transformers", str(error))
        if compiled and self.device.type == "cuda":
            rivals.append(StaticMode(self.config, weights, compiled=True))
        return rivals

    def _that_fit(self, cell: Cell, steps: int) -> list[Mode]:
        """Ours and the rivals as long as a cache of their kind has room; what has none is reported."""
        config = self.config
        per_token = 2 * config.num_hidden_layers * config.hidden_size * self.dtype.itemsize
        cache = per_token * (cell.context + steps) * cell.rows
        # beside the caches: the past that they are filled from, and one layer of a cache that grows by a copy
        taken = per_token * cell.context + cache / config.num_hidden_layers + _SPARE_BYTES
        modes: list[Mode] = []
        arithmetic = (
            f"a cache of 2 x {config.num_hidden_layers} layers x {config.hidden_size} x {cell.context + steps} tokens "
            f"x {cell.rows} sequences x {self.dtype.itemsize} bytes"
        )
        kinds: set[str] = set()
        for mode in (*self.ours, *self.rivals):
            if isinstance(mode, LlamaCppMode) and (cell.rows > 1 or cell.context > MAX_CONTEXT):
                limits = f"compared with one sequence of at most {MAX_CONTEXT:,} tokens, which it must compute"
                self._skip(f"{cell.label}, {mode.name}", limits)
                continue
            if mode.cache_kind not in kinds:
                if reason := self._too_large(arithmetic, cache, taken):
                    self._skip(f"{cell.label}, {mode.name if modes else 'all'}", reason)
                    if not modes:
                        break
                    continue
                kinds.add(mode.cache_kind)
                taken += cache
            modes.append(mode)
        return modes

    def _too_large(self, what: str, num_bytes: float, taken: float) -> str | None:
        """Why num_bytes more do not fit beside what is taken already; None if they do."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            available = torch.cuda.mem_get_info(self.device)[0]
        else:
            available = machine_limits.available_memory()
        if num_bytes + taken <= available:
            return None
        return (
            f"{what} = {num_bytes / 1e9:.3g} GB, with {taken / 1e9:.3g} GB for the rest, does not fit into the "
            f"{available / 1e9:.3g} GB that are free"
        )

    def _down_bytes(self) -> int:
        config = self.config
        return config.num_hidden_layers * config.hidden_size * config.intermediate_size * self.dtype.itemsize

    def _skip(self, what: str, reason: str) -> None:
        self._skipped.append({"op": f"decode: {what}", "reason": reason})

    def _tokens(self, count: int) -> Tensor:
        """[1, count] random ids."""
        return torch.randint(self.config.vocab_size, (1, count), generator=self._generator).to(self.device)


def _model_and_block(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[PersimmonForCausalLM, Tensor]:
    """The model, and memory of the kind that its weights lie in, to read for the limit."""
    if args.checkpoint:
        if not (args.checkpoint / "config.json").exists():
            with console.status(f"writing random weights to {args.checkpoint}"):
                write_random_checkpoint(args.checkpoint, full_config(), dtype)
        model = load_checkpoint_model(args.checkpoint, dtype, device)
        return model, model.lm_head.weight.detach()
    model, workspace = random_model(full_config() if args.full else slice_config(args.small), dtype, device)
    return model, workspace.block()


def run(args: argparse.Namespace, skipped: list[dict[str, str]]) -> dict[str, Any] | None:
    """The record of all cells, None where this build lacks kernels; what is left out is added to `skipped`."""
    missing = [op for op in DECODER_OPS if not has_kernel(op, torch.device(args.device))]
    if missing:
        reason = f"no {args.device} kernel in this build for {', '.join(missing)}"
        skipped.append({"op": "decode", "reason": reason})
        return None
    benchmark = DecodeBenchmark(args, skipped)
    cells = [Cell(context, rows) for context in args.contexts for rows in args.batches]
    sections = [section for cell in cells if (section := benchmark.cell(cell)) is not None]
    return {
        "model": describe(benchmark.model),
        "zeros": {f"{asked:.2f}": found for asked, found in benchmark.biases.zeros.items() if asked is not None},
        "sections": sections,
    }
