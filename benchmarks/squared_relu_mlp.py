"""squared_relu_mlp at several shares of zeros.

The bias of the up-projection is shifted to a quantile of its pre-activations, so that the wanted share of each row's
neurons is zero, in every copy of the weights. With several rows a neuron must be read if any row needs it: the share
of neurons that no row needs is reported beside the share of zeros, and the bytes are counted from it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from benchmarks import counts, plain
from benchmarks.cases import Call, Case, Prepared, Shapes, Workspace, phase_of, rows_label, set_bytes
from persimmon_fast import ops, reference

ZEROS = {1: (0.0, 0.5, 0.9, 0.95), 4: (0.0, 0.5, 0.9, 0.95), 16: (0.5, 0.9)}  # by rows; prefill skips nothing
MAX_SKIPPING_ROWS = 16


def cases(shapes: Shapes) -> Iterator[Case]:
    for rows in (*shapes.decode_rows, *shapes.prefill_rows):
        for zeros in ZEROS.get(rows, (0.5,)):

            def prepare(ws: Workspace, rows: int = rows, zeros: float = zeros) -> Prepared:
                return _prepare(ws, shapes, rows, zeros)

            yield Case(
                "squared_relu_mlp",
                f"{rows_label(rows)}, {zeros:.0%} zeros",
                phase_of(rows),
                {
                    "rows": rows,
                    "hidden_size": shapes.hidden_size,
                    "intermediate_size": shapes.intermediate_size,
                    "zeros": zeros,
                },
                prepare,
                quick=rows == 512 or (rows == 1 and zeros in (0.0, 0.5, 0.9)),
            )


def _prepare(ws: Workspace, shapes: Shapes, rows: int, zeros: float) -> Prepared:
    hidden, intermediate = shapes.hidden_size, shapes.intermediate_size
    sets = ws.rotate((intermediate, hidden), (intermediate, hidden), (hidden,))
    x, residual = ws.randn(rows, hidden), ws.randn(rows, hidden)
    arguments, plain_arguments, zero_shares, idle_shares = [], [], [], []
    for up, down_by_neuron, down_bias in sets:
        pre = F.linear(x[:16], up).float()  # of a few rows: torch.quantile refuses more than 2^24 numbers
        row_quantiles = pre.amin(1) - 1 if zeros == 0 else pre.quantile(zeros, dim=1)
        up_bias = (-row_quantiles.mean()).to(ws.dtype).repeat(intermediate)
        active = F.linear(x, up, up_bias) > 0
        zero_shares.append(1 - float(active.float().mean()))
        idle_shares.append(1 - float(active.any(0).float().mean()))
        arguments.append((x, up, up_bias, down_by_neuron.t(), down_bias, residual))
        # torch gets the order that it is used to, [hidden_size, intermediate_size]
        plain_arguments.append((x, up, up_bias, down_by_neuron.t().contiguous(), down_bias, residual))
    idle = sum(idle_shares) / len(idle_shares)
    skipped = idle if rows <= MAX_SKIPPING_ROWS else 0.0
    return Prepared(
        ours=Call(ops.squared_relu_mlp, arguments),
        reference=Call(reference.squared_relu_mlp, arguments),
        plain={"F.linear, relu_, square_, F.linear": Call(plain.squared_relu_mlp, plain_arguments)},
        counts=counts.squared_relu_mlp(rows, hidden, intermediate, ws.itemsize, 1 - skipped),
        dtype=ws.dtype,
        working_set=set_bytes(sets),
        notes={"zeros": sum(zero_shares) / len(zero_shares), "neurons_zero_in_all_rows": idle},
    )
