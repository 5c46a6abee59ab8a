"""The losses of the classes, from logits and labels; all in fp32. -100: a label that does not count.

Source: transformers 5.23, loss/loss_utils.py (what each loss is; compared in tests/test_classification.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from persimmon_fast.config import PersimmonConfig


def cross_entropy(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of logits [..., num_classes] and labels [...], the mean over those that are not -100.

    Args:
        num_items_in_batch: divides the sum instead, where a batch is computed in several parts whose mean is to weigh
            every label alike.
    """
    reduction = "mean" if num_items_in_batch is None else "sum"
    labels = labels.flatten().to(logits.device)
    loss = F.cross_entropy(logits.flatten(0, -2).float(), labels, ignore_index=-100, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each position's logits [batch_size, seqlen, vocab_size] with the label after it; with
    shift_labels, [batch_size, seqlen] too, with its own of them."""
    for name, given in (("labels", labels), ("shift_labels", shift_labels)):
        if given is not None and given.shape != logits.shape[:-1]:
            raise ValueError(f"{name} must be {list(logits.shape[:-1])} as the logits, got {list(given.shape)}")
    if shift_labels is not None:
        return cross_entropy(logits, shift_labels, num_items_in_batch)
    return cross_entropy(logits[:, :-1], labels[:, 1:], num_items_in_batch)


def token_classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [batch_size, seqlen, num_labels] and labels [batch_size, seqlen]."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels must be {list(logits.shape[:-1])} as the tokens, got {list(labels.shape)}")
    return cross_entropy(logits, labels)


def sequence_classification_loss(logits: Tensor, labels: Tensor, config: PersimmonConfig) -> Tensor:
    """The loss that config.problem_type names, of logits [batch_size, num_labels].

    regression: mean squared error; labels like the logits, or [batch_size] for one label.
    single_label_classification: cross-entropy; labels [batch_size] of integers.
    multi_label_classification: binary cross-entropy of every label; labels like the logits, 0 to 1.
    None: regression for one label; else the second for integer labels, the third for the others.
    """
    batch_size, num_labels = logits.shape
    labels = labels.to(logits.device)
    problem_type = config.problem_type
    if problem_type is None:
        is_integer = labels.dtype in (torch.int64, torch.int32)
        problem_type = "single_label_classification" if is_integer else "multi_label_classification"
        problem_type = "regression" if num_labels == 1 else problem_type
    per_sequence = problem_type == "single_label_classification" or num_labels == 1
    count = batch_size if per_sequence else batch_size * num_labels
    if labels.numel() != count or (not per_sequence and labels.shape != logits.shape):
        expected = [batch_size] if per_sequence else list(logits.shape)
        raise ValueError(f"labels must be {expected} for {problem_type}, got {list(labels.shape)}")
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels.long())
    targets = labels.float().view_as(logits)
    if problem_type == "regression":
        return F.mse_loss(logits.float(), targets)
    return F.binary_cross_entropy_with_logits(logits.float(), targets)
