"""generate: tokens equal transformers', padding and batching change nothing, filters, stopping, errors."""

from __future__ import annotations

import pytest
import torch
from helpers import hf_model, max_error, tiny_config

from persimmon_fast import GenerationConfig, PersimmonForCausalLM, ops, reference


def random_ids(batch_size: int, seqlen: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 160, (batch_size, seqlen), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair():
    config = tiny_config()
    theirs, ours = hf_model(config), PersimmonForCausalLM(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture
def ours(pair):
    return pair[0]


def hf_greedy(model, ids, new, **kwargs):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **kwargs
    )


@pytest.mark.parametrize("prompt", [1, 5, 63, 64, 100])
def test_greedy_equals_transformers(pair, prompt):
    ours, theirs = pair
    ids = random_ids(3, prompt)
    assert torch.equal(ours.generate(ids, max_new_tokens=70, pad_token_id=0), hf_greedy(theirs, ids, 70))


def test_repetition_penalty_equals_transformers(pair):
    ours, theirs = pair
    ids = random_ids(3, 12)
    expected = hf_greedy(theirs, ids, 40, repetition_penalty=1.3)
    assert torch.equal(ours.generate(ids, max_new_tokens=40, repetition_penalty=1.3, pad_token_id=0), expected)
    assert not torch.equal(ours.generate(ids, max_new_tokens=40, pad_token_id=0), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_token(ours, side):
    lengths = [3, 17, 30]
    ids = random_ids(3, 30)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        mask[row, 30 - n :] = 1
        if side == "right":
            mask[row] = mask[row].flip(0)
    ids[mask == 0] = 0
    together = ours.generate(ids, mask, max_new_tokens=20, eos_token_id=None)
    for row in range(3):
        alone = ours.generate(ids[row][mask[row].bool()].unsqueeze(0), max_new_tokens=20, eos_token_id=None)
        assert torch.equal(together[row, 30:], alone[0, lengths[row] :])


def test_same_seed_same_tokens_whatever_the_batch(ours):
    ids = random_ids(4, 9)
    settings = {"do_sample": True, "seed": 7, "max_new_tokens": 30, "eos_token_id": None}
    together = ours.generate(ids, **settings)
    assert torch.equal(together, ours.generate(ids, **settings))
    assert torch.equal(together[:1], ours.generate(ids[:1], **settings))
    assert not torch.equal(together, ours.generate(ids, **(settings | {"seed": 8})))


def test_torch_manual_seed_repeats_a_run(ours):
    ids = random_ids(1, 9)

    def run(seed):
        torch.manual_seed(seed)
        return ours.generate(ids, do_sample=True, max_new_tokens=30)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_num_return_sequences_are_independent_and_continue_the_prompt(ours):
    ids = random_ids(2, 70)  # a full page is shared, a partial one copied
    settings = {"do_sample": True, "seed": 1, "return_dict_in_generate": True}
    out = ours.generate(ids, num_return_sequences=3, max_new_tokens=20, eos_token_id=None, **settings)
    assert out.sequences.shape == (6, 90)
    assert torch.equal(out.sequences[:, :70], ids.repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in out.sequences}) == 6
    # no row has written into another's page: the model agrees with what each row saw
    with torch.no_grad():
        logits = ours(out.sequences[:, :-1]).logits[:, 69:]
    expected = logits.log_softmax(-1).gather(-1, out.sequences[:, 70:, None]).squeeze(-1)
    assert max_error(out.logprobs, expected) < 1e-4
    greedy = ours.generate(ids, num_return_sequences=3, max_new_tokens=20, eos_token_id=None)
    assert torch.equal(greedy, ours.generate(ids, max_new_tokens=20, eos_token_id=None).repeat_interleave(3, 0))


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True, "temperature": 0.7, "top_k": 20}, {"repetition_penalty": 1.2}]
)
def test_logprobs_are_those_of_the_model(ours, settings):
    ids = random_ids(2, 10)
    out = ours.generate(ids, max_new_tokens=15, seed=3, eos_token_id=None, return_dict_in_generate=True, **settings)
    with torch.no_grad():
        logits = ours(out.sequences[:, :-1]).logits[:, 9:]
    expected = logits.log_softmax(-1).gather(-1, out.sequences[:, 10:, None]).squeeze(-1)
    assert max_error(out.logprobs, expected) < 1e-4
    assert out.num_new_tokens == [15, 15]


@pytest.mark.parametrize(
    "filters", [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.4}, {"top_k": 10, "top_p": 0.5, "temperature": 2.0}]
)
def test_filters_hold_at_every_step(ours, filters):
    ids = random_ids(2, 10)
    out = ours.generate(ids, do_sample=True, seed=5, max_new_tokens=40, eos_token_id=None, **filters)
    with torch.no_grad():
        logits = ours(out[:, :-1]).logits[:, 9:].flatten(0, 1)
    one = torch.ones(logits.shape[0])
    z = logits / filters.get("temperature", 1.0)
    # a hair wider than the filter: the logits of decode and prefill differ in their last bits
    mask = reference.keep_mask(
        z,
        (one * filters.get("top_k", 0)).int(),
        one * min(1.0, filters.get("top_p", 1.0) + 1e-4),
        one * filters.get("min_p", 0.0) * 0.9999,
    )
    assert mask.gather(-1, out[:, 10:].reshape(-1, 1)).all()


def test_stop_ids_end_a_row_and_the_others_go_on(ours):
    ids = random_ids(3, 10)
    free = ours.generate(ids, max_new_tokens=30, eos_token_id=None)
    stop = int(free[1, 14])  # the fifth new token of row 1
    out = ours.generate(ids, max_new_tokens=30, eos_token_id=[stop, 159], pad_token_id=1, return_dict_in_generate=True)
    for row in range(3):
        new = free[row, 10:].tolist()
        ends = [new.index(s) + 1 for s in (stop, 159) if s in new]
        n = min(ends, default=30)
        assert out.num_new_tokens[row] == n
        assert out.sequences[row, 10:].tolist() == new[:n] + [1] * (out.sequences.shape[1] - 10 - n)
    assert out.num_new_tokens[1] <= 5


def test_all_rows_stopped_ends_early(ours):
    ids = random_ids(1, 10)
    first = int(ours.generate(ids, max_new_tokens=1)[0, -1])
    assert ours.generate(ids, max_new_tokens=50, eos_token_id=first).shape == (1, 11)


def test_streamer_gets_prompt_and_tokens_in_order(ours):
    class Recorder:
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values += value.flatten().tolist()

        def end(self):
            self.ended = True

    recorder, ids = Recorder(), random_ids(1, 10)
    out = ours.generate(ids, max_new_tokens=12, eos_token_id=None, streamer=recorder)
    assert recorder.values == out[0].tolist()
    assert recorder.ended


def test_inputs_embeds_equal_ids(ours):
    ids = random_ids(2, 10)
    out = ours.generate(inputs_embeds=ours.model.embed_tokens(ids), max_new_tokens=12)
    assert torch.equal(out, ours.generate(ids, max_new_tokens=12)[:, 10:])


def test_sampling_does_not_see_logits_in_python(ours, monkeypatch):
    calls = []
    monkeypatch.setattr(
        ops, "lm_head_sample", lambda *a, real=ops.lm_head_sample, **k: calls.append(1) or real(*a, **k)
    )
    ours.generate(random_ids(1, 4), do_sample=True, max_new_tokens=3, eos_token_id=None)
    assert len(calls) == 3


def test_up_to_the_last_position_and_not_past_it(ours):
    ids = random_ids(1, 250)
    assert ours.generate(ids, max_new_tokens=6, eos_token_id=None).shape == (1, 256)
    with pytest.raises(
        ValueError, match=r"prompt \(250 tokens\) \+ max_new_tokens \(7\) = 257 passes .* 256 positions"
    ):
        ours.generate(ids, max_new_tokens=7)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be a number > 0, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a number > 0, got nan"),
        ({"top_k": -1}, ValueError, "top_k must be an integer >= 0, got -1"),
        ({"top_p": 0.0}, ValueError, r"top_p must be a number in \(0, 1\], got 0.0"),
        ({"min_p": 1.5}, ValueError, r"min_p must be a number in \[0, 1\], got 1.5"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be a number > 0, got 0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be an integer > 0 or None, got 0"),
        ({"max_length": 4}, ValueError, "max_length=4 leaves no room after a prompt of 10 tokens"),
        ({"num_return_sequences": True}, ValueError, "num_return_sequences must be an integer > 0, got True"),
        ({"num_beams": 4}, TypeError, "unknown argument num_beams; known: do_sample"),
        ({"seed": 1.5}, ValueError, "seed must be an integer of 64 bits, got 1.5"),
        ({"stop_strings": "x"}, ValueError, "stop_strings needs tokenizer="),
        ({"attention_mask": torch.ones(1, 9)}, ValueError, r"attention_mask must be \[1, 10\] as the prompts, got"),
        ({"attention_mask": torch.zeros(1, 10)}, ValueError, "at least one token per prompt, got prompts of"),
        ({"streamer": object(), "num_return_sequences": 2}, ValueError, "streamer needs one sequence"),
    ],
)
def test_errors(ours, arguments, error, match):
    with pytest.raises(error, match=match):
        ours.generate(random_ids(1, 10), **arguments)


def test_generation_config_file(tmp_path):
    config = tiny_config(eos_token_id=2)
    assert GenerationConfig.from_pretrained(tmp_path, config).eos_token_id == 2
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": [5, 6], "temperature": 0.5, "do_sample": true, "num_beams": 4, "top_k": null}')
    with pytest.warns(UserWarning, match="ignored, not supported by generate: num_beams"):
        loaded = GenerationConfig.from_pretrained(tmp_path, config)
    assert loaded == GenerationConfig(eos_token_id=[5, 6], temperature=0.5, do_sample=True)
    loaded.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path, config) == loaded
    for text, match in [("[1]", "expected a JSON object, found list"), ("{", "not a JSON file")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            GenerationConfig.from_pretrained(tmp_path, config)
    path.write_text('{"temperature": -1}')
    with pytest.raises(ValueError, match=r"generation_config.json: generation: temperature must be"):
        GenerationConfig.from_pretrained(tmp_path, config)
