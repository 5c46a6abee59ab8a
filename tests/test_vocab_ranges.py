"""Which ids a tokenizer can make, their ranges, and generation that looks at nothing else."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from test_decode_graph import Recorder, assert_same_bits, generate, make_model
from test_tokenizer import SHIPPED, TEXTS, text_strategy, train_model

from persimmon_fast import SMALL_MODEL, GenerationConfig, PersimmonForCausalLM, PersimmonTokenizer
from persimmon_fast.decode_graph import DecodeGraphs
from persimmon_fast.vocabulary import emittable_ids, ranges_of

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def with_pieces(proto, *pieces):
    """A sentencepiece model with more pieces (text, score, type) at its end: protobuf's repeated fields can be
    appended."""
    for text, score, kind in pieces:
        raw = text.encode()
        message = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        proto += b"\x0a" + bytes([len(message)]) + message
    return proto


@pytest.fixture(scope="module", params=["bytes", "no bytes", "spaces kept", "marks behind"])
def grown(request):
    options = {
        "bytes": {},
        "no bytes": {"byte_fallback": False, "vocab_size": 60},
        "spaces kept": {"remove_extra_whitespaces": False},
        "marks behind": {"treat_whitespace_as_suffix": True},
    }
    proto = train_model(**options[request.param])
    pieces = [
        ("quic", -0.5, NORMAL),
        ("fox", -500.0, NORMAL),  # f, o and x score more together
        ("boxes", 0.0, UNUSED),
        ("<tag>", 0.0, USER_DEFINED),
        ("<end>", 0.0, CONTROL),
        ("\u2581jug", -500.0, NORMAL),
        ("\ufb01", -500.0, NORMAL),  # a ligature that is normalised away: not compared, so kept
    ]
    return PersimmonTokenizer(with_pieces(proto, *pieces)), PersimmonTokenizer(proto).vocab_size


def test_pieces_that_no_text_becomes_are_found(grown):
    tokenizer, first = grown
    kept = set(emittable_ids(tokenizer))
    quic, fox, boxes, tag, end, jug, ligature = range(first, first + 7)
    assert {quic, tag, end, ligature} <= kept
    assert not {fox, boxes, jug} & kept
    assert {0, 1, 2} <= kept  # unknown, BOS, EOS
    assert {i for i in range(first) if tokenizer.sp.is_byte(i)} <= kept


def test_every_id_of_a_text_is_kept(grown):
    tokenizer, _ = grown
    kept = set(emittable_ids(tokenizer))

    @given(text_strategy)
    def check(text):
        assert set(tokenizer.encode(text)) <= kept

    check()
    for text in (*TEXTS, "the quick brown fox", "quic fox jug <tag> boxes jugs"):
        assert set(tokenizer.encode(text)) <= kept


def test_the_shipped_tokenizer_makes_all_of_its_ids():
    tokenizer = PersimmonTokenizer.from_pretrained(SHIPPED)
    assert emittable_ids(tokenizer) == list(range(4096))
    assert tokenizer.emittable_ranges() == [(0, 4096)]


def test_ranges_close_the_shortest_gaps():
    ids = [0, 1, 2, 10, 11, 20, 24, 25, 99]
    assert ranges_of(ids, 1) == [(0, 3), (10, 12), (20, 21), (24, 26), (99, 100)]
    assert ranges_of(ids, 9) == [(0, 26), (99, 100)]
    assert ranges_of(ids, 8) == [(0, 12), (20, 26), (99, 100)]
    assert ranges_of(ids, 7) == [(0, 3), (10, 12), (20, 26), (99, 100)]
    assert ranges_of(ids, 1, max_ranges=3) == [(0, 12), (20, 26), (99, 100)]
    assert ranges_of(ids, 1, max_ranges=1) == [(0, 100)]
    assert ranges_of([5]) == [(5, 6)]
    assert ranges_of(range(7)) == [(0, 7)]
    assert ranges_of([0, 128]) == [(0, 129)]  # a gap of 127
    assert ranges_of([0, 129]) == [(0, 1), (129, 130)]


# ---- generate ----


@pytest.fixture(scope="module")
def small():
    return PersimmonForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32), PersimmonTokenizer.from_pretrained(
        SMALL_MODEL
    )


PLAIN = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": None}  # in place of the checkpoint's
SETTINGS = [
    {},
    {"do_sample": True, "seed": 3, "top_k": 0, "top_p": 0.9},
    {"repetition_penalty": 1.3},
    {"prompt_lookup_num_tokens": 5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_generate_chooses_inside_of_the_ranges_alone(small, settings):
    model, tokenizer = small
    inputs = tokenizer("def f(x):\n    return", return_tensors="pt")
    arguments = inputs | {"max_new_tokens": 24, "return_dict_in_generate": True} | PLAIN | settings
    free = model.generate(**arguments)
    new = free.sequences[0, inputs.input_ids.shape[1] :].tolist()
    # without the tokens that it likes best
    ranges = ranges_of(sorted(set(range(4096)) - set(new[:6])), 1)
    part = model.generate(**arguments, vocab_ranges=ranges)
    chosen = part.sequences[0, inputs.input_ids.shape[1] :]
    assert not set(chosen.tolist()) & set(new[:6])
    # as the whole model with logits of -inf there
    expected = model(part.sequences[:, :-1]).logits[0, inputs.input_ids.shape[1] - 1 :].float()
    expected[:, new[:6]] = -torch.inf
    logprobs = expected.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    assert (part.logprobs[0] - logprobs).abs().max() < 1e-3
    if "do_sample" not in settings and "repetition_penalty" not in settings:
        assert torch.equal(chosen, expected.argmax(-1))


def test_each_part_of_the_vocabulary_is_captured_apart():
    model, recorder = make_model(), Recorder()
    model.decode_graphs = DecodeGraphs(recorder)
    for ranges in (None, ((0, 60),), ((20, 60), (100, 130)), None):
        settings = {"do_sample": True, "seed": 1, "max_new_tokens": 8, "vocab_ranges": ranges}
        assert_same_bits(generate(model, 2, **settings), generate(model, 2, use_cuda_graph=False, **settings))
    assert len(recorder.graphs) == 3


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ranges_that_hold_everything_change_nothing(small, settings):
    model, tokenizer = small
    inputs = tokenizer("def f(x):\n    return", return_tensors="pt")
    arguments = inputs | {"max_new_tokens": 16} | PLAIN | settings
    whole = model.generate(**arguments)
    assert torch.equal(model.generate(**arguments, vocab_ranges=tokenizer.emittable_ranges()), whole)
    assert torch.equal(model.generate(**arguments, vocab_ranges=[(0, 5), (5, 4096)]), whole)


def test_a_checkpoint_names_its_ranges(small, tmp_path):
    model, tokenizer = small
    config = model.generation_config
    try:
        model.generation_config = config.replace(vocab_ranges=[[0, 2000], [2100, 4096]])
        model.save_pretrained(tmp_path / "model")
    finally:
        model.generation_config = config
    loaded = PersimmonForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.generation_config.vocab_ranges == ((0, 2000), (2100, 4096))
    out = loaded.generate(**tokenizer("def", return_tensors="pt"), max_new_tokens=3)
    assert not ((out >= 2000) & (out < 2100))[:, -3:].any()


@pytest.mark.parametrize(
    ("ranges", "match"),
    [
        ([], r"vocab_ranges must be pairs \(begin, end\), ascending, or None, got \[\]"),
        ([(1, 2, 3)], "vocab_ranges must be pairs"),
        ([(3, 3)], "vocab_ranges must be pairs"),
        ([(5, 9), (8, 10)], "vocab_ranges must be pairs"),
        ([(-1, 9)], "vocab_ranges must be pairs"),
        ([(0, 9.5)], "vocab_ranges must be pairs"),
        ("0-9", "vocab_ranges must be pairs"),
        ([(0, 2), (3, 9)], r"vocab_ranges must be ranges that hold eos_token_id \[2\], got \(\(0, 2\), \(3, 9\)\)"),
    ],
)
def test_errors(ranges, match):
    with pytest.raises(ValueError, match=f"generation: {match}"):
        GenerationConfig(eos_token_id=2, vocab_ranges=ranges)
