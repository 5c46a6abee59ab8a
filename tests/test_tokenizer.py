"""PersimmonTokenizer against sentencepiece itself, on the shipped model and on models trained here."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import persimmon_fast
from persimmon_fast.tokenizer import BatchEncoding, PersimmonTokenizer, StreamingDecoder, TextStreamer

SHIPPED = Path(persimmon_fast.__file__).parent / "assets" / "persimmon-small"
PROTO = (SHIPPED / "tokenizer.model").read_bytes()
TEXTS = [
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\ttabs\r\n",
    "def f(x: int) -> str:\n    return f'{x:>10}'\n",
    "naïve café ½ Ω",
    "日本語 한국어 עברית",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "nul \0 and bell \a",
    "\ufffd\u200b\ufeff",
    "1234567890",
    "<s></s><unk><0x41>",
]
relaxed = settings(deadline=None, suppress_health_check=list(HealthCheck))  # a busy machine is no failure
# Text whose marks survive: sentencepiece itself turns U+2581 into a space.
text_strategy = st.text(st.characters(exclude_characters="\u2581", exclude_categories=("Cs",)))


def train_model(**options) -> bytes:
    model = io.BytesIO()
    lines = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 4
    defaults = {"vocab_size": 320, "hard_vocab_limit": False, "byte_fallback": True, "minloglevel": 2}
    spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **{**defaults, **options})
    return model.getvalue()


@pytest.fixture(scope="module")
def sp() -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_proto=PROTO)


@pytest.fixture(scope="module")
def tokenizer() -> PersimmonTokenizer:
    return PersimmonTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module", params=["one space", "all spaces", "no prefix", "text symbol as EOS"])
def other(request) -> PersimmonTokenizer:
    """Models that treat leading spaces and special tokens in the other possible ways."""
    if request.param == "one space":
        return PersimmonTokenizer(train_model(remove_extra_whitespaces=False))
    if request.param == "all spaces":
        return PersimmonTokenizer(train_model())  # sentencepiece's default
    if request.param == "no prefix":
        return PersimmonTokenizer(train_model(add_dummy_prefix=False, remove_extra_whitespaces=False))
    proto = train_model(user_defined_symbols=["|ENDOFTEXT|"])
    end = spm.SentencePieceProcessor(model_proto=proto).piece_to_id("|ENDOFTEXT|")
    return PersimmonTokenizer(proto, bos_token_id=end, eos_token_id=end)


# ---------------------------------------------------------------- text -> ids


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_sentencepiece_ids(tokenizer, sp, text):
    assert tokenizer.encode(text, add_bos=False) == sp.encode(text)
    assert tokenizer.encode(text) == [sp.bos_id(), *sp.encode(text)]
    assert tokenizer.encode(text, add_special_tokens=False, add_bos=True) == sp.encode(text)


@relaxed
@given(text_strategy)
def test_ids_and_round_trip_of_any_text(tokenizer, sp, text):
    ids = tokenizer.encode(text)
    assert ids[1:] == sp.encode(text)
    assert tokenizer.decode(ids) == text


def test_the_dummy_prefix_and_byte_fallback_are_there(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("日", add_bos=False))
    assert pieces == ["▁", "<0xE6>", "<0x97>", "<0xA5>"]
    assert tokenizer.convert_tokens_to_ids(pieces) == tokenizer.encode("日", add_bos=False)
    assert tokenizer.convert_ids_to_tokens(tokenizer.bos_token_id) == "<s>"
    assert tokenizer.convert_tokens_to_ids("no such piece") == tokenizer.unk_token_id


def test_sizes_and_special_ids(tokenizer, sp):
    assert len(tokenizer) == tokenizer.vocab_size == sp.vocab_size() == 4096
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 2, "padding falls back to EOS"


def test_bos_is_a_choice(sp):
    plain = PersimmonTokenizer(PROTO, add_bos=False)
    assert plain.encode("a") == sp.encode("a")
    assert plain.encode("a", add_bos=True) == [1, *sp.encode("a")]
    assert plain("a", add_bos=True).input_ids == [1, *sp.encode("a")]
    no_bos = PersimmonTokenizer(train_model(bos_id=-1))
    with pytest.raises(ValueError, match="no bos_token_id; use add_bos=False"):
        no_bos.encode("a")
    assert no_bos.encode("a", add_bos=False) == no_bos.sp.encode("a")


# ---------------------------------------------------------------- batches


def test_single_text_gives_flat_lists_and_tensors_of_one_row(tokenizer):
    ids = tokenizer.encode("import os")
    assert tokenizer("import os") == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    batch = tokenizer("import os", return_tensors="pt")
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.input_ids.tolist() == [ids]
    array = tokenizer("import os", return_tensors="np", return_attention_mask=False)
    assert list(array) == ["input_ids"]
    assert array.input_ids.dtype == np.int64
    assert array.input_ids.tolist() == [ids]


@pytest.mark.parametrize(
    ("options", "side"),
    [
        ({"padding": True}, "left"),
        ({"padding": "longest"}, "left"),
        ({"padding": "left"}, "left"),
        ({"padding": "right"}, "right"),
        ({"padding": True, "padding_side": "right"}, "right"),
    ],
)
def test_padding_to_the_longest(tokenizer, options, side):
    short, long = tokenizer.encode("a"), tokenizer.encode("def f(x):\n    return x")
    missing = len(long) - len(short)
    fill, zeros, ones = [tokenizer.pad_token_id] * missing, [0] * missing, [1] * len(short)
    batch = tokenizer(["a", "def f(x):\n    return x"], return_tensors="pt", **options)
    assert batch.input_ids.tolist() == [fill + short if side == "left" else short + fill, long]
    assert batch.attention_mask.tolist() == [zeros + ones if side == "left" else ones + zeros, [1] * len(long)]


def test_padding_and_truncation_to_a_length(tokenizer):
    ids = tokenizer.encode("def f(x):\n    return x")
    assert len(ids) > 4
    batch = tokenizer(["a", "def f(x):\n    return x"], padding="max_length", max_length=4, truncation=True)
    short = tokenizer.encode("a")
    assert len(short) < 4
    # The right end is cut, so BOS stays; the left is filled.
    assert batch.input_ids == [[2] * (4 - len(short)) + short, ids[:4]]
    assert batch.attention_mask == [[0] * (4 - len(short)) + [1] * len(short), [1] * 4]
    assert tokenizer("def f(x):\n    return x", max_length=4).input_ids == ids, "never cut unasked"
    sized = PersimmonTokenizer(PROTO, model_max_length=3)
    assert len(sized("def f(x):", truncation=True).input_ids) == 3


def test_empty_batch_and_empty_text(tokenizer):
    assert tokenizer([], return_tensors="pt").input_ids.shape == (0, 0)
    assert tokenizer("", add_bos=False, return_tensors="pt").input_ids.shape == (1, 0)
    assert tokenizer([], padding=True) == {"input_ids": [], "attention_mask": []}


def test_batch_encoding_behaves_like_the_one_of_transformers(tokenizer):
    batch = tokenizer("a", return_tensors="pt")
    moved = batch.to("meta")
    assert isinstance(moved, BatchEncoding)
    assert moved.input_ids.device.type == "meta"
    assert batch.input_ids.device.type == "cpu"
    assert sorted({**batch}) == ["attention_mask", "input_ids"]
    with pytest.raises(AttributeError, match="no 'labels'"):
        _ = batch.labels


def test_bad_calls_say_what_was_expected(tokenizer):
    with pytest.raises(TypeError, match="text must be a str, got int"):
        tokenizer([1])
    with pytest.raises(ValueError, match="rows of one length, got lengths 2 to"):
        tokenizer(["a", "def f(x):"], return_tensors="pt")
    with pytest.raises(ValueError, match="return_tensors must be 'pt', 'np' or None, got 'tf'"):
        tokenizer("a", return_tensors="tf")
    with pytest.raises(ValueError, match=r"padding must be one of .*, got 'middle'"):
        tokenizer(["a"], padding="middle")
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right', got 'up'"):
        tokenizer(["a"], padding=True, padding_side="up")
    with pytest.raises(ValueError, match="truncation needs max_length of at least 1, got 0"):
        tokenizer("a", truncation=True, max_length=0)
    with pytest.raises(ValueError, match="needs max_length of at least 1, got None"):
        PersimmonTokenizer(PROTO)("a", padding="max_length")
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer("\ud83d")
    no_end = PersimmonTokenizer(train_model(eos_id=-1))
    with pytest.raises(ValueError, match="neither pad_token_id nor eos_token_id"):
        no_end(["a", "the quick"], padding=True)


# ---------------------------------------------------------------- ids -> text


@settings(relaxed, max_examples=300)
@given(st.lists(st.integers(0, 4095) | st.integers(0, 260), max_size=30))
def test_decode_of_random_ids_is_sentencepieces(tokenizer, sp, ids):
    """Ids 3..258 are the byte pieces: half of the draws make invalid UTF-8."""
    assert tokenizer.decode(ids) == sp.decode(ids)


@settings(relaxed, max_examples=150)
@given(data=st.data())
def test_other_kinds_of_models_decode_as_sentencepiece(other, data):
    spaces = [other.sp.piece_to_id("▁"), other.sp.piece_to_id("<0x20>")]
    near = st.sampled_from([*spaces, 0, 1, 2, other.eos_token_id])
    ids = data.draw(st.lists(st.integers(0, other.vocab_size - 1) | near, max_size=12))
    # To sentencepiece an EOS made of text is text; it must vanish here as the control token 2 does there.
    assert other.decode(ids) == other.sp.decode([2 if i == other.eos_token_id else i for i in ids])


@relaxed
@given(st.lists(st.integers(0, 4095) | st.integers(0, 260), max_size=40))
def test_streaming_equals_sentencepiece_and_never_takes_back(tokenizer, sp, ids):
    decoder = StreamingDecoder(tokenizer)
    text = ""
    for count, token_id in enumerate(ids, 1):
        text += decoder.put(token_id)
        # Whatever comes next, what was printed stays a prefix of the whole.
        assert sp.decode(ids[:count]).startswith(text)
        assert sp.decode([*ids[:count], 3 + 0x80]).startswith(text)
    assert text + decoder.end() == sp.decode(ids)


def test_streaming_holds_back_unfinished_characters_alone(tokenizer):
    decoder = StreamingDecoder(tokenizer)
    ids = tokenizer.encode("a👩日", add_bos=False)
    assert tokenizer.convert_ids_to_tokens(ids[1:5]) == ["<0xF0>", "<0x9F>", "<0x91>", "<0xA9>"]
    assert [decoder.put(i) for i in ids] == ["a", "", "", "", "👩", "", "", "日"]
    assert decoder.end() == ""
    assert [decoder.put(i) for i in ids[1:3]] == ["", ""]
    assert decoder.end() == "\ufffd\ufffd"
    assert decoder.end() == ""


def test_special_tokens_are_skipped_or_named(tokenizer):
    ids = [1, *tokenizer.encode("a b", add_bos=False), 2, *tokenizer.encode("c", add_bos=False)]
    assert tokenizer.decode(ids) == "a b c"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>a b</s> c"
    end = 4000
    renamed = PersimmonTokenizer(PROTO, bos_token_id=end, eos_token_id=end)
    piece = renamed.convert_ids_to_tokens(end)
    assert renamed.decode([end, *tokenizer.encode("a", add_bos=False)]) == "a"
    assert renamed.decode([end], skip_special_tokens=False) == piece


def test_decode_takes_ints_lists_arrays_tensors_and_refuses_the_rest(tokenizer):
    ids = tokenizer.encode("x = 1")
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(torch.tensor(ids)) == "x = 1"
    assert tokenizer.decode(torch.tensor(ids[-1])) == tokenizer.decode(ids[-1]) == "1"
    assert tokenizer.batch_decode(torch.tensor([ids, ids])) == ["x = 1"] * 2
    with pytest.raises(TypeError, match="flat sequence of ints, got an item of type list"):
        tokenizer.decode(torch.tensor([ids]))
    for outside in (-1, 4096):
        with pytest.raises(ValueError, match=f"token id {outside} lies outside of this tokenizer's 4096 pieces"):
            tokenizer.decode([outside])


# ---------------------------------------------------------------- streamer


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_text_streamer_prints_what_generate_sends(tokenizer, skip_prompt):
    out = io.StringIO()
    streamer = TextStreamer(tokenizer, skip_prompt=skip_prompt, file=out)
    whole = tokenizer.encode("def f(日):\n    return 日")
    prompt = tokenizer.encode("def f")
    assert whole[: len(prompt)] == prompt
    for _ in range(2):  # a streamer may be used again
        streamer.put(torch.tensor([prompt]))
        for token_id in whole[len(prompt) :]:
            streamer.put(torch.tensor([token_id]))
        streamer.end()
    continuation = "(日):\n    return 日\n"
    assert out.getvalue() == (continuation if skip_prompt else "def f" + continuation) * 2
    with pytest.raises(ValueError, match=r"one sequence at a time, got ids of shape \[2, 1\]"):
        streamer.put(torch.tensor([[1], [1]]))


# ---------------------------------------------------------------- chat


def test_chat_format(tokenizer, sp):
    one = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(one, tokenize=False) == "human: hi\n\nadept:"
    more = [*one, {"role": "assistant", "content": "hello"}, {"role": "human", "content": "bye"}]
    text = "human: hi\n\nadept: hello\n\nhuman: bye\n\nadept:"
    assert tokenizer.apply_chat_template(more, tokenize=False) == text
    assert tokenizer.apply_chat_template(more) == [1, *sp.encode(text)]
    assert tokenizer.apply_chat_template(more, add_bos=False) == sp.encode(text)
    assert tokenizer.apply_chat_template(more, return_tensors="pt").tolist() == [[1, *sp.encode(text)]]
    batch = tokenizer.apply_chat_template(more, return_tensors="pt", return_dict=True)
    assert batch.attention_mask.tolist() == [[1] * len(batch.input_ids[0])]
    ended = tokenizer.apply_chat_template(more[:2], tokenize=False, add_generation_prompt=False)
    assert ended == "human: hi\n\nadept: hello"


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "messages is empty"),
        ([{"role": "system", "content": "x"}], r"messages\[0\] must have role 'user' .*got 'system' .*no system role"),
        ([{"role": "user", "content": "x"}] * 2, r"messages\[1\] must have role 'assistant' or 'adept', got 'user'"),
        ([{"role": "user"}], r"messages\[0\] must have a str 'content', got NoneType"),
        (
            [{"role": "user", "content": "x"}, {"role": "adept", "content": "y"}],
            "add_generation_prompt=True needs a user message at the end",
        ),
    ],
)
def test_chat_errors(tokenizer, messages, match):
    with pytest.raises(ValueError, match=match):
        tokenizer.apply_chat_template(messages)


# ---------------------------------------------------------------- files


def write(folder: Path, **files) -> Path:
    (folder / "adept_vocab.model").write_bytes(PROTO)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_both_file_names_load_and_neither_is_an_error(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*: expected tokenizer.model or adept_vocab.model"):
        PersimmonTokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        PersimmonTokenizer.from_pretrained(tmp_path / "missing")
    loaded = PersimmonTokenizer.from_pretrained(str(write(tmp_path)))
    assert loaded.encode("import os") == tokenizer.encode("import os")


def test_where_special_ids_come_from(tmp_path):
    config = {"bos_token_id": 10, "eos_token_id": 11, "pad_token_id": 12, "max_position_embeddings": 77}
    write(tmp_path, config=config)
    loaded = PersimmonTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.model_max_length) == (10, 11, 12, 77)
    write(tmp_path, generation_config={"eos_token_id": [20, 21], "pad_token_id": None})
    loaded = PersimmonTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (10, 20, 12)
    write(tmp_path, special_tokens_map={"bos_token": {"content": "</s>"}, "pad_token": "<0x00>"})
    loaded = PersimmonTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (2, 20, 3)
    write(tmp_path, tokenizer_config={"bos_token": "<s>", "add_bos_token": False, "model_max_length": 1e30})
    loaded = PersimmonTokenizer.from_pretrained(tmp_path, eos_token_id=5, padding_side="right")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 5, 3)
    assert (loaded.add_bos, loaded.padding_side, loaded.model_max_length) == (False, "right", 77)


def test_save_and_load_again(tmp_path, tokenizer):
    changed = PersimmonTokenizer(
        PROTO, bos_token_id=7, eos_token_id=8, add_bos=False, padding_side="right", model_max_length=9
    )
    changed.save_pretrained(tmp_path / "new" / "folder")
    loaded = PersimmonTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert repr(loaded) == repr(changed)
    assert loaded.model_max_length == 9
    assert loaded.model_proto == PROTO


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"tokenizer\.model is empty: expected a sentencepiece model"),
        (b"not a model" * 50, r"tokenizer\.model is not a sentencepiece model \(550 bytes\)"),
        (PROTO[:3000], r"tokenizer\.model is not a sentencepiece model \(3000 bytes\)"),
        (b"\x12\x00", r"tokenizer\.model is not a sentencepiece model \(2 bytes\): .*unk is not defined"),
    ],
)
def test_a_broken_model_is_named(tmp_path, content, match):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        PersimmonTokenizer.from_pretrained(tmp_path)


def test_broken_settings_are_named(tmp_path):
    write(tmp_path, tokenizer_config={"bos_token": "|ENDOFTEXT|"})
    with pytest.raises(
        ValueError, match=r"tokenizer_config.json: bos_token '\|ENDOFTEXT\|' is not in the sentencepiece"
    ):
        PersimmonTokenizer.from_pretrained(tmp_path)
    write(tmp_path, tokenizer_config={"padding_side": "top"})
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right', got 'top'"):
        PersimmonTokenizer.from_pretrained(tmp_path)
    write(tmp_path, tokenizer_config=[1])
    with pytest.raises(ValueError, match=r"tokenizer_config.json must hold a JSON object, got list"):
        PersimmonTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not valid JSON"):
        PersimmonTokenizer.from_pretrained(tmp_path)
    write(tmp_path, tokenizer_config={}, config={"bos_token_id": 71013})
    with pytest.raises(ValueError, match=r"bos_token_id=71013 lies outside of the 4096 pieces of .*adept_vocab.model"):
        PersimmonTokenizer.from_pretrained(tmp_path)


def test_importing_the_module_loads_nothing_heavy():
    code = "import sys, persimmon_fast.tokenizer; print({'torch', 'numpy', 'sentencepiece'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
