"""The decoder with a classification head: of a whole sequence, or of every token.

Source: transformers 5.23, modeling_layers.py (which token of a sequence is classified, names of modules; compared in
tests/test_classification.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persimmon_fast.config import PersimmonConfig
from persimmon_fast.kv_cache import PagedKVCache
from persimmon_fast.losses import sequence_classification_loss, token_classification_loss
from persimmon_fast.model import PersimmonModel
from persimmon_fast.outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput
from persimmon_fast.pretrained import PersimmonPreTrainedModel


class _Classifier(PersimmonPreTrainedModel):
    """The decoder and `score`, a Linear from hidden_size to config.num_labels."""

    has_lm_head = False
    _has_bias: ClassVar[bool]
    accepts_loss_kwargs: ClassVar[bool] = False  # transformers' Trainer then averages the losses of parts itself

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__()
        self.config = config
        self.model = PersimmonModel(config)
        num_labels, hidden_size = self._heads(config)["score.weight"]
        self.score = nn.Linear(hidden_size, num_labels, bias=self._has_bias)
        nn.init.normal_(self.score.weight, std=config.initializer_range)
        if self._has_bias:
            nn.init.zeros_(self.score.bias)

    @property
    def num_labels(self) -> int:
        return self.score.out_features

    @classmethod
    def _heads(cls, config: PersimmonConfig) -> dict[str, tuple[int, ...]]:
        assert config.num_labels is not None
        heads: dict[str, tuple[int, ...]] = {"score.weight": (config.num_labels, config.hidden_size)}
        return heads | {"score.bias": (config.num_labels,)} if cls._has_bias else heads


class PersimmonForSequenceClassification(_Classifier):
    """Logits of the last token of each sequence."""

    _has_bias = False

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
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Logits [batch_size, num_labels], and the loss if labels are given. Arguments as in `PersimmonModel.forward`,
        and:

        Args:
            labels: what `losses.sequence_classification_loss` takes.
        Raises:
            ValueError: more than one sequence, and config.pad_token_id is None.
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
        hidden = outputs.last_hidden_state
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        logits = self.score(hidden[rows, self._last_token(hidden, input_ids, attention_mask)])
        output = SequenceClassifierOutputWithPast(
            loss=sequence_classification_loss(logits, labels, self.config) if labels is not None else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return self._returned(output, return_dict)

    def _last_token(self, hidden: Tensor, input_ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """Column of the token that is classified, of each sequence: the last that is not the pad token, as in
        transformers, which looks at ids alone. Without ids or a pad token: the last that the mask counts."""
        batch_size, seqlen = hidden.shape[:2]
        pad = self.config.pad_token_id
        if pad is None and batch_size != 1:
            raise ValueError(
                f"{type(self).__name__}: config.pad_token_id is None, so that the last token of {batch_size} sequences "
                "is not known: set it, or give one sequence at a time"
            )
        if input_ids is not None and pad is not None:
            counts = input_ids != pad
        elif mask is not None:
            counts = mask[:, -seqlen:] != 0
        else:
            counts = torch.ones(batch_size, seqlen, dtype=torch.bool)
        return (torch.arange(seqlen, device=counts.device) * counts).argmax(1).to(hidden.device)


class PersimmonForTokenClassification(_Classifier):
    """Logits of every token. Dropout in front of the head is config.classifier_dropout, else config.hidden_dropout."""

    _has_bias = True

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
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Logits [batch_size, seqlen, num_labels], and the loss if labels are given. Arguments as in
        `PersimmonModel.forward`, and:

        Args:
            labels: [batch_size, seqlen] int64, -100: ignored. Padding is not ignored of itself.
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
        config = self.config
        dropout = config.hidden_dropout if config.classifier_dropout is None else config.classifier_dropout
        logits = self.score(F.dropout(outputs.last_hidden_state, dropout, self.training))
        output = TokenClassifierOutput(
            loss=token_classification_loss(logits, labels) if labels is not None else None,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return self._returned(output, return_dict)


__all__ = ["PersimmonForSequenceClassification", "PersimmonForTokenClassification"]
