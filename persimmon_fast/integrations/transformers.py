"""One line for Persimmon and Fuyu models of transformers: `apply_persimmon_fast(model)`.

What changes: the forward of every attention and MLP of the instance, the attention implementation in its config, and
the order in which the down-projections lie in memory. What does not: classes, parameters, hooks, caches, `generate`.
`revert` undoes all of it.

A layer runs our kernels where it is what they know: plain linear layers, one dtype, evaluation without gradients, a
device and a head size with kernels. Where it is not, that layer, or that one linear layer, runs as transformers has it:
quantised weights, adapters (PEFT), offloaded weights, autocast, training.
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from persimmon_fast import ops
from persimmon_fast.integrations import attention

# Kept in the __dict__ of what is patched, so that a deep copy of a model is a patched model that can be reverted.
_ORIGINAL = "_persimmon_fast_original"  # of a module: the forward that its __dict__ held before, or None
_ORIGINAL_ATTENTION = "_persimmon_fast_original_attention"  # of a backbone: the name of its attention before
_REPLICATE = "_replicate_for_data_parallel"  # what nn.DataParallel calls
_warned: set[str] = set()

Model = TypeVar("Model", bound=nn.Module)


def apply_persimmon_fast(model: Model) -> Model:
    """Runs a Persimmon or Fuyu model of transformers on our kernels, in place.

    Args:
        model: PersimmonModel, PersimmonForCausalLM, PersimmonForSequenceClassification,
            PersimmonForTokenClassification or a Fuyu class of transformers 4.57 or 5, or a module that holds one (a
            PeftModel). Patching it twice changes nothing.
    Returns:
        the same object. No parameter is moved or copied, except that the weights of the down-projections are laid out
        anew, one row per neuron (same shape, same values): their zeros can then be skipped.
    Raises:
        TypeError: it holds no Persimmon of transformers.
        ImportError: transformers is not installed.
    """
    from transformers.models.persimmon import modeling_persimmon as hf

    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    backbones = [module for module in modules if isinstance(module, hf.PersimmonModel)]
    if not backbones:
        raise TypeError(
            "apply_persimmon_fast: model must be, or hold, a Persimmon of transformers (PersimmonForCausalLM, "
            f"FuyuForCausalLM, ...), got {type(model).__module__}.{type(model).__qualname__}. Classes of "
            "persimmon_fast run the kernels without it."
        )
    attention.register()
    for backbone in backbones:
        if _ORIGINAL_ATTENTION not in backbone.__dict__:
            setattr(backbone, _ORIGINAL_ATTENTION, backbone.config._attn_implementation)
            backbone.config._attn_implementation = attention.NAME
            for name in _masks_of_transformers_4(backbone):
                backbone.__dict__[name] = functools.partial(_MASKS[name], backbone)
    for module in modules:
        if isinstance(module, hf.PersimmonAttention):
            _rebind(module, _attention_forward)
        elif isinstance(module, hf.PersimmonMLP) and _is_squared_relu(module.act):
            _rebind(module, _mlp_forward)
            _lay_out(module, ops.to_neuron_major)
    return model


def revert(model: Model) -> Model:
    """Undoes `apply_persimmon_fast`, in place: forwards, attention implementation, memory order. Returns the model,
    whose results are then bit for bit those of before. A model that is not patched stays as it is."""
    for module in model.modules():
        if _ORIGINAL_ATTENTION in module.__dict__:
            before = module.__dict__.pop(_ORIGINAL_ATTENTION)
            config: Any = module.config
            if config._attn_implementation == attention.NAME:  # else somebody has chosen another one since
                config._attn_implementation = before
            for name in _masks_of_transformers_4(module):
                del module.__dict__[name]
        if _ORIGINAL in module.__dict__:
            _unbind(module)
            if hasattr(module, "dense_4h_to_h"):
                _lay_out(module, Tensor.contiguous)
    return model


# ---- binding ----


def _slot(module: nn.Module) -> str:
    """The attribute that holds a module's innermost forward: hooks of accelerate wrap it and keep it elsewhere."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def _is_class_forward(module: nn.Module, slot: str) -> bool:
    """Whether nothing but the class decides what this forward is; accelerate leaves bound methods behind."""
    forward = module.__dict__.get(slot)
    return forward is None or (isinstance(forward, types.MethodType) and forward.__func__ is type(module).forward)


def _rebind(module: nn.Module, forward: Callable[..., Any]) -> None:
    if _ORIGINAL in module.__dict__:
        return
    slot = _slot(module)
    module.__dict__[_ORIGINAL] = None if _is_class_forward(module, slot) else module.__dict__[slot]
    module.__dict__[slot] = functools.partial(forward, module)
    module.__dict__[_REPLICATE] = functools.partial(_replicate, module)


def _unbind(module: nn.Module) -> None:
    slot = _slot(module)
    module.__dict__.pop(_REPLICATE, None)
    original = module.__dict__.pop(_ORIGINAL)
    if original is not None:
        module.__dict__[slot] = original
    elif slot == "forward":
        module.__dict__.pop(slot, None)
    else:
        module.__dict__[slot] = types.MethodType(type(module).forward, module)


def _replicate(module: nn.Module) -> nn.Module:
    """A replica of nn.DataParallel. Its __dict__ is copied, and the forward in it would read the weights of `module`,
    which lie on another device."""
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)
    slot = _slot(module)
    forward = module.__dict__[slot]
    if isinstance(forward, functools.partial) and forward.args == (module,):
        replica.__dict__[slot] = functools.partial(forward.func, replica)
    return replica


def _call_original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    original = module.__dict__[_ORIGINAL]
    return type(module).forward(module, *args, **kwargs) if original is None else original(*args, **kwargs)


def _lay_out(mlp: nn.Module, order: Callable[[Tensor], Tensor]) -> None:
    """Sets the memory order of a plain down-projection, below an adapter too (PEFT's `base_layer`), which may be merged
    one day; the parameter stays the object that an optimizer may hold."""
    down: Any = getattr(mlp.dense_4h_to_h, "base_layer", mlp.dense_4h_to_h)
    if _is_plain(down) and not down.weight.is_meta:
        with torch.no_grad():
            down.weight.data = order(down.weight.data)


# ---- what runs our kernels ----


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a layer is nothing but its weight and bias, which a fused kernel may then read itself."""
    return (
        type(module) is kind
        and type(module.weight) is nn.Parameter
        and _is_class_forward(module, "forward")  # no wrapper, as accelerate makes
        and not _is_hooked(module)
    )


def _are_plain(*modules: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    for module in modules:
        if not _is_plain(module, kind):
            name = f"{type(module).__module__}.{type(module).__qualname__}"
            weight = getattr(module, "weight", None)
            if type(module) is kind and type(weight) is not nn.Parameter:
                name += f" with a weight of type {type(weight).__name__}"
            _warn_once(
                f"apply_persimmon_fast: a {name} is no plain nn.{kind.__name__} (quantised, adapted, offloaded or "
                "hooked): it is called as it is, and the kernels that would read its weights are not used around it."
            )
            return False
    return True


def _are_plain_norms(q_norm: Any, k_norm: Any, x: Tensor) -> bool:
    return (
        _are_plain(q_norm, k_norm, kind=nn.LayerNorm)
        and q_norm.bias is not None
        and k_norm.bias is not None
        and q_norm.eps == k_norm.eps
        and _is_like(q_norm.weight, x)
        and _is_like(k_norm.weight, x)
    )


def _warn_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=6)


def _is_inference(module: nn.Module, x: Tensor) -> bool:
    """Whether this call may leave transformers' own code: no gradient is recorded, the dtype is one of ours."""
    device = x.device.type
    if module.training or x.dtype not in attention.KERNEL_DTYPES:
        return False
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return False
    if attention.is_differentiated(x):
        return False
    return not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()))


def _is_like(weight: Tensor, x: Tensor) -> bool:
    return weight.dtype == x.dtype and weight.device == x.device


def _is_squared_relu(activation: nn.Module) -> bool:
    return type(activation).__name__ == "ReLUSquaredActivation"


def _mlp_forward(module: Any, hidden_states: Tensor) -> Tensor:
    up, down = module.dense_h_to_4h, module.dense_4h_to_h
    if not (
        _is_inference(module, hidden_states)
        and _is_squared_relu(module.act)
        and not _is_hooked(module.act)
        and ops.has_kernels(hidden_states, "squared_relu_mlp")
        and _are_plain(up, down)
        and _is_like(up.weight, hidden_states)
        and _is_like(down.weight, hidden_states)
    ):
        return _call_original(module, hidden_states)
    return ops.squared_relu_mlp(hidden_states, up.weight, up.bias, down.weight, down.bias)


def _attention_forward(
    module: Any, hidden_states: Tensor, *positional: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    position_embeddings = kwargs.get("position_embeddings")
    if module.config._attn_implementation == attention.NAME:
        # transformers' own forward keeps output_attentions to itself, and its eager attention needs no word of it
        kwargs[attention.WANTS_WEIGHTS] = kwargs.get("output_attentions") or module.config.output_attentions
    if (
        positional  # whose order is that of the version of transformers
        or position_embeddings is None
        or not _is_inference(module, hidden_states)
        or not ops.has_kernels(hidden_states, "qkv_norm_rope", "qk_norm_rope", head_dim=module.head_dim)
        or (module.qk_layernorm and not _are_plain_norms(module.q_layernorm, module.k_layernorm, hidden_states))
    ):
        return _call_original(module, hidden_states, *positional, **kwargs)
    for name in ("position_embeddings", "position_ids", "use_cache"):  # not for the attention implementation
        kwargs.pop(name, None)
    attention_mask, past_key_values = kwargs.pop("attention_mask", None), kwargs.pop("past_key_values", None)
    batch_size, q_length, _ = hidden_states.shape
    query, key, value = (
        x.view(batch_size, q_length, module.num_heads, module.head_dim).transpose(1, 2)
        for x in _project(module, hidden_states, position_embeddings)
    )
    cache_position = kwargs.pop("cache_position", None)
    if past_key_values is not None:
        # transformers 4 tells the cache where the keys go, transformers 5 lets it count
        extra = () if cache_position is None else ({"cache_position": cache_position},)
        key, value = past_key_values.update(key, value, module.layer_idx, *extra)
    attend = attention.implementation(module.config._attn_implementation)
    out, weights = attend(module, query, key, value, attention_mask, dropout=0.0, scaling=module.scaling, **kwargs)
    return module.dense(out.reshape(batch_size, q_length, -1)), weights


def _project(module: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """q, k, v [num_tokens, num_heads, head_dim]: projection, LayerNorm of q and k, rotary embedding."""
    batch_size, q_length, hidden_size = hidden_states.shape
    num_tokens = batch_size * q_length
    x = hidden_states.reshape(num_tokens, hidden_size)
    q_weight = q_bias = k_weight = k_bias = None
    eps = 1e-5
    if module.qk_layernorm:
        q_norm, k_norm = module.q_layernorm, module.k_layernorm
        q_weight, q_bias, k_weight, k_bias, eps = q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias, q_norm.eps
    # Each half of transformers' cos and sin is the other half again. Its values are taken as they are, rounded to the
    # model's dtype, so that every rope type and the numerics of transformers stay.
    half = position_embeddings[0].shape[-1] // 2
    cos_sin = torch.cat([table[..., :half].float() for table in position_embeddings], dim=-1)
    cos_sin = cos_sin.expand(batch_size, -1, -1).reshape(num_tokens, 2 * half)
    rows = torch.arange(num_tokens, device=x.device)
    linear = module.query_key_value
    if _are_plain(linear) and _is_like(linear.weight, x):
        return ops.qkv_norm_rope(
            x, linear.weight, linear.bias, q_weight, q_bias, k_weight, k_bias, cos_sin, rows, eps, module.num_heads
        )
    q, k, v = linear(x).view(num_tokens, module.num_heads, 3, module.head_dim).unbind(2)
    return (*ops.qk_norm_rope(q, k, q_weight, q_bias, k_weight, k_bias, cos_sin, rows, eps), v)


# ---- masks of transformers 4, whose Persimmon makes them itself and asks no mask interface ----


def _hides_keys(mask: Tensor | None, cache_position: Tensor) -> bool:
    """Whether a mask of the caller is more than ones. Our mask function need not see one that is."""
    if mask is None:
        return False
    return mask.dim() != 2 or attention.may_hide_keys(mask, cache_position[0], cache_position.shape[0])


def _update_causal_mask(
    backbone: Any,
    attention_mask: Tensor | None,
    input_tensor: Tensor,
    cache_position: Tensor,
    past_key_values: Any,
    output_attentions: bool = False,
) -> Tensor | None:
    mask: Tensor | None
    if backbone.config._attn_implementation == attention.NAME and not _hides_keys(attention_mask, cache_position):
        from transformers.masking_utils import create_causal_mask

        mask = create_causal_mask(
            config=backbone.config,
            input_embeds=input_tensor,
            attention_mask=None,  # it hides nothing, and need not be looked at twice
            cache_position=cache_position,
            past_key_values=past_key_values,
        )
        if mask is None or attention.is_key_ranges(mask):
            return mask
    # Padding: its own mask, in which a row of padding sees something, not nothing as in transformers 5.
    mask = type(backbone)._update_causal_mask(
        backbone, attention_mask, input_tensor, cache_position, past_key_values, output_attentions
    )
    return mask


def _static_cache_mask(backbone: Any, given: Tensor | None, **kwargs: Any) -> Tensor | None:
    if backbone.config._attn_implementation == attention.NAME and not _hides_keys(given, kwargs["cache_position"]):
        mask = attention.attention_mask(
            kwargs["batch_size"],
            kv_length=kwargs["target_length"],
            cache_position=kwargs["cache_position"],
        )
        if mask is None or attention.is_key_ranges(mask):
            return mask
    mask = type(backbone)._prepare_4d_causal_attention_mask_with_cache_position(given, **kwargs)
    return mask


_MASKS: dict[str, Callable[..., Tensor | None]] = {
    "_update_causal_mask": _update_causal_mask,
    "_prepare_4d_causal_attention_mask_with_cache_position": _static_cache_mask,
}


def _masks_of_transformers_4(backbone: nn.Module) -> list[str]:
    return [name for name in _MASKS if hasattr(type(backbone), name)]


# A pickle of a patched model imports this file in a process that may never have patched one. (transformers is there:
# the model's class comes before what is in it.)
if "transformers" in sys.modules:
    attention.register()
