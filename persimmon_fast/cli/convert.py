"""`persimmon-fast convert`: Adept's original checkpoints to the Hugging Face layout, and back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from persimmon_fast.cli import terminal
from persimmon_fast.cli.terminal import UsageError, bytes_text


@dataclass(frozen=True)
class Request:
    """A parsed `convert`."""

    source: Path
    target: Path
    to: str
    md5: str | None
    max_shard_size: str
    tensor_parallel: int
    quiet: bool


def run(request: Request) -> int:
    """Converts, says what was done on stderr, and returns the exit status."""
    if request.to not in ("hf", "adept"):
        raise UsageError(f"--to must be hf or adept, got {request.to!r}")
    if request.md5 is not None and not re.fullmatch(r"[0-9a-fA-F]{32}", request.md5):
        raise UsageError(f"--md5 must be 32 hexadecimal digits, got {request.md5!r}")
    if request.to == "hf" and request.tensor_parallel != 1:
        raise UsageError("--tensor-parallel splits a model for Adept's code: add --to adept")
    if request.to == "adept" and request.md5 is not None:
        raise UsageError("--md5 is for Adept's tars; with --to adept, IN is a folder")
    if request.tensor_parallel < 1:
        raise UsageError(f"--tensor-parallel must be at least 1, got {request.tensor_parallel}")

    from persimmon_fast import adept

    progress = not request.quiet
    if request.to == "hf":
        done = adept.to_hugging_face(
            request.source, request.target, md5=request.md5, max_shard_size=request.max_shard_size, progress=progress
        )
    else:
        done = adept.to_adept(request.source, request.target, num_ranks=request.tensor_parallel, progress=progress)
    if request.quiet:
        return 0
    config = done.config
    ranks = f"{done.num_ranks} tensor parallel rank" + "s" * (done.num_ranks != 1)
    parts = [
        f"{done.target}: {bytes_text(done.num_bytes)} of {config.dtype}",
        f"{config.num_hidden_layers} layers",
        ranks,
        f"theta {config.rope_theta:,.0f}",
        f"end of text {', '.join(map(str, config.eos_token_ids)) or 'not known'}",
    ]
    if done.foreign:
        parts.append(f"not imported: {', '.join(done.foreign)}")
    if done.resumed:
        parts.append("gone on from an interrupted run")
    terminal.print_parts(parts)
    return 0
