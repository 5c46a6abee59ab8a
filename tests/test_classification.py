"""The classification classes and the losses, against transformers' on the same random weights."""

from __future__ import annotations

import pytest
import torch
from helpers import hf_model, max_error, tiny_config

from persimmon_fast import PersimmonForCausalLM, PersimmonForSequenceClassification, PersimmonForTokenClassification
from persimmon_fast.losses import causal_lm_loss

TOLERANCE = 1e-5
PAD = 0
CLASSES = {
    "PersimmonForSequenceClassification": PersimmonForSequenceClassification,
    "PersimmonForTokenClassification": PersimmonForTokenClassification,
}


def pair(kind, **changes):
    """(ours, theirs): the class of that name with the same weights, on a config with these changes."""
    config = tiny_config(**({"num_labels": 3, "pad_token_id": PAD} | changes))
    theirs, ours = hf_model(config, kind=kind), CLASSES[kind](config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def sequence_pair(**changes):
    return pair("PersimmonForSequenceClassification", **changes)


def token_pair(**changes):
    return pair("PersimmonForTokenClassification", **changes)


def padded_ids(side, lengths=(9, 4, 1), width=9):
    """ids with pad tokens on that side, and their mask."""
    ids = torch.randint(3, 160, (len(lengths), width), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        padding = slice(length, None) if side == "right" else slice(0, width - length)
        ids[row, padding], mask[row, padding] = PAD, 0
    return ids, mask


def labels_for(problem_type, num_labels, batch_size=3):
    generator = torch.Generator().manual_seed(6)
    if problem_type == "single_label_classification":
        return torch.randint(num_labels, (batch_size,), generator=generator)
    if problem_type == "multi_label_classification":
        return torch.randint(2, (batch_size, num_labels), generator=generator).float()
    shape = (batch_size,) if num_labels == 1 else (batch_size, num_labels)
    return torch.randn(shape, generator=generator)


PROBLEMS = [
    ("regression", 1),
    ("regression", 3),
    ("single_label_classification", 3),
    ("multi_label_classification", 3),
    ("multi_label_classification", 1),
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_logits_equal_transformers(side):
    ours, theirs = sequence_pair()
    ids, mask = padded_ids(side)
    with torch.no_grad():
        actual, expected = ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
        assert actual.shape == (3, 3)
        assert max_error(actual, expected) < TOLERANCE
        assert max_error(actual[0], actual[1]) > 100 * TOLERANCE  # the rows differ at all


def test_sequence_logits_without_a_mask_are_those_of_the_last_token_that_is_no_padding():
    ours, theirs = sequence_pair()
    ids, _ = padded_ids("right")
    with torch.no_grad():
        assert max_error(ours(ids).logits, theirs(ids).logits) < TOLERANCE
        alone = [ours(ids[row : row + 1, :length]).logits for row, length in enumerate((9, 4, 1))]
        assert max_error(ours(ids).logits, torch.cat(alone)) < TOLERANCE


def test_sequence_of_pad_tokens_alone():
    ours, theirs = sequence_pair()
    ids = torch.full((2, 4), PAD)
    with torch.no_grad():
        assert max_error(ours(ids).logits, theirs(ids).logits) < TOLERANCE


def test_sequence_without_a_pad_token():
    ours, theirs = sequence_pair(pad_token_id=None)
    ids, _ = padded_ids("right")
    with torch.no_grad():
        assert max_error(ours(ids[:1]).logits, theirs(ids[:1]).logits) < TOLERANCE
        with pytest.raises(
            ValueError, match=r"pad_token_id is None, so that the last token of 3 sequences is not known"
        ):
            ours(ids)
        mask = torch.tensor([[1] * 6 + [0] * 3])
        assert max_error(ours(ids[:1], attention_mask=mask).logits, ours(ids[:1, :6]).logits) < TOLERANCE


def test_sequence_of_embeddings():
    ours, theirs = sequence_pair()
    ids, mask = padded_ids("left")
    embeds = ours.get_input_embeddings()(ids)
    with torch.no_grad():
        expected = theirs(inputs_embeds=embeds, attention_mask=mask).logits
        assert max_error(ours(inputs_embeds=embeds, attention_mask=mask).logits, expected) < TOLERANCE
        right_ids, right_mask = padded_ids("right")
        embeds = ours.get_input_embeddings()(right_ids)
        from_ids = ours(right_ids, attention_mask=right_mask).logits
        assert max_error(ours(inputs_embeds=embeds, attention_mask=right_mask).logits, from_ids) < TOLERANCE


def test_sequence_over_a_cache():
    ours, _ = sequence_pair()
    ids, mask = padded_ids("left")
    with torch.no_grad():
        first = ours(ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
        second = ours(ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
        assert max_error(second.logits, ours(ids, attention_mask=mask).logits) < TOLERANCE


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "named"),
    [(*problem, True) for problem in PROBLEMS]
    # those that follow from the number of labels and their dtype
    + [("regression", 1, False), ("single_label_classification", 3, False), ("multi_label_classification", 3, False)],
)
def test_sequence_loss_and_gradients_equal_transformers(problem_type, num_labels, named):
    ours, theirs = sequence_pair(num_labels=num_labels, problem_type=problem_type if named else None)
    ids, mask = padded_ids("right")
    labels = labels_for(problem_type, num_labels)
    if problem_type == "multi_label_classification" and num_labels == 1:
        labels = labels.view(3, 1)
    losses = [model(ids, attention_mask=mask, labels=labels).loss for model in (ours, theirs)]
    assert_same_losses(losses)
    assert_same_gradients(ours, theirs, losses)


def assert_same_losses(losses):
    actual, expected = (float(loss.detach()) for loss in losses)
    assert abs(actual - expected) < TOLERANCE * max(1.0, expected)


def assert_same_gradients(ours, theirs, losses):
    for loss in losses:
        loss.backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        largest = float(expected[name].abs().max())
        assert max_error(parameter.grad, expected[name]) <= 2e-5 * largest + 1e-7, name


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_logits_loss_and_gradients_equal_transformers(side):
    ours, theirs = token_pair()
    ids, mask = padded_ids(side)
    labels = torch.randint(3, ids.shape, generator=torch.Generator().manual_seed(7)).masked_fill(mask == 0, -100)
    actual, expected = (model(ids, attention_mask=mask, labels=labels) for model in (ours, theirs))
    assert max_error(actual.logits[mask.bool()].detach(), expected.logits[mask.bool()].detach()) < TOLERANCE
    assert_same_losses((actual.loss, expected.loss))
    assert list(actual) == ["loss", "logits"]
    assert_same_gradients(ours, theirs, (actual.loss, expected.loss))


@pytest.mark.parametrize(("classifier", "hidden", "zeros"), [(0.5, 0.0, True), (None, 0.5, True), (0.0, 0.5, False)])
def test_dropout_in_front_of_the_token_head(classifier, hidden, zeros, monkeypatch):
    ours = PersimmonForTokenClassification(tiny_config(classifier_dropout=classifier, hidden_dropout=hidden)).train()
    seen = []
    ours.score.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ours(padded_ids("right")[0])
    assert (float((seen[0] == 0).float().mean()) > 0.3) == zeros


@pytest.mark.parametrize("kind", CLASSES)
def test_outputs_of_every_form(kind):
    ours, theirs = pair(kind)
    ids, mask = padded_ids("left")
    options = {"attention_mask": mask, "output_hidden_states": True, "output_attentions": True}
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        with pytest.warns(UserWarning, match="output_attentions"):
            actual = ours(ids, **options)
        expected = theirs(ids, **options)
        assert list(actual) == [key for key in expected if key != "past_key_values" or "past_key_values" in actual]
        for a, e in zip(actual.hidden_states, expected.hidden_states, strict=True):
            assert max_error(a[mask.bool()], e[mask.bool()]) < TOLERANCE
        assert len(actual.attentions) == len(expected.attentions) == 2
        as_tuple = ours(ids, return_dict=False, **options)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(as_tuple[0], actual.logits)
        assert len(as_tuple) == len(actual)


@pytest.mark.parametrize(
    ("changes", "labels", "match"),
    [
        ({}, torch.zeros(2, dtype=torch.long), r"labels must be \[3\] for single_label_classification, got \[2\]"),
        ({}, torch.zeros(3), r"labels must be \[3, 3\] for multi_label_classification, got \[3\]"),
        ({"num_labels": 1}, torch.zeros(2), r"labels must be \[3\] for regression, got \[2\]"),
        ({"problem_type": "regression"}, torch.zeros(3), r"labels must be \[3, 3\] for regression, got \[3\]"),
    ],
)
def test_labels_of_a_wrong_shape(changes, labels, match):
    ours = PersimmonForSequenceClassification(tiny_config(**({"num_labels": 3, "pad_token_id": PAD} | changes)))
    with pytest.raises(ValueError, match=match):
        ours(padded_ids("right")[0], labels=labels)


def test_token_labels_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"labels must be \[3, 9\] as the tokens, got \[3\]"):
        PersimmonForTokenClassification(tiny_config())(padded_ids("right")[0], labels=torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(5)], ids=str)
def test_language_model_loss_and_gradients_equal_transformers(num_items):
    config = tiny_config()
    theirs, ours = hf_model(config), PersimmonForCausalLM(config).eval()
    ours.load_state_dict(theirs.state_dict())
    ids, mask = padded_ids("right")
    options = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "num_items_in_batch": num_items}
    losses = [model(ids, **options).loss for model in (ours, theirs)]
    assert_same_losses(losses)
    assert_same_gradients(ours, theirs, losses)


def test_labels_that_are_shifted_already():
    config = tiny_config()
    theirs, ours = hf_model(config), PersimmonForCausalLM(config).eval()
    ours.load_state_dict(theirs.state_dict())
    ids, _ = padded_ids("right", (9, 9, 9))
    shifted = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)
    with torch.no_grad():
        plain = ours(ids, labels=ids).loss
        assert max_error(ours(ids, labels=ids, shift_labels=shifted).loss, plain) < TOLERANCE
        shifted[:, -1] = 5  # the label of the token after these
        expected = theirs(ids, labels=ids, shift_labels=shifted).loss
        assert max_error(ours(ids, labels=ids, shift_labels=shifted).loss, expected) < TOLERANCE
        assert max_error(plain, expected) > 100 * TOLERANCE
        with pytest.raises(ValueError, match=r"shift_labels must be \[3, 9\] as the logits, got \[3, 8\]"):
            ours(ids, labels=ids, shift_labels=shifted[:, :8])


def test_parts_of_a_batch_weigh_every_label_alike():
    logits = torch.randn(4, 6, 11, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(2))
    labels[0, 2:] = -100
    num_items = int((labels[:, 1:] != -100).sum())
    parts = [causal_lm_loss(logits[i : i + 2], labels[i : i + 2], num_items) for i in (0, 2)]
    assert max_error(sum(parts), causal_lm_loss(logits, labels)) < 1e-6


def test_loss_of_half_precision_is_taken_in_fp32():
    ours = PersimmonForSequenceClassification(tiny_config(num_labels=3, pad_token_id=PAD)).eval().to(torch.bfloat16)
    for labels in (torch.tensor([0, 1, 2]), torch.zeros(3, 3)):
        assert ours(padded_ids("right")[0], labels=labels).loss.dtype == torch.float32
