"""Which ids of a vocabulary a tokenizer can make at all: the rows of the head that generation needs.

A sentencepiece Unigram model writes the segmentation of highest score. A piece of which two others together score more
is therefore never written, in whatever text; neither are unused pieces and ids beyond the model. A language model that
has seen tokenized text alone has learned nothing about them, and a head that skips their rows reads less.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from persimmon_fast.streaming import SPACE_MARK

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

    from persimmon_fast.tokenizer import PersimmonTokenizer

# A shorter gap is read: a CUDA kernel leaves out whole tiles of 128 tokens, so most of it would be read there anyway,
# and 128 rows are one 2,000th of Persimmon's head.
MIN_GAP = 128
MAX_RANGES = 16  # of one head
_TIE = 1e-3  # sums of scores this close may go either way, as they are rounded to fp32 in the order of the text
_GUARDS = ("\ue000", "\uf8ff", "\U000f0000", "\U0010fffd")  # private characters, in no ordinary vocabulary


def emittable_ids(tokenizer: PersimmonTokenizer) -> list[int]:
    """Ascending: pieces that some text is tokenized to, byte pieces, and control and special tokens, with which a text
    can end though it never contains them."""
    sp = tokenizer.sp
    kept = {i for i in range(sp.vocab_size()) if sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i)}
    kept |= tokenizer.special_ids
    ids = [i for i in range(sp.vocab_size()) if i not in kept and not sp.is_unused(i)]
    return sorted(kept.union(_written(tokenizer, ids)))


def ranges_of(ids: Iterable[int], min_gap: int = MIN_GAP, max_ranges: int = MAX_RANGES) -> list[tuple[int, int]]:
    """Half-open ranges that hold these ascending ids; gaps of fewer than min_gap, and then the shortest ones until
    max_ranges are left, are part of them."""
    ids = list(ids)
    gaps = sorted((after - before - 1, after) for before, after in pairwise(ids))
    starts = sorted(after for gap, after in gaps[max(0, len(gaps) - max_ranges + 1) :] if gap >= max(1, min_gap))
    return [(begin, last + 1) for begin, last in _bounds(ids, starts)]


def _bounds(ids: list[int], starts: list[int]) -> Iterable[tuple[int, int]]:
    """(first, last) id of the runs that begin with ids[0] and with each of starts."""
    begin = ids[0]
    for before, after in pairwise(ids):
        if starts and after == starts[0]:
            yield begin, before
            begin = starts.pop(0)
    yield begin, ids[-1]


def _written(tokenizer: PersimmonTokenizer, ids: list[int]) -> list[int]:
    """Which of these pieces stand alone where their text stands alone; in doubt, they do."""
    sp = tokenizer.sp
    # Between two characters that no piece holds, no neighbour and no added space can reach a piece.
    held = {character for i in ids for character in sp.id_to_piece(i)}
    guard = next((g for g in _GUARDS if g not in held and g in sp.normalize(g)), None)
    if guard is None:
        return ids
    marks = [i for i in sp.encode(guard) if sp.id_to_piece(i) != SPACE_MARK]
    texts = [guard + sp.id_to_piece(i).replace(SPACE_MARK, " ") + guard for i in ids]
    return [i for i, found in zip(ids, sp.encode(texts), strict=True) if _can_win(sp, i, _between(found, marks))]


def _can_win(sp: SentencePieceProcessor, piece_id: int, found: list[int]) -> bool:
    """Whether sentencepiece, which made `found` of the text of a piece, may make that piece of it in some context."""
    if "".join(sp.id_to_piece(i) for i in found) != sp.id_to_piece(piece_id):
        return True  # a normalisation changed the text, so nothing was compared
    return found == [piece_id] or sp.get_score(piece_id) > sum(sp.get_score(i) for i in found) - _TIE


def _between(found: list[int], marks: list[int]) -> list[int]:
    """What lies between the first and the last occurrence of marks."""
    places = [n for n in range(len(found)) if found[n : n + len(marks)] == marks]
    return found[places[0] + len(marks) : places[-1]]
