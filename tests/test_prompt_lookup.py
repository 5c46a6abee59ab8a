"""Prompt lookup: the same tokens in fewer steps, a bounded loss where text does not repeat."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import max_error, tiny_config

from persimmon_fast import SMALL_MODEL, GenerationConfig, PersimmonForCausalLM, PersimmonTokenizer
from persimmon_fast.kv_cache import PAGE_SIZE, PagedKVCache
from persimmon_fast.prompt_lookup import (
    INCOME_PER_STEP,
    INITIAL_BALANCE,
    MAX_BALANCE,
    MAX_ROWS,
    ROW_COST,
    DraftBudget,
    NgramIndex,
    PromptLookup,
)

GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
SAMPLED = {"do_sample": True, "seed": 3, "temperature": 0.6, "top_p": 0.9}
PENALISED = {"do_sample": False, "repetition_penalty": 1.15}
# Code that goes on as it began: the model copies it.
REPEATING = "def winfo_width(self):\n        return self.width\n\n    " * 8
OPENINGS = [
    "def read_config(path):",
    "class Parser:\n    def __init__(self",
    "import os\nimport sys\n\n",
    "for i in range(",
    "try:\n    import json\nexcept",
    "raise ValueError(",
    "with open(filename",
    '"""Utilities for',
    REPEATING,
]


@pytest.fixture(scope="module")
def tokenizer():
    return PersimmonTokenizer.from_pretrained(SMALL_MODEL)


@pytest.fixture(scope="module")
def small():
    return PersimmonForCausalLM.from_pretrained(SMALL_MODEL, dtype="float32")


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = PersimmonForCausalLM(tiny_config()).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


class StepCounter:
    """Counts the forward passes of prompt lookup after the prefill, and their rows."""

    def __init__(self, model, monkeypatch):
        self.rows: list[int] = []
        self.seqlens: list[list[int]] = []  # of the cache before each of them
        forward = model.model.forward_packed

        def counted(x, position_ids, lengths, seq_len, cache):
            if any(cache.seqlens):
                self.rows.append(x.shape[0])
                self.seqlens.append(list(cache.seqlens))
            return forward(x, position_ids, lengths, seq_len, cache)

        monkeypatch.setattr(model.model, "forward_packed", counted)


def both(model, inputs, num_drafts=10, **settings):
    """The outputs of plain generation and with prompt lookup."""
    settings = {"eos_token_id": None, "return_dict_in_generate": True} | settings
    return model.generate(**inputs, **settings), model.generate(
        **inputs, **settings, prompt_lookup_num_tokens=num_drafts
    )


def assert_same(plain, drafted):
    assert plain.sequences.tolist() == drafted.sequences.tolist()
    assert plain.num_new_tokens == drafted.num_new_tokens
    assert max_error(drafted.logprobs, plain.logprobs) < 1e-4


# ---- n-grams ----


def longest_latest_match(tokens, max_ngram_size, num_tokens):
    """The definition: the longest n-gram at the end that occurred before, where it did so last."""
    for size in range(max_ngram_size, min(2, max_ngram_size) - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[len(tokens) - size :]:
                extended = list(tokens)
                for i in range(num_tokens):
                    extended.append(extended[start + size + i])
                return extended[len(tokens) :]
    return []


@pytest.mark.parametrize("max_ngram_size", [1, 2, 3, 5])
def test_continuation_is_that_of_the_longest_latest_match(max_ngram_size):
    draws = random.Random(0)
    for alphabet in (1, 2, 5, 30):
        index, tokens = NgramIndex([], max_ngram_size), []
        for _ in range(80):
            assert index.continuation(7) == longest_latest_match(tokens, max_ngram_size, 7), tokens
            tokens.append(draws.randrange(alphabet))
            index.append(tokens[-1])


# ---- the rule ----


@pytest.mark.parametrize("row_cost", [ROW_COST, 0.2, 0.8])
@pytest.mark.parametrize("copied_before", [0, 50])
def test_wrong_drafts_cost_at_most_what_the_rule_says(row_cost, copied_before):
    budget = DraftBudget()
    for step in range(copied_before + 300):
        if step == copied_before:
            cost = 0.0
        num_drafted = budget.num_tokens(15, row_cost)
        budget.spend(num_drafted, row_cost)
        if step >= copied_before:
            cost += row_cost * num_drafted
            allowance = MAX_BALANCE if copied_before else INITIAL_BALANCE
            assert cost <= allowance + INCOME_PER_STEP * (step - copied_before + 1) + 1e-6
        budget.settle(num_drafted, num_drafted if step < copied_before else 0)


def test_right_drafts_become_long_also_after_wrong_ones():
    budget = DraftBudget()
    for accepts, steps in [(True, 12), (False, 200), (True, 25)]:
        for _ in range(steps):
            num_drafted = budget.num_tokens(15, ROW_COST)
            budget.spend(num_drafted, ROW_COST)
            budget.settle(num_drafted, num_drafted if accepts else 0)
        assert num_drafted >= 13 if accepts else num_drafted <= 1


@pytest.mark.parametrize("num_sequences", [1, 2, 5, 8, 9, 40])
def test_a_step_has_at_most_16_rows(num_sequences):
    lookup = PromptLookup([[5] * 20] * num_sequences, 100, 3)
    tokens: list[list[int]] = [[5] for _ in range(num_sequences)]
    longest = 0
    for _ in range(20):
        drafts = [lookup.draft(row, tokens[row], 100, num_sequences) for row in range(num_sequences)]
        longest = max(longest, sum(1 + len(draft) for draft in drafts))
        for row, draft in enumerate(drafts):
            tokens[row] += [*draft, 5]  # all accepted
    assert longest <= max(MAX_ROWS, num_sequences)
    assert (longest > num_sequences) == (num_sequences <= MAX_ROWS // 2)


# ---- generate ----


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, PENALISED, SAMPLED | {"repetition_penalty": 1.1}], ids=str)
@pytest.mark.parametrize("num_drafts", [3, 15])
def test_tokens_and_logprobs_are_those_of_plain_generation(small, tokenizer, monkeypatch, settings, num_drafts):
    for text in OPENINGS:
        inputs = tokenizer(text, return_tensors="pt")
        plain, drafted = both(small, inputs, num_drafts, max_new_tokens=48, **settings)
        assert_same(plain, drafted)
    steps = StepCounter(small, monkeypatch)
    small.generate(**inputs, max_new_tokens=48, eos_token_id=None, prompt_lookup_num_tokens=num_drafts, **settings)
    assert len(steps.rows) < 47  # of the last text some draft was accepted, or this test would compare nothing


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, PENALISED], ids=str)
def test_batches_and_several_continuations(small, tokenizer, monkeypatch, settings):
    inputs = tokenizer([REPEATING, OPENINGS[0], REPEATING[60:]], padding=True, return_tensors="pt")
    steps = StepCounter(small, monkeypatch)
    for changes in ({}, {"num_return_sequences": 2}):
        plain, drafted = both(small, inputs, max_new_tokens=40, **settings | changes)
        assert_same(plain, drafted)
    pairs = zip(steps.seqlens, steps.seqlens[1:], strict=False)
    assert any(b - a > 1 for old, new in pairs if len(old) == len(new) for a, b in zip(old, new, strict=True))
    # rows end at different steps: by length, and by a stop id
    stop = int(plain.sequences[0, inputs.input_ids.shape[1] + 9])
    assert_same(*both(small, inputs, max_new_tokens=40, **settings | {"eos_token_id": stop, "pad_token_id": 1}))


def test_copied_text_takes_few_steps(small, tokenizer, monkeypatch):
    inputs = tokenizer(REPEATING, return_tensors="pt")
    steps = StepCounter(small, monkeypatch)
    out = small.generate(**inputs, max_new_tokens=120, eos_token_id=None, prompt_lookup_num_tokens=15, **GREEDY)
    assert tokenizer.decode(out[0, -60:]).count("return self.width\n") >= 3  # it does copy
    num_accepted = 119 - len(steps.rows)
    num_drafted = sum(steps.rows) - len(steps.rows)
    assert len(steps.rows) <= 20
    assert num_accepted >= 0.9 * num_drafted
    # and after each step the cache holds what was kept, no more
    assert all(later[0] - earlier[0] <= rows for earlier, later, rows in zip(
        steps.seqlens, steps.seqlens[1:], steps.rows, strict=False))  # fmt: skip


def test_text_that_does_not_repeat_turns_drafts_off(tiny, monkeypatch):
    """Nearly uniform draws from 160 tokens: matches are chance, and what follows them is not repeated."""
    steps = StepCounter(tiny, monkeypatch)
    ids = torch.randint(3, 160, (1, 30), generator=torch.Generator().manual_seed(1))
    settings = {"do_sample": True, "temperature": 5.0, "seed": 1, "max_new_tokens": 220, "max_matching_ngram_size": 1}
    assert_same(*both(tiny, {"input_ids": ids}, 15, **settings))
    rows = steps.rows
    num_drafted, num_accepted = sum(rows) - len(rows), 219 - len(rows)
    assert num_drafted > 10  # there was something to turn off
    assert ROW_COST * num_drafted - num_accepted <= INITIAL_BALANCE + INCOME_PER_STEP * len(rows) + 1e-6


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7, 12, 13])
def test_max_new_tokens_holds_inside_a_draft(small, tokenizer, monkeypatch, max_new_tokens):
    inputs, steps = tokenizer(REPEATING, return_tensors="pt"), StepCounter(small, monkeypatch)
    plain, drafted = both(small, inputs, 15, max_new_tokens=max_new_tokens, **GREEDY)
    assert drafted.num_new_tokens == [max_new_tokens]
    assert_same(plain, drafted)
    last_needed = inputs.input_ids.shape[1] + max_new_tokens - 1  # the last token is not looked at
    assert all(seqlens[0] + rows <= last_needed for seqlens, rows in zip(steps.seqlens, steps.rows, strict=True))


def test_up_to_the_last_position(tiny):
    ids = torch.tensor([[5, 6, 7, 8] * 60])
    plain, drafted = both(tiny, {"input_ids": ids}, 15, max_new_tokens=16)
    assert plain.sequences.shape == (1, 256)
    assert_same(plain, drafted)


def test_stop_ids_and_strings_inside_an_accepted_draft(small, tokenizer, monkeypatch):
    inputs = tokenizer(REPEATING, return_tensors="pt")
    settings = GREEDY | {"max_new_tokens": 60}
    free = small.generate(**inputs, eos_token_id=None, **settings)[0, inputs.input_ids.shape[1] :]
    stopped_inside = 0
    for stop in sorted(set(free.tolist())):
        plain, drafted = both(small, inputs, 15, **settings | {"eos_token_id": [stop]})
        assert_same(plain, drafted)
        steps = StepCounter(small, monkeypatch)
        small.generate(**inputs, eos_token_id=stop, prompt_lookup_num_tokens=15, **settings)
        monkeypatch.undo()
        if steps.rows and steps.seqlens[-1][0] + steps.rows[-1] > inputs.input_ids.shape[1] + drafted.num_new_tokens[0]:
            stopped_inside += 1
    assert stopped_inside > 0
    for string in ("width\n", "self.w", "n s"):
        plain, drafted = both(small, inputs, 15, **settings, stop_strings=string, tokenizer=tokenizer)
        assert_same(plain, drafted)
        assert drafted.num_new_tokens[0] < 60


def test_streamer_gets_the_kept_tokens_one_by_one(small, tokenizer):
    class Recorder:
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    recorder, inputs = Recorder(), tokenizer(REPEATING, return_tensors="pt")
    out = small.generate(
        **inputs, **GREEDY, max_new_tokens=30, eos_token_id=None, prompt_lookup_num_tokens=15, streamer=recorder
    )
    prompt, *new = recorder.values
    assert prompt + [token for (token,) in new] == out[0].tolist()
    assert recorder.ended


def test_embeddings_instead_of_ids_draft_from_the_new_text(small, tokenizer, monkeypatch):
    ids = tokenizer(REPEATING, return_tensors="pt").input_ids
    steps = StepCounter(small, monkeypatch)
    plain, drafted = both(small, {"inputs_embeds": small.model.embed_tokens(ids)}, max_new_tokens=60, **GREEDY)
    assert_same(plain, drafted)
    assert len(steps.rows) < 59


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens must be an integer > 0 or None, got 0"),
        ({"prompt_lookup_num_tokens": 2.5}, "prompt_lookup_num_tokens must be an integer > 0 or None, got 2.5"),
        ({"max_matching_ngram_size": 0}, "max_matching_ngram_size must be an integer > 0, got 0"),
    ],
)
def test_errors(tiny, arguments, match):
    with pytest.raises(ValueError, match=match):
        tiny.generate(torch.tensor([[5, 6]]), **arguments)


def test_generation_config_file_turns_it_on(tmp_path, tiny, monkeypatch):
    GenerationConfig(prompt_lookup_num_tokens=8).save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path, tiny.config)
    assert loaded.prompt_lookup_num_tokens == 8
    steps = StepCounter(tiny, monkeypatch)
    tiny.generate(torch.tensor([[5, 6, 7] * 20]), generation_config=loaded, max_new_tokens=30, eos_token_id=None)
    assert max(steps.rows) > 1


# ---- the cache ----


@pytest.mark.parametrize(
    ("length", "dropped"), [(100, 0), (100, 5), (100, 36), (100, 37), (128, 64), (200, 199), (70, 70)]
)
def test_cache_goes_on_from_where_it_was_cut(tiny, length, dropped):
    ids = torch.randint(3, 160, (1, 256), generator=torch.Generator().manual_seed(2))
    cache = tiny(ids[:, :length], use_cache=True).past_key_values
    num_free = len(cache._free)
    cache.drop_last([dropped])
    kept = length - dropped
    assert cache.seqlens == [kept]
    assert cache.get_seq_length() == kept
    assert len(cache._free) - num_free == -(-length // PAGE_SIZE) - -(-kept // PAGE_SIZE)
    other = ids.flip(1)[:, :60]
    actual = tiny(other, past_key_values=cache).logits
    expected = tiny(torch.cat([ids[:, :kept], other], dim=1)).logits[:, kept:]
    assert max_error(actual, expected) < 1e-4


@pytest.mark.parametrize("dropped", [5, 37, 199])
def test_a_cut_can_keep_its_pages_reserved(tiny, dropped):
    ids = torch.randint(3, 160, (1, 256), generator=torch.Generator().manual_seed(2))
    cache = tiny(ids[:, :200], use_cache=True).past_key_values
    cache.reserve([56])
    table, num_free = cache.page_table(4), len(cache._free)
    cache.drop_last([dropped], keep_pages=True)
    kept = 200 - dropped
    assert cache.seqlens == [kept]
    assert torch.equal(cache.page_table(4), table)
    assert len(cache._free) == num_free
    other = ids.flip(1)[:, : 256 - kept]
    actual = tiny(other, past_key_values=cache).logits
    expected = tiny(torch.cat([ids[:, :kept], other], dim=1)).logits[:, kept:]
    assert max_error(actual, expected) < 1e-4
    assert torch.equal(cache.page_table(4), table)
    cache.drop_last([256 - kept])  # and without it they are free again
    assert len(cache._free) == cache.num_pages - -(-kept // PAGE_SIZE)


def test_cut_into_a_shared_page_leaves_the_other_owner_alone(tiny):
    ids = torch.randint(3, 160, (1, 256), generator=torch.Generator().manual_seed(2))
    cache = tiny(ids[:, : PAGE_SIZE + 10], use_cache=True).past_key_values
    cache.repeat_interleave(2)
    cache.drop_last([20, 0])
    pages = [page for owned in cache._pages for page in owned] + cache._free
    assert sorted(pages) == list(range(len(cache._owners)))  # each page has one owner, or is free
    lengths, starts = [30, 3], cache.seqlens
    new = [ids[0, 150:180], ids[0, 200:203]]
    positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    with torch.no_grad():
        embeds = tiny.model.embed_tokens(torch.cat(new))
        hidden = tiny.model.forward_packed(embeds, positions, lengths, 256, cache)
        for row, states in enumerate(hidden.split(lengths)):
            alone = tiny.model(torch.cat([ids[0, : starts[row]], new[row]])[None]).last_hidden_state[0, starts[row] :]
            assert max_error(states, alone) < 1e-4


def test_cut_errors(tiny):
    cache = PagedKVCache(tiny.config, 2, 10, dtype=torch.float32)
    cache.append([3, 4])
    for dropped, match in [
        ([1], "the cache holds 2 sequences, got 1"),
        ([1, 5], r"cannot drop \[1, 5\] tokens of sequences of \[3, 4\]"),
        ([-1, 0], r"cannot drop \[-1, 0\] tokens"),
    ]:
        with pytest.raises(ValueError, match=match):
            cache.drop_last(dropped)
    assert cache.seqlens == [3, 4]
