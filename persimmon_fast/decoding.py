"""What `generate` asks for the next tokens: one per step and sequence, or with prompt lookup also drafted ones."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from persimmon_fast import ops
from persimmon_fast.decode_step import Choice, Continuation, DecodeStep
from persimmon_fast.prompt_lookup import PromptLookup
from persimmon_fast.token_choice import RowSettings, TokenChoice, draw_counter, draw_tokens

if TYPE_CHECKING:
    from persimmon_fast.decode_graph import StepRunner
    from persimmon_fast.generation import GenerationMixin


class Decoder(Protocol):
    def next_tokens(self, active: Sequence[Continuation]) -> list[list[Choice]]:
        """At least one token more of each sequence that goes on. `active` has all tokens that were given before."""
        ...

    def keep(self, going: Sequence[int]) -> None:
        """Only these of the sequences go on."""
        ...


class StepDecoder:
    """One token per step and sequence.

    On a GPU the host runs one step ahead: step t + 1 is enqueued before the tokens of step t are read, so that stop
    checks, streamers and decoding to text take no time of the GPU. A sequence that stops has then been computed once
    more than needed; what came of that is not looked at.
    """

    def __init__(
        self,
        runner: StepRunner,
        choice: TokenChoice,
        sequences: Sequence[Continuation],
        hidden: Tensor,
        max_new_tokens: int,
    ) -> None:
        """hidden [num_sequences, hidden_size]: final states of the prompts' last tokens, which are in runner.cache; the
        pages of all that may follow are reserved."""
        self._runner, self._choice = runner, choice
        self._step = self._loaded(sequences)
        self._step.choose(hidden)
        self._steps_left = max_new_tokens - 1
        self._pending = deque([self._step.results()])  # of the steps that the host has not seen
        self._rows = list(range(len(sequences)))  # of the step: those that go on

    def next_tokens(self, active: Sequence[Continuation]) -> list[list[Choice]]:
        if self._runner.shrinks(self._step.batch_size, len(self._rows)) and self._steps_left:
            # a smaller step starts from what the host has seen, which must be everything first
            if not self._pending:
                self._runner.cache.keep(self._rows)
                self._step = self._loaded(active)
                self._rows = list(range(len(active)))
                self._launch(1 + self._runner.num_ahead)
        else:
            self._launch(1 + self._runner.num_ahead)
        choices = self._pending.popleft()()
        return [[choices[row]] for row in self._rows]

    def keep(self, going: Sequence[int]) -> None:
        self._rows = [self._rows[index] for index in going]

    def _loaded(self, sequences: Sequence[Continuation]) -> DecodeStep:
        step = self._runner.step(len(sequences), self._choice)
        step.load(sequences, self._choice)
        return step

    def _launch(self, num_pending: int) -> None:
        """Enqueues steps until that many results are on their way."""
        while self._steps_left and len(self._pending) < num_pending:
            self._runner.launch(self._step)
            self._pending.append(self._step.results())
            self._steps_left -= 1


class LookupDecoder:
    """Prompt lookup: a step also checks drafted tokens, and keeps those that it would have chosen. Where nothing is
    drafted it is the step without lookup."""

    def __init__(
        self,
        model: GenerationMixin,
        runner: StepRunner,
        choice: TokenChoice,
        sequences: Sequence[Continuation],
        hidden: Tensor,
        max_new_tokens: int,
    ) -> None:
        config = choice.config
        assert config.prompt_lookup_num_tokens is not None
        prompts = [s.prompt_ids for s in sequences]
        self._model, self._runner, self._cache, self._choice = model, runner, runner.cache, choice
        self._step: DecodeStep | None = None  # of these sequences, once it has been needed
        self._step_is_current = False
        self._max_new_tokens = max_new_tokens
        self._lookup = PromptLookup(prompts, config.prompt_lookup_num_tokens, config.max_matching_ngram_size)
        self._seen = [set(ids) for ids in prompts] if choice.penalises else []
        self._drafts: list[list[int]] = [[] for _ in sequences]
        self._hidden: Tensor | None = hidden

    def next_tokens(self, active: Sequence[Continuation]) -> list[list[Choice]]:
        if self._hidden is None:
            self._draft(active)
            if not any(self._drafts):
                return [[choice] for choice in self._run_step(active)]
            self._step_is_current = False
            self._hidden = self._forward([[s.tokens[-1], *d] for s, d in zip(active, self._drafts, strict=True)])
        choices = iter(self._choose(self._hidden, active))
        self._hidden = None
        per_sequence = [list(itertools.islice(choices, 1 + len(draft))) for draft in self._drafts]
        kept = [list(_accepted(c, d)) for c, d in zip(per_sequence, self._drafts, strict=True)]
        num_rejected = [len(c) - len(k) for c, k in zip(per_sequence, kept, strict=True)]
        if any(num_rejected):
            self._cache.drop_last(num_rejected, keep_pages=True)
        return kept

    def keep(self, going: Sequence[int]) -> None:
        self._cache.keep(list(going))
        self._step = None

    def _run_step(self, active: Sequence[Continuation]) -> list[Choice]:
        if self._step is None:
            self._step = self._runner.step(len(active), self._choice)
            self._step.load(active, self._choice)
        elif not self._step_is_current:
            self._step.move_to(active)
        self._step_is_current = True
        self._runner.launch(self._step)
        return self._step.results()()

    def _draft(self, active: Sequence[Continuation]) -> None:
        self._drafts = []
        for s in active:
            room = self._max_new_tokens - len(s.tokens) - 1  # the step adds one token more than it drafts
            self._drafts.append(self._lookup.draft(s.row, s.tokens, room, len(active)))

    def _forward(self, token_ids: list[list[int]]) -> Tensor:
        """Final hidden states [num_tokens, hidden_size] after each of these tokens of each sequence."""
        decoder, device = self._model.model, self._cache.device
        lengths = [len(ids) for ids in token_ids]
        starts = self._cache.seqlens
        positions = [start + i for start, length in zip(starts, lengths, strict=True) for i in range(length)]
        embeds = decoder.embed_tokens(torch.tensor(list(itertools.chain(*token_ids)), device=device))
        position_ids = torch.tensor(positions, device=device)
        hidden = decoder.forward_packed(embeds, position_ids, lengths, max(positions) + 1, self._cache)
        return hidden

    def _choose(self, hidden: Tensor, active: Sequence[Continuation]) -> list[Choice]:
        """The choice after each token of the step: of each sequence its last token, then its draft."""
        weight, device = self._model.lm_head.weight, hidden.device
        ranges = self._choice.config.vocab_ranges
        if not self._choice.draws:
            chosen = ops.lm_head_argmax(hidden, weight, vocab_ranges=ranges)
        else:
            places = [(s, i) for s, draft in zip(active, self._drafts, strict=True) for i in range(1 + len(draft))]
            settings = RowSettings(len(places), device)
            settings.fill(self._choice)
            counters = torch.tensor([draw_counter(s.row, len(s.tokens) + i) for s, i in places], device=device)
            penalty_ids = self._penalty_ids(active, places, device)
            chosen = draw_tokens(hidden, weight, settings, counters, penalty_ids, ranges)
        return list(zip(*(values.tolist() for values in chosen), strict=True))

    def _penalty_ids(
        self, active: Sequence[Continuation], places: list[tuple[Continuation, int]], device: torch.device
    ) -> Tensor | None:
        if not self._choice.penalises:
            return None
        # a draft repeats earlier tokens: it brings none that was not seen
        for s in active:
            self._seen[s.row].update(s.tokens)
        seen = [self._seen[s.row] for s, _ in places]
        width = max(len(ids) for ids in seen)
        padded = [[*ids, *[-1] * (width - len(ids))] for ids in seen]
        return torch.tensor(padded, dtype=torch.long, device=device).view(len(places), width)


def _accepted(choices: list[Choice], draft: list[int]) -> Iterator[Choice]:
    """Choices up to the first that differs from the draft: what comes after that was computed from a wrong token."""
    for choice, drafted in zip(choices, [*draft, None], strict=True):
        yield choice
        if choice[0] != drafted:
            return
