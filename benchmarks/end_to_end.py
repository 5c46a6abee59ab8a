"""Prefill, decode and generate of a slice of Persimmon-8B beside transformers on the same weights.

The slice keeps the model's proportions: 4 layers of the real shape and 29,184 = 262,144 * 4 / 36 (rounded up to a
multiple of 256) tokens of vocabulary, so that every part has its share of the bytes. Weights are random: about half
of the neurons are zero after relu^2 then. The trained model has more zeros (its authors say over 90 %): ours is also
measured with the biases of the up-projections shifted to 90 % zeros. transformers reads every weight in any case.

Both models share one copy of the weights, but for the down-projections: transformers gets them in the memory order
that it is used to. Every variant continues the same tokens, from a cache that it filled itself.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import counts
from benchmarks.cases import DTYPES
from benchmarks.limits import Limit, measure_limits
from benchmarks.models import DECODER_OPS, UpBiases, describe, random_model, slice_config
from benchmarks.modes import Mode, OurMode, UnavailableError
from benchmarks.report import console
from benchmarks.runner import BenchmarkError, has_kernel
from benchmarks.timing import Budget, Stats, Variant, WallTimer, interleave
from benchmarks.transformers_modes import row_major_weights, transformers_modes

SHIFTED_ZEROS = 0.9
AGREEMENT = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # of logits, relative to the largest


@dataclass(frozen=True)
class Sizes:
    """What is measured: (prompt tokens, rounds), (context, rounds, steps per round), (prompt, new tokens, rounds)."""

    prefill: tuple[tuple[int, int], ...]
    decode: tuple[tuple[int, int, int], ...]
    generate: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Sizes:
        if args.quick and args.small:
            return cls(((32, 2),), ((32, 2, 4),), ((16, 8, 2),))
        if args.quick:
            return cls(((128, 3),), ((128, 3, 4),), ())
        return cls(((128, 7), (512, 5), (2048, 3)), ((128, 8, 8), (2048, 8, 4)), ((128, 64, 3),))


class Measurement:
    """The models, the clock and the limits of one end-to-end run."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.device, self.dtype = device, DTYPES[args.dtype]
        self.config = slice_config(args.small)
        self.difference = 0.0  # the largest between logits of two modes, relative to the largest logit
        self._generator = torch.Generator().manual_seed(1)
        self.model, workspace = random_model(self.config, self.dtype, device)
        self.biases = UpBiases(self.model, self.tokens(64), [SHIFTED_ZEROS])
        self.timer = WallTimer(device)
        budget = Budget(seconds=1.0, min_rounds=3, max_rounds=10)
        # the memory that is read is the memory that the weights lie in
        self.limits = measure_limits(workspace.block, self.dtype, self.timer, budget, 512 if args.small else None)
        self.modes: list[Mode] = [
            OurMode("persimmon_fast", self.model, None),
            OurMode(f"persimmon_fast, {SHIFTED_ZEROS:.0%} zeros", self.model, SHIFTED_ZEROS),
        ]

    def tokens(self, count: int) -> Tensor:
        """[1, count] random ids."""
        return torch.randint(self.config.vocab_size, (1, count), generator=self._generator).to(self.device)

    def prefill(self, num_tokens: int, rounds: int) -> dict[str, Any]:
        input_ids = self.tokens(num_tokens)
        modes = [mode for mode in self.modes if mode.in_prefill]
        self._fill_caches(modes, input_ids, num_tokens)

        def run(mode: Mode) -> Variant:
            def variant(call: int) -> None:
                self.biases.use(mode.zeros)
                mode.prefill(input_ids, num_tokens)

            return variant

        seconds = self._interleave({mode.name: run(mode) for mode in modes}, self.limits.matmul, rounds)
        flops = self._prefill_flops(num_tokens)
        rate = self.limits.matmul.rate(seconds.pop("limit")).median
        for mode in modes:
            mode.drop_cache()
        return self._section(
            f"prefill of {num_tokens:,} tokens, logits of the last one",
            {"kind": "prefill", "tokens": num_tokens},
            {name: [num_tokens / s for s in samples] for name, samples in seconds.items()},
            {mode.name: num_tokens * rate / flops for mode in modes},
        )

    def decode(self, context: int, rounds: int, steps: int) -> dict[str, Any]:
        """One token at a time, the same tokens for all; the cache grows from `context` + 2 as it would in use."""
        warmups = 2
        total = context + warmups + rounds * steps
        input_ids, following = self.tokens(context), self.tokens(warmups + rounds * steps)
        self._fill_caches(self.modes, input_ids, total)

        def run(mode: Mode) -> Variant:
            positions = iter(range(warmups, following.shape[1]))

            def variant(call: int) -> None:
                self.biases.use(mode.zeros)
                for _ in range(steps):
                    index = next(positions)
                    mode.step(following[:, index : index + 1]).argmax(-1)

            return variant

        def warm_up(mode: Mode) -> Tensor:
            with console.status(f"{mode.name}: first steps"):  # torch.compile happens here
                return [mode.step(following[:, index : index + 1]) for index in range(warmups)][-1]

        self._compare_logits(self.modes, warm_up)
        variants = {mode.name: run(mode) for mode in self.modes}
        seconds = self._interleave(variants, self.limits.read, rounds)
        rate = self.limits.read.rate(seconds.pop("limit")).median
        mean_context = total - rounds * steps / 2
        limits = {}
        for mode in self.modes:
            skipped = self.biases.zeros[mode.zeros] if isinstance(mode, OurMode) else 0.0
            limits[mode.name] = rate / self._decode_bytes(mean_context, skipped)
        for mode in self.modes:
            mode.drop_cache()
        gc.collect()
        return self._section(
            f"decode at context {context:,}, {rounds * steps} steps",
            {"kind": "decode", "context": context, "steps": rounds * steps},
            {name: [steps / s for s in samples] for name, samples in seconds.items()},
            limits,
        )

    def generate(self, prompt: int, new_tokens: int, rounds: int) -> dict[str, Any]:
        """The whole call as a user makes it, prefill included."""
        input_ids = self.tokens(prompt)
        modes = [mode for mode in self.modes if mode.in_generate]

        def run(mode: Mode) -> Variant:
            def variant(call: int) -> None:
                self.biases.use(mode.zeros)
                out = mode.generate(input_ids, new_tokens)
                assert out.shape[1] == prompt + new_tokens, f"{mode.name} made {out.shape[1] - prompt} tokens"

            self.biases.use(mode.zeros)
            mode.generate(input_ids, 2)
            return variant

        seconds = self._interleave({mode.name: run(mode) for mode in modes}, self.limits.read, rounds)
        seconds.pop("limit")
        return self._section(
            f"generate: {prompt} tokens in, {new_tokens} out, greedy, prefill included",
            {"kind": "generate", "prompt": prompt, "new_tokens": new_tokens},
            {name: [new_tokens / s for s in samples] for name, samples in seconds.items()},
            {},
        )

    def _interleave(self, variants: dict[str, Variant], limit: Limit, rounds: int) -> dict[str, list[float]]:
        return interleave(variants | {"limit": limit.variant}, self.timer, rounds)

    def _fill_caches(self, modes: list[Mode], input_ids: Tensor, max_cache_len: int) -> None:
        self._compare_logits(modes, lambda mode: mode.prefill(input_ids, max_cache_len))

    def _compare_logits(self, modes: list[Mode], logits_of: Callable[[Mode], Tensor]) -> None:
        """Modes that run on the same biases must give the same logits, up to the roundings of their orders."""
        expected: dict[float | None, Tensor] = {}
        for mode in modes:
            self.biases.use(mode.zeros)
            logits = logits_of(mode).double()
            first = expected.setdefault(mode.zeros, logits)
            difference = float((logits - first).abs().max() / first.abs().max())
            self.difference = max(self.difference, difference)
            if not difference <= AGREEMENT[self.dtype]:
                raise BenchmarkError(f"end_to_end: logits of {mode.name} differ by {difference:.1e} of the largest")

    def _decode_bytes(self, context: float, skipped: float) -> float:
        parameters = self.model.num_parameters()
        config = self.config
        cached = 2 * context * config.num_hidden_layers * config.hidden_size
        return counts.decode_step(
            parameters,
            config.vocab_size * config.hidden_size,
            config.num_hidden_layers * config.intermediate_size * config.hidden_size,
            skipped,
            cached,
            self.dtype.itemsize,
        ).num_bytes

    def _prefill_flops(self, num_tokens: int) -> float:
        config = self.config
        return counts.prompt_flops(
            num_tokens, config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size
        )

    def _section(
        self, title: str, facts: dict[str, Any], rates: dict[str, list[float]], limits: dict[str, float]
    ) -> dict[str, Any]:
        variants = {}
        for name, samples in rates.items():
            stats, limit = Stats.of(samples), limits.get(name)
            variants[name] = {
                "tokens_per_s": stats.to_dict(),
                "samples_tokens_per_s": samples,
                "limit_tokens_per_s": limit,
                "share_of_limit": None if limit is None else stats.median / limit,
            }
            console.print(f"  {title}: {name}: {stats.median:.4g} tokens/s")
        return {"title": title, **facts, "variants": variants}


def run(args: argparse.Namespace, device: torch.device, skipped: list[dict[str, str]]) -> dict[str, Any] | None:
    """The end-to-end part of a result, None where this build lacks kernels; what is left out is added to `skipped`."""
    missing = [op for op in DECODER_OPS if not has_kernel(op, device)]
    if missing:
        reason = f"no {device.type} kernel in this build for {', '.join(missing)}"
        skipped.append({"op": "end_to_end", "reason": reason})
        return None
    sizes = Sizes.of(args)
    measurement = Measurement(args, device)
    try:
        measurement.modes += transformers_modes(
            measurement.model, row_major_weights(measurement.model), compiled=not args.quick, freezing=args.thorough
        )
    except UnavailableError as error:
        skipped.append({"op": "end_to_end with transformers", "reason": str(error)})
    sections = [measurement.prefill(*size) for size in sizes.prefill]
    sections += [measurement.decode(*size) for size in sizes.decode]
    sections += [measurement.generate(*size) for size in sizes.generate]
    limits = measurement.limits
    return {
        "model": describe(measurement.model),
        "zeros": {"random weights": measurement.biases.zeros[None], "shifted": measurement.biases.zeros[SHIFTED_ZEROS]},
        "logits_difference": measurement.difference,
        "limits": {
            "read_bytes_per_s": limits.samples["read bandwidth"],
            "matmul_flops_per_s": limits.samples["matmul peak"],
            "copy_bytes_per_s": limits.samples.get("copy bandwidth"),
        },
        "sections": sections,
    }
