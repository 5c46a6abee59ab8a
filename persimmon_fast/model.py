"""The decoder: Persimmon composed from `ops`.

Inside, a batch is packed: tokens of all sequences lie one after the other, `[num_tokens, hidden_size]`, and padding
does not exist. Sequences of any length, left or right padding and masks with holes therefore cost only their real
tokens and cannot change one another. Module and parameter names are those of transformers' checkpoints.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from persimmon_fast import ops, rounded_qkv
from persimmon_fast.config import PersimmonConfig
from persimmon_fast.decode_graph import DecodeGraphs
from persimmon_fast.generation import GenerationMixin
from persimmon_fast.generation_config import GenerationConfig
from persimmon_fast.kv_cache import PackedBatch, PagedKVCache
from persimmon_fast.losses import causal_lm_loss
from persimmon_fast.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from persimmon_fast.packing import Packing, checked_seq_len
from persimmon_fast.padded_attention import PaddedAttention
from persimmon_fast.pretrained import PersimmonPreTrainedModel
from persimmon_fast.rope import RotaryTable


class _InputNorm(TypedDict):
    norm_weight: Tensor
    norm_bias: Tensor
    norm_eps: float


def _input_norm(norm: nn.LayerNorm) -> _InputNorm:
    """As the ops that normalise their own input take it."""
    return {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}


Block = Callable[[Tensor], Tensor]
Projection = tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor, float, int
]


class QKLayerNorm(nn.Module):
    """The parameters of a LayerNorm over head_dim, one for all heads or one each: the ops apply it."""

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.qk_layernorm_shape))
        self.bias = nn.Parameter(torch.zeros(config.qk_layernorm_shape))


class PersimmonAttention(nn.Module):
    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.eps = config.layer_norm_eps
        self.rope_precision = config.rope_precision
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_layernorm = QKLayerNorm(config) if config.qk_layernorm else None
        self.k_layernorm = QKLayerNorm(config) if config.qk_layernorm else None

    def forward(self, x: Tensor, norm: nn.LayerNorm, batch: PackedBatch, kv: tuple[Tensor, Tensor] | None) -> Tensor:
        """x + attention(norm(x)); x [num_tokens, hidden_size]; kv: this layer's pages."""
        return self.bind(norm, batch, kv)(x)

    def _projection(self, batch: PackedBatch) -> Projection:
        """What `ops.qkv_norm_rope` takes behind x."""
        q_norm, k_norm = self.q_layernorm, self.k_layernorm
        return (
            self.query_key_value.weight,
            self.query_key_value.bias,
            q_norm.weight if q_norm is not None else None,
            q_norm.bias if q_norm is not None else None,
            k_norm.weight if k_norm is not None else None,
            k_norm.bias if k_norm is not None else None,
            batch.cos_sin,
            batch.position_ids,
            self.eps,
            self.num_heads,
        )

    def bind(self, norm: nn.LayerNorm, batch: PackedBatch, kv: tuple[Tensor, Tensor] | None) -> Block:
        """`forward` of x alone, as long as parameters, batch and pages are these."""
        qkv_norm_rope, qkv_norm_rope_paged = ops.qkv_norm_rope, ops.qkv_norm_rope_paged
        if self.rope_precision != "fp32":
            rounded_qkv.check_dtype(self.rope_precision, self.query_key_value.weight.dtype)
            qkv_norm_rope, qkv_norm_rope_paged = rounded_qkv.qkv_norm_rope, rounded_qkv.qkv_norm_rope_paged
        dense, projection, input_norm = (self.dense.weight, self.dense.bias), self._projection(batch), _input_norm(norm)
        starts, seqlen, padded = batch.cu_seqlens_q, batch.max_seqlen_q, batch.padded
        if kv is not None and batch.slots is not None:
            k_cache, v_cache, slots = *kv, batch.slots

            def over_cache(x: Tensor) -> Tensor:
                q = qkv_norm_rope_paged(x, *projection, slots.slot_mapping, k_cache, v_cache, **input_norm)
                if padded is not None:
                    out = padded.over_cache(q, k_cache, v_cache, slots)
                    return ops.linear_residual(out.flatten(1), *dense, x)
                out = ops.paged_attention(
                    q, k_cache, v_cache, slots.page_table, slots.cache_seqlens, cu_seqlens_q=starts, max_seqlen_q=seqlen
                )
                return ops.linear_residual(out.flatten(1), *dense, x)

            return over_cache

        def over_batch(x: Tensor) -> Tensor:
            q, k, v = qkv_norm_rope(x, *projection, **input_norm)
            if padded is not None:
                return ops.linear_residual(padded(q, k, v).flatten(1), *dense, x)
            out, _ = ops.flash_attention(
                q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=seqlen, max_seqlen_k=seqlen
            )
            return ops.linear_residual(out.flatten(1), *dense, x)

        return over_batch


class PersimmonMLP(nn.Module):
    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        with torch.no_grad():  # one row per neuron in memory: zeros of relu^2 can be skipped
            self.dense_4h_to_h.weight = nn.Parameter(ops.to_neuron_major(self.dense_4h_to_h.weight))

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """x + dropout(mlp(norm(x))); x [num_tokens, hidden_size]."""
        return self.bind(norm)(x)

    def bind(self, norm: nn.LayerNorm) -> Block:
        """`forward` of x alone, as long as parameters and mode are these."""
        up, down = self.dense_h_to_4h, self.dense_4h_to_h
        weights = (up.weight, up.bias, down.weight, down.bias)
        input_norm = _input_norm(norm)
        if self.training and self.dropout > 0:
            return lambda x: x + F.dropout(ops.squared_relu_mlp(x, *weights, **input_norm), self.dropout)
        return lambda x: ops.squared_relu_mlp(x, *weights, x, **input_norm)


class PersimmonDecoderLayer(nn.Module):
    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__()
        self.self_attn = PersimmonAttention(config)
        self.mlp = PersimmonMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, batch: PackedBatch, kv: tuple[Tensor, Tensor] | None) -> Tensor:
        x = self.self_attn(x, self.input_layernorm, batch, kv)
        return self.mlp(x, self.post_attention_layernorm)

    def bind(self, batch: PackedBatch, kv: tuple[Tensor, Tensor]) -> Block:
        """`forward` of x alone: no module is called, so none of their hooks either."""
        attention = self.self_attn.bind(self.input_layernorm, batch, kv)
        mlp = self.mlp.bind(self.post_attention_layernorm)
        return lambda x: mlp(attention(x))


_PREFIX = "model."  # of the decoder's tensors in a checkpoint


class PersimmonModel(PersimmonPreTrainedModel):
    """Embedding, decoder layers, final LayerNorm."""

    has_lm_head = False

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PersimmonDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.rotary = RotaryTable(config)
        if config.rope_precision != "fp32":
            warnings.warn(
                f"rope_precision {config.rope_precision!r} repeats the rounding of Adept's server. It needs more "
                "kernels per layer and is slower than 'fp32'.",
                stacklevel=2,
            )
        self._warned_of_attentions = False
        self._init_weights()

    @staticmethod
    def _load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
        own = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
        model.load_state_dict(own, strict=True, assign=True)

    def _tensors_to_save(self) -> dict[str, Tensor]:
        return {_PREFIX + name: tensor for name, tensor in self.state_dict().items()}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PagedKVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states of a padded batch.

        Args:
            input_ids: [batch_size, seqlen] int64; or inputs_embeds: [batch_size, seqlen, hidden_size].
            attention_mask: [batch_size, seqlen] or [batch_size, past + seqlen], nonzero where a token counts; None:
                everywhere. The columns of tokens that are already in the cache are not looked at again.
            position_ids: [batch_size or 1, seqlen] int64; None: past, past + 1, ...
            past_key_values: the cache of an earlier call, changed in place.
            use_cache: None: config.use_cache, except where gradients are recorded.
            output_attentions: also return the attention weights of every layer. Attention is then computed in plain
                torch, in memory that grows with the square of seqlen.
            output_hidden_states: also return the input of every layer and the final output; one or several indices:
                those of them alone, None for the others.
            return_dict: False: return a tuple of what is not None.
                None for these three: what config.extra says under the same name, else False, False, True.
        Raises:
            ValueError: naming the argument that does not fit.
        """
        embeds = self._embed(input_ids, inputs_embeds)
        batch_size, seqlen, _ = embeds.shape
        cache = self._cache(embeds, past_key_values, use_cache)
        past = cache.num_columns if cache is not None else 0
        packing = Packing.from_mask(attention_mask, batch_size, seqlen, past)
        with_weights = bool(self._option("output_attentions", output_attentions))
        padded = self._padded_attention(packing, attention_mask, cache, with_weights)
        if position_ids is None:
            positions, seq_len = torch.arange(past, past + seqlen, device=embeds.device).unsqueeze(0), past + seqlen
        else:
            positions, seq_len = position_ids, checked_seq_len(position_ids, batch_size, seqlen)
        selected = self._selected(self._option("output_hidden_states", output_hidden_states))
        hidden_states: list[Tensor | None] = []

        def record(x: Tensor) -> Tensor:
            """What a layer takes is what is returned, so that gradients of the loss reach it."""
            if len(hidden_states) not in selected:
                hidden_states.append(None)
                return x
            hidden_states.append(padded_x := packing.unpack(x))
            return packing.pack(padded_x)

        x = self.forward_packed(
            packing.pack(embeds),
            packing.pack(positions.expand(batch_size, -1).contiguous()),
            packing.lengths,
            seq_len,
            cache,
            record=record if selected else None,
            padded=padded,
        )
        if cache is not None:
            cache.num_columns += seqlen
        last = packing.unpack(x)
        hidden_states.append(last if len(self.layers) in selected else None)
        output = BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=cache,
            hidden_states=tuple(hidden_states) if selected else None,
            attentions=tuple(padded.weights) if padded is not None and with_weights else None,
        )
        return self._returned(output, return_dict)

    def forward_packed(
        self,
        x: Tensor,
        position_ids: Tensor,
        lengths: list[int],
        seq_len: int,
        cache: PagedKVCache | None,
        *,
        record: Block | None = None,
        padded: PaddedAttention | None = None,
    ) -> Tensor:
        """The decoder on packed embeddings.

        Args:
            x: [num_tokens, hidden_size]; position_ids: [num_tokens].
            lengths: tokens of each sequence. seq_len: largest position + 1.
            record: gets the input of each layer and returns what the layer takes.
            padded: computes attention, and keeps its weights.
        Returns:
            The normalised output, like x.
        """
        cu_seqlens = torch.tensor([0, *lengths], device=x.device).cumsum(0, dtype=torch.int32)
        batch = PackedBatch(
            position_ids=position_ids,
            cos_sin=self.rotary(seq_len, x.device),
            cu_seqlens_q=cu_seqlens,
            max_seqlen_q=max(lengths, default=0),
            slots=cache.append(lengths) if cache is not None else None,
            padded=padded,
        )
        return self.forward_batch(x, batch, cache, record=record)

    def forward_batch(
        self, x: Tensor, batch: PackedBatch, cache: PagedKVCache | None, *, record: Block | None = None
    ) -> Tensor:
        """`forward_packed` of a batch whose tensors lie on the device already: it neither reads nor makes a value on
        the host, so that it can be captured in a CUDA graph."""
        recompute = self.gradient_checkpointing and self.training and cache is None and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            if record is not None:
                x = record(x)
            kv = (cache.k[index], cache.v[index]) if cache is not None else None
            x = checkpoint(layer, x, batch, kv, use_reentrant=False) if recompute else layer(x, batch, kv)
        norm = self.final_layernorm
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)

    def bind(self, batch: PackedBatch, cache: PagedKVCache) -> Block:
        """Token ids [num_tokens] to final hidden states, for the steps of a batch whose tensors stay where they are:
        `forward_batch`, and where no module has a hook the same without calling modules, which costs a CPU whose caches
        are full of weights 0.2 ms per layer."""
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.modules()):
            return lambda token_ids: self.forward_batch(self.embed_tokens(token_ids), batch, cache)
        layers = [
            cast(PersimmonDecoderLayer, layer).bind(batch, (k, v))
            for layer, k, v in zip(self.layers, cache.k, cache.v, strict=True)
        ]
        embedding = self.embed_tokens.weight
        norm = self.final_layernorm
        weight, bias, eps = norm.weight, norm.bias, norm.eps

        def run(token_ids: Tensor) -> Tensor:
            x = F.embedding(token_ids, embedding)
            for layer in layers:
                x = layer(x)
            return ops.layer_norm(x, weight, bias, eps)

        return run

    def _selected(self, output_hidden_states: bool | int | Sequence[int] | None) -> frozenset[int]:
        """Indices of the hidden states that are asked for."""
        num = len(self.layers) + 1
        if output_hidden_states is None or isinstance(output_hidden_states, bool):
            return frozenset(range(num) if output_hidden_states else ())
        indices = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
        if not all(-num <= i < num for i in indices):
            raise ValueError(f"output_hidden_states must be indices of {num} hidden states, got {list(indices)}")
        return frozenset(i % num for i in indices)

    def _padded_attention(
        self, packing: Packing, mask: Tensor | None, cache: PagedKVCache | None, output_attentions: bool
    ) -> PaddedAttention | None:
        """None where the kernels compute attention."""
        dropout = self.config.attention_dropout if self.training else 0.0
        if output_attentions and not self._warned_of_attentions:
            self._warned_of_attentions = True
            message = "output_attentions: attention is computed in plain torch, with all its weights in memory"
            warnings.warn(message, stacklevel=4)
        return PaddedAttention(packing, mask, cache, dropout) if output_attentions or dropout > 0 else None

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is not None:
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.config.hidden_size:
                raise ValueError(
                    f"inputs_embeds must be [batch_size, seqlen, hidden_size={self.config.hidden_size}], "
                    f"got {list(inputs_embeds.shape)}"
                )
            return inputs_embeds.to(self.dtype)
        assert input_ids is not None
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [batch_size, seqlen], got {list(input_ids.shape)}")
        return self.embed_tokens(input_ids)

    def _cache(self, embeds: Tensor, past: PagedKVCache | None, use_cache: bool | None) -> PagedKVCache | None:
        records_gradients = torch.is_grad_enabled() and (
            embeds.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        if records_gradients:
            if past is not None or use_cache:
                raise ValueError(
                    "the key/value cache does not carry gradients: call under torch.no_grad(), or without "
                    "past_key_values and use_cache=True"
                )
            return None
        if past is not None:
            if not isinstance(past, PagedKVCache):
                raise ValueError(f"past_key_values must be a PagedKVCache, got {type(past).__name__}")
            if past.batch_size != embeds.shape[0]:
                raise ValueError(f"past_key_values holds {past.batch_size} sequences, the batch {embeds.shape[0]}")
            return past
        if not (self.config.use_cache if use_cache is None else use_cache):
            return None
        return PagedKVCache(self.config, embeds.shape[0], embeds.shape[1] + 1, dtype=embeds.dtype, device=embeds.device)


class PersimmonForCausalLM(PersimmonPreTrainedModel, GenerationMixin):
    """The language model: decoder and head. `generate` is in generation.py."""

    accepts_loss_kwargs: ClassVar[bool] = True  # transformers' Trainer then passes num_items_in_batch

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__()
        self.config = config
        self.model = PersimmonModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=config.initializer_range)
        self.tie_weights()
        self.generation_config = GenerationConfig.from_model_config(config)
        self.decode_graphs = DecodeGraphs()

    @staticmethod
    def _load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
        assert isinstance(model, PersimmonForCausalLM)
        if model.config.tie_word_embeddings:
            tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
        model.load_state_dict(tensors, strict=True, assign=True)
        model.tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PagedKVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the loss if labels are given. Arguments as in `PersimmonModel.forward`, and:

        Args:
            labels: [batch_size, seqlen] int64, -100: ignored; shifted inside, so labels = input_ids is right.
            logits_to_keep: which positions get logits; a 16K prompt's are 16 GiB in fp32: ask for what you need.
                an integer: the last that many, 0: all; negative: all but the first that many;
                [num_kept] int64: these positions of every sequence; [batch_size, num_kept] int64: of each its own;
                [batch_size, seqlen] bool: where it is true, and the logits are then [num_true, vocab_size].
            num_items_in_batch: divides the sum of the loss, which is else a mean: labels that count in the whole batch,
                where this is a part of it.
            shift_labels: like labels and beside them, the label of each position itself: of a part of a sequence, whose
                last label is that of the next part.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        rows = _kept_rows(outputs.last_hidden_state, logits_to_keep)
        # as a matrix: frozen weights times a slice of three dimensions would be a product with a copy of the head
        logits = self.lm_head(rows.flatten(0, -2)).view(*rows.shape[:-1], self.config.vocab_size)
        loss = None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch, shift_labels)
        output = CausalLMOutputWithPast(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions
        )
        return self._returned(output, return_dict)


def _kept_rows(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The rows of hidden [batch_size, seqlen, hidden_size] that `PersimmonForCausalLM.forward` is to give logits."""
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:]
    if logits_to_keep.dim() != 2:
        return hidden[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]
    return hidden.take_along_dim(logits_to_keep[..., None], dim=1)


__all__ = [
    "BaseModelOutputWithPast",
    "CausalLMOutputWithPast",
    "PersimmonForCausalLM",
    "PersimmonModel",
    "PersimmonPreTrainedModel",
]
