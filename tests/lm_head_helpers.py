"""Inputs that the tests of lm_head_* share."""

from __future__ import annotations

import torch
from helpers import randn

NAN, INF = float("nan"), float("inf")


def inputs(num_rows, vocab_size, dtype, hidden_size=64, device="cpu"):
    x = randn(num_rows, hidden_size, dtype=dtype, seed=1)
    weight = randn(vocab_size, hidden_size, dtype=dtype, seed=2, scale=3 * hidden_size**-0.5)
    return x.to(device), weight.to(device)


def exact_head(logits):
    """x and weight in fp32 whose product is `logits` [num_rows, vocab_size] exactly, in any order of summation."""
    return torch.eye(logits.shape[0], device=logits.device), logits.t().contiguous()


def settings(num_rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7, first_offset=0, device="cpu"):
    """The per-row arguments of lm_head_sample; offsets count up."""
    args = {
        "temperature": torch.full((num_rows,), float(temperature)),
        "top_k": torch.full((num_rows,), top_k, dtype=torch.int32),
        "top_p": torch.full((num_rows,), float(top_p)),
        "min_p": torch.full((num_rows,), float(min_p)),
        "seeds": torch.full((num_rows,), seed),
        "offsets": torch.arange(num_rows) + first_offset,
    }
    return {name: value.to(device) for name, value in args.items()}
