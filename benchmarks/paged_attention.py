"""paged_attention: decode steps and prompts over the paged cache; torch gets a contiguous cache of the same size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import counts, plain
from benchmarks.cases import Call, Case, Prepared, Shapes, Workspace, set_bytes
from persimmon_fast import ops, reference
from persimmon_fast.kv_cache import PAGE_SIZE


def cases(shapes: Shapes) -> Iterator[Case]:
    short = shapes.contexts[0]
    wanted: list[tuple[Literal["decode", "prefill"], int, int, int]] = []
    wanted += [("decode", 1, 1, context) for context in shapes.contexts]
    wanted += [("decode", rows, 1, short) for rows in shapes.decode_rows if rows > 1]
    wanted += [("prefill", 1, rows, rows) for rows in shapes.prefill_rows]
    wanted += [("prefill", 1, shapes.prefill_rows[0], short)]
    for phase, batch_size, seqlen_q, context in wanted:

        def prepare(
            ws: Workspace, batch_size: int = batch_size, seqlen_q: int = seqlen_q, context: int = context
        ) -> Prepared:
            return _prepare(ws, shapes, batch_size, seqlen_q, context)

        if phase == "decode":
            label = f"context {context:,}" if batch_size == 1 else f"{batch_size} x context {context:,}"
        else:
            label = f"{seqlen_q:,} tokens" + (f" at context {context:,}" if context > seqlen_q else "")
        sizes = {
            "batch_size": batch_size,
            "seqlen_q": seqlen_q,
            "context": context,
            "num_heads": shapes.num_heads,
            "head_dim": shapes.head_dim,
        }
        quick = batch_size == 1 and (seqlen_q == context == 512 or (phase == "decode" and context == short))
        yield Case("paged_attention", label, phase, sizes, prepare, quick)


def _prepare(ws: Workspace, shapes: Shapes, batch_size: int, seqlen_q: int, context: int) -> Prepared:
    heads, dim = shapes.num_heads, shapes.head_dim
    num_pages = -(-context // PAGE_SIZE)
    sets = ws.rotate(*[(batch_size * num_pages, heads, PAGE_SIZE, dim)] * 2)
    q = ws.randn(batch_size * seqlen_q, heads, dim)
    table = ws.arange(batch_size * num_pages, dtype=torch.int32).view(batch_size, num_pages)
    seqlens = torch.full((batch_size,), context, dtype=torch.int32, device=ws.device)
    bounds = ops._uniform_cu_seqlens(batch_size, seqlen_q, ws.device)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.paged_attention(q, k, v, table, seqlens, cu_seqlens_q=bounds, max_seqlen_q=seqlen_q)

    def reference_(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.paged_attention(q, k, v, table, seqlens, bounds, dim**-0.5)

    causal = seqlen_q > 1 and seqlen_q == context
    mask = None
    if 1 < seqlen_q < context:
        mask = ws.arange(context) <= ws.arange(seqlen_q, context - seqlen_q).unsqueeze(1)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = plain.attention(q.view(batch_size, seqlen_q, heads, dim).transpose(1, 2), k, v, mask, causal)
        return out.transpose(1, 2).reshape(q.shape)

    arguments = [(q, k, v) for k, v in sets]
    # The same memory read as [batch_size, heads, context, dim]. Only the first copy holds the same keys in the other
    # order, for the comparison of results: which numbers the others hold does not matter to the time.
    contiguous: list[tuple[Any, ...]] = [
        (q, *(t.view(batch_size, heads, num_pages * PAGE_SIZE, dim)[:, :, :context] for t in pair)) for pair in sets
    ]
    contiguous[0] = (q, *(_unpaged(t, batch_size, context) for t in sets[0]))
    return Prepared(
        ours=Call(ours, arguments),
        reference=Call(reference_, arguments),
        plain={"scaled_dot_product_attention": Call(sdpa, contiguous)},
        counts=counts.paged_attention(batch_size, seqlen_q, context, heads, dim, ws.itemsize),
        dtype=ws.dtype,
        working_set=set_bytes(sets),
    )


def _unpaged(pages: Tensor, batch_size: int, context: int) -> Tensor:
    """[batch_size, num_heads, context, head_dim] of pages that count up."""
    num_heads, dim = pages.shape[1], pages.shape[3]
    by_sequence = pages.view(batch_size, -1, num_heads, PAGE_SIZE, dim)
    return by_sequence.transpose(1, 2).reshape(batch_size, num_heads, -1, dim)[:, :, :context].contiguous()
