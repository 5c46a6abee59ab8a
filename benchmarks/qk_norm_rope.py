"""qk_norm_rope and qk_norm_rope_, on the packed [num_tokens, num_heads, 3, head_dim] projection of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import counts, plain
from benchmarks.cases import Call, Case, Prepared, Shapes, Workspace, is_quick, phase_of, rows_label, set_bytes
from persimmon_fast import ops, reference


def cases(shapes: Shapes) -> Iterator[Case]:
    for op in ("qk_norm_rope", "qk_norm_rope_"):
        for rows in (*shapes.decode_rows, *shapes.prefill_rows):

            def prepare(ws: Workspace, rows: int = rows, op: str = op) -> Prepared:
                return _prepare(ws, shapes, rows, op)

            sizes = {"rows": rows, "num_heads": shapes.num_heads, "head_dim": shapes.head_dim}
            yield Case(op, rows_label(rows), phase_of(rows), sizes, prepare, is_quick(rows))


def _reference_(q: Tensor, k: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    new_q, new_k = reference.qk_norm_rope(q, k, *rest)  # type: ignore[arg-type]
    return q.copy_(new_q), k.copy_(new_k)


def _prepare(ws: Workspace, shapes: Shapes, rows: int, op: str) -> Prepared:
    heads, dim = shapes.num_heads, shapes.head_dim
    sets = ws.rotate((rows, heads, 3, dim), *[(dim,)] * 4)
    in_place = op == "qk_norm_rope_"
    packed = [tensors[0].clone() if in_place else tensors[0] for tensors in sets]  # the block itself stays as it is
    positions, cos_sin = ws.arange(rows), ws.cos_sin(shapes, rows)
    norms = [tensors[1:] for tensors in sets]
    arguments = [
        (qkv[:, :, 0], qkv[:, :, 1], *norm, cos_sin, positions, shapes.eps)
        for qkv, norm in zip(packed, norms, strict=True)
    ]
    cos, sin = cos_sin.to(ws.dtype).unsqueeze(1).chunk(2, dim=-1)
    plain_arguments = [(*args[:6], cos, sin, shapes.eps) for args in arguments]

    def ours(*args: Tensor) -> tuple[Tensor, Tensor]:
        ops.qk_norm_rope_(*args)  # type: ignore[arg-type]
        return args[0], args[1]

    return Prepared(
        ours=Call(ours if in_place else ops.qk_norm_rope, arguments),
        reference=Call(_reference_ if in_place else reference.qk_norm_rope, arguments),
        plain={"F.layer_norm + rotary": Call(getattr(plain, op), plain_arguments)},
        counts=counts.qk_norm_rope(rows, heads, dim, shapes.rotary_dim, ws.itemsize),
        dtype=ws.dtype,
        working_set=set_bytes(sets),
        # in place, each call starts from the last one's result: there is nothing to compare
        result=None if in_place else lambda out: torch.cat(out),
    )
