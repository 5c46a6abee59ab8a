"""Our tokenizer as one of transformers, for `pipeline`, lm-evaluation-harness and whatever else asks for such a one.

What transformers makes of the bare `tokenizer.model` differs by version: LlamaTokenizer of 4.57 gives sentencepiece's
ids, its fast twin only where protobuf is installed, and AutoTokenizer of 5 loses BOS and the space in front of a text.
So the fast tokenizer is built here, piece by piece, and gives the same ids in every version. Where two segmentations of
a text have the same score, the two libraries may choose differently: sentencepiece adds the scores in fp32.

Source: the fields of sentencepiece's file format (google/sentencepiece, src/sentencepiece_model.proto).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon_fast.streaming import SPACE_MARK

if TYPE_CHECKING:
    from persimmon_fast.tokenizer import PersimmonTokenizer

_NEVER = -1e6  # the score of a piece that no text may become: below any sum of scores of real pieces
_UNIGRAM = 1  # TrainerSpec.model_type
_NORMAL, _USER_DEFINED = 1, 4  # SentencePiece.type
_SETTINGS = {
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def to_transformers(tokenizer: PersimmonTokenizer) -> Any:
    """A `PreTrainedTokenizerFast` of transformers with the ids, BOS, padding and decoded texts of `tokenizer`.

    `save_for_both` puts it into a model's folder.

    Args:
        tokenizer: a PersimmonTokenizer of a Unigram model. A text that spells a special token ("<s>") stays a text, as
            with it, if the vocabulary has the characters. A user-defined symbol that the model's normalisation would
            change (a full-width one, a tab) is not recognised.
    Raises:
        ValueError: it is no Unigram model.
        ImportError: transformers is not installed.
    """
    from transformers import PreTrainedTokenizerFast

    names: dict[str, Any] = {f"{kind}_token": piece for kind, piece in _special_pieces(tokenizer).items()}
    if tokenizer.model_max_length is not None:
        names["model_max_length"] = tokenizer.model_max_length
    return PreTrainedTokenizerFast(
        tokenizer_object=_fast_tokenizer(tokenizer), padding_side=tokenizer.padding_side, **_SETTINGS, **names
    )


def save_for_both(tokenizer: PersimmonTokenizer, folder: str | os.PathLike[str]) -> None:
    """Writes a tokenizer that `PersimmonTokenizer.from_pretrained` and transformers' `AutoTokenizer.from_pretrained`
    both load, with the same ids: `tokenizer.model` for the one, `tokenizer.json` for the other, and one
    `tokenizer_config.json`. Needs the package tokenizers alone.

    Raises:
        ValueError: as `to_transformers`.
        ImportError: tokenizers is not installed.
    """
    path = Path(folder)
    fast = _fast_tokenizer(tokenizer)
    tokenizer.save_pretrained(path)
    fast.save(str(path / "tokenizer.json"))
    config = path / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", **_SETTINGS}
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def is_unigram(tokenizer: PersimmonTokenizer) -> bool:
    """Whether `tokenizer` is of the kind that the functions above take, as Persimmon's is."""
    return _sections(tokenizer)[1].get(3, _UNIGRAM) == _UNIGRAM


def _special_pieces(tokenizer: PersimmonTokenizer) -> dict[str, str]:
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    return {kind: tokenizer.sp.id_to_piece(i) for kind, i in ids.items() if i is not None}


def _sections(tokenizer: PersimmonTokenizer) -> tuple[list[bytes], dict[int, Any], dict[int, Any]]:
    """Pieces, TrainerSpec and NormalizerSpec of the model."""
    fields = list(_fields(tokenizer.model_proto))
    pieces = [value for number, value in fields if number == 1]
    trainer, normalizer = (dict(_fields(dict(fields).get(number, b""))) for number in (2, 3))
    return pieces, trainer, normalizer


def _fast_tokenizer(tokenizer: PersimmonTokenizer) -> Any:
    """A `tokenizers.Tokenizer`."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import Unigram

    pieces, trainer, normalizer = _sections(tokenizer)
    if (model_type := trainer.get(3, _UNIGRAM)) != _UNIGRAM:
        raise ValueError(f"to_transformers: the sentencepiece model must be Unigram (type 1), got type {model_type}")
    unk_id = tokenizer.sp.unk_id()
    fast = Tokenizer(Unigram(_scored(pieces), unk_id=unk_id, byte_fallback=bool(trainer.get(35, 0))))
    steps: list[Any] = []
    if charsmap := normalizer.get(2):
        steps.append(normalizers.Precompiled(charsmap))
    if normalizer.get(4, 1):  # remove_extra_whitespaces
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex("^ | $"), "")]
    if normalizer.get(3, 1):  # add_dummy_prefix
        steps.append(normalizers.Prepend(SPACE_MARK))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE_MARK)])
    spaces = min(tokenizer.num_dropped_spaces, 1000)
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", spaces, 0)]
    )
    if tokenizer.add_bos and tokenizer.bos_token_id is not None:
        bos = (_special_pieces(tokenizer)["bos"], tokenizer.bos_token_id)
        fast.post_processor = processors.TemplateProcessing(single=[bos[0], "$A"], special_tokens=[bos])
    return fast


def _scored(pieces: Iterable[bytes]) -> list[tuple[str, float]]:
    """Pieces with the scores that make the Viterbi of `tokenizers`, which knows no kinds of pieces, choose as
    sentencepiece's does."""
    result = []
    for piece in pieces:
        fields = dict(_fields(piece))
        score = struct.unpack("<f", fields.get(2, bytes(4)))[0]
        result.append((fields[1].decode(), score if fields.get(3, _NORMAL) in (_NORMAL, _USER_DEFINED) else _NEVER))
    return result


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message: int of a varint, bytes of anything else."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}.get(kind) or varint()
        yield number, message[position : position + length]
        position += length
