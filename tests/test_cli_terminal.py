"""The command line as a process: in pipes, and in a terminal (through a pty)."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from cli_helpers import PROMPT, generated, tiny_model

import persimmon_fast

COMMAND = [sys.executable, "-m", "persimmon_fast"]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(autouse=True)
def _package_under_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m` looks in the working folder first: the package of this process must be there, not the sources. And
    what is expected here is what the CPU does."""
    monkeypatch.chdir(Path(persimmon_fast.__file__).parents[1])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("cli") / "tiny-model")


def test_pipe_gets_the_text_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but prompt and text, byte for byte, also from a prompt on stdin; no bar, no colour, no figures."""
    expected = PROMPT + "\n" + generated(folder, capsys, PROMPT + "\n", "--greedy", "-n", 6)["text"]
    result = subprocess.run(
        [*COMMAND, "generate", "-m", str(folder), "--file", "-", "--greedy", "-n", "6"],
        input=(PROMPT + "\n").encode(),
        capture_output=True,
        timeout=60,
        env=os.environ | {"FORCE_COLOR": "1"},  # even where a person forces colour for other programs
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode() == expected + "\n" * (not expected.endswith("\n"))
    assert result.stderr == b""


def test_reader_that_leaves_ends_the_run_quietly(folder: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "-m", str(folder), PROMPT, "-n", "4000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(len(PROMPT) + 3).decode(errors="replace").startswith(PROMPT)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


# ---- in a terminal ----


@pytest.fixture
def spawn() -> Iterator[Any]:
    """Starts the program in a pty of 80 columns; it is ended with the test."""
    children = []

    def start(*arguments: object, **environment: str) -> pexpect.spawn:
        env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
        child = pexpect.spawn(
            sys.executable,
            ["-m", "persimmon_fast", *map(str, arguments)],
            env=env | {"TERM": "xterm-256color"} | environment,
            dimensions=(30, 80),
            encoding="utf-8",
            codec_errors="strict",  # half a character would raise
            timeout=60,
            # a shell's background job ignores Ctrl-C, and so would the program that its tests start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        child.logfile_read = io.StringIO()
        children.append(child)
        return child

    yield start
    for child in children:
        child.close(force=True)


def test_terminal_streams_and_ctrl_c_ends_it_cleanly(folder: Path, spawn: Any) -> None:
    child = spawn("generate", "-m", folder, PROMPT, "-n", "4000")
    child.expect("Loading tiny-model")
    child.expect(r"\r\x1b\[2K")  # the line is taken away again
    child.expect(r"tiny-model, .* parameters, float32, cpu, \d+ threads?,.*loaded in [\d.]+ s")
    child.expect(re.escape(f"\x1b[2m{PROMPT}\x1b[0m"))  # dim
    for _ in range(3):  # text comes in pieces while the run goes on
        child.expect(r"\S+")
    assert child.isalive()
    child.kill(signal.SIGINT)
    child.expect(  # the figures of what there is, in one line
        r"\x1b\[2m(\d+) tokens, [\d.]+ tok/s, [\d.]+ GB/s, prefill [\d.]+ tok/s, peak [\d.]+ .B, seed \d+\x1b\[0m\r\n"
    )
    assert 0 < int(child.match[1]) < 4000
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 130
    output = child.logfile_read.getvalue()
    assert "Traceback" not in output
    assert "\x1b[?" not in output  # no cursor hidden, no other mode set: nothing is left to restore
    last_style = ESCAPE.findall(output)[-1]
    assert last_style == "\x1b[0m"


def test_no_color_and_narrow_terminal(folder: Path, spawn: Any) -> None:
    child = spawn("generate", "-m", folder, PROMPT, "-n", "3", NO_COLOR="1", COLUMNS="40")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0
    output = child.logfile_read.getvalue()
    assert [code for code in ESCAPE.findall(output) if code.endswith("m")] == []
    figures = output[output.index("3 tokens") :].splitlines()
    assert all(len(line) <= 40 for line in figures), figures


def test_chat_in_a_terminal(folder: Path, spawn: Any) -> None:
    child = spawn("chat", "-m", folder, "-n", "3000", "--seed", "1")
    child.expect("human: ")
    child.sendline("hello")
    child.expect("adept: ")
    child.expect(r"\S+")
    child.kill(signal.SIGINT)
    child.expect(r"\(stopped\)")
    child.expect("human: ")  # the answer has ended, the chat has not
    time.sleep(1)  # Python misses a signal between readline's prompt and its wait for a key
    child.kill(signal.SIGINT)
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 130
    assert "Traceback" not in child.logfile_read.getvalue()
