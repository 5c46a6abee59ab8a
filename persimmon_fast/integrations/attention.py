"""The attention implementation "persimmon_fast" of transformers: its mask and its function.

transformers makes one mask per forward pass and hands it to every layer. Ours takes one of three forms:

    None            as many keys as queries, causal: what a prompt without padding needs
    key ranges      int32 [1, 1, 3, batch_size + 1], for queries behind a cache: row 0 the keys that the last query of
                    each sequence sees, row 1 its "page", row 2 the start of its queries; all that the kernel needs, so
                    a layer makes no tensor of its own
    [batch_size, 1, q_length, kv_length]   anything else (padding, packed sequences, masks of the caller), dense; such
                    a batch runs transformers' "sdpa"

The mask has four dimensions because transformers passes such a mask through unchanged, which its static cache needs.

A cache of transformers, [batch_size, num_heads, length, head_dim], is a paged one whose pages are as long as the
cache: page b is sequence b. So the keys are read where they lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from persimmon_fast import ops

NAME = "persimmon_fast"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WANTS_WEIGHTS = "persimmon_fast_wants_weights"  # keyword of a call, as output_attentions is


@functools.cache
def register() -> None:
    """Makes "persimmon_fast" known to transformers, its mask too: without one, transformers drops the padding."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def implementation(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that transformers' Persimmon calls for the attention implementation `name`."""
    from transformers import AttentionInterface
    from transformers.models.persimmon.modeling_persimmon import eager_attention_forward

    result: Callable[..., tuple[Tensor, Tensor | None]]
    result = eager_attention_forward if name == "eager" else AttentionInterface()[name]
    return result


def attention_mask(
    batch_size: int,
    *,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass; see the module. Arguments as transformers gives them to every mask function:

    kv_length: keys, those not yet written of a static cache included; attention_mask: [batch_size, keys so far] bool;
    q_length and q_offset in transformers 5, cache_position [q_length] in 4.
    """
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

    position: dict[str, Any]
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
        position = {"cache_position": cache_position}
    else:
        assert q_length is not None
        device = torch.device("cpu" if device is None else device)
        position = {"q_length": q_length, "q_offset": q_offset, "device": device}
    is_causal = mask_function in (None, causal_mask_function) and kv_offset == 0
    if not is_causal or may_hide_keys(attention_mask, q_offset, q_length):
        # None would be read as causal, so nothing may be skipped
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        dense: Tensor = AttentionMaskInterface()["sdpa"](
            batch_size,
            **position,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function or causal_mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
        return dense
    if kv_length == q_length:
        return None
    return key_ranges(batch_size, q_length, q_offset + q_length, device)


def may_hide_keys(mask: Tensor | None, q_offset: int | Tensor, q_length: int) -> bool:
    """Whether a padding mask may be false at a key that causality shows. A graph cannot ask for the values."""
    if mask is None:
        return False
    if _is_tracing(mask):
        return True
    return not bool(mask.all()) or mask.shape[1] < int(q_offset) + q_length


def _is_tracing(x: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or isinstance(x, FakeTensor)
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def key_ranges(batch_size: int, q_length: int, num_keys: int | Tensor, device: torch.device | str) -> Tensor:
    """The mask in which the last query of every sequence sees `num_keys` keys, the one before it one less, ..."""
    page = torch.arange(batch_size + 1, dtype=torch.int32, device=device)
    return torch.stack([torch.zeros_like(page) + num_keys, page, page * q_length]).to(torch.int32)[None, None]


def is_key_ranges(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int32 and mask.shape[:3] == (1, 1, 3)


def is_differentiated(x: Tensor) -> bool:
    """Whether a gradient is recorded of x, or forward-mode differentiation carries one along (torch.func.jvp)."""
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention for transformers. Returns [batch_size, q_length, num_heads, head_dim], and the weights
    [batch_size, num_heads, q_length, kv_length] if kwargs ask for them (`output_attentions`).

    Args:
        query: [batch_size, num_heads, q_length, head_dim]; key, value: [batch_size, num_heads, kv_length, head_dim].
        attention_mask: as this module's `attention_mask` made it, or a dense one of the caller.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    runs_kernel = (
        (is_causal if attention_mask is None else is_key_ranges(attention_mask))
        and dropout == 0.0
        and not _wants_weights(kwargs)
        and not any(is_differentiated(x) for x in (query, key, value))
        and ops.has_kernels(query, "flash_attention", "paged_attention", head_dim=query.shape[-1])
        and query.dtype == key.dtype
        and query.dtype in KERNEL_DTYPES
    )
    if runs_kernel:
        return _kernel_attention(query, key, value, attention_mask, scale), None
    return _torch_attention(module, query, key, value, attention_mask, scale, dropout, **kwargs)


def _wants_weights(kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("output_attentions") or kwargs.get(WANTS_WEIGHTS))


def _kernel_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch_size, num_heads, q_length, head_dim = query.shape
    if mask is None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return ops.flash_attention(q, k, v, softmax_scale=scale)[0]
    num_keys, page, start = mask[0, 0]
    out = ops.paged_attention(
        query.transpose(1, 2).reshape(batch_size * q_length, num_heads, head_dim),
        key.contiguous(),  # a cache is, but for odd ones
        value.contiguous(),
        page[:batch_size].unsqueeze(1),
        num_keys[:batch_size],
        cu_seqlens_q=start,
        max_seqlen_q=q_length,
        softmax_scale=scale,
    )
    return out.view(batch_size, q_length, num_heads, head_dim)


def _torch_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers itself would do: "eager" where the weights are asked for, else "sdpa"."""
    if is_key_ranges(mask):
        assert mask is not None
        mask = _dense(mask, query.shape[2], key.shape[2])
    wants_weights = _wants_weights(kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("output_attentions", WANTS_WEIGHTS)}
    if not wants_weights:
        return implementation("sdpa")(module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs)
    if mask is None:
        q_length = query.shape[2]
        mask = _dense(key_ranges(query.shape[0], q_length, q_length, query.device), q_length, q_length)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return implementation("eager")(module, query, key, value, mask, scaling=scale, dropout=dropout, **kwargs)


def _dense(ranges: Tensor, q_length: int, kv_length: int) -> Tensor:
    """[batch_size, 1, q_length, kv_length] bool of a key-range mask."""
    num_keys = ranges[0, 0, 0, :-1, None, None, None]
    query_idx = torch.arange(q_length, device=ranges.device)[:, None]
    return torch.arange(kv_length, device=ranges.device) < num_keys - q_length + 1 + query_idx
