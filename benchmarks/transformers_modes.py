"""transformers' Persimmon in its modes, on the weights of one of our models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from persimmon_fast import PersimmonForCausalLM


class UnavailableError(RuntimeError):
    """Something that the comparison needs is not installed."""


class Mode:
    """A way to run a model: prefill a cache, then step by step; or generate.

    Attributes:
        zeros: which biases it runs with, see `end_to_end.UpBiases`.
        in_prefill, in_generate: whether it takes part there; modes that differ in decode steps alone do not.
    """

    name: str
    zeros: float | None = None
    in_prefill = True
    in_generate = True

    def prefill(self, input_ids: Tensor, max_cache_len: int) -> Tensor:
        """Starts a new cache with input_ids [1, seqlen]; the last token's logits [1, vocab_size]."""
        raise NotImplementedError

    def step(self, token: Tensor) -> Tensor:
        """Logits [1, vocab_size] after one more token [1, 1]."""
        raise NotImplementedError

    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy, never stopping early: [1, seqlen + max_new_tokens]."""
        raise NotImplementedError

    def drop_cache(self) -> None:
        """Frees the memory of the cache."""
        raise NotImplementedError


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
    ) -> None:
        self.name = f"transformers {name}"
        self._model, self._static = model, static
        self._step: Callable[..., Any] = model if compiled is None else compiled
        self._cache: Any = None
        self.in_prefill, self.in_generate = not static, in_generate and compiled is None

    def prefill(self, input_ids: Tensor, max_cache_len: int) -> Tensor:
        from transformers import DynamicCache, StaticCache

        config = self._model.config
        # as long as needed: attention over a static cache reads all of it
        self._cache = StaticCache(config, max_cache_len=max_cache_len) if self._static else DynamicCache(config=config)
        self._position = input_ids.shape[1]
        return self._model(input_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def step(self, token: Tensor) -> Tensor:
        position = torch.tensor([[self._position]], device=token.device)
        self._position += 1
        out = self._step(token, position_ids=position, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
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


def transformers_modes(ours: PersimmonForCausalLM, *, compiled: bool, freezing: bool) -> list[Mode]:
    """Eager and sdpa attention with the growing cache (sdpa is what `generate` takes by default), sdpa with a static
    cache, and that under torch.compile; with `freezing` also with constant weights, which inductor then repacks.

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
    version = transformers.__version__
    weights = {
        name: tensor.contiguous() if "dense_4h_to_h" in name else tensor for name, tensor in ours.state_dict().items()
    }
    eager, sdpa = (_model(ours, weights, implementation) for implementation in ("eager", "sdpa"))
    modes: list[Mode] = [
        TransformersMode(f"{version} eager", eager, in_generate=False),  # left out there to save time
        TransformersMode(f"{version} sdpa", sdpa),
        TransformersMode(f"{version} sdpa, static cache", sdpa, static=True),
    ]
    if compiled:
        step = torch.compile(sdpa, dynamic=False)
        modes.append(TransformersMode(f"{version} sdpa, static, compiled", sdpa, static=True, compiled=step))
    if freezing:
        frozen = torch.compile(_model(ours, weights, "sdpa"), dynamic=False, options={"freezing": True})
        modes.append(TransformersMode(f"{version} sdpa, static, compiled, frozen", sdpa, static=True, compiled=frozen))
    return modes


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
