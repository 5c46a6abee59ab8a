"""transformers' Persimmon in its modes, on the weights of one of our models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.modes import Mode, Past, UnavailableError
from persimmon_fast import PersimmonForCausalLM, apply_persimmon_fast


class TransformersMode(Mode):
    """One attention implementation, kind of cache and way to call."""

    def __init__(
        self,
        name: str,
        model: Any,
        *,
        static: bool = False,
        compiled: Callable[..., Any] | None = None,
        in_generate: bool = True,
        is_default: bool = False,
    ) -> None:
        self.name = name
        self._model, self._static = model, static
        self._step: Callable[..., Any] = model if compiled is None else compiled
        self._cache: Any = None
        self.in_prefill, self.in_generate = not static, in_generate and compiled is None
        self.is_default = is_default
        self.cache_kind = "static" if static else "dynamic"

    def _new_cache(self, max_cache_len: int) -> Any:
        from transformers import DynamicCache, StaticCache

        config = self._model.config
        # as long as needed: attention over a static cache reads all of it
        return StaticCache(config, max_cache_len=max_cache_len) if self._static else DynamicCache(config=config)

    def prefill(self, input_ids: Tensor, max_cache_len: int) -> Tensor:
        self._cache = self._new_cache(max_cache_len)
        self._position = input_ids.shape[1]
        return self._model(input_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def take_over(self, past: Past, other: Mode | None) -> None:
        self._context = self._position = past.context
        if isinstance(other, TransformersMode):
            self._cache = other._cache
            return
        self._cache = self._new_cache(past.max_cache_len)
        for layer in range(len(past.layers)):
            self._cache.update(*past.batch(layer), layer)

    def rewind(self) -> None:
        self._position = self._context
        for layer in self._cache.layers:
            if self._static:
                layer.cumulative_length.fill_(self._context)  # it writes where this says, and masks what lies behind
            else:
                layer.crop(self._context - layer.get_seq_length())  # takes minus the number of tokens to forget

    def step(self, tokens: Tensor) -> Tensor:
        position = torch.tensor([[self._position]], device=tokens.device)
        self._position += 1
        out = self._step(tokens, position_ids=position, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        out: Tensor = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            do_sample=False,
            cache_implementation="static" if self._static else "dynamic",
        )
        return out

    def drop_cache(self) -> None:
        self._cache = None


def transformers_modes(
    ours: PersimmonForCausalLM, weights: dict[str, Tensor], *, compiled: bool, freezing: bool
) -> list[Mode]:
    """Eager and sdpa attention with the growing cache (sdpa is what `generate` takes by default), sdpa with a static
    cache, and that under torch.compile; with `freezing` also with constant weights, which inductor then repacks. And
    what `apply_persimmon_fast` makes of the same model, with either cache.

    Args:
        weights: of `row_major_weights`.
    Raises:
        UnavailableError: transformers is not installed.
    """
    try:
        import transformers
        from transformers.utils import logging
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise UnavailableError("transformers is not installed: pip install 'transformers>=5.23,<5.24'") from None
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    version = f"transformers {transformers.__version__}"
    eager, sdpa = (_model(ours, weights, implementation) for implementation in ("eager", "sdpa"))
    modes: list[Mode] = [
        TransformersMode(f"{version} eager", eager, in_generate=False),  # left out there to save time
        TransformersMode(f"{version} sdpa", sdpa, is_default=True),
        TransformersMode(f"{version} sdpa, static cache", sdpa, static=True),
    ]
    patched = apply_persimmon_fast(_model(ours, ours.state_dict(), "sdpa"))
    modes += [
        TransformersMode(f"patched {version}", patched),
        TransformersMode(f"patched {version}, static cache", patched, static=True),
    ]
    if compiled:
        # on a GPU as its `generate` compiles, with CUDA graphs
        mode = "reduce-overhead" if ours.device.type == "cuda" else None
        step = torch.compile(sdpa, dynamic=False, mode=mode)
        modes.append(TransformersMode(f"{version} sdpa, static, compiled", sdpa, static=True, compiled=step))
    if freezing:
        frozen = torch.compile(_model(ours, weights, "sdpa"), dynamic=False, options={"freezing": True})
        modes.append(TransformersMode(f"{version} sdpa, static, compiled, frozen", sdpa, static=True, compiled=frozen))
    return modes


def row_major_weights(ours: PersimmonForCausalLM) -> dict[str, Tensor]:
    """Our state_dict, the down-projections copied to the memory order that everybody else is used to."""
    return {
        name: tensor.contiguous() if "dense_4h_to_h" in name else tensor for name, tensor in ours.state_dict().items()
    }


def _model(ours: PersimmonForCausalLM, weights: dict[str, Tensor], attention: str) -> Any:
    """transformers' model on these very tensors."""
    from transformers import PersimmonConfig, PersimmonForCausalLM
    from transformers.models.persimmon.modeling_persimmon import PersimmonRotaryEmbedding

    config = PersimmonConfig(**ours.config.to_dict())
    config._attn_implementation = attention
    with torch.device("meta"):
        model = PersimmonForCausalLM(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.eval()  # type: ignore[no-untyped-call]
    # its inverse frequencies are a buffer that no checkpoint holds, and still on the meta device
    model.model.rotary_emb = PersimmonRotaryEmbedding(config).to(ours.device)
    model.generation_config.eos_token_id = None
    return model
