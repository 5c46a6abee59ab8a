"""linear_residual: the attention's output projection."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import counts, plain
from benchmarks.cases import Call, Case, Prepared, Shapes, Workspace, is_quick, phase_of, rows_label, set_bytes
from persimmon_fast import ops, reference


def cases(shapes: Shapes) -> Iterator[Case]:
    for rows in (*shapes.decode_rows, *shapes.prefill_rows):

        def prepare(ws: Workspace, rows: int = rows) -> Prepared:
            return _prepare(ws, shapes, rows)

        sizes = {"rows": rows, "in_features": shapes.hidden_size, "out_features": shapes.hidden_size}
        yield Case("linear_residual", rows_label(rows), phase_of(rows), sizes, prepare, is_quick(rows))


def _prepare(ws: Workspace, shapes: Shapes, rows: int) -> Prepared:
    hidden = shapes.hidden_size
    sets = ws.rotate((hidden, hidden), (hidden,))
    x, residual = ws.randn(rows, hidden), ws.randn(rows, hidden)
    arguments = [(x, *tensors, residual) for tensors in sets]
    return Prepared(
        ours=Call(ops.linear_residual, arguments),
        reference=Call(reference.linear_residual, arguments),
        plain={"F.linear + add": Call(plain.linear_residual, arguments)},
        counts=counts.linear_residual(rows, hidden, hidden, ws.itemsize),
        dtype=ws.dtype,
        working_set=set_bytes(sets),
    )
