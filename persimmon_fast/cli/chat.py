"""`persimmon-fast chat`: talk to a model in Adept's human/adept format."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from persimmon_fast.cli import INTERRUPTED, terminal

if TYPE_CHECKING:
    from persimmon_fast.cli.session import Options, Session

_STOPS = ("\n\nhuman:", "human:")  # the model must not speak for its user
_RESERVE = 256  # tokens kept free for an answer where --max-new-tokens does not say
_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def run(options: Options) -> int:
    """Reads lines from stdin, writes answers to stdout, and returns the exit status."""
    from persimmon_fast.cli.session import Session

    session = Session(replace(options, stop=_STOPS + options.stop))
    if not options.quiet and sys.stderr.isatty():
        terminal.print_parts(session.header())
        if session.is_shipped:
            _note(f"{session.name} is a code model, no chat model: expect Python. For a chat: --model FOLDER")
        _note(_HELP + "\n")
    return _Chat(session, options.max_new_tokens).run()


def _note(text: str) -> None:
    if sys.stderr.isatty():
        terminal.print_line(text, "dim")


class _Chat:
    """The conversation. Each answer is prefilled from its start: dropping old turns moves every position anyway."""

    def __init__(self, session: Session, max_new_tokens: int | None) -> None:
        self._session = session
        self._wanted = max_new_tokens
        self._messages: list[dict[str, str]] = []
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> int:
        interrupts = 0  # Ctrl-C in a row: the second one leaves
        while True:
            try:
                line = self._read()
            except EOFError:
                if self._is_terminal:
                    print()
                return 0
            except KeyboardInterrupt:
                interrupts += 1
                print()
                if interrupts > 1:
                    return INTERRUPTED
                _note("Ctrl-C again or Ctrl-D leaves")
                continue
            if line in ("/exit", "/quit"):
                return 0
            if line == "/reset":
                self._messages.clear()
                _note("conversation forgotten")
            elif line.startswith("/"):
                _note(_HELP)
            elif line:
                interrupts = 1 if self._answer(line) == "interrupted" else 0

    def _read(self) -> str:
        """The next line of the user, without spaces around it."""
        if not self._is_terminal:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.strip()
        import readline  # noqa: F401  line editing and history for input()

        return input(self._label("human: ", readline_marks=True)).strip()

    def _label(self, text: str, readline_marks: bool = False) -> str:
        if terminal.console().color_system is None:
            return text
        on, off = "\x1b[1m", "\x1b[0m"
        if readline_marks:  # tells readline that these take no columns
            on, off = f"\x01{on}\x02", f"\x01{off}\x02"
        return f"{on}{text}{off}"

    def _answer(self, line: str) -> str:
        """Streams the answer to a line; returns why it ended."""
        self._messages.append({"role": "user", "content": line})
        ids = self._fitting_prompt()
        if ids is None:
            self._messages.pop()
            return "refused"
        is_start = True

        def write(text: str) -> None:
            nonlocal is_start
            text = text.lstrip() if is_start else text
            is_start = is_start and not text
            sys.stdout.write(terminal.printable(text) if self._is_terminal else text)
            sys.stdout.flush()

        if self._is_terminal:
            print(self._label("adept: "), end="", flush=True)
        room = self._session.max_positions - len(ids)
        limit = min(room, self._wanted or _RESERVE)
        result = self._session.generate(ids, write, max_new_tokens=limit)
        print("\n" if self._is_terminal else "", flush=True)
        if result.finish_reason == "interrupted":
            _note("(stopped)")
        self._messages.append({"role": "assistant", "content": result.text.strip()})
        return result.finish_reason

    def _fitting_prompt(self) -> list[int] | None:
        """The conversation as ids, its oldest turns dropped until an answer fits; None if the last line is too long."""
        limit = self._session.max_positions
        reserve = min(self._wanted or _RESERVE, limit // 2)
        dropped = 0
        while True:
            ids = self._session.encode_chat(self._messages)
            if len(ids) + reserve <= limit:
                break
            if len(self._messages) == 1:
                terminal.print_error(
                    f"this message alone has {len(ids)} tokens; the model takes {limit - reserve} beside an answer"
                )
                return None
            del self._messages[:2]
            dropped += 1
        if dropped:
            _note(f"({dropped} oldest turn{'s' * (dropped > 1)} dropped: the context holds {limit} tokens)")
        return ids
