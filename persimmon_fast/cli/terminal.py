"""Output for people: consoles, numbers with units, errors and warnings as one line."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ACCENT = "color(166)"  # persimmon; about equally far from a black and from a white background
# What a model writes must not steer the terminal: control characters show as their Unicode pictures.
_VISIBLE = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
)


class UsageError(Exception):
    """A command line that cannot be meant: exit status 2."""


def console(stream: TextIO | None = None) -> Console:
    """A rich console on stdout (default) or another stream: styled on a terminal only, not at all under NO_COLOR."""
    from rich.console import Console

    stream = sys.stdout if stream is None else stream
    return Console(
        file=stream,
        force_terminal=stream.isatty(),
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        highlight=False,
        markup=False,
        emoji=False,
    )


def printable(text: str) -> str:
    """text with its control characters made visible, line ends and tabs excepted."""
    return text.translate(_VISIBLE)


def print_line(text: str, style: str = "", stream: TextIO | None = None) -> None:
    """One line on a stream (stderr by default), whatever its length."""
    stream = sys.stderr if stream is None else stream
    with contextlib.suppress(OSError):  # a closed stderr is no reason to fail
        console(stream).print(printable(text), style=style, soft_wrap=True)


def print_error(message: str) -> None:
    print_line("error: " + " ".join(message.split()), "red")


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Python warnings inside the block appear as "warning: ..." on stderr, without file and line."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        print_line("warning: " + " ".join(str(message).split()), "yellow")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def transient_line(text: str, enabled: bool) -> Iterator[None]:
    """Shows a line on stderr while the block runs, then takes it away. No cursor is hidden and no thread started, so
    nothing needs to be restored however the process ends."""
    stream = console(sys.stderr)
    enabled = enabled and stream.is_terminal and not stream.is_dumb_terminal
    if enabled:
        stream.print(text, style="dim", end="", soft_wrap=True)
        sys.stderr.flush()
    try:
        yield
    finally:
        if enabled:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


def print_parts(parts: Sequence[str], end: str = "") -> None:
    """Short facts, separated by commas, dim on stderr, in as few lines as hold them without breaking one."""
    width = console(sys.stderr).width
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 > width:  # ", " and the comma that may follow
            lines[-1] += ","
            lines.append(part)
        else:
            lines[-1] += ", " + part
    print_line("\n".join(lines) + end, "dim")


# ---- numbers: three or four digits and a unit, powers of 1000 ----


def bytes_text(num_bytes: float) -> str:
    """0 B, 589.8 kB, 16.65 GB."""
    return _scaled(num_bytes, ["B", "kB", "MB", "GB", "TB", "PB"])


def memory_text(num_bytes: float) -> str:
    """Bytes with the precision that memory use deserves: 355 MB, 16.7 GB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 999.5e6 else f"{num_bytes / 1e6:.0f} MB"


def count_text(count: int) -> str:
    """5.25 M, 9.40 billion is "9.40 B"."""
    return _scaled(count, ["", "k", "M", "B", "T"]).strip()


def rate_text(rate: float | None) -> str:
    """A rate with at least two digits: 1.84, 38.2, 1204; a dash where there is none."""
    if rate is None:
        return "-"
    return f"{rate:.2f}" if rate < 9.995 else f"{rate:.1f}" if rate < 99.95 else f"{rate:.0f}"


def _scaled(value: float, units: Sequence[str]) -> str:
    exponent = 0
    while value >= 999.95 and exponent + 1 < len(units):
        value, exponent = value / 1000, exponent + 1
    if exponent == 0:
        return f"{value:.0f} {units[0]}"
    digits = 2 if value < 99.995 else 1
    return f"{value:.{digits}f} {units[exponent]}"


# ---- tables ----


def facts(values: Mapping[str, str]) -> Table:
    """Names and values in two columns; long values wrap inside theirs."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=14)
    grid.add_column(overflow="fold")
    for name, value in values.items():
        grid.add_row(name, printable(value))
    return grid


def table(*headings: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for index, heading in enumerate(headings):
        result.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return result
