"""A model's vocabulary made larger or smaller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from persimmon_fast.generation import GenerationMixin
from persimmon_fast.generation_config import GenerationConfig

if TYPE_CHECKING:
    from persimmon_fast.pretrained import PersimmonPreTrainedModel


def resize_token_embeddings(
    model: PersimmonPreTrainedModel, new_num_tokens: int | None, pad_to_multiple_of: int | None, mean_resizing: bool
) -> nn.Embedding:
    """Adds rows at the end of the embedding and of the head, or takes rows away. The model's config is replaced by one
    with the new vocab_size; its captured decode graphs are freed. Optimisers that hold the old parameters must be made
    anew.

    Args:
        new_num_tokens: rows afterwards; None: as many as now.
        pad_to_multiple_of: round up to a multiple of it.
        mean_resizing: added rows are the mean of the old ones, so that they hardly change the probabilities of the old
            tokens; False: normal numbers with a standard deviation of config.initializer_range. transformers adds noise
            to the mean, of 1e-9 times the covariance of the old rows: we leave it out, so that the result is the same
            each time and no [hidden_size, hidden_size] matrix is needed.
    Returns:
        The embedding.
    Raises:
        ValueError: a size that is none, or a token that config or generation_config names would be taken away.

    Source: Hewitt 2021, Initializing New Word Embeddings for Pretrained Language Models,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html (the mean); transformers 5.23 modeling_utils.py (arguments).
    """
    from persimmon_fast.pretrained import PersimmonPreTrainedModel

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    size = model.config.vocab_size if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        if type(pad_to_multiple_of) is not int or pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be an integer > 0, got {pad_to_multiple_of!r}")
        size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
    if size == model.config.vocab_size:
        return embedding
    config = model.config.replace(vocab_size=size)  # checks the size and the tokens that it names
    if isinstance(model, GenerationMixin):
        _check_tokens(model.generation_config, size)
        model.decode_graphs.free()

    std = None if mean_resizing else config.initializer_range
    embedding.weight = _resized(embedding.weight, size, std)
    embedding.num_embeddings = size
    if head is not None:
        head.weight = embedding.weight if config.tie_word_embeddings else _resized(head.weight, size, std)
        head.out_features = size
    for module in model.modules():
        if isinstance(module, PersimmonPreTrainedModel):
            module.config = config
    return embedding


def _check_tokens(config: GenerationConfig, size: int) -> None:
    last = max((*config.eos_token_ids, config.pad_token_id or 0))
    if last >= size:
        raise ValueError(f"generation_config names token {last}, which a vocabulary of {size} tokens lacks")
    if config.vocab_ranges is not None and config.vocab_ranges[-1][1] > size:
        raise ValueError(
            f"generation_config.vocab_ranges ends at {config.vocab_ranges[-1][1]}, the new vocabulary at {size}: "
            "replace it first"
        )


def _resized(weight: Tensor, size: int, std: float | None) -> nn.Parameter:
    """The first rows of weight [num_tokens, hidden_size], and as many new ones as are missing: the mean of all, or
    normal numbers with that standard deviation."""
    old = weight.detach()
    if size <= old.shape[0]:
        return nn.Parameter(old[:size].clone(), requires_grad=weight.requires_grad)
    new = old.new_empty(size - old.shape[0], old.shape[1])
    new = new.copy_(old.mean(0, dtype=torch.float32)) if std is None else new.normal_(std=std)
    return nn.Parameter(torch.cat([old, new]), requires_grad=weight.requires_grad)
