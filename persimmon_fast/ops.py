"""The ops: typed functions over torch.ops.persimmon_fast, each with a definition in `reference`.

Every function runs the compiled kernel of its device. It runs the pure-torch reference instead -- with one warning
per reason, because that is slow -- where no kernel fits: a device without one, a head size that the kernels do not
have, or an input that requires gradients. PERSIMMON_FAST_FORCE_REFERENCE=1 asks for the reference everywhere.

Shapes: activations are [..., hidden_size], heads [..., num_heads, head_dim]; leading dimensions are free unless a
docstring says otherwise. Tensors of one call share device and dtype (float32, float16, bfloat16) except where noted;
products, statistics, rotary angles and softmax are in fp32. Shapes and dtypes are checked by the extension: a
ValueError or TypeError names op, argument, expected and found. No tensor value is ever checked, so no call
synchronises a GPU.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

from persimmon_fast import extension, reference  # noqa: F401  extension registers the ops
from persimmon_fast.memory import to_neuron_major as to_neuron_major

_FORCE_REFERENCE = os.environ.get("PERSIMMON_FAST_FORCE_REFERENCE", "0") not in ("", "0")
MAX_HEAD_DIM = 128
CUDA_HEAD_DIMS = (64, 128)
# Those that this build has a CUDA kernel for. A constant: torch.compile can read it, but not ask the dispatcher.
_CUDA_OPS = frozenset(
    name.removeprefix("persimmon_fast::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("persimmon_fast::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
)
_warned: set[str] = set()
# Which kernels run: persimmon_fast, or in tests persimmon_fast_emu, the CUDA kernels on CPU tensors.
_library = "persimmon_fast"


def _kernel(op: str) -> Any:
    return getattr(getattr(torch.ops, _library), op)


def _warn_once(message: str) -> None:
    if message not in _warned and not torch.compiler.is_compiling():
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


def _use_kernel(op: str, *tensors: Tensor | None, head_dim: int | None = None) -> bool:
    """Whether `op` runs its kernel on these inputs (True) or, with one warning per reason, the reference (False)."""
    if _FORCE_REFERENCE:
        return False
    reason = _why_no_kernel(op, *tensors, head_dim=head_dim)
    if reason:
        _warn_once(f"persimmon_fast.{op} {reason}: it runs the slower pure-torch reference.")
    return not reason


def _why_no_kernel(op: str, *tensors: Tensor | None, head_dim: int | None = None) -> str:
    """What keeps `op` from running its kernel on these inputs, or ""."""
    device = next(t for t in tensors if t is not None).device.type
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "has no backward kernel yet and an input requires gradients (torch.no_grad() where none is needed)"
    if device not in ("cpu", "meta") and not (device == "cuda" and op in _CUDA_OPS):
        return f"has no {device} kernel in this build"
    on_cuda = device == "cuda" or _library != "persimmon_fast"
    if head_dim is not None and (
        head_dim not in CUDA_HEAD_DIMS if on_cuda else head_dim % 8 != 0 or head_dim > MAX_HEAD_DIM
    ):
        taken = f"{CUDA_HEAD_DIMS} on CUDA" if on_cuda else f"multiples of 8 up to {MAX_HEAD_DIM}"
        return f"has kernels for a head_dim of {taken}, not of {head_dim}"
    return ""


def has_kernels(like: Tensor, *names: str, head_dim: int | None = None) -> bool:
    """Whether all these ops run their kernels on tensors of the device of `like`, with heads of this size."""
    return not _FORCE_REFERENCE and not any(_why_no_kernel(name, like, head_dim=head_dim) for name in names)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    Args:
        x: [..., hidden_size].
        weight, bias: [hidden_size].
        eps: added to the variance, dimensionless.
    Returns:
        [..., hidden_size], contiguous.
    Raises:
        ValueError, TypeError: shape, device or dtype does not fit (see the module's docstring).
    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    if not _use_kernel("layer_norm", x, weight, bias):
        return reference.layer_norm(x, weight, bias, eps)
    out = _kernel("layer_norm")(x.reshape(-1, x.shape[-1]), weight, bias, eps)
    return out.view(x.shape)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(LayerNorm(s), s) with s = x + residual, in one pass; arguments as in `layer_norm`."""
    if not _use_kernel("add_layer_norm", x, residual, weight, bias):
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    hidden_size = x.shape[-1]
    out, total = _kernel("add_layer_norm")(
        x.reshape(-1, hidden_size), residual.reshape(-1, hidden_size), weight, bias, eps
    )
    return out.view(x.shape), total.view(x.shape)


def _normalised(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, norm_eps: float) -> Tensor:
    if norm_weight is None or norm_bias is None:
        return x
    return reference.layer_norm(x, norm_weight, norm_bias, norm_eps)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos_sin: Tensor,
    position_ids: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """rope(LayerNorm(q)), rope(LayerNorm(k)) for queries and keys that are already projected.

    Args:
        q, k: [num_tokens, num_heads, head_dim], any strides with a dense last dimension (views of a packed
            projection need no copy).
        q_weight, q_bias, k_weight, k_bias: [head_dim], or [num_heads, head_dim] for one LayerNorm per head; all
            None: no LayerNorm.
        cos_sin: [num_positions, rotary_dim] fp32, cosines in the first half of the columns, sines in the second.
            Dims i and i + rotary_dim / 2 of a head are one rotated pair; dims from rotary_dim on pass through.
        position_ids: [num_tokens] int64, rows of cos_sin. Out of range is undefined on a GPU, an error on a CPU.
        eps: of the LayerNorm.
    Returns:
        new q and k, contiguous. `qk_norm_rope_` writes them in place.
    """
    if not _use_kernel("qk_norm_rope", q, k, q_weight, q_bias, head_dim=q.shape[-1]):
        return reference.qk_norm_rope(q, k, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps)
    return _kernel("qk_norm_rope")(q, k, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps)


def qk_norm_rope_(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos_sin: Tensor,
    position_ids: Tensor,
    eps: float = 1e-5,
) -> None:
    """`qk_norm_rope` in place: q and k are overwritten. They must not overlap each other."""
    if not _use_kernel("qk_norm_rope_", q, k, q_weight, q_bias, head_dim=q.shape[-1]):
        new_q, new_k = reference.qk_norm_rope(q, k, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps)
        q.copy_(new_q)
        k.copy_(new_k)
        return
    _kernel("qk_norm_rope_")(q, k, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps)


def qkv_norm_rope(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos_sin: Tensor,
    position_ids: Tensor,
    eps: float,
    num_heads: int,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of x: projection + bias, LayerNorm of q and k, rotary embedding; v is the bare projection.

    Args:
        x: [num_tokens, hidden_size].
        weight: [num_heads * 3 * head_dim, hidden_size], per head its q, k and v rows; bias: its rows, or None.
        num_heads: splits the rows of weight.
        norm_weight, norm_bias: [hidden_size], both or none: x is replaced by layer_norm(x, norm_weight, norm_bias,
            norm_eps) first, bit for bit, without a pass of its own where few tokens come.
        the others: as in `qk_norm_rope`.
    Returns:
        q, k, v: [num_tokens, num_heads, head_dim] each.
    """
    head_dim = weight.shape[0] // (3 * num_heads) if num_heads > 0 else 0
    if not _use_kernel("qkv_norm_rope", x, weight, bias, q_weight, norm_weight, head_dim=head_dim):
        x = _normalised(x, norm_weight, norm_bias, norm_eps)
        return reference.qkv_norm_rope(
            x, weight, bias, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps, num_heads
        )
    return _kernel("qkv_norm_rope")(
        x, weight, bias, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps, num_heads,
        norm_weight, norm_bias, norm_eps,
    )  # fmt: skip


def qkv_norm_rope_paged(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos_sin: Tensor,
    position_ids: Tensor,
    eps: float,
    num_heads: int,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    """`qkv_norm_rope` that writes k and v to the paged cache, in place, and returns q.

    Args:
        slot_mapping: [num_tokens] int64: page * page_size + offset of each token; negative: not kept. No two
            tokens may share a slot. Past the cache is undefined on a GPU, an error on a CPU.
        k_cache, v_cache: [num_pages, num_heads, page_size, head_dim] contiguous, written.
        the others: as in `qkv_norm_rope`.
    Returns:
        q: [num_tokens, num_heads, head_dim].
    """
    head_dim = k_cache.shape[-1]
    if not _use_kernel("qkv_norm_rope_paged", x, weight, bias, q_weight, norm_weight, head_dim=head_dim):
        x = _normalised(x, norm_weight, norm_bias, norm_eps)
        q, k, v = reference.qkv_norm_rope(
            x, weight, bias, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps, num_heads
        )
        reference.write_paged(k, v, slot_mapping, k_cache, v_cache)
        return q
    return _kernel("qkv_norm_rope_paged")(
        x, weight, bias, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps, num_heads,
        slot_mapping, k_cache, v_cache, norm_weight, norm_bias, norm_eps,
    )  # fmt: skip


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * softmax_scale) v with an online softmax: scores are never whole in memory.

    Two layouts, as in flash-attention:
        batched: q [batch_size, seqlen_q, num_heads, head_dim], k and v [batch_size, seqlen_k, num_heads, head_dim];
        packed: q [total_q, num_heads, head_dim], k and v [total_k, num_heads, head_dim] with cu_seqlens_q and
            cu_seqlens_k [batch_size + 1] int32 on the same device, starting at 0 and ascending; max_seqlen_* are
            upper bounds of the lengths.
    Args:
        seqused_k: [batch_size] int32, only the first seqused_k[b] keys of a sequence count (right padding);
            None: all.
        softmax_scale: None: head_dim ** -0.5.
        causal: with seqlen_q <= seqlen_k the mask is aligned at the bottom right:
                keys  0 1 2 3 4
            query 0:  x x x x .
            query 1:  x x x x x
    Returns:
        out: like q. softmax_lse: natural logarithm of the softmax denominator, fp32, [batch_size, num_heads,
        seqlen_q] or [num_heads, total_q]. A query without keys gives 0 and -inf.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    batched = q.dim() == 4
    if batched:
        batch_size, seqlen_q, num_heads, _ = q.shape
        max_seqlen_q, max_seqlen_k = seqlen_q, k.shape[1]
        cu_seqlens_q = _uniform_cu_seqlens(batch_size, max_seqlen_q, q.device)
        cu_seqlens_k = _uniform_cu_seqlens(k.shape[0], max_seqlen_k, q.device)
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if cu_seqlens_q is None or cu_seqlens_k is None or max_seqlen_q is None or max_seqlen_k is None:
        raise ValueError(
            "flash_attention: packed q of three dimensions needs cu_seqlens_q, cu_seqlens_k, max_seqlen_q and "
            "max_seqlen_k"
        )
    if not _use_kernel("flash_attention", q, k, v, head_dim=q.shape[-1]):
        out, lse = reference.flash_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, causal)
    else:
        out, lse = _kernel("flash_attention")(
            q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, scale, causal
        )
    if batched:
        out = out.view(batch_size, seqlen_q, num_heads, -1)
        lse = lse.view(num_heads, batch_size, seqlen_q).transpose(0, 1)
    return out, lse


def _uniform_cu_seqlens(batch_size: int, seqlen: int, device: torch.device) -> Tensor:
    return torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seqlen


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cache_seqlens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int = 1,
    softmax_scale: float | None = None,
) -> Tensor:
    """Causal attention of the newest queries of each sequence over its paged cache.

    Args:
        q: [total_q, num_heads, head_dim]: one query per sequence, or packed by cu_seqlens_q. The last query of a
            sequence sees its whole cache, the one before it one key less, and so on.
        k_cache, v_cache: [num_pages, num_heads, page_size, head_dim] contiguous.
        page_table: [batch_size, max_pages] int32: entry i of a row is the page of keys i * page_size and on.
        cache_seqlens: [batch_size] int32: keys in the cache, those of q included. Keys beyond are never read.
        cu_seqlens_q: [batch_size + 1] int32, None: one query per sequence. max_seqlen_q: its longest sequence. Lengths
            and pages out of range are undefined on a GPU, an error on a CPU.
        softmax_scale: None: head_dim ** -0.5.
    Returns:
        like q.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if cu_seqlens_q is None:
        cu_seqlens_q = _uniform_cu_seqlens(q.shape[0], 1, q.device)
    if not _use_kernel("paged_attention", q, k_cache, v_cache, head_dim=q.shape[-1]):
        return reference.paged_attention(q, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q, scale)
    return _kernel("paged_attention")(q, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, scale)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x W^T + b, rounded once.

    Args:
        x: [..., in_features]; weight: [out_features, in_features]; bias: [out_features] or None.
        residual: [..., out_features].
    Returns:
        [..., out_features].
    """
    if not _use_kernel("linear_residual", x, weight, bias, residual):
        return reference.linear_residual(x, weight, bias, residual)
    out = _kernel("linear_residual")(x.reshape(-1, x.shape[-1]), weight, bias, residual.reshape(-1, residual.shape[-1]))
    return out.view(residual.shape)


def squared_relu_mlp(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    """(residual +) relu(x U^T + b_u)^2 D^T + b_d.

    On a CPU the second product of up to 16 rows reads only the columns of D whose neuron is nonzero in some row. That
    is exact, and a saving when D lies in memory as [intermediate_size, hidden_size] rows: see `to_neuron_major`. (A
    skipped neuron is not multiplied: an inf or NaN in its column of D does not show.) The squares are kept in fp32,
    or scaled by a power of two per row in fp16, so that they do not overflow.

    Args:
        x: [..., hidden_size].
        up_weight: [intermediate_size, hidden_size]; up_bias: [intermediate_size] or None.
        down_weight: [hidden_size, intermediate_size], in either memory order; down_bias: [hidden_size] or None.
        residual: [..., hidden_size] or None.
        norm_weight, norm_bias: [hidden_size], both or none: x (not residual) is replaced by layer_norm(x, norm_weight,
            norm_bias, norm_eps) first, bit for bit, without a pass of its own where few rows come.
    Returns:
        [..., hidden_size].
    Source: So et al. 2021, Primer, arXiv:2109.08668 (squared ReLU).
    """
    if not _use_kernel("squared_relu_mlp", x, up_weight, up_bias, down_weight, down_bias, residual, norm_weight):
        x = _normalised(x, norm_weight, norm_bias, norm_eps)
        return reference.squared_relu_mlp(x, up_weight, up_bias, down_weight, down_bias, residual)
    if down_weight.device.type == "cpu" and down_weight.stride(0) != 1 and down_weight.shape[0] > 1:
        _warn_once(
            "persimmon_fast.squared_relu_mlp: down_weight lies in [hidden_size, intermediate_size] order, so zeros "
            "cannot be skipped; lay it out once with persimmon_fast.ops.to_neuron_major(down_weight)."
        )
    out = _kernel("squared_relu_mlp")(
        x.reshape(-1, x.shape[-1]),
        up_weight,
        up_bias,
        down_weight,
        down_bias,
        None if residual is None else residual.reshape(-1, residual.shape[-1]),
        norm_weight,
        norm_bias,
        norm_eps,
    )
    return out.view(*x.shape[:-1], down_weight.shape[0])


def _flat(vocab_ranges: reference.VocabRanges | None) -> list[int] | None:
    return None if vocab_ranges is None else [token for pair in vocab_ranges for token in pair]


def lm_head_argmax(
    x: Tensor, weight: Tensor, *, vocab_ranges: reference.VocabRanges | None = None
) -> tuple[Tensor, Tensor]:
    """Most likely token of each row, the lowest id where logits are equal.

    Args:
        x: [num_rows, hidden_size]; weight: [vocab_size, hidden_size].
        vocab_ranges: up to 16 ranges of tokens (begin, end), half-open and ascending; None: the whole vocabulary. The
            result is that of logits of -inf at all other tokens, whose rows of weight are not read (on CUDA whole
            blocks of 128 of them).
    Returns:
        token_ids [num_rows] int64 and their log-probabilities [num_rows] fp32.
    """
    if not _use_kernel("lm_head_argmax", x, weight):
        return reference.lm_head_argmax(x, weight, vocab_ranges)
    return _kernel("lm_head_argmax")(x, weight, _flat(vocab_ranges))


def lm_head_sample(
    x: Tensor,
    weight: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    penalty_ids: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    *,
    vocab_ranges: reference.VocabRanges | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of each row, drawn from its filtered distribution; exact, and the same for the same seed.

    Order: repetition penalty, temperature, top-k, top-p, min-p, draw. Definitions: `reference.keep_mask`,
    `reference.lm_head_sample`.

    Args:
        x: [num_rows, hidden_size]; weight: [vocab_size, hidden_size].
        temperature: [num_rows] fp32, >= 0; 0 takes the most likely token.
        top_k: [num_rows] int32, 0: off. top_p: [num_rows] fp32 in (0, 1], 1: off. min_p: [num_rows] fp32 in [0, 1],
            0: off.
        seeds, offsets: [num_rows] int64, key and counter of the random numbers: draw number `offset` of the stream
            `seed`, independent of the row's place in the batch.
        penalty_ids: [num_rows, num_penalised] int64, tokens to penalise, padded with -1; repetition_penalty:
            [num_rows] fp32 > 0. Both or none.
        vocab_ranges: as in `lm_head_argmax`; the numbers drawn belong to token ids, so the others keep theirs.
    Returns:
        token_ids [num_rows] int64 and their log-probabilities [num_rows] fp32 under the bare logits (before
        penalty, temperature and filters).
    """
    args = (x, weight, temperature, top_k, top_p, min_p, seeds, offsets, penalty_ids, repetition_penalty)
    if not _use_kernel("lm_head_sample", x, weight):
        return reference.lm_head_sample(*args, vocab_ranges)
    return _kernel("lm_head_sample")(*args, _flat(vocab_ranges))


def lm_head_logprobs(
    x: Tensor, weight: Tensor, token_ids: Tensor, *, vocab_ranges: reference.VocabRanges | None = None
) -> Tensor:
    """log softmax(x W^T)[row, token_ids[row]] without keeping the logits.

    Args:
        x: [num_rows, hidden_size]; weight: [vocab_size, hidden_size]; token_ids: [num_rows] int64.
        vocab_ranges: as in `lm_head_argmax`; a token outside has -inf.
    Returns:
        [num_rows] fp32.
    """
    if not _use_kernel("lm_head_logprobs", x, weight):
        return reference.lm_head_logprobs(x, weight, token_ids, vocab_ranges)
    return _kernel("lm_head_logprobs")(x, weight, token_ids, _flat(vocab_ranges))
