"""lm_head_argmax, lm_head_sample and lm_head_logprobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import counts, plain
from benchmarks.cases import Call, Case, Prepared, Shapes, Workspace, is_quick, phase_of, rows_label, set_bytes
from persimmon_fast import ops, reference

TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.95


def cases(shapes: Shapes) -> Iterator[Case]:
    for rows in shapes.decode_rows:
        yield _case(shapes, "lm_head_argmax", rows, "", _argmax)
    for rows in (shapes.decode_rows[0], shapes.decode_rows[-1]):
        yield _case(shapes, "lm_head_sample", rows, ", temperature", _sample)
        yield _case(shapes, "lm_head_sample", rows, f", top-k {TOP_K}, top-p {TOP_P}", _sample_filtered)
    for rows in (*shapes.decode_rows, shapes.prefill_rows[0]):
        yield _case(shapes, "lm_head_logprobs", rows, "", _logprobs)


Prepare = Callable[[Workspace, Shapes, int], Prepared]


def _case(shapes: Shapes, op: str, rows: int, detail: str, prepare: Prepare) -> Case:
    sizes = {"rows": rows, "hidden_size": shapes.hidden_size, "vocab_size": shapes.vocab_size}
    # the reference on the head converts 2 GB to fp32 per call: a quick run has time for one row
    quick = is_quick(rows) and phase_of(rows) == "decode"
    return Case(op, rows_label(rows) + detail, phase_of(rows), sizes, lambda ws: prepare(ws, shapes, rows), quick)


def _weights(ws: Workspace, shapes: Shapes) -> list[tuple[Tensor, ...]]:
    return ws.rotate((shapes.vocab_size, shapes.hidden_size))


def _counts(ws: Workspace, shapes: Shapes, rows: int) -> counts.Counts:
    return counts.lm_head(rows, shapes.hidden_size, shapes.vocab_size, ws.itemsize)


def _argmax(ws: Workspace, shapes: Shapes, rows: int) -> Prepared:
    sets = _weights(ws, shapes)
    x = ws.randn(rows, shapes.hidden_size)
    arguments = [(x, *tensors) for tensors in sets]
    return Prepared(
        ours=Call(ops.lm_head_argmax, arguments),
        reference=Call(reference.lm_head_argmax, arguments),
        plain={"F.linear, max, logsumexp": Call(plain.lm_head_argmax, arguments)},
        counts=_counts(ws, shapes, rows),
        dtype=ws.dtype,
        working_set=set_bytes(sets),
        result=lambda out: out[1],  # ids may differ where two logits are equal up to rounding
    )


def _logprobs(ws: Workspace, shapes: Shapes, rows: int) -> Prepared:
    sets = _weights(ws, shapes)
    x = ws.randn(rows, shapes.hidden_size)
    token_ids = ws.arange(rows) * (shapes.vocab_size // rows)
    arguments = [(x, *tensors, token_ids) for tensors in sets]
    return Prepared(
        ours=Call(ops.lm_head_logprobs, arguments),
        reference=Call(reference.lm_head_logprobs, arguments),
        plain={"F.linear, gather, logsumexp": Call(plain.lm_head_logprobs, arguments)},
        counts=_counts(ws, shapes, rows),
        dtype=ws.dtype,
        working_set=set_bytes(sets),
    )


def _sample(ws: Workspace, shapes: Shapes, rows: int) -> Prepared:
    return _sampling(ws, shapes, rows, filtered=False)


def _sample_filtered(ws: Workspace, shapes: Shapes, rows: int) -> Prepared:
    return _sampling(ws, shapes, rows, filtered=True)


def _sampling(ws: Workspace, shapes: Shapes, rows: int, *, filtered: bool) -> Prepared:
    sets = _weights(ws, shapes)
    x = ws.randn(rows, shapes.hidden_size)

    def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=ws.device)

    settings: tuple[Any, ...] = (
        full(TEMPERATURE),
        full(TOP_K if filtered else 0, torch.int32),
        full(TOP_P if filtered else 1.0),
        full(0.0),
        ws.arange(rows),
        torch.zeros(rows, dtype=torch.int64, device=ws.device),
        None,
        None,
    )
    arguments = [(x, *tensors, *settings) for tensors in sets]
    if filtered:
        what, function = "F.linear, topk, softmax, multinomial", plain.lm_head_sample_filtered
        plain_arguments: list[tuple[Any, ...]] = [(x, *tensors, settings[0], TOP_K, TOP_P) for tensors in sets]
    else:
        what, function = "F.linear, softmax, multinomial", plain.lm_head_sample  # type: ignore[assignment]
        plain_arguments = [(x, *tensors, settings[0]) for tensors in sets]
    return Prepared(
        ours=Call(ops.lm_head_sample, arguments),
        reference=Call(reference.lm_head_sample, arguments),
        plain={what: Call(function, plain_arguments)},
        counts=_counts(ws, shapes, rows),
        dtype=ws.dtype,
        working_set=set_bytes(sets),
        result=None,  # random: torch draws other tokens
    )
