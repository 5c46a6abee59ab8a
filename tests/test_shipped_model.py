"""The small model that the package brings, trained for real: tokens, logits and losses equal transformers'."""

from __future__ import annotations

import ast
import json

import pytest
import torch
from helpers import FLOOR, max_error
from prompts import PROMPTS

from persimmon_fast import SMALL_MODEL, PersimmonForCausalLM, PersimmonTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return PersimmonTokenizer.from_pretrained(SMALL_MODEL)


@pytest.fixture(scope="module")
def fp32():
    """(ours, theirs) in fp32."""
    from transformers import PersimmonForCausalLM as HFModel

    ours = PersimmonForCausalLM.from_pretrained(SMALL_MODEL, dtype="float32")
    return ours, HFModel.from_pretrained(SMALL_MODEL, dtype=torch.float32).eval()


def test_greedy_tokens_equal_transformers_on_100_prompts(fp32, tokenizer):
    ours, theirs = fp32
    for prompt in PROMPTS[:100]:
        inputs = tokenizer(prompt, return_tensors="pt")
        settings = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.0}
        actual = ours.generate(**inputs, **settings)
        expected = theirs.generate(**inputs, **settings, pad_token_id=0)
        assert actual.tolist() == expected.tolist(), prompt


def test_batch_of_unequal_prompts_equals_singles(fp32, tokenizer):
    ours, _ = fp32
    batch = PROMPTS[:100:11]
    inputs = tokenizer(batch, padding=True, return_tensors="pt")
    together = ours.generate(**inputs, max_new_tokens=24, eos_token_id=None, do_sample=False)
    width = inputs.input_ids.shape[1]
    for row, prompt in enumerate(batch):
        single = tokenizer(prompt, return_tensors="pt")
        alone = ours.generate(**single, max_new_tokens=24, eos_token_id=None, do_sample=False)
        assert together[row, width:].tolist() == alone[0, single.input_ids.shape[1] :].tolist(), prompt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_within_the_contract(fp32, tokenizer, dtype):
    """Against fp32 transformers: at most twice the error of transformers in this dtype, plus the floor."""
    from transformers import PersimmonForCausalLM as HFModel

    ids = tokenizer((SMALL_MODEL / "README.md").read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :400]
    ours = PersimmonForCausalLM.from_pretrained(SMALL_MODEL, dtype=dtype)
    theirs = HFModel.from_pretrained(SMALL_MODEL, dtype=dtype).eval()
    with torch.no_grad():
        exact = fp32[1](ids).logits
        bound = 2 * max_error(theirs(ids).logits, exact) + FLOOR[dtype] * float(exact.abs().max())
        assert max_error(ours(ids).logits, exact) <= bound
        steps = torch.cat([step.logits for step in decode_steps(ours, ids[:, :80])], dim=1)
        assert max_error(steps, exact[:, :80]) <= bound


def decode_steps(model, ids):
    cache = None
    for position in range(ids.shape[1]):
        out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        yield out


def test_it_has_learnt_python(tokenizer):
    """Unseen code costs it less than 5 nats a token (an untrained model: 8.3), and less than the same code shuffled."""
    code = (
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
        "        self.items.append(item)\n\n    def pop(self):\n        return self.items.pop()\n"
    )
    model = PersimmonForCausalLM.from_pretrained(SMALL_MODEL, dtype="float32")
    ids = tokenizer(code, return_tensors="pt").input_ids
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        loss, shuffled_loss = (model(x, labels=x).loss.item() for x in (ids, shuffled))
    assert loss < 5.0
    assert loss < shuffled_loss - 2.0


def test_greedy_continuation_is_code(tokenizer):
    model = PersimmonForCausalLM.from_pretrained(SMALL_MODEL)
    inputs = tokenizer("import os\n\ndef main():\n    ", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=False)[0])
    lines = text.split("\n")
    while lines:  # the last line may be cut off: some prefix of whole lines must parse
        try:
            ast.parse("\n".join(lines))
            break
        except SyntaxError:
            lines.pop()
    assert len(lines) > 3, text


def test_stop_strings_and_streamer_on_text(tokenizer):
    model = PersimmonForCausalLM.from_pretrained(SMALL_MODEL)
    inputs = tokenizer("def read_config(path):", return_tensors="pt")
    settings = {"max_new_tokens": 60, "do_sample": False}
    free = tokenizer.decode(model.generate(**inputs, **settings)[0])
    new = free[len("def read_config(path):") :]
    stop = new[5:8]
    out = model.generate(**inputs, **settings, stop_strings=[stop], tokenizer=tokenizer)
    text = tokenizer.decode(out[0])[len("def read_config(path):") :]
    assert stop in text
    assert new.startswith(text)
    assert stop not in tokenizer.decode(out[0][:-1])[len("def read_config(path):") :]


def test_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in SMALL_MODEL.iterdir()}
    model = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(files) == model | {"README.md", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    assert sum(files.values()) < 12_000_000
    assert json.loads((SMALL_MODEL / "config.json").read_text())["architectures"] == ["PersimmonForCausalLM"]
