"""Tokens per second of `generate` with and without prompt lookup, on the model that ships with the package.

    python benchmarks/prompt_lookup.py [--dtype bf16] [--rounds 15] [--threads 1]

Two texts: code that repeats itself, continued greedily; and draws from the whole vocabulary, which do not repeat.
A round runs both ways once, in turns; ratios are medians over the rounds, p10 .. p90 beside them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

# Last, so that an installed persimmon_fast, which has the compiled extension, goes before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import DTYPES
from persimmon_fast import SMALL_MODEL, PersimmonForCausalLM, PersimmonTokenizer

NEW_TOKENS = 256
TEXTS = {
    "repeats, greedy": ("def winfo_width(self):\n        return self.width\n\n    " * 8, {"do_sample": False}),
    "does not repeat, temperature 3": ("def read_config(path):", {"do_sample": True, "temperature": 3.0, "seed": 1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = PersimmonTokenizer.from_pretrained(SMALL_MODEL)
    model = PersimmonForCausalLM.from_pretrained(SMALL_MODEL, dtype=DTYPES[args.dtype])
    for name, (text, settings) in TEXTS.items():
        inputs = tokenizer(text, return_tensors="pt")
        seconds: dict[int | None, list[float]] = {None: [], 10: []}
        outputs = {}
        for number in range(args.rounds + 1):
            for drafts in list(seconds)[:: 1 if number % 2 else -1]:
                start = time.perf_counter()
                outputs[drafts] = model.generate(
                    **inputs, **settings, max_new_tokens=NEW_TOKENS, eos_token_id=None, prompt_lookup_num_tokens=drafts
                )
                if number > 0:  # the first round warms up
                    seconds[drafts].append(time.perf_counter() - start)
        ratios = sorted(plain / drafted for plain, drafted in zip(*seconds.values(), strict=True))
        p10, p90 = (ratios[round(share * (len(ratios) - 1))] for share in (0.1, 0.9))
        plain, drafted = (NEW_TOKENS / statistics.median(values) for values in seconds.values())
        equal = "equal" if torch.equal(*outputs.values()) else "differ"
        ratio = f"x {statistics.median(ratios):.3f} ({p10:.3f} .. {p90:.3f})"
        print(f"{name}: {plain:.0f} -> {drafted:.0f} tokens/s, {ratio}, tokens {equal}")


if __name__ == "__main__":
    main()
