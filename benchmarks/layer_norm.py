"""layer_norm and add_layer_norm."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import counts, plain
from benchmarks.cases import Call, Case, Prepared, Shapes, Workspace, is_quick, phase_of, rows_label, set_bytes
from persimmon_fast import ops, reference


def cases(shapes: Shapes) -> Iterator[Case]:
    for residual in (False, True):
        for rows in (*shapes.decode_rows, *shapes.prefill_rows):

            def prepare(ws: Workspace, rows: int = rows, residual: bool = residual) -> Prepared:
                return _prepare(ws, shapes, rows, residual)

            op = "add_layer_norm" if residual else "layer_norm"
            sizes = {"rows": rows, "hidden_size": shapes.hidden_size}
            yield Case(op, rows_label(rows), phase_of(rows), sizes, prepare, is_quick(rows))


def _prepare(ws: Workspace, shapes: Shapes, rows: int, residual: bool) -> Prepared:
    hidden = shapes.hidden_size
    inputs = [(rows, hidden)] * (2 if residual else 1)
    sets = ws.rotate(*inputs, (hidden,), (hidden,))
    arguments = [(*tensors, shapes.eps) for tensors in sets]
    op = "add_layer_norm" if residual else "layer_norm"
    return Prepared(
        ours=Call(getattr(ops, op), arguments),
        reference=Call(getattr(reference, op), arguments),
        plain={"F.layer_norm": Call(getattr(plain, op), arguments)},
        counts=getattr(counts, op)(rows, hidden, ws.itemsize),
        dtype=ws.dtype,
        working_set=set_bytes(sets),
        result=(lambda out: out[0]) if residual else lambda out: out,
    )
