"""Ids to text, piece by piece: what is printed is final, and never half a character."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import torch

    from persimmon_fast.tokenizer import PersimmonTokenizer

SPACE_MARK = "\u2581"  # how sentencepiece writes a space inside a piece
UNKNOWN_TEXT = " \u2047 "  # what sentencepiece decodes its unknown id to
REPLACEMENT = "\ufffd"  # stands for a byte that is not UTF-8


class StreamingDecoder:
    """Decodes ids one at a time into text that is final.

    The pieces that `put` returns, plus `end()`, join to `tokenizer.decode(all ids)`. Text is held back
    only while it is an unfinished UTF-8 character (at most 3 bytes), so each `put` is O(length of the piece).
    """

    def __init__(self, tokenizer: PersimmonTokenizer, skip_special_tokens: bool = True) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._bytes = b""  # start of a UTF-8 character that waits for its other bytes
        self._num_droppable = tokenizer.num_dropped_spaces  # leading spaces still to drop

    def put(self, token_id: int) -> str:
        """Text that became final with `token_id`; may be empty.

        Raises:
            ValueError: `token_id` lies outside of the tokenizer's pieces.
        """
        piece = self.tokenizer._piece(token_id)
        if self.tokenizer.sp.is_byte(token_id):
            self._num_droppable = 0
            self._bytes += bytes([int(piece[1:-1], 16)])  # the piece reads "<0x41>"
            return self._take_characters(is_complete=False)
        text = self.end()
        if token_id in self.tokenizer.special_ids or self.tokenizer.sp.is_control(token_id):
            return text if self.skip_special_tokens else text + piece
        if token_id == self.tokenizer.unk_token_id:
            self._num_droppable = 0
            return text + UNKNOWN_TEXT
        if self._num_droppable:
            stripped = piece.lstrip(SPACE_MARK)
            num_dropped = min(len(piece) - len(stripped), self._num_droppable)
            # One space is dropped from the first piece alone; "drop all" goes on to the first other character.
            is_done = self._num_droppable == 1 or bool(stripped)
            self._num_droppable = 0 if is_done else self._num_droppable
            piece = piece[num_dropped:]
        return text + piece.replace(SPACE_MARK, " ")

    def end(self) -> str:
        """The rest: bytes that never became a character, as U+FFFD each."""
        return self._take_characters(is_complete=True)

    def _take_characters(self, is_complete: bool) -> str:
        """Cut finished characters off `_bytes`; a byte that cannot start one becomes U+FFFD, as in sentencepiece."""
        text = ""
        while self._bytes:
            length = _utf8_length(self._bytes[0])
            if len(self._bytes) < length and not is_complete:
                break
            try:
                text += self._bytes[:length].decode()
            except UnicodeDecodeError:
                length = 1
                text += REPLACEMENT
            self._bytes = self._bytes[length:]
        return text


class TextStreamer:
    """Prints a generation as it grows: transformers' streamer protocol, `put` and `end`.

    Args:
        skip_prompt: do not print the first `put` (generate sends the prompt first). It is decoded all the
            same: what is printed is exactly how the text goes on, leading space included.
        file: where to print. Subclasses may override `on_finalized_text` instead.
    """

    def __init__(
        self,
        tokenizer: PersimmonTokenizer,
        skip_prompt: bool = False,
        file: TextIO | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.file = file
        self.skip_special_tokens = skip_special_tokens
        self._start()

    def _start(self) -> None:
        self._decoder = StreamingDecoder(self.tokenizer, self.skip_special_tokens)
        self._is_prompt = True

    def put(self, value: torch.Tensor | Sequence[int] | int) -> None:
        """Take ids: [1, seqlen] or [seqlen] (the prompt first, then new tokens)."""
        shape = tuple(getattr(value, "shape", ()))
        if len(shape) > 1 and shape[0] != 1:
            raise ValueError(f"TextStreamer: one sequence at a time, got ids of shape {list(shape)}")
        ids = as_ids(value[0] if len(shape) > 1 else value)  # type: ignore[index]
        text = "".join([self._decoder.put(i) for i in ids])
        if text and not (self._is_prompt and self.skip_prompt):
            self.on_finalized_text(text)
        self._is_prompt = False

    def end(self) -> None:
        """Print the rest and a line end; the streamer is then ready for another generation."""
        self.on_finalized_text(self._decoder.end(), stream_end=True)
        self._start()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print `text`, which will not change any more."""
        print(text, end="\n" if stream_end else "", file=self.file or sys.stdout, flush=True)


def as_ids(ids: Any) -> list[int]:
    """An int, or a flat sequence, array or tensor of ints, as a list."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, int):
        return [ids]
    result = list(ids)
    for item in result:
        if not isinstance(item, int):
            raise TypeError(f"ids must be a flat sequence of ints, got an item of type {type(item).__name__}")
    return result


def _utf8_length(lead: int) -> int:
    """Bytes of the UTF-8 character that starts with `lead`; 1 for a byte that cannot start one."""
    return 1 if lead < 0xC2 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4 if lead < 0xF5 else 1
