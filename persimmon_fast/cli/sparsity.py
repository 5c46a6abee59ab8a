"""`persimmon-fast sparsity`: exact zeros after squared ReLU, and what skipping them saves."""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon_fast.cli import terminal
from persimmon_fast.cli.terminal import UsageError, bytes_text

if TYPE_CHECKING:
    from rich.table import Table

    from persimmon_fast.cli.session import Options, Session
    from persimmon_fast.sparsity import SparsityReport

_DEFAULT_MODULE = "plistlib"  # of the standard library, but kept out of the shipped model's training


@dataclass(frozen=True)
class Request:
    """A parsed `sparsity`: where the text is ("-": stdin; None: a module of the standard library) and what to write."""

    file: str | None
    plot: Path | None
    as_json: bool


def run(request: Request, options: Options) -> int:
    """Prints the report and returns the exit status."""
    text, source = _read(request.file)
    if not text:
        raise UsageError(f"{source} is empty: give some text")
    if request.plot is not None:
        _check_plot(request.plot)
    from persimmon_fast import sparsity
    from persimmon_fast.cli.session import Session

    session = Session(options)
    ids = session.tokenizer.encode(text)
    limit = session.max_positions
    if len(ids) > limit:
        source = f"the first {limit:,} of {len(ids):,} tokens of {source}"
    else:
        source = f"{len(ids):,} token{'s' * (len(ids) != 1)} of {source}"
    with terminal.transient_line("Reading the text ...", True):
        result = sparsity.report(session.model, ids[:limit])
    if request.plot is not None:
        sparsity.plot(result, request.plot, session.name)
    if request.as_json:
        print(json.dumps(_as_json(session, source, ids[:limit], result), ensure_ascii=False))
    else:
        _print(session, source, result)
    return 0


def _read(file: str | None) -> tuple[str, str]:
    """(text, what it is)."""
    if file is None:
        spec = importlib.util.find_spec(_DEFAULT_MODULE)
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            raise UsageError(f"this Python comes without the source of {_DEFAULT_MODULE}: give a FILE, or - for stdin")
        name = f"{_DEFAULT_MODULE}.py (Python {platform.python_version()})"
        return Path(spec.origin).read_text(encoding="utf-8"), name
    data, name = (sys.stdin.buffer.read(), "stdin") if file == "-" else (Path(file).read_bytes(), file)
    try:
        return data.decode(), name
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text, byte {error.start} is {data[error.start]:#04x}") from None


def _check_plot(path: Path) -> None:
    """What would fail after minutes of reading fails before."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'persimmon_fast[plot]'") from None
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--plot must name a file in a folder that exists, got {path}")


def _as_json(session: Session, source: str, ids: list[int], result: SparsityReport) -> dict[str, Any]:
    zeros = result.zeros
    return {
        "model": session.name,
        "dtype": result.dtype,
        "device": str(session.device),
        "text": source,
        "token_ids": ids,
        "neurons_per_layer": result.intermediate_size,
        "zeros": zeros.mean().item(),
        "zeros_by_layer": zeros.mean(1).tolist(),
        "active_neurons": result.active[1].tolist(),
        "down_bytes": result.down_bytes,
        "step_bytes": result.step_bytes,
        "savings": [asdict(saving) for saving in result.savings],
    }


def _print(session: Session, source: str, result: SparsityReport) -> None:
    out = terminal.console()
    out.print(session.name, style=f"bold {terminal.ACCENT}", end="")
    out.print(f"  {result.dtype}, {terminal.printable(source)}", style="dim", soft_wrap=True)
    for block in (_layer_table(result), _saving_table(result)):
        out.print(block)
        out.print()
    out.print("At most: by bytes of weights read; keys and values of the cache come on top.", style="dim")


def _layer_table(result: SparsityReport) -> Table:
    table = terminal.table(f"zeros of {result.intermediate_size:,} neurons", "mean", "least", "most")
    for index, layer in enumerate(result.zeros):
        table.add_row(f"layer {index}", *(f"{value:.1%}" for value in (layer.mean(), layer.min(), layer.max())))
    table.add_row("all layers", f"{result.zeros.mean():.1%}", style="bold")
    return table


def _saving_table(result: SparsityReport) -> Table:
    table = terminal.table("a step over", "zero in all", "down reads", "step reads", "at most")
    table.add_row("skipping nothing", "", bytes_text(result.down_bytes), bytes_text(result.step_bytes), "1.000 x")
    for saving in result.savings:
        table.add_row(
            f"{saving.window} position" + "s" * (saving.window != 1),
            f"{saving.zeros:.1%}",
            bytes_text(saving.down_bytes),
            bytes_text(saving.step_bytes),
            f"{saving.speed_up_bound:.3f} x",
        )
    return table
