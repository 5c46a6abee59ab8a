"""Paged key/value cache.

Keys and values of a layer lie in pages of `page_size` tokens, `[num_pages, num_heads, page_size, head_dim]`; a page
table says which pages a sequence owns. Sequences therefore differ in length at no cost, leave the batch without moving
the others, and share the pages of a common prompt. Which pages are used is decided on the host, which knows every
length: nothing here reads a tensor back from a GPU.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from persimmon_fast.config import PersimmonConfig
from persimmon_fast.memory import empty_huge

if TYPE_CHECKING:
    from persimmon_fast.padded_attention import PaddedAttention

PAGE_SIZE = 64


@dataclass(frozen=True)
class CacheSlots:
    """Where the tokens of one forward pass go, and what their queries see."""

    slot_mapping: Tensor  # [num_tokens] int64: page * page_size + offset
    page_table: Tensor  # [batch_size, max_pages] int32
    cache_seqlens: Tensor  # [batch_size] int32, the new tokens included


@dataclass(frozen=True)
class PackedBatch:
    """What attention needs to know about the tokens of one forward pass."""

    position_ids: Tensor  # [num_tokens] int64, rows of cos_sin
    cos_sin: Tensor  # [num_positions, rotary_dim] fp32
    cu_seqlens_q: Tensor  # [batch_size + 1] int32
    max_seqlen_q: int
    slots: CacheSlots | None  # None: no cache
    padded: PaddedAttention | None = None  # computes attention in place of the kernels


class PagedKVCache:
    """Keys (after rotary) and values of a batch of sequences.

    Args:
        config: the model's; decides layers, heads and head_dim.
        batch_size: sequences, at least 1.
        capacity: tokens per sequence that fit before the pool grows (it doubles then, with one copy).
        num_pages: pages of the pool instead, at least 1; None: what batch_size and capacity need.
        dtype, device: of keys and values, the model's.
    """

    def __init__(
        self,
        config: PersimmonConfig,
        batch_size: int,
        capacity: int,
        *,
        num_pages: int | None = None,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"PagedKVCache: batch_size must be at least 1, got {batch_size}")
        self.device = torch.device(device)
        if num_pages is None:
            num_pages = batch_size * max(1, pages_of(capacity))
        shape = (num_pages, config.num_attention_heads, PAGE_SIZE, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.k = [empty_huge(shape, dtype, self.device) for _ in layers]
        self.v = [empty_huge(shape, dtype, self.device) for _ in layers]
        self.reset(batch_size)

    def reset(self, batch_size: int) -> None:
        """Empty, for that many sequences; the pool stays where it is."""
        self.seqlens = [0] * batch_size
        self.num_columns = 0  # of the padded batch that the caller has passed so far
        self._pages: list[list[int]] = [[] for _ in range(batch_size)]
        self._owners = [0] * self.num_pages  # sequences that hold the page
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._table: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return len(self.seqlens)

    @property
    def num_pages(self) -> int:
        """Pages of the pool, used or not."""
        return self.k[0].shape[0]

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included (the meaning it has in transformers)."""
        return self.num_columns

    def append(self, num_new: list[int]) -> CacheSlots:
        """Makes room for num_new[b] more tokens of sequence b, in the order in which they are packed."""
        starts = self.seqlens
        self.reserve(num_new)
        self.seqlens = [old + new for old, new in zip(starts, num_new, strict=True)]
        table = self._page_table()
        return CacheSlots(self._slots(table, starts, num_new), table, self._int32(self.seqlens))

    def reserve(self, num_new: list[int]) -> None:
        """Takes the pages of num_new[b] more tokens of sequence b, without counting these tokens yet."""
        if len(num_new) != self.batch_size:
            raise ValueError(f"PagedKVCache: the cache holds {self.batch_size} sequences, got {len(num_new)}")
        lengths = [old + new for old, new in zip(self.seqlens, num_new, strict=True)]
        needed = [pages_of(length) - len(pages) for length, pages in zip(lengths, self._pages, strict=True)]
        if any(n > 0 for n in needed):
            self._take_pages(needed)

    def advance(self) -> None:
        """Counts one more token of each sequence, which a kernel has written to a reserved page."""
        self.seqlens = [length + 1 for length in self.seqlens]
        assert all(pages_of(n) <= len(pages) for n, pages in zip(self.seqlens, self._pages, strict=True))

    def page_table(self, num_columns: int) -> Tensor:
        """[batch_size, num_columns] int32 on the host: the pages that each sequence has, then zeros."""
        rows = [pages + [0] * (num_columns - len(pages)) for pages in self._pages]
        return torch.tensor(rows, dtype=torch.int32)

    def repeat_interleave(self, repeats: int) -> None:
        """Every sequence becomes `repeats` adjacent ones. Full pages are shared; only the last, partly filled page of
        a sequence is copied, since only that one is still written."""
        if repeats == 1:
            return
        originals = list(zip(self.seqlens, self._pages, strict=True))
        self.seqlens, self._pages = [], []
        self._table = None
        for length, pages in originals:
            full, partial = pages[: length // PAGE_SIZE], pages[length // PAGE_SIZE :]
            for copy in range(repeats):
                own = partial if copy == 0 else [self._copy_page(page) for page in partial]
                if copy > 0:
                    for page in full:
                        self._owners[page] += 1
                self.seqlens.append(length)
                self._pages.append(full + own)

    def drop_last(self, num_dropped: list[int], *, keep_pages: bool = False) -> None:
        """Forgets the last num_dropped[b] tokens of sequence b. Pages that nobody needs any more are free again,
        reserved ones too; keep_pages: they stay reserved, which no sequence may then share."""
        if len(num_dropped) != self.batch_size:
            raise ValueError(f"PagedKVCache: the cache holds {self.batch_size} sequences, got {len(num_dropped)}")
        if any(not 0 <= n <= length for n, length in zip(num_dropped, self.seqlens, strict=True)):
            raise ValueError(f"PagedKVCache: cannot drop {num_dropped} tokens of sequences of {self.seqlens}")
        self.num_columns = max(0, self.num_columns - min(num_dropped))  # columns that no sequence has any more
        self.seqlens = [length - n for length, n in zip(self.seqlens, num_dropped, strict=True)]
        if keep_pages:
            return
        for length, pages in zip(self.seqlens, self._pages, strict=True):
            while len(pages) > pages_of(length):
                self._release(pages.pop())
                self._table = None
            if length % PAGE_SIZE and self._owners[pages[-1]] > 1:  # will be written, so it must not be shared
                shared = pages[-1]
                pages[-1] = self._copy_page(shared)
                self._release(shared)
                self._table = None

    def keep(self, rows: list[int]) -> None:
        """Only these sequences go on; pages that nobody holds any more are free again."""
        kept = set(rows)
        for row, pages in enumerate(self._pages):
            if row not in kept:
                for page in pages:
                    self._release(page)
        self.seqlens = [self.seqlens[row] for row in rows]
        self._pages = [self._pages[row] for row in rows]
        self._table = None

    def nbytes(self) -> int:
        """Bytes of the pool, used or not."""
        return sum(t.nbytes for t in itertools.chain(self.k, self.v))

    # ---- pages ----

    def _take_pages(self, needed: list[int]) -> None:
        shortage = sum(max(0, n) for n in needed) - len(self._free)
        if shortage > 0:
            self._grow(shortage)
        for pages, n in zip(self._pages, needed, strict=True):
            for _ in range(n):
                page = self._free.pop()
                self._owners[page] = 1
                pages.append(page)
        self._table = None

    def _release(self, page: int) -> None:
        self._owners[page] -= 1
        if self._owners[page] == 0:
            self._free.append(page)

    def _copy_page(self, page: int) -> int:
        if not self._free:
            self._grow(1)
        new = self._free.pop()
        self._owners[new] = 1
        for pool in itertools.chain(self.k, self.v):
            pool[new] = pool[page]
        return new

    def _grow(self, at_least: int) -> None:
        old = self.k[0].shape[0]
        extra = max(at_least, old)
        for pools in (self.k, self.v):
            for layer, pool in enumerate(pools):
                pools[layer] = empty_huge((old + extra, *pool.shape[1:]), pool.dtype, pool.device)
                pools[layer][:old] = pool
        self._owners += [0] * extra
        self._free = list(range(old + extra - 1, old - 1, -1)) + self._free

    # ---- tensors for the kernels ----

    def _page_table(self) -> Tensor:
        if self._table is None:
            self._table = self.page_table(max(1, *(len(pages) for pages in self._pages))).to(self.device)
        return self._table

    def _slots(self, table: Tensor, starts: list[int], num_new: list[int]) -> Tensor:
        if max(num_new) <= PAGE_SIZE:  # a decode step: cheap on the host
            slots = [
                pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
                for pages, start, new in zip(self._pages, starts, num_new, strict=True)
                for position in range(start, start + new)
            ]
            return torch.tensor(slots, dtype=torch.long, device=self.device)
        per_sequence = []
        for row, (start, new) in enumerate(zip(starts, num_new, strict=True)):
            position = torch.arange(start, start + new, device=self.device)
            per_sequence.append(table[row, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE)
        return torch.cat(per_sequence)

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def pages_of(num_tokens: int) -> int:
    """Pages that so many tokens of one sequence need."""
    return -(-num_tokens // PAGE_SIZE)
