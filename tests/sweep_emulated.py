"""Looks for false alarms: random shapes of every op on the emulated CUDA kernels, schedules and sanitizers at random.

    python tests/sweep_emulated.py [--runs 1000] [--seed 0]

Every run must be clean and within the numerics contract; exit status 1 if one is not.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import emulator
from helpers import DTYPES, assert_within_contract, emulated, randn
from test_squared_relu_mlp import plain as plain_squared_relu_mlp

from persimmon_fast import ops, reference

SHARES = {"plain": 0.6, "asan": 0.2, "tsan": 0.2}  # of the runs; the sanitizers are 5 to 20 times slower
SCHEDULES = ["fifo", "reverse", "random", "warp", "pct"]
ASYNC = ["late", "early", "random"]
EDGES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 72, 127, 128, 129]
LARGE = [*EDGES, 257, 600]  # of products: more than one tile of 128 x 256


class Draw:
    """Random inputs of one run."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.dtype = rng.choice(DTYPES)

    def size(self, largest: int) -> int:
        return self.rng.choice([size for size in EDGES if size <= largest])

    def tensor(self, *shape: int, scale: float = 1.0) -> Tensor:
        return randn(*shape, dtype=self.dtype, seed=self.rng.randrange(10**6), scale=scale)

    def maybe(self, *shape: int) -> Tensor | None:
        return self.tensor(*shape) if self.rng.random() < 0.7 else None


def check(
    actual: Tensor | Sequence[Tensor], definition: Callable, what: str, *inputs: object, plain: Callable | None = None
) -> None:
    """plain: the same in plain torch where that rounds more often than the definition, which is the yardstick else."""

    def called(function: Callable, convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        result = function(*(convert(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs))
        return list(result) if isinstance(result, (tuple, list)) else [result]

    got = list(actual) if isinstance(actual, (tuple, list)) else [actual]
    exact, rounded = called(definition, lambda x: x.double()), called(plain or definition, lambda x: x)
    for out, expected, yardstick in zip(got, exact, rounded, strict=True):
        if out.dtype.is_floating_point:
            assert_within_contract(out, expected, yardstick, what)


def layer_norm(draw: Draw) -> str:
    rows, size = draw.size(33), draw.rng.choice([*EDGES, 1000, 4096, 5001])
    x, weight, bias = draw.tensor(rows, size), draw.tensor(size), draw.tensor(size)
    check(ops.layer_norm(x, weight, bias, 1e-5), reference.layer_norm, "layer_norm", x, weight, bias, 1e-5)
    return f"{rows}x{size}"


def rope_inputs(draw: Draw, tokens: int, heads: int, head_dim: int):
    rotary_dim = draw.rng.choice([2, head_dim // 4, head_dim // 2, head_dim])
    cos_sin = randn(64, rotary_dim, seed=draw.rng.randrange(10**6)).clamp(-1, 1)
    positions = torch.randint(0, 64, (tokens,), generator=torch.Generator().manual_seed(draw.rng.randrange(10**6)))
    kind = draw.rng.choice(["none", "shared", "per_head"])
    shape = (head_dim,) if kind == "shared" else (heads, head_dim)
    norms = [None] * 4 if kind == "none" else [draw.tensor(*shape) for _ in range(4)]
    return norms, cos_sin, positions


def qk_norm_rope(draw: Draw) -> str:
    tokens, heads, head_dim = draw.size(33), draw.rng.randint(1, 3), draw.rng.choice(ops.CUDA_HEAD_DIMS)
    q, k = draw.tensor(tokens, heads, head_dim), draw.tensor(tokens, heads, head_dim)
    norms, cos_sin, positions = rope_inputs(draw, tokens, heads, head_dim)
    arguments = (q, k, *norms, cos_sin, positions, 1e-5)
    check(ops.qk_norm_rope(*arguments), reference.qk_norm_rope, "qk_norm_rope", *arguments)
    return f"{tokens}x{heads}x{head_dim}"


def qkv_norm_rope(draw: Draw) -> str:
    tokens, hidden = draw.rng.choice(LARGE), draw.rng.choice([8, 24, 64, 72, 200, 296])
    heads, head_dim = draw.rng.randint(1, 3), draw.rng.choice(ops.CUDA_HEAD_DIMS)
    x, weight = draw.tensor(tokens, hidden), draw.tensor(3 * heads * head_dim, hidden, scale=0.1)
    norms, cos_sin, positions = rope_inputs(draw, tokens, heads, head_dim)
    arguments = (x, weight, draw.maybe(3 * heads * head_dim), *norms, cos_sin, positions, 1e-5, heads)
    check(ops.qkv_norm_rope(*arguments), reference.qkv_norm_rope, "qkv_norm_rope", *arguments)
    return f"{tokens}x{hidden}, {heads} heads of {head_dim}"


def linear_residual(draw: Draw) -> str:
    rows, n, k = draw.rng.choice(LARGE), draw.rng.choice(LARGE), draw.rng.choice([*EDGES, 200, 296])
    arguments = (draw.tensor(rows, k), draw.tensor(n, k, scale=0.1), draw.maybe(n), draw.tensor(rows, n))
    check(ops.linear_residual(*arguments), reference.linear_residual, "linear_residual", *arguments)
    return f"{rows}x{n}x{k}"


def squared_relu_mlp(draw: Draw) -> str:
    rows, hidden, neurons = draw.rng.choice(LARGE), draw.size(129), draw.rng.choice([*EDGES, 200, 520])
    down = draw.tensor(hidden, neurons, scale=0.1)
    arguments = (
        draw.tensor(rows, hidden), draw.tensor(neurons, hidden, scale=0.2), draw.maybe(neurons),
        ops.to_neuron_major(down) if draw.rng.random() < 0.7 else down, draw.maybe(hidden), draw.maybe(rows, hidden),
    )  # fmt: skip
    out = ops.squared_relu_mlp(*arguments)
    check(out, reference.squared_relu_mlp, "squared_relu_mlp", *arguments, plain=plain_squared_relu_mlp)
    return f"{rows}x{hidden}x{neurons}"


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def flash_attention(draw: Draw) -> str:
    batch, heads, head_dim = draw.rng.randint(1, 2), draw.rng.randint(1, 2), draw.rng.choice(ops.CUDA_HEAD_DIMS)
    lengths_q = [draw.rng.choice([0, *EDGES]) for _ in range(batch)]
    lengths_k = [draw.rng.choice([0, *EDGES, 200, 333]) for _ in range(batch)]
    q, k, v = (draw.tensor(sum(lengths), heads, head_dim) for lengths in (lengths_q, lengths_k, lengths_k))
    used = torch.tensor([draw.rng.randint(0, n) for n in lengths_k]).int() if draw.rng.random() < 0.3 else None
    causal = draw.rng.random() < 0.6
    out = ops.flash_attention(
        q, k, v, cu_seqlens_q=starts(lengths_q), cu_seqlens_k=starts(lengths_k), max_seqlen_q=max(lengths_q),
        max_seqlen_k=max(lengths_k), seqused_k=used, causal=causal,
    )  # fmt: skip
    scale = head_dim**-0.5
    inputs = (q, k, v, starts(lengths_q), starts(lengths_k), used, scale, causal)
    check(out[0], lambda *a: reference.flash_attention(*a)[0], "flash_attention", *inputs)
    return f"q {lengths_q} k {lengths_k} used {used} heads {heads} of {head_dim} causal {causal}"


def paged_attention(draw: Draw) -> str:
    batch, heads, head_dim = draw.rng.randint(1, 3), draw.rng.randint(1, 2), draw.rng.choice(ops.CUDA_HEAD_DIMS)
    page_size = draw.rng.choice([16, 64, 64, 64])
    queries = [draw.rng.choice([0, 1, 1, 2, 5, 16, 17, 40]) for _ in range(batch)]
    seqlens = [q + draw.rng.choice([0, 1, 40, 63, 64, 65, 300]) for q in queries]
    pages = -(-max(seqlens) // page_size) + 1
    table = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(draw.rng.randrange(10**6)))
    table = table.view(batch, pages).int()
    k_cache, v_cache = (draw.tensor(batch * pages, heads, page_size, head_dim) for _ in range(2))
    q = draw.tensor(sum(queries), heads, head_dim)
    lengths = torch.tensor(seqlens).int()
    for row, length in zip(table, seqlens, strict=True):  # what lies beyond a sequence must never be read
        for cache in (k_cache, v_cache):
            for i, page in enumerate(row.tolist()):
                cache[page, :, max(0, length - i * page_size) :] = float("nan")
    out = ops.paged_attention(
        q, k_cache, v_cache, table, lengths, cu_seqlens_q=starts(queries), max_seqlen_q=max(queries)
    )
    inputs = (q, k_cache, v_cache, table, lengths, starts(queries), head_dim**-0.5)
    check(out, reference.paged_attention, "paged_attention", *inputs)
    return f"queries {queries} keys {seqlens} pages of {page_size} heads {heads} of {head_dim}"


def lm_head(draw: Draw) -> str:
    rows, vocab, hidden = draw.size(65), draw.rng.choice([2, 65, 128, 129, 300, 700]), draw.rng.choice([8, 24, 64, 200])
    x, weight = draw.tensor(rows, hidden), draw.tensor(vocab, hidden, scale=0.3)
    wanted = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(draw.rng.randrange(10**6)))
    logits = x.double() @ weight.double().t()
    expected = logits.log_softmax(-1)
    logprobs = ops.lm_head_logprobs(x, weight, wanted)
    assert torch.allclose(logprobs.double(), expected.gather(1, wanted[:, None])[:, 0], atol=2e-4, rtol=1e-4)
    tokens, best = ops.lm_head_argmax(x, weight)
    assert torch.allclose(best.double(), expected.max(-1).values, atol=2e-4, rtol=1e-4)
    kept = draw.rng.choice([0, 1, 2, 50])
    filters = {
        "temperature": torch.full((rows,), draw.rng.choice([0.0, 0.5, 1.0, 2.0])),
        "top_k": torch.full((rows,), kept).int(),
        "top_p": torch.full((rows,), draw.rng.choice([0.1, 0.9, 1.0])),
        "min_p": torch.full((rows,), draw.rng.choice([0.0, 0.1])),
    }
    seeds = torch.arange(rows) + draw.rng.randrange(10**9)
    drawn, _ = ops.lm_head_sample(x, weight, **filters, seeds=seeds, offsets=seeds % 7)
    order = logits.argsort(-1, descending=True)
    place = (order == drawn[:, None]).int().argmax(-1)
    if kept:
        assert bool((place < kept).all())
    if kept == 1:
        assert torch.equal(drawn, tokens)
    return f"{rows}x{vocab}x{hidden}, top_k {kept}"


CASES = [layer_norm, qk_norm_rope, qkv_norm_rope, linear_residual, squared_relu_mlp, flash_attention, paged_attention]
CASES += [lm_head]


def sweep(variant: str, runs: int, seed: int) -> int:
    """Runs in this process, which has the sanitizer preloaded; returns the number of alarms."""
    emulator.load()
    alarms = 0
    warnings.filterwarnings("ignore", message=".*zeros cannot be skipped")  # about CPUs
    begin = time.monotonic()
    for number in range(runs):
        rng = random.Random(f"{seed}/{variant}/{number}")
        case, draw = rng.choice(CASES), Draw(rng)
        architecture = rng.choice([80, 90])
        settings = (rng.choice(SCHEDULES), rng.choice(ASYNC), rng.randrange(10**6), rng.choice([0, 1, 2, 4]))
        torch.ops.persimmon_fast_emu.configure(*settings)
        what = ""
        try:
            with emulated(architecture):
                what = case(draw)
        except Exception as error:
            alarms += 1
            run = f"{variant} run {number}: sm_{architecture} {case.__name__} {what} {draw.dtype} {settings}"
            print(f"ALARM {run}: {error}", flush=True)
    print(f"{variant}: {runs} runs, {alarms} alarms, {time.monotonic() - begin:.0f} s", flush=True)
    return alarms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", choices=emulator.VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        return min(1, sweep(args.variant, args.runs, args.seed))
    failed = 0
    for variant, share in SHARES.items():
        emulator.build(variant)
        command = [sys.executable, __file__, "--variant", variant, "--runs", str(round(args.runs * share))]
        env = os.environ | emulator.sanitizer_environment(variant)
        failed |= subprocess.run([*command, "--seed", str(args.seed)], env=env, check=False).returncode
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
