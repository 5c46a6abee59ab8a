"""qkv_norm_rope and qkv_norm_rope_paged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import counts, plain
from benchmarks.cases import Call, Case, Prepared, Shapes, Workspace, is_quick, phase_of, rows_label, set_bytes
from persimmon_fast import ops, reference
from persimmon_fast.kv_cache import PAGE_SIZE


def cases(shapes: Shapes) -> Iterator[Case]:
    for paged in (False, True):
        for rows in (*shapes.decode_rows, *shapes.prefill_rows):

            def prepare(ws: Workspace, rows: int = rows, paged: bool = paged) -> Prepared:
                return _prepare(ws, shapes, rows, paged)

            op = "qkv_norm_rope_paged" if paged else "qkv_norm_rope"
            sizes = {"rows": rows, "hidden_size": shapes.hidden_size, "num_heads": shapes.num_heads}
            yield Case(op, rows_label(rows), phase_of(rows), sizes, prepare, is_quick(rows))


def _reference_paged(*args: Any) -> Tensor:
    *projection, slots, k_cache, v_cache = args
    q, k, v = reference.qkv_norm_rope(*projection)
    reference.write_paged(k, v, slots, k_cache, v_cache)
    return q


def _prepare(ws: Workspace, shapes: Shapes, rows: int, paged: bool) -> Prepared:
    hidden, heads, dim = shapes.hidden_size, shapes.num_heads, shapes.head_dim
    sets = ws.rotate((3 * hidden, hidden), (3 * hidden,), *[(dim,)] * 4)
    x, positions, cos_sin = ws.randn(rows, hidden), ws.arange(rows), ws.cos_sin(shapes, rows)
    tail: tuple[Any, ...] = (cos_sin, positions, shapes.eps, heads)
    cos, sin = cos_sin.to(ws.dtype).unsqueeze(1).chunk(2, dim=-1)
    plain_tail: tuple[Any, ...] = (cos, sin, shapes.eps, heads)
    if paged:  # one sequence of `rows` tokens in a cache of its own
        num_pages = -(-rows // PAGE_SIZE)
        paged_cache = [ws.randn(num_pages, heads, PAGE_SIZE, dim) for _ in range(2)]
        tail += (ws.arange(rows), *paged_cache)
        plain_tail += (positions, *[cache.view(heads, num_pages * PAGE_SIZE, dim) for cache in paged_cache])
    arguments = [(x, *tensors, *tail) for tensors in sets]
    plain_arguments = [(x, *tensors, *plain_tail) for tensors in sets]
    count = counts.qkv_norm_rope_paged if paged else counts.qkv_norm_rope
    return Prepared(
        ours=Call(ops.qkv_norm_rope_paged if paged else ops.qkv_norm_rope, arguments),
        reference=Call(_reference_paged if paged else reference.qkv_norm_rope, arguments),
        plain={
            "F.linear + F.layer_norm + rotary": Call(
                plain.qkv_norm_rope_cached if paged else plain.qkv_norm_rope, plain_arguments
            )
        },
        counts=count(rows, hidden, dim, shapes.rotary_dim, ws.itemsize),
        dtype=ws.dtype,
        working_set=set_bytes(sets),
        result=(lambda out: out) if paged else lambda out: torch.cat(out),
    )
