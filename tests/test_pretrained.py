"""Loading and saving of every class, both ways with transformers, and what changes a model's parameters."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from fuyu_helpers import tiny_fuyu
from helpers import hf_model, max_error, tiny_config

import persimmon_fast
from persimmon_fast import (
    CheckpointError,
    FuyuForCausalLM,
    PersimmonForCausalLM,
    PersimmonForSequenceClassification,
    PersimmonModel,
)
from persimmon_fast.config import ConfigError
from persimmon_fast.decode_graph import DecodeGraphs

KINDS = [
    "PersimmonModel",
    "PersimmonForCausalLM",
    "PersimmonForSequenceClassification",
    "PersimmonForTokenClassification",
]
TOLERANCE = 1e-5
LABELS = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}


def random_ids(batch_size=2, seqlen=9, vocab=160):
    return torch.randint(3, vocab, (batch_size, seqlen), generator=torch.Generator().manual_seed(3))


def first_output(model, ids):
    with torch.no_grad():
        return model(ids, return_dict=True).to_tuple()[0]


# ---- checkpoints ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_through_transformers(kind, tied, tmp_path):
    config = tiny_config(pad_token_id=0, tie_word_embeddings=tied, **LABELS)
    theirs = hf_model(config, kind=kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = getattr(persimmon_fast, kind).from_pretrained(tmp_path / "theirs", dtype="float32")
    assert ours.config.id2label == LABELS["id2label"]
    assert not ours.training
    ours.save_pretrained(tmp_path / "ours")
    again, report = getattr(transformers, kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.label2id == LABELS["label2id"]
    assert again.config.architectures == [kind]
    for (name, a), b in zip(theirs.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    ids = random_ids()
    assert max_error(first_output(ours, ids), first_output(theirs, ids)) < TOLERANCE
    loaded = getattr(persimmon_fast, kind).from_pretrained(tmp_path / "ours")
    assert torch.equal(first_output(loaded, ids), first_output(ours, ids))


@pytest.mark.parametrize("kind", KINDS[2:])
def test_problem_type_and_dropout_go_both_ways(kind, tmp_path):
    config = tiny_config(problem_type="multi_label_classification", classifier_dropout=0.25, num_labels=4)
    getattr(persimmon_fast, kind)(config).save_pretrained(tmp_path / "ours")
    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "ours")
    assert (theirs.config.problem_type, theirs.config.classifier_dropout) == ("multi_label_classification", 0.25)
    theirs.save_pretrained(tmp_path / "theirs")
    again = getattr(persimmon_fast, kind).from_pretrained(tmp_path / "theirs").config
    assert (again.problem_type, again.classifier_dropout, again.num_labels) == (config.problem_type, 0.25, 4)


@pytest.fixture
def language_model(tmp_path):
    """Folder of a language model, and the model."""
    model = PersimmonForCausalLM(tiny_config()).eval()
    model.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm", model


def test_a_classifier_starts_from_a_language_model(language_model):
    folder, model = language_model
    with pytest.warns(UserWarning, match=r"has no score.weight: random now, to be trained"):
        classifier = PersimmonForSequenceClassification.from_pretrained(folder, num_labels=5, pad_token_id=0)
    assert classifier.score.weight.shape == (5, 48)
    assert 0.01 < float(classifier.score.weight.detach().std()) < 0.04
    assert (classifier.config.num_labels, classifier.config.pad_token_id) == (5, 0)
    assert torch.equal(classifier.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert PersimmonModel.from_pretrained(folder).num_parameters() == model.num_parameters() - 160 * 48


def test_a_language_model_does_not_start_from_a_classifier(tmp_path):
    PersimmonForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"1 missing \(lm_head.weight\) and 1 unexpected \(score.weight"):
        PersimmonForCausalLM.from_pretrained(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"score.weight: expected shape \[7, 48\], found \[2, 48\]"):
        PersimmonForSequenceClassification.from_pretrained(tmp_path / "c", num_labels=7)


def test_saving_names_the_class_that_was_saved(language_model):
    folder, _ = language_model
    named = [json.loads((folder / "config.json").read_text())["architectures"]]
    PersimmonModel.from_pretrained(folder).save_pretrained(folder / "decoder")
    PersimmonForCausalLM(PersimmonModel.from_pretrained(folder / "decoder").config).save_pretrained(folder / "lm")
    named += [json.loads((folder / sub / "config.json").read_text())["architectures"] for sub in ("decoder", "lm")]
    assert named == [["PersimmonForCausalLM"], ["PersimmonModel"], ["PersimmonForCausalLM"]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_of_a_fuyu_checkpoint(kind, tmp_path):
    fuyu = FuyuForCausalLM(tiny_fuyu(pad_token_id=0)).eval()
    assert fuyu.get_input_embeddings() is fuyu.language_model.model.embed_tokens
    assert fuyu.get_output_embeddings() is fuyu.language_model.lm_head
    fuyu.resize_token_embeddings(170)
    assert fuyu.config.text_config.vocab_size == 170
    fuyu.save_pretrained(tmp_path / "fuyu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a score is new
        model = getattr(persimmon_fast, kind).from_pretrained(tmp_path / "fuyu")
    ids = random_ids()
    assert torch.equal(first_output(model.base_model, ids), first_output(fuyu.language_model.model, ids))
    assert FuyuForCausalLM.from_pretrained(tmp_path / "fuyu").num_parameters() == fuyu.num_parameters()


# ---- keywords of from_pretrained ----


def test_names_of_the_dtype(language_model):
    folder, _ = language_model
    load = PersimmonForCausalLM.from_pretrained
    assert load(folder).dtype == torch.float32
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert load(folder, torch_dtype=torch.float16).dtype == torch.float16
    assert load(folder, torch_dtype="auto", dtype="auto").dtype == torch.float32
    with pytest.raises(ValueError, match="torch_dtype='float16' and dtype='bfloat16' are the same argument: give one"):
        load(folder, torch_dtype="float16", dtype="bfloat16")


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu"), "balanced"], ids=str)
def test_names_of_the_device(language_model, device_map, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert PersimmonForCausalLM.from_pretrained(language_model[0], device_map=device_map).device.type == "cpu"


def test_device_map_chooses_the_current_cuda_device(monkeypatch):
    from persimmon_fast.pretrained import _device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert _device(None, "auto") == torch.device("cuda", 3)
    assert _device(None, {"": 1}) == _device("cuda:1", 1) == torch.device("cuda", 1)
    assert _device(None, None) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device_map must be one device, .* got \{'model.layers.0': 0\}"):
        _device(None, {"model.layers.0": 0})
    with pytest.raises(ValueError, match="are the same argument"):
        _device("cpu", 0)


def test_changes_of_the_config(language_model):
    folder, _ = language_model
    model = PersimmonForCausalLM.from_pretrained(folder, output_hidden_states=True, hidden_dropout=0.5)
    assert model.config.hidden_dropout == 0.5
    assert model.config.extra["output_hidden_states"] is True
    assert len(model(random_ids()).hidden_states) == 3
    assert PersimmonForCausalLM.from_pretrained(folder, config=tiny_config(use_cache=False)).config.use_cache is False
    with pytest.raises(TypeError, match=r"unknown argument attn_implementation, trust: no field of PersimmonConfig"):
        PersimmonForCausalLM.from_pretrained(folder, trust=True, attn_implementation="eager")


# ---- embeddings ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_of_every_class(kind, tied):
    model = getattr(persimmon_fast, kind)(tiny_config(tie_word_embeddings=tied))
    assert model.get_input_embeddings() is model.base_model.embed_tokens
    head = model.get_output_embeddings()
    assert (head is not None) == (kind == "PersimmonForCausalLM")
    if head is None:
        with pytest.raises(ValueError, match=f"{kind} has no language model head"):
            model.set_output_embeddings(torch.nn.Linear(48, 160, bias=False))
    model.set_input_embeddings(new := torch.nn.Embedding(160, 48))
    assert model.get_input_embeddings() is new
    if head is not None:
        assert (head.weight is new.weight) == tied
        model.set_output_embeddings(other := torch.nn.Linear(48, 160, bias=False))
        assert model.get_output_embeddings() is other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("size", "multiple", "expected"), [(171, None, 171), (100, None, 100), (161, 64, 192)])
def test_resized_vocabulary_equals_transformers(kind, tied, size, multiple, expected, tmp_path):
    config = tiny_config(pad_token_id=0, tie_word_embeddings=tied)
    theirs, ours = hf_model(config, kind=kind), getattr(persimmon_fast, kind)(config).eval()
    ours.load_state_dict(theirs.state_dict())
    ours.tie_weights()
    embedding = ours.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    theirs.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    assert embedding is ours.get_input_embeddings()
    assert ours.config.vocab_size == ours.base_model.config.vocab_size == theirs.config.vocab_size == expected
    assert embedding.num_embeddings == expected
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert max_error(a, b) < 1e-3, name  # transformers adds noise of 3e-5 standard deviations to new rows
        assert torch.equal(a[: min(160, expected)], b[: min(160, expected)]), name
    ids = random_ids(vocab=100)
    assert max_error(first_output(ours, ids), first_output(theirs, ids)) < 1e-3
    ours.save_pretrained(tmp_path / "resized")
    loaded = type(ours).from_pretrained(tmp_path / "resized")
    assert torch.equal(first_output(loaded, ids), first_output(ours, ids))
    if tied and kind == "PersimmonForCausalLM":
        assert ours.lm_head.weight is embedding.weight


def test_resizing_keeps_what_is_trained_and_can_draw_new_rows():
    model = PersimmonForCausalLM(tiny_config())
    model.lm_head.weight.requires_grad_(False)
    old = model.lm_head.weight.clone()
    model.resize_token_embeddings(300, mean_resizing=False)
    assert torch.equal(model.lm_head.weight[:160], old)
    assert 0.015 < float(model.lm_head.weight[160:].std()) < 0.025
    assert not model.lm_head.weight.requires_grad
    assert model.get_input_embeddings().weight.requires_grad
    assert model.lm_head.out_features == 300
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.config.vocab_size == 300


def test_generation_follows_a_resized_vocabulary():
    model = PersimmonForCausalLM(tiny_config(eos_token_id=None)).eval()
    ids = random_ids(1, 5)
    before = model.generate(ids, max_new_tokens=6)
    model.resize_token_embeddings(200)
    with torch.no_grad():
        model.lm_head.weight[190] = 50 * first_output(model.model, before[:, :5])[0, -1]
    after = model.generate(ids, max_new_tokens=1)
    assert after[0, -1] == 190
    model.resize_token_embeddings(190)
    assert torch.equal(model.generate(ids, max_new_tokens=6), before)


def test_resizing_frees_the_captured_steps(monkeypatch):
    freed = []
    monkeypatch.setattr(DecodeGraphs, "free", lambda self: freed.append(self))
    model = PersimmonForCausalLM(tiny_config())
    model.resize_token_embeddings(160)
    assert freed == []
    model.resize_token_embeddings(161)
    assert freed == [model.decode_graphs]


@pytest.mark.parametrize(
    ("size", "settings", "error", "match"),
    [
        (0, {}, ConfigError, "vocab_size: expected an integer in"),
        (2, {}, ConfigError, "eos_token_id: expected a token id in"),
        (100, {"pad_token_id": 120}, ValueError, "generation_config names token 120, which .* of 100 tokens lacks"),
        (
            100,
            {"vocab_ranges": [(0, 50), (90, 110)]},
            ValueError,
            "vocab_ranges ends at 110, the new vocabulary at 100",
        ),
    ],
)
def test_resizing_that_is_refused_changes_nothing(size, settings, error, match):
    model = PersimmonForCausalLM(tiny_config())
    model.generation_config = model.generation_config.replace(**settings)
    weight = model.get_input_embeddings().weight
    with pytest.raises(error, match=match):
        model.resize_token_embeddings(size)
    assert model.get_input_embeddings().weight is weight
    assert model.config.vocab_size == 160


@pytest.mark.parametrize("multiple", [0, 1.5])
def test_pad_to_a_multiple_of_nothing(multiple):
    with pytest.raises(ValueError, match="pad_to_multiple_of must be an integer > 0"):
        PersimmonModel(tiny_config()).resize_token_embeddings(None, pad_to_multiple_of=multiple)


# ---- parameters and training ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_num_parameters_equals_transformers(kind, tied):
    config = tiny_config(tie_word_embeddings=tied)
    theirs, ours = hf_model(config, kind=kind), getattr(persimmon_fast, kind)(config)
    for model in (ours, theirs):
        model.get_input_embeddings().weight.requires_grad_(False)
    for only_trainable in (False, True):
        for exclude_embeddings in (False, True):
            options = {"only_trainable": only_trainable, "exclude_embeddings": exclude_embeddings}
            assert ours.num_parameters(**options) == theirs.num_parameters(**options), options


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_memory_alone(kind):
    model = getattr(persimmon_fast, kind)(tiny_config(pad_token_id=0)).train()
    calls = []
    model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients, counts = [], []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        calls.clear()
        model(random_ids())[0].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        counts.append(len(calls))
    assert counts == [1, 2]  # the layer is computed again for its gradients
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert max_error(gradients[1][name], expected) < 1e-6, name
    model.eval()
    calls.clear()
    model(random_ids())[0].sum().backward()
    assert len(calls) == 1


class Wrapped(torch.nn.Module):
    """transformers' Trainer writes to the config of a model that has one."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.accepts_loss_kwargs = model, model.accepts_loss_kwargs

    def forward(self, input_ids, attention_mask, labels, **options):
        return self.inner(input_ids, attention_mask, labels=labels, **options)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_transformers_trainer_trains_and_evaluates(kind, tmp_path):
    model = getattr(persimmon_fast, kind)(tiny_config(pad_token_id=0, num_labels=3))
    ids = random_ids(6)
    labels = {"PersimmonForCausalLM": ids, "PersimmonForSequenceClassification": ids[:, 0] % 3}.get(kind, ids % 3)
    rows = [{"input_ids": i, "attention_mask": i > 0, "labels": n} for i, n in zip(ids, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=Wrapped(model), args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.01
