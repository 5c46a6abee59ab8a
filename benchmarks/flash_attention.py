"""flash_attention: causal self-attention of a prompt without a cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from benchmarks import counts, plain
from benchmarks.cases import Call, Case, Prepared, Shapes, Workspace, set_bytes
from persimmon_fast import ops, reference


def cases(shapes: Shapes) -> Iterator[Case]:
    for batch_size, seqlen in [(1, n) for n in shapes.prefill_rows] + [(4, shapes.prefill_rows[0])]:

        def prepare(ws: Workspace, batch_size: int = batch_size, seqlen: int = seqlen) -> Prepared:
            return _prepare(ws, shapes, batch_size, seqlen)

        label = f"{seqlen:,} tokens" if batch_size == 1 else f"{batch_size} x {seqlen:,} tokens"
        sizes = {
            "batch_size": batch_size,
            "seqlen": seqlen,
            "num_heads": shapes.num_heads,
            "head_dim": shapes.head_dim,
        }
        yield Case("flash_attention", label, "prefill", sizes, prepare, quick=(batch_size, seqlen) == (1, 512))


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.flash_attention(q, k, v)[0]


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch_size, seqlen, _, head_dim = q.shape
    bounds = ops._uniform_cu_seqlens(batch_size, seqlen, q.device)
    packed_q, packed_k, packed_v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    out, _ = reference.flash_attention(packed_q, packed_k, packed_v, bounds, bounds, None, head_dim**-0.5, True)
    return out.view(q.shape)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True).transpose(1, 2)


def _prepare(ws: Workspace, shapes: Shapes, batch_size: int, seqlen: int) -> Prepared:
    sets = ws.rotate(*[(batch_size, seqlen, shapes.num_heads, shapes.head_dim)] * 3)
    return Prepared(
        ours=Call(_ours, sets),
        reference=Call(_reference, sets),
        plain={"scaled_dot_product_attention": Call(_plain, sets)},
        counts=counts.flash_attention(batch_size, seqlen, shapes.num_heads, shapes.head_dim, ws.itemsize),
        dtype=ws.dtype,
        working_set=set_bytes(sets),
    )
