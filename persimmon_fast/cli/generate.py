"""`persimmon-fast generate`: continue a text."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon_fast.cli import INTERRUPTED, terminal
from persimmon_fast.cli.terminal import UsageError

if TYPE_CHECKING:
    from persimmon_fast.cli.session import Generation, Options, Session


@dataclass(frozen=True)
class Request:
    """A parsed `generate`: the prompt as an argument, or where to read it from ("-": stdin)."""

    prompt: str | None
    file: str | None
    as_json: bool


def run(request: Request, options: Options) -> int:
    """Generates to stdout and returns the exit status."""
    from persimmon_fast.cli.session import Session

    prompt = read_prompt(request)
    if request.as_json:
        options = replace(options, quiet=True)
    session = Session(options)
    ids = session.encode(prompt)
    if request.as_json:
        result = session.generate(ids, lambda _: None)
        print(json.dumps(as_json(session, prompt, result), ensure_ascii=False))
    else:
        result = _stream(session, prompt, ids, options.quiet)
    return INTERRUPTED if result.finish_reason == "interrupted" else 0


def read_prompt(request: Request) -> str:
    """The prompt, exactly as given: line ends of a file or of stdin belong to it."""
    sources = [source for source in (request.prompt, request.file) if source is not None]
    if len(sources) != 1:
        problem = "both a prompt and --file" if sources else "no prompt"
        raise UsageError(f'{problem}: give one, such as "def read_config(path):", or --file FILE, or - for stdin')
    if "-" in sources:
        data, name = sys.stdin.buffer.read(), "stdin"
    elif request.file is not None:
        data, name = Path(request.file).read_bytes(), request.file
    else:
        return str(request.prompt)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text, byte {error.start} is {data[error.start]:#04x}") from None


def _stream(session: Session, prompt: str, ids: list[int], quiet: bool) -> Generation:
    """Text to stdout as it is made; header and summary to stderr if that is a terminal."""
    notes = sys.stderr.isatty() and not quiet
    if notes:
        terminal.print_parts(session.header(), end="\n")
    end = "\n"  # the last two characters written

    def write(text: str, dim: bool = False) -> None:
        nonlocal end
        end = (end + text)[-2:]
        if is_terminal:
            text = terminal.printable(text)
        sys.stdout.write(f"\x1b[2m{text}\x1b[0m" if dim and has_colour else text)
        sys.stdout.flush()

    is_terminal = sys.stdout.isatty()
    has_colour = is_terminal and terminal.console().color_system is not None
    write(prompt, dim=True)
    result = session.generate(ids, write)
    if not end.endswith("\n") or (is_terminal and result.finish_reason == "interrupted"):
        write("\n")  # after the ^C that a terminal echoes, too
    if notes:
        if is_terminal and end != "\n\n":
            write("\n")  # the figures stand apart
        terminal.print_parts(summary(session, result))
    return result


def summary(session: Session, result: Generation) -> list[str]:
    """Figures of a generation, in short parts. GB/s are those of a step that skips nothing: skipping zeros can take
    them past what the memory delivers."""
    from persimmon_fast import measure

    parts = [f"{len(result.token_ids)} token" + "s" * (len(result.token_ids) != 1)]
    if result.decode_rate is not None:
        bandwidth = result.decode_rate * session.costs.decode_bytes(result.mean_context)
        parts += [f"{terminal.rate_text(result.decode_rate)} tok/s", f"{terminal.rate_text(bandwidth / 1e9)} GB/s"]
    if result.prefill_rate is not None:
        parts.append(f"prefill {terminal.rate_text(result.prefill_rate)} tok/s")
    gpu_memory = session.peak_device_memory()
    if gpu_memory is None:
        parts.append(f"peak {terminal.memory_text(measure.peak_memory())}")
    else:
        parts.append(f"peak {terminal.memory_text(gpu_memory)} on {session.device}")
    if session.samples:
        parts.append(f"seed {result.seed}")
    return parts


def as_json(session: Session, prompt: str, result: Generation) -> dict[str, Any]:
    """Everything about a generation. Rates are null where too few tokens came to have one."""
    from persimmon_fast import measure

    per_token = session.costs.decode_bytes(result.mean_context)
    rate = result.decode_rate
    return {
        "model": session.name,
        "dtype": session.dtype,
        "device": str(session.device),
        "threads": session.num_threads,
        "prompt": prompt,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.token_ids),
        "token_ids": result.token_ids,
        "logprobs": result.logprobs,
        "seed": result.seed if session.samples else None,
        "timings": {
            "load_seconds": session.load_seconds,
            "prefill_seconds": result.prefill_seconds,
            "prefill_tokens_per_second": result.prefill_rate,
            "decode_seconds": result.decode_seconds,
            "decode_tokens_per_second": rate,
            "decode_bytes_per_token": per_token,
            "decode_bytes_per_second": None if rate is None else rate * per_token,
        },
        "peak_memory_bytes": measure.peak_memory(),
        "peak_device_memory_bytes": session.peak_device_memory(),
    }
