"""The command line in this process: usage, errors, what generate and chat write."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from cli_helpers import PROMPT, edited, generated, run, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from persimmon_fast import SMALL_MODEL, PersimmonForCausalLM, PersimmonTokenizer, measure
from persimmon_fast.cli import chat, doctor, session, terminal
from persimmon_fast.cli.app import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("cli") / "tiny-model")


# ---- help and version ----


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from persimmon_fast.cli import run\n"
        "commands = [[], *([name] for name in ('generate', 'chat', 'info', 'sparsity', 'convert', 'doctor'))]\n"
        "statuses = [run([*command, '--help']) for command in commands]\n"
        "heavy = {'torch', 'numpy', 'sentencepiece', 'safetensors', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(f'{statuses} {heavy}' if any(statuses) or heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--repetition-penalty" in result.stdout


def test_every_option_explains_itself() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == {"generate", "chat", "info", "sparsity", "convert", "doctor"}
    for name, command in commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


def test_no_arguments_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert "generate" in capsys.readouterr().out
    assert run("--version") == 0
    assert re.fullmatch(r"persimmon-fast \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generat x", "generat"),
        ("generate --nope x", "--nope"),
        ("generate", "no prompt"),
        ("generate x --file y", "both a prompt and --file"),
        ("generate x --max-new-tokens 0", "--max-new-tokens must be at least 1, got 0"),
        ("generate x --max-new-tokens many", "--max-new-tokens"),
        ("generate x --temperature nan", "--temperature must be a number >= 0, got nan"),
        ("generate x --top-p 0", "--top-p must be above 0 and at most 1, got 0.0"),
        ("generate x --min-p 1.5", "--min-p must be between 0 and 1, got 1.5"),
        ("generate x --top-k -1", "--top-k must be at least 0, got -1"),
        ("generate x --repetition-penalty 0", "--repetition-penalty must be a number > 0"),
        ("generate x --seed 9223372036854775808", "--seed must be an integer of 64 bits"),
        ("generate x --threads 0", "--threads must be between 1"),
        ("generate x --dtype int8", "--dtype must be auto, float32, float16, bfloat16, got int8"),
        ("generate x --greedy --top-k 5", "--greedy takes the most likely token, so --top-k cannot apply"),
        ("generate x --sample --temperature 0", "so --sample cannot apply"),
        ("info --bandwidth nan", "--bandwidth must be a number > 0, got nan"),
    ],
)
def test_wrong_usage(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_unusable_input(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").mkdir()
    no_weights = edited(folder, tmp_path / "no-weights")
    (no_weights / "model.safetensors").unlink()
    other = edited(folder, tmp_path / "other", vocab_size=100)
    for arguments, parts in {
        ("-m", tmp_path / "nowhere", "x"): ["nowhere", "nothing there"],
        ("-m", tmp_path / "empty", "x"): ["empty", "config.json"],
        ("-m", no_weights, "x"): ["no-weights", "model.safetensors"],
        ("-m", other, "x"): ["4096 pieces", "vocabulary of 100"],
        ("-m", folder, "--file", tmp_path / "latin"): ["latin", "UTF-8", "byte 3", "0xe9"],
        ("-m", folder, "--file", tmp_path / "missing"): ["missing: No such file"],
        ("-m", folder, "-n", 4000, "x " * 200): ["4096 positions", "shorten the prompt"],
    }.items():
        assert run("generate", *arguments) == 1, arguments
        captured = capsys.readouterr()
        assert captured.out == "" or "x " in captured.out  # the prompt may be out before the model refuses it
        error = captured.err.splitlines()[-1]
        assert error.startswith("error: ")
        assert "Traceback" not in captured.err
        for part in parts:
            assert part in error
    assert run("generate", "-m", folder, "--no-bos", "") == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_traceback_is_shown_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("info", tmp_path, "--traceback") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    monkeypatch.setenv("PERSIMMON_FAST_TRACEBACK", "1")
    assert run("info", tmp_path) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_fault_of_ours_says_how_to_find_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "build_facts", lambda: {}["gone"])
    assert run("doctor") == 1
    assert capsys.readouterr().err == "error: KeyError: 'gone' (--traceback shows where)\n"


def test_warnings_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = edited(folder, tmp_path / "old", rope_theta=None, rope_parameters=None)
    assert run("info", old, "--bandwidth", 10) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: ")
    assert "25000" in error
    assert error.count("\n") == 1


# ---- generate ----


def test_json_tells_what_the_model_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = generated(folder, capsys, PROMPT, "--greedy", "-n", 12)
    model, tokenizer = PersimmonForCausalLM.from_pretrained(folder), PersimmonTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**ids, do_sample=False, max_new_tokens=12, return_dict_in_generate=True)
    new = expected.sequences[0, ids["input_ids"].shape[1] :].tolist()
    assert result["token_ids"] == new
    assert result["logprobs"] == pytest.approx(expected.logprobs[0].tolist(), abs=1e-5)
    assert result["prompt"] == PROMPT
    assert tokenizer.decode(expected.sequences[0]) == PROMPT + result["text"]
    assert (result["finish_reason"], result["new_tokens"], result["seed"]) == ("length", 12, None)
    assert result["prompt_tokens"] == ids["input_ids"].shape[1]
    timings = result["timings"]
    assert timings["decode_tokens_per_second"] == pytest.approx(11 / timings["decode_seconds"])
    context = result["prompt_tokens"] + 6
    embedding = model.model.embed_tokens.weight.numel()
    read = 4 * (model.num_parameters() - embedding) + context * 2 * 2 * 64 * 4  # fp32; k and v, 2 layers of 64
    assert timings["decode_bytes_per_token"] == read
    assert 50e6 < result["peak_memory_bytes"] <= measure.peak_memory()


def test_text_goes_on_from_the_prompt() -> None:
    """The space in front of the first new word is kept, and bytes of a character wait for each other."""
    tokenizer = PersimmonTokenizer.from_pretrained(SMALL_MODEL)
    prompt, new = tokenizer.encode("import"), tokenizer.encode("os \U0001f60a", add_bos=False)
    pieces: list[str] = []
    stream = session._Stream(tokenizer, [], pieces.append)
    for ids in [prompt, *([token] for token in new)]:
        stream.put(torch.tensor(ids))
    stream.end()
    assert "".join(pieces) == stream.result_text == " os \U0001f60a"
    assert pieces[-1] == "\U0001f60a"


def test_seed_repeats_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = generated(folder, capsys, PROMPT, "-n", 8)
    assert generated(folder, capsys, PROMPT, "-n", 8, "--seed", first["seed"])["text"] == first["text"]
    assert generated(folder, capsys, PROMPT, "-n", 8, "--seed", first["seed"] + 1)["text"] != first["text"]


def test_options_reach_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = generated(folder, capsys, PROMPT, "--greedy", "-n", 8)
    for same in (["--temperature", 0], ["--top-k", 1], ["--top-p", 1e-6], ["--min-p", 1]):
        assert generated(folder, capsys, PROMPT, *same, "-n", 8)["token_ids"] == greedy["token_ids"], same
    penalised = generated(folder, capsys, PROMPT, "--greedy", "--repetition-penalty", 50, "-n", 8)
    assert len(set(penalised["token_ids"])) == 8
    without_bos = generated(folder, capsys, PROMPT, "--greedy", "--no-bos", "-n", 1)
    assert without_bos["prompt_tokens"] == greedy["prompt_tokens"] - 1
    assert generated(folder, capsys, PROMPT, "--dtype", "bfloat16", "-n", 1)["dtype"] == "bfloat16"
    assert generated(folder, capsys, PROMPT, "--threads", 2, "-n", 1)["threads"] == 2


def test_tiny_models_run_on_one_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert generated(folder, capsys, PROMPT, "-n", 1)["threads"] == 1
        monkeypatch.setattr(session, "_SMALL_BYTES", 0)
        assert generated(folder, capsys, PROMPT, "-n", 1)["threads"] == 2
    finally:
        torch.set_num_threads(before)


def test_stop_strings_end_the_text_and_are_not_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = generated(folder, capsys, PROMPT, "--greedy", "-n", 12)["text"]
    stop = text[len(text) // 2 :][:3]
    result = generated(folder, capsys, PROMPT, "--greedy", "-n", 12, "--stop", "never", "--stop", stop)
    assert result["text"] == text[: text.index(stop)]
    assert result["finish_reason"] == "stop"
    assert result["new_tokens"] < 12


@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_filter_cuts_at_the_first_stop_however_text_is_split(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    stop_filter = session.StopFilter(stops)
    passed = "".join([stop_filter.put(piece) for piece in pieces] + [stop_filter.end()])
    rest = text.removeprefix(passed)
    assert passed + rest == text
    assert not any(stop in passed for stop in stops)
    if any(stop in text for stop in stops):
        assert stop_filter.found
        assert any(rest.startswith(stop) for stop in stops)
    else:
        assert rest == ""


def test_interrupted_json_is_still_one_object(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put = session._Stream.put

    def interrupted_put(stream: session._Stream, value: torch.Tensor) -> None:
        if len(stream.token_ids) == 3:
            raise KeyboardInterrupt
        put(stream, value)

    monkeypatch.setattr(session._Stream, "put", interrupted_put)
    assert run("generate", "-m", folder, PROMPT, "--json") == 130
    result = json.loads(capsys.readouterr().out)
    assert (result["finish_reason"], result["new_tokens"], result["logprobs"]) == ("interrupted", 3, None)


def test_control_characters_never_reach_a_terminal() -> None:
    assert terminal.printable("a\x1b[31m\tb\r\n\x07\x9b2J\x7f") == "a␛[31m\tb␍\n␇\ufffd2J␡"


# ---- chat ----


def chatted(
    monkeypatch: pytest.MonkeyPatch, folder: Path, lines: str, *arguments: object
) -> tuple[list[str], list[list[dict[str, str]]]]:
    """Runs a chat over the given input; returns its notes and the conversation behind each answer."""
    notes: list[str] = []
    prompts: list[list[dict[str, str]]] = []
    encode = session.Session.encode_chat

    def recorded(self: session.Session, messages: list[dict[str, str]]) -> list[int]:
        prompts.append([dict(message) for message in messages])
        return encode(self, messages)

    monkeypatch.setattr(chat, "_note", notes.append)
    monkeypatch.setattr(session.Session, "encode_chat", recorded)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert run("chat", "-m", folder, *arguments) == 0
    return notes, prompts


def test_chat_keeps_and_forgets_turns(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "one\ntwo\n/reset\nthree\n/help\n/exit\nnever\n"
    notes, prompts = chatted(monkeypatch, folder, lines, "-n", 4, "--greedy")
    answers = capsys.readouterr().out
    assert [[m["content"] for m in messages if m["role"] == "user"] for messages in prompts] == [
        ["one"],
        ["one", "two"],
        ["three"],
    ]
    assert prompts[1][1]["role"] == "assistant"
    assert prompts[1][1]["content"] in answers
    assert "conversation forgotten" in notes


def test_chat_drops_the_oldest_turns(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = edited(folder, tmp_path / "short", max_position_embeddings=64)
    notes, prompts = chatted(monkeypatch, short, "one\ntwo\n" + "long " * 200 + "\nthree\n", "-n", 24, "--greedy")
    assert [message["content"] for message in prompts[-1] if message["role"] == "user"] == ["three"]
    assert any("oldest turn" in note and "64 tokens" in note for note in notes)
    assert re.search(r"error: this message alone has \d+ tokens; the model takes 40", capsys.readouterr().err)


def test_chat_never_speaks_for_its_user(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(self: session.Session, ids: list[int], write: Any, **_: object) -> session.Generation:
        stop_filter = session.StopFilter(self._options.stop)
        for piece in (" Fine", ".", "\n", "\nhu", "man", ": and", " you?"):
            write(stop_filter.put(piece))
        return session.Generation(len(ids), 0, text=" Fine.", finish_reason="stop")

    monkeypatch.setattr(session.Session, "generate", generate)
    chatted(monkeypatch, folder, "how are you?\n")
    assert capsys.readouterr().out == "Fine.\n"
