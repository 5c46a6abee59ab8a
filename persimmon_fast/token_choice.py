"""The next token of each row, from its final hidden state: greedy, sampled, with a repetition penalty.

A choice does not depend on what else is in the batch: a draw is a function of the seed and of a counter that holds the
row of the output and the number of its new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from persimmon_fast import ops
from persimmon_fast.generation_config import GenerationConfig
from persimmon_fast.reference import VocabRanges


@dataclass(frozen=True)
class TokenChoice:
    """How one `generate` call chooses."""

    config: GenerationConfig
    seed: int

    @property
    def draws(self) -> bool:
        """Whether the sampling kernel is needed; else the most likely token is taken."""
        return self.config.do_sample or self.penalises

    @property
    def penalises(self) -> bool:
        return self.config.repetition_penalty != 1.0


def draw_counter(row: int, num_new_tokens: int) -> int:
    """One stream per seed: the row of the output in the high half of the counter, its new tokens in the low one."""
    return (row << 32) + num_new_tokens


class RowSettings:
    """What `lm_head_sample` takes per row, on the device; the same for all rows of a `generate` call."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        def empty(dtype: torch.dtype) -> Tensor:
            return torch.empty(num_rows, dtype=dtype, device=device)

        self.temperature = empty(torch.float32)
        self.top_k = empty(torch.int32)
        self.top_p = empty(torch.float32)
        self.min_p = empty(torch.float32)
        self.seeds = empty(torch.long)
        self.repetition_penalty = empty(torch.float32)

    def fill(self, choice: TokenChoice) -> None:
        config = choice.config
        self.temperature.fill_(config.temperature if config.do_sample else 0.0)
        self.top_k.fill_(config.top_k)
        self.top_p.fill_(config.top_p)
        self.min_p.fill_(config.min_p)
        self.seeds.fill_(choice.seed)
        self.repetition_penalty.fill_(config.repetition_penalty)


def draw_tokens(
    hidden: Tensor,
    weight: Tensor,
    settings: RowSettings,
    counters: Tensor,
    penalty_ids: Tensor | None,
    vocab_ranges: VocabRanges | None,
) -> tuple[Tensor, Tensor]:
    """(token, log-probability) of each row of hidden [num_rows, hidden_size]; counters: [num_rows] int64, see
    `draw_counter`; penalty_ids, vocab_ranges: see `ops.lm_head_sample`."""
    return ops.lm_head_sample(
        hidden,
        weight,
        settings.temperature,
        settings.top_k,
        settings.top_p,
        settings.min_p,
        settings.seeds,
        counters,
        penalty_ids,
        settings.repetition_penalty if penalty_ids is not None else None,
        vocab_ranges=vocab_ranges,
    )
