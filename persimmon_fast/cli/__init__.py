"""The command line: `persimmon-fast generate | chat | info | sparsity | convert | doctor` (`python -m persimmon_fast`).

app.py declares commands and options, the modules named after a command do the work. Nothing heavy is imported before
a command needs it, so that --help answers at once; text for people goes through rich, data (--json, pipes) does not.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

INTERRUPTED = 130  # exit status of a command that SIGINT ended: 128 + 2
BROKEN_PIPE = 141  # of one whose reader has gone: 128 + SIGPIPE


def main() -> None:
    """Runs the command line of this process and exits with its status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" where it lacks a character
    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # what is buffered is dropped with it, so Python's own flush at exit finds nothing
        status = BROKEN_PIPE
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C while Python shuts down ends it without a traceback
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit status: 0, 1 (failed), 2 (wrong usage), 130 (Ctrl-C), 141 (the
    reader of stdout has gone). Errors are one line on stderr."""
    try:
        from persimmon_fast.cli.app import dispatch

        return dispatch(list(arguments))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
