"""Text <-> token ids for Persimmon: a sentencepiece Unigram model with byte fallback.

Design choices:
- Ids are those of sentencepiece itself, dummy prefix included (a text starts with a space mark).
- BOS in front is a choice: transformers prepends it (the default here), Adept's own code does not.
- Padding goes to the left by default, because a decoder continues at the right end.
- One decoder serves `decode` and streaming, so a streamed text equals the decoded text by construction.
- sentencepiece, torch and numpy are imported when used: importing this module costs nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from persimmon_fast.hub import TOKENIZER_FILES, folder_of
from persimmon_fast.streaming import SPACE_MARK, StreamingDecoder, TextStreamer, as_ids

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

__all__ = ["BatchEncoding", "PersimmonTokenizer", "StreamingDecoder", "TextStreamer"]

MODEL_NAMES = ("tokenizer.model", "adept_vocab.model")
_UNLIMITED = 10**12  # transformers writes model_max_length = 1e30 for "none"

PaddingSide = Literal["left", "right"]
Padding = bool | Literal["left", "right", "longest", "max_length", "do_not_pad"]
Message = Mapping[str, str]


class BatchEncoding(dict[str, Any]):
    """Dict of model inputs (`input_ids`, `attention_mask`) that also answers to attributes.

    Unpacks into a model: `model.generate(**tokenizer(text, return_tensors="pt"))`.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"BatchEncoding has no {name!r}; it holds {list(self)}") from None

    def to(self, device: Any) -> BatchEncoding:
        """Copy with every tensor on `device`; what is not a tensor stays as it is."""
        return BatchEncoding({k: v.to(device) if hasattr(v, "to") else v for k, v in self.items()})


class PersimmonTokenizer:
    """A sentencepiece model plus the ids of its special tokens.

    Args:
        model_proto: the serialized sentencepiece model (the bytes of `tokenizer.model`).
        bos_token_id, eos_token_id: begin and end of text. None takes the sentencepiece model's own.
            The released Persimmon checkpoints use "|ENDOFTEXT|" = 71013 for both.
        pad_token_id: id written into padding; masked, so its value never matters. None takes EOS.
        add_bos: whether BOS is prepended by default (True, as in transformers).
        padding_side: "left" (default) or "right".
        model_max_length: positions of the model, used by truncation and padding to "max_length"
            when they are called without a length. None: no limit is known.
        source: name of the model in error messages.

    Raises:
        ValueError: the model is empty or not a sentencepiece model, or an id lies outside of it.
    """

    def __init__(
        self,
        model_proto: bytes,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        add_bos: bool = True,
        padding_side: PaddingSide = "left",
        model_max_length: int | None = None,
        source: str = "model_proto",
    ) -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        self.model_proto = model_proto
        self.sp = _load_sentencepiece(model_proto, source)
        self.vocab_size: int = self.sp.vocab_size()  # number of pieces; the model may have more rows
        self.unk_token_id: int = self.sp.unk_id()
        self.bos_token_id = self._special_id("bos_token_id", bos_token_id, self.sp.bos_id(), source)
        self.eos_token_id = self._special_id("eos_token_id", eos_token_id, self.sp.eos_id(), source)
        own_pad_id = self._special_id("pad_token_id", pad_token_id, self.sp.pad_id(), source)
        self.pad_token_id = self.eos_token_id if own_pad_id is None else own_pad_id
        self.add_bos = add_bos
        self.padding_side: PaddingSide = padding_side
        self.model_max_length = model_max_length
        specials = (self.bos_token_id, self.eos_token_id, own_pad_id)
        self.special_ids = frozenset(i for i in specials if i is not None)
        # How many leading space marks decoding drops: the dummy prefix (1), all of them, or none.
        probe = self.sp.decode_pieces([SPACE_MARK, SPACE_MARK, "a"])
        self.num_dropped_spaces = {"  a": 0, " a": 1}.get(probe, sys.maxsize)

    def _special_id(self, name: str, given: int | None, own: int, source: str) -> int | None:
        if given is None:
            return own if own >= 0 else None
        if not 0 <= given < self.vocab_size:
            raise ValueError(f"{name}={given} lies outside of the {self.vocab_size} pieces of {source}")
        return given

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> PersimmonTokenizer:
        """Load `tokenizer.model` or `adept_vocab.model` from a checkpoint folder, or by a name on the Hugging Face Hub
        (which revision and the three after it are for, see `hub.folder_of`).

        Special tokens come from the first that names them: `overrides` (keywords of the class),
        `tokenizer_config.json`, `special_tokens_map.json` (both by token text), `generation_config.json`,
        `config.json` (both by id), the sentencepiece model.

        Raises:
            FileNotFoundError: no such folder, or no sentencepiece model in it.
            HubError: a name on the Hub could not be downloaded.
            ValueError: a JSON file or the model cannot be read, or names a token the model lacks.
        """
        folder = Path(
            folder_of(
                folder,
                TOKENIZER_FILES,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
            )
        )
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; expected one that holds {' or '.join(MODEL_NAMES)}")
        path = next((folder / name for name in MODEL_NAMES if (folder / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no tokenizer in {folder}: expected {' or '.join(MODEL_NAMES)}")
        settings = _read_settings(folder, _load_sentencepiece(proto := path.read_bytes(), str(path)))
        return cls(proto, source=str(path), **{**settings, **overrides})

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.model` and `tokenizer_config.json`; `from_pretrained` gives this tokenizer back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_NAMES[0]).write_bytes(self.model_proto)
        ids = {
            "bos_token": self.bos_token_id,
            "eos_token": self.eos_token_id,
            "pad_token": self.pad_token_id,
        }
        config: dict[str, Any] = {name: None if i is None else self.sp.id_to_piece(i) for name, i in ids.items()}
        config |= {"add_bos_token": self.add_bos, "padding_side": self.padding_side}
        config |= {
            "model_max_length": self.model_max_length,
            "tokenizer_class": type(self).__name__,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(vocab_size={self.vocab_size}, bos_token_id={self.bos_token_id}, "
            f"eos_token_id={self.eos_token_id}, pad_token_id={self.pad_token_id}, add_bos={self.add_bos}, "
            f"padding_side={self.padding_side!r})"
        )

    # ------------------------------------------------------------ text -> ids

    def encode(self, text: str, add_special_tokens: bool = True, add_bos: bool | None = None) -> list[int]:
        """Ids of `text` as sentencepiece makes them, with BOS in front if asked.

        Args:
            text: any str that UTF-8 can hold; special tokens inside it are ordinary text unless the
                sentencepiece model itself defines them as symbols.
            add_special_tokens: False turns BOS off, whatever `add_bos` says.
            add_bos: None takes the tokenizer's own setting.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode: text must be a str, got {type(text).__name__}")
        try:
            ids: list[int] = self.sp.encode(text.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"encode: text is not valid Unicode: {error}") from None
        if add_special_tokens and (self.add_bos if add_bos is None else add_bos):
            if self.bos_token_id is None:
                raise ValueError("encode: BOS is asked for, but this tokenizer has no bos_token_id; use add_bos=False")
            ids.insert(0, self.bos_token_id)
        return ids

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        add_bos: bool | None = None,
        padding: Padding = False,
        padding_side: PaddingSide | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: Literal["pt", "np"] | None = None,
        return_attention_mask: bool = True,
    ) -> BatchEncoding:
        """Encode one text or a batch of texts for the model.

        Args:
            text: one text, or a list of texts (a batch).
            add_special_tokens, add_bos: as in `encode`.
            padding: False; True or "longest" (to the longest of the batch); "left" or "right" (the same,
                on that side); "max_length" (to `max_length` ids).
            padding_side: overrides the tokenizer's side.
            max_length: ids per text, for truncation and "max_length" padding; None takes `model_max_length`.
            truncation: cut what exceeds `max_length` at the right end. A longer text is never cut otherwise.
            return_tensors: "pt" for torch tensors, "np" for numpy arrays, None for lists.

        Returns:
            `input_ids` and `attention_mask` (1 for text, 0 for padding): [batch, seqlen] int64 with
            `return_tensors` (one text makes a batch of one), otherwise lists (one text makes a flat list).

        Raises:
            ValueError: an option is unknown, a length is missing, or rows differ in length where a tensor is asked for.
        """
        is_single = isinstance(text, str)
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self.encode(item, add_special_tokens, add_bos) for item in texts]
        if truncation:
            length = self._max_length("truncation", max_length)
            rows = [row[:length] for row in rows]
        rows, masks = self._pad(rows, padding, padding_side, max_length)
        if return_tensors is not None:
            return _as_arrays(rows, masks if return_attention_mask else None, return_tensors)
        fields: dict[str, Any] = {"input_ids": rows, "attention_mask": masks}
        if not return_attention_mask:
            del fields["attention_mask"]
        return BatchEncoding({name: value[0] if is_single else value for name, value in fields.items()})

    def _max_length(self, purpose: str, max_length: int | None) -> int:
        length = self.model_max_length if max_length is None else max_length
        if length is None or length < 1:
            raise ValueError(f"{purpose} needs max_length of at least 1, got {length}")
        return length

    def _pad(
        self,
        rows: list[list[int]],
        padding: Padding,
        padding_side: PaddingSide | None,
        max_length: int | None,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Rows filled to one length and their masks."""
        side = padding_side or (padding if padding in ("left", "right") else self.padding_side)
        if padding in (False, "do_not_pad"):
            length = 0
        elif padding == "max_length":
            length = self._max_length("padding='max_length'", max_length)
        elif padding in (True, "longest", "left", "right"):
            length = max((len(row) for row in rows), default=0)
        else:
            known = "True, False, 'longest', 'left', 'right', 'max_length'"
            raise ValueError(f"padding must be one of {known}, got {padding!r}")
        if side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {side!r}")
        padded, masks = [], []
        for row in rows:
            missing = max(0, length - len(row))
            if missing and self.pad_token_id is None:
                raise ValueError("padding: this tokenizer has neither pad_token_id nor eos_token_id to fill with")
            fill, mask_fill = [self.pad_token_id or 0] * missing, [0] * missing
            mask = [1] * len(row)
            padded.append(fill + row if side == "left" else row + fill)
            masks.append(mask_fill + mask if side == "left" else mask + mask_fill)
        return padded, masks

    # ------------------------------------------------------------ ids -> text

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """Text of `ids` (an int, a flat list, array or tensor), as sentencepiece decodes it.

        The leading space that the dummy prefix added is dropped; a byte that is not UTF-8 becomes U+FFFD.
        `skip_special_tokens=False` writes BOS, EOS and padding as their names.
        """
        decoder = StreamingDecoder(self, skip_special_tokens)
        parts = [decoder.put(i) for i in as_ids(ids)]
        return "".join([*parts, decoder.end()])

    def batch_decode(self, rows: Iterable[Any], skip_special_tokens: bool = True) -> list[str]:
        """`decode` of every row."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str]:
        """Piece(s) of id(s), space marks included."""
        pieces = [self._piece(i) for i in as_ids(ids)]
        return pieces[0] if isinstance(ids, int) else pieces

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...  # type: ignore[overload-overlap]
    @overload
    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]: ...
    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Id(s) of piece(s); a piece the model lacks gets `unk_token_id`, as in transformers."""
        if isinstance(tokens, str):
            return int(self.sp.piece_to_id(tokens))
        return [int(self.sp.piece_to_id(token)) for token in tokens]

    def _piece(self, token_id: int) -> str:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} lies outside of this tokenizer's {self.vocab_size} pieces")
        return str(self.sp.id_to_piece(token_id))

    def emittable_ranges(self) -> list[tuple[int, int]]:
        """At most 16 half-open ranges that hold every id that this tokenizer makes of some text, byte pieces, and
        control and special tokens: what `generate(vocab_ranges=...)` takes. Ids in gaps shorter than 128 are left in,
        since a head gains nothing by skipping them; ids beyond the model are not.

        Exact for texts tokenized as `encode` does it; training on sampled segmentations reaches more ids.
        """
        from persimmon_fast import vocabulary

        return vocabulary.ranges_of(vocabulary.emittable_ids(self))

    # ------------------------------------------------------------ chat

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        return_tensors: Literal["pt", "np"] | None = None,
        return_dict: bool = False,
        add_bos: bool | None = None,
    ) -> Any:
        """Adept's chat format: `human: {prompt}\\n\\nadept: {output}\\n\\nhuman: {follow_up}\\n\\nadept:`.

        Args:
            messages: `{"role": ..., "content": ...}`, the roles "user" (or "human") and "assistant"
                (or "adept") in turn, "user" first. The format knows no system role.
            tokenize: False returns the text.
            add_generation_prompt: end with `adept:`, so that the model answers; the last message must be
                the user's.
            return_dict: True returns a `BatchEncoding` (transformers 5 does so by default).

        Returns:
            str, list of ids, [1, seqlen] tensor or array, or `BatchEncoding` of those.
        """
        text = _chat_text(messages, add_generation_prompt)
        if not tokenize:
            return text
        encoding = self(text, add_bos=add_bos, return_tensors=return_tensors)
        return encoding if return_dict else encoding["input_ids"]


# ---------------------------------------------------------------- helpers


def _load_sentencepiece(model_proto: bytes, source: str) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    if not model_proto:
        raise ValueError(f"{source} is empty: expected a sentencepiece model")
    try:
        return SentencePieceProcessor(model_proto=model_proto)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{source} is not a sentencepiece model ({len(model_proto)} bytes): {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # covers bad UTF-8 and bad JSON
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_settings(folder: Path, sp: SentencePieceProcessor) -> dict[str, Any]:
    """Keywords of PersimmonTokenizer that the JSON files of a checkpoint folder name."""
    names = (
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "config.json",
    )
    files = {name: _read_json(folder / name) for name in names}
    settings: dict[str, Any] = {}
    for kind in ("bos", "eos", "pad"):
        for name, content in files.items():
            token_id = content.get(f"{kind}_token_id")
            token = content.get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and "token" in name:
                token_id = sp.piece_to_id(token)
                if token_id == sp.unk_id() and token != sp.id_to_piece(token_id):
                    raise ValueError(f"{folder / name}: {kind}_token {token!r} is not in the sentencepiece model")
            if isinstance(token_id, list):  # several stop ids: the first is the token's own
                token_id = token_id[0] if token_id else None
            if isinstance(token_id, int):
                settings[f"{kind}_token_id"] = token_id
                break
    config = files["tokenizer_config.json"]
    if isinstance(config.get("add_bos_token"), bool):
        settings["add_bos"] = config["add_bos_token"]
    if config.get("padding_side") is not None:
        settings["padding_side"] = config["padding_side"]
    for length in (config.get("model_max_length"), files["config.json"].get("max_position_embeddings")):
        if isinstance(length, int) and length < _UNLIMITED:
            settings["model_max_length"] = length
            break
    return settings


def _as_arrays(rows: list[list[int]], masks: list[list[int]] | None, kind: str) -> BatchEncoding:
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"return_tensors={kind!r} needs rows of one length, got lengths {lengths[0]} to {lengths[-1]}: "
            "use padding=True, or truncation=True with padding='max_length'"
        )
    shape = (len(rows), lengths[0] if lengths else 0)
    fields = {"input_ids": rows} | ({} if masks is None else {"attention_mask": masks})
    if kind == "pt":
        import torch

        return BatchEncoding({k: torch.tensor(v, dtype=torch.int64).reshape(shape) for k, v in fields.items()})
    if kind == "np":
        import numpy as np

        return BatchEncoding({k: np.array(v, dtype=np.int64).reshape(shape) for k, v in fields.items()})
    raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {kind!r}")


def _chat_text(messages: Sequence[Message], add_generation_prompt: bool) -> str:
    if not messages:
        raise ValueError("apply_chat_template: messages is empty")
    text = ""
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        accepted = ("user", "human") if index % 2 == 0 else ("assistant", "adept")
        if role not in accepted:
            raise ValueError(
                f"apply_chat_template: messages[{index}] must have role {accepted[0]!r} or {accepted[1]!r}, "
                f"got {role!r} (the user begins, roles alternate, the format has no system role)"
            )
        if not isinstance(content, str):
            raise ValueError(
                f"apply_chat_template: messages[{index}] must have a str 'content', got {type(content).__name__}"
            )
        if index % 2 == 0:
            text += ("\n\n" if index else "") + f"human: {content}"
        else:
            text += f"\n\nadept: {content}"
    if not add_generation_prompt:
        return text
    if len(messages) % 2 == 0:
        raise ValueError(
            "apply_chat_template: add_generation_prompt=True needs a user message at the end, got an assistant's"
        )
    return text + "\n\nadept:"
