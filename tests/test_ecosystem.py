"""A patched model in what people use around transformers: Auto classes, pipelines, lm-evaluation-harness; and our
tokenizer as one of transformers. lm-evaluation-harness is optional: `pip install ".[test,ecosystem]"`.
"""

from __future__ import annotations

import copy
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from adept_helpers import sentencepiece_model
from hf_helpers import IS_TRANSFORMERS_4, calls_of, hf_config, randomised, tokens
from processes import environment
from prompts import PROMPTS as TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer, PersimmonForCausalLM, pipeline

from persimmon_fast import SMALL_MODEL, PersimmonTokenizer, apply_persimmon_fast, ops
from persimmon_fast.integrations.tokenizer import save_for_both, to_transformers

KERNELS = ("squared_relu_mlp", "qkv_norm_rope")
PROMPTS = ["def read_config(path):", "class Stack:\n", "import os\n\n"]
NUM_LAYERS = 2  # of hf_config


@pytest.fixture(autouse=True)
def no_reference(monkeypatch):
    """The kernels run, not their definitions in torch."""
    monkeypatch.setattr(ops, "_warn_once", lambda message: pytest.fail(f"a slow path: {message}"))


@pytest.fixture
def calls(monkeypatch):
    return calls_of(monkeypatch, *KERNELS)


def load_small():
    dtype = "torch_dtype" if IS_TRANSFORMERS_4 else "dtype"
    return AutoModelForCausalLM.from_pretrained(SMALL_MODEL, **{dtype: torch.float32}).eval()


# ---- the tokenizer ----


@pytest.fixture(scope="module")
def tokenizer():
    return to_transformers(PersimmonTokenizer.from_pretrained(SMALL_MODEL))


def normalising_model() -> bytes:
    """A sentencepiece model that normalises (NFKC) and drops spaces, as sentencepiece does unless told otherwise."""
    return sentencepiece_model(("|ENDOFTEXT|", "<", ">", "0", "x", "4", "1", "s", "u", "n", "k", "/", "ea", "ason"))


TOKENIZERS = {
    "shipped": lambda: PersimmonTokenizer.from_pretrained(SMALL_MODEL),
    "shipped, no BOS": lambda: PersimmonTokenizer.from_pretrained(SMALL_MODEL, add_bos=False, padding_side="right"),
    "normalising": lambda: PersimmonTokenizer(normalising_model(), bos_token_id=3, eos_token_id=3),
}
SPECIAL = ["<s>", "</s>", "<unk>", "<0x41>", "|ENDOFTEXT|"]
SNIPPETS = [*SPECIAL, " ", "  ", "\n", "\t", "a", "def", "season", "fruit", "é", "\uff21\uff22", "\ufb01", "🎉"]


def random_texts(num_texts: int) -> list[str]:
    generator = random.Random(0)
    source = (SMALL_MODEL / "README.md").read_text(encoding="utf-8")
    texts = ["", " ", "a", " a"]
    for _ in range(num_texts):
        start = generator.randrange(len(source))
        texts.append(source[start : start + generator.randrange(60)])
        texts.append("".join(generator.choice(SNIPPETS) for _ in range(generator.randrange(8))))
    return texts


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_of_transformers_gives_our_ids_and_texts(name, tmp_path):
    own = TOKENIZERS[name]()
    theirs = to_transformers(own)
    save_for_both(own, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ours = PersimmonTokenizer.from_pretrained(tmp_path)
    assert ours(TEXTS[:20]).input_ids == own(TEXTS[:20]).input_ids
    for one in (theirs, loaded):
        for kind in ("bos_token_id", "eos_token_id", "pad_token_id", "padding_side"):
            assert getattr(one, kind) == getattr(own, kind)
        num_ties = 0
        for text in random_texts(500):
            expected, actual = own(text).input_ids, one(text).input_ids
            if expected != actual:  # two segmentations of one score; sentencepiece sums in fp32
                num_ties += 1
                scores = [sum(own.sp.get_score(i) for i in ids) for ids in (expected, actual)]
                assert scores[0] == pytest.approx(scores[1], abs=1e-3), repr(text)
                assert own.decode(expected) == own.decode(actual), repr(text)
            assert one.decode(expected, skip_special_tokens=True) == own.decode(expected), repr(text)
        assert num_ties <= 5
    batch = theirs(PROMPTS, padding=True, return_tensors="pt")
    expected = own(PROMPTS, padding=True, return_tensors="pt")
    assert torch.equal(batch.input_ids, expected.input_ids)
    assert torch.equal(batch.attention_mask, expected.attention_mask)


def test_the_shipped_model_has_a_tokenizer_for_transformers(tmp_path):
    save_for_both(PersimmonTokenizer.from_pretrained(SMALL_MODEL), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((SMALL_MODEL / name).read_text()) == json.loads((tmp_path / name).read_text()), name
    theirs, ours = AutoTokenizer.from_pretrained(SMALL_MODEL), PersimmonTokenizer.from_pretrained(SMALL_MODEL)
    assert theirs(TEXTS).input_ids == ours(TEXTS).input_ids


def test_other_kinds_of_sentencepiece_models_are_refused():
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e"] * 20), model_writer=out, model_type="bpe", vocab_size=12, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"must be Unigram \(type 1\), got type 2"):
        to_transformers(PersimmonTokenizer(out.getvalue()))


# ---- Auto classes and pipelines ----


def test_auto_class_and_text_generation_pipeline(tokenizer, calls):
    settings = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.15, "batch_size": 2}
    model = load_small()
    assert type(model) is PersimmonForCausalLM
    expected = pipeline("text-generation", model=model, tokenizer=tokenizer)(PROMPTS, **settings)
    assert not any(calls.values())
    fast = apply_persimmon_fast(load_small())
    actual = pipeline("text-generation", model=fast, tokenizer=tokenizer)(PROMPTS, **settings)
    assert actual == expected
    assert all(len(text[0]["generated_text"]) > len(prompt) for text, prompt in zip(actual, PROMPTS, strict=True))
    assert calls["squared_relu_mlp"] >= 4 * 12
    assert calls["qkv_norm_rope"] == calls["squared_relu_mlp"]


def test_text_classification_pipeline(tokenizer, calls):
    from transformers import PersimmonForSequenceClassification

    config = hf_config(vocab_size=4096, num_labels=3, pad_token_id=tokenizer.pad_token_id)
    model = randomised(PersimmonForSequenceClassification(config))
    expected = pipeline("text-classification", model=copy.deepcopy(model), tokenizer=tokenizer)(PROMPTS)
    fast = apply_persimmon_fast(model)
    actual = pipeline("text-classification", model=fast, tokenizer=tokenizer)(PROMPTS)
    assert [one["label"] for one in actual] == [one["label"] for one in expected]
    assert [one["score"] for one in actual] == pytest.approx([one["score"] for one in expected], abs=1e-5)
    assert calls["squared_relu_mlp"] == NUM_LAYERS * len(PROMPTS)


def test_trainer(tmp_path, calls):
    """Same losses while it trains, in transformers' own code; evaluation between the steps runs the kernels."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    histories = []
    for patch in (lambda model: model, apply_persimmon_fast):
        arguments = TrainingArguments(
            output_dir=tmp_path, max_steps=4, per_device_train_batch_size=2, per_device_eval_batch_size=4,
            logging_steps=1, eval_strategy="steps", eval_steps=2, learning_rate=1e-3, save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        model = patch(randomised(PersimmonForCausalLM(hf_config())))
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        before = calls["squared_relu_mlp"]
        trainer.train()
        histories.append([log[key] for log in trainer.state.log_history for key in ("loss", "eval_loss") if key in log])
    assert before == 0
    assert calls["squared_relu_mlp"] == NUM_LAYERS * 2 * 2  # two evaluations of two batches
    assert len(histories[0]) == 6
    assert histories[0][-1] < histories[0][2]  # of the evaluations; it learns
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)


# ---- lm-evaluation-harness ----

LM_EVAL_TASKS = {
    "choice": """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "text": """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "generation": """
task: local_generation
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
LM_EVAL_DOCUMENTS = [
    {"text": "import", "choices": [" os", " elephant"], "answer": 0},
    {"text": "def __init__(", "choices": ["xylophone", "self"], "answer": 1},
    {"text": "    return", "choices": [" None", " zebra crossing"], "answer": 0},
    {"text": "for i in", "choices": [" aquarium", " range(10):"], "answer": 1},
    {"text": "class Error(", "choices": ["banana", "Exception):"], "answer": 1},
]


def run_lm_eval(folder: Path) -> None:
    """Evaluates the shipped model, as it is and patched; prints both results and the calls of a kernel as JSON.

    In a process of its own: the harness changes seeds, logging and the environment.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in LM_EVAL_DOCUMENTS))
    for name, task in LM_EVAL_TASKS.items():
        (folder / f"{name}.yaml").write_text(task.replace("DATA", str(data)))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tokenizer = to_transformers(PersimmonTokenizer.from_pretrained(SMALL_MODEL))
    num_calls, op = [0], ops.squared_relu_mlp

    def counting(*args, **kwargs):
        num_calls[0] += 1
        return op(*args, **kwargs)

    ops.squared_relu_mlp = counting
    report = []
    for patch in (lambda model: model, apply_persimmon_fast):
        num_calls[0] = 0
        model = HFLM(pretrained=patch(load_small()), tokenizer=tokenizer, batch_size=2, max_length=128)
        names = [f"local_{name}" for name in LM_EVAL_TASKS]
        result = simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)
        responses = {name: [sample["filtered_resps"] for sample in result["samples"][name]] for name in names}
        report.append({"results": result["results"], "responses": responses, "num_calls": num_calls[0]})
    print("REPORT" + json.dumps(report, default=str))


def numbers(value) -> list[float]:
    """Every number in a nested structure, in order."""
    if isinstance(value, dict | list):
        return [x for item in (value.values() if isinstance(value, dict) else value) for x in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.skipif(IS_TRANSFORMERS_4, reason="the installed lm-evaluation-harness is tested with transformers 5")
def test_lm_evaluation_harness(tmp_path):
    pytest.importorskip("lm_eval")
    settings = environment(HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("REPORT"))
    plain, fast = json.loads(line.removeprefix("REPORT"))
    assert plain["num_calls"] == 0
    assert fast["num_calls"] >= 4 * 20
    assert set(fast["results"]) == {"local_choice", "local_text", "local_generation"}
    assert fast["results"]["local_choice"]["acc,none"] == plain["results"]["local_choice"]["acc,none"] >= 0.6
    assert fast["responses"]["local_generation"] == plain["responses"]["local_generation"]
    for kind in ("results", "responses"):
        assert numbers(fast[kind]) == pytest.approx(numbers(plain[kind]), rel=1e-4), kind
    assert len(numbers(fast["responses"])) >= 2 * len(LM_EVAL_DOCUMENTS)


if __name__ == "__main__":
    run_lm_eval(Path(sys.argv[1]))
