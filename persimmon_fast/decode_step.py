"""One decode step: the next token of each sequence of a batch, on tensors that stay where they are.

    embed -> layers -> head with argmax or draw -> token, position, length, draw counter, seen tokens moved on

Everything that differs from step to step lies in these tensors, and the step itself moves them on: `run` takes no value
from the host and gives it none. So it can be enqueued again before the host knows the last token, and captured once as
a CUDA graph and replayed (decode_graph.py). It runs op by op on every device just as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from persimmon_fast import ops
from persimmon_fast.kv_cache import PAGE_SIZE, CacheSlots, PackedBatch, PagedKVCache
from persimmon_fast.reference import VocabRanges
from persimmon_fast.token_choice import RowSettings, TokenChoice, draw_counter, draw_tokens

if TYPE_CHECKING:
    from persimmon_fast.generation import GenerationMixin

Choice = tuple[int, float]  # a token and its log-probability
_RESULT_BYTES = 12  # of a row: its token in 64 bits and the log-probability in 32


@dataclass
class Continuation:
    """One sequence of the output."""

    row: int  # of the output
    prompt_length: int
    prompt_ids: list[int]  # empty for inputs_embeds
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


class DecodeStep:
    """The static tensors of one batch size, and the step on them.

    Args:
        model: with `model` (the decoder) and `lm_head`.
        cache: whose pool keys and values go to.
        batch_size: rows. num_columns: of the page table, so that a sequence holds num_columns * PAGE_SIZE tokens at
            most; the work of a step follows from the lengths on the device, not from this width.
        draws: whether tokens come from the sampling kernel; else the most likely ones are taken.
        penalises: whether the repetition penalty is on, which also draws.
        vocab_ranges: of the tokens that may be chosen, see `ops.lm_head_argmax`.
    """

    def __init__(
        self,
        model: GenerationMixin,
        cache: PagedKVCache,
        batch_size: int,
        num_columns: int,
        *,
        draws: bool,
        penalises: bool,
        vocab_ranges: VocabRanges | None,
    ) -> None:
        device, capacity = cache.device, num_columns * PAGE_SIZE

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.batch_size = batch_size
        self.num_columns = num_columns
        self._model, self._cache, self._vocab_ranges = model, cache, vocab_ranges
        # tokens and log-probabilities lie in one piece, so that one copy brings both to the host
        self._results = zeros(batch_size * _RESULT_BYTES, dtype=torch.uint8)
        self.token_ids, self.logprobs = _parts(self._results)
        self._counters = zeros(2, batch_size)  # moved on by one addition: positions, draw counters
        self.position_ids, self.draw_counters = self._counters
        self.slot_mapping = zeros(batch_size)
        self._slots = zeros(batch_size, capacity)  # slot of each position
        self.page_table = zeros(batch_size, num_columns, dtype=torch.int32)
        self.cache_seqlens = zeros(batch_size, dtype=torch.int32)
        self._settings = RowSettings(batch_size, device) if draws else None
        self.penalty_ids = zeros(batch_size, capacity) if penalises else None  # the text; -1 beyond it
        self.batch = PackedBatch(
            position_ids=self.position_ids,
            cos_sin=model.model.rotary(min(capacity, model.model.rotary.limit), device),
            cu_seqlens_q=torch.arange(batch_size + 1, dtype=torch.int32, device=device),
            max_seqlen_q=1,
            slots=CacheSlots(self.slot_mapping, self.page_table, self.cache_seqlens),
        )
        self._decoder = model.model.bind(self.batch, cache)
        self._head = model.lm_head.weight

    def load(self, sequences: Sequence[Continuation], choice: TokenChoice) -> None:
        """Starts from these sequences, one per row of the cache: `choose` comes next if they have no new token yet,
        else `run`. Their pages must be reserved."""
        table = self._cache.page_table(self.num_columns)
        self.page_table.copy_(table)
        self._slots.copy_((table.long().unsqueeze(2) * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten(1))
        if self._settings is not None:
            self._settings.fill(choice)
        self.move_to(sequences)

    def move_to(self, sequences: Sequence[Continuation]) -> None:
        """Where the same sequences are now, if their pages and their choice are those that were loaded."""
        lengths = [s.prompt_length + len(s.tokens) for s in sequences]
        self.token_ids.copy_(torch.tensor([s.tokens[-1] if s.tokens else 0 for s in sequences]))
        counters = [draw_counter(s.row, len(s.tokens)) for s in sequences]
        self._counters.copy_(torch.tensor([[length - 1 for length in lengths], counters]))
        self.cache_seqlens.copy_(torch.tensor(lengths))
        if self.penalty_ids is not None:
            seen = torch.full(self.penalty_ids.shape, -1)
            for ids, s in zip(seen, sequences, strict=True):
                # of inputs_embeds the prompt's places stay empty
                ids[s.prompt_length - len(s.prompt_ids) : s.prompt_length] = torch.tensor(s.prompt_ids)
                ids[s.prompt_length : s.prompt_length + len(s.tokens)] = torch.tensor(s.tokens)
            self.penalty_ids.copy_(seen)

    def run(self) -> None:
        """The next token of every row."""
        # ops alone, no value of this step on the host: see the module's docstring
        torch.gather(self._slots, 1, self.position_ids.unsqueeze(1), out=self.slot_mapping.unsqueeze(1))
        self.choose(self._decoder(self.token_ids))

    def choose(self, hidden: Tensor) -> None:
        """The second half of `run`: chooses from the final hidden states [batch_size, hidden_size] of the last tokens,
        and moves the state on to the chosen ones."""
        if self._settings is None:
            token_ids, logprobs = ops.lm_head_argmax(hidden, self._head, vocab_ranges=self._vocab_ranges)
        else:
            token_ids, logprobs = draw_tokens(
                hidden, self._head, self._settings, self.draw_counters, self.penalty_ids, self._vocab_ranges
            )
        self.token_ids.copy_(token_ids)
        self.logprobs.copy_(logprobs)
        self._counters.add_(1)
        self.cache_seqlens.add_(1)
        if self.penalty_ids is not None:
            self.penalty_ids.scatter_(1, self.position_ids.unsqueeze(1), self.token_ids.unsqueeze(1))

    def serve(self, seq_len: int) -> None:
        """Before each `run` of a model whose rotary table depends on the longest sequence."""
        table = self._model.model.rotary(seq_len, self._cache.device)
        self.batch = dataclasses.replace(self.batch, cos_sin=table)
        self._decoder = self._model.model.bind(self.batch, self._cache)

    def results(self) -> Callable[[], list[Choice]]:
        """Starts to bring what was chosen last to the host, and returns what waits for it."""
        if self._results.device.type != "cuda":
            return partial(_choices, self._results.clone())
        host = torch.empty(self._results.shape, dtype=torch.uint8, pin_memory=True)
        host.copy_(self._results, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self._results.device))

        def wait() -> list[Choice]:
            arrived.synchronize()
            return _choices(host)

        return wait


def _parts(results: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens and the log-probabilities of what `DecodeStep` copies to the host."""
    num_token_bytes = results.numel() // _RESULT_BYTES * 8
    return results[:num_token_bytes].view(torch.long), results[num_token_bytes:].view(torch.float32)


def _choices(results: Tensor) -> list[Choice]:
    token_ids, logprobs = _parts(results)
    return list(zip(token_ids.tolist(), logprobs.tolist(), strict=True))
