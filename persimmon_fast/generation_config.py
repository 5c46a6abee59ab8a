"""The settings of `generate`, and the file that they are stored in."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon_fast.config import PersimmonConfig

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How tokens are chosen and when to stop: generation_config.json, or keywords of `generate`.

    Args:
        max_new_tokens: tokens to generate at most; None: max_length, else 256 or what fits before the position limit.
        max_length: prompt and new tokens together, None: no such limit. max_new_tokens goes before it.
        do_sample: draw from the distribution; False: the most likely token.
        temperature: divides the logits, > 0. top_k: keep the k most likely tokens, 0: all. top_p: keep the most likely
            tokens that together reach this probability, 1: all. min_p: keep tokens at least this many times as likely
            as the most likely one, 0: all. These four apply when do_sample is set.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occurred, 1: none.
        eos_token_id: one id or several; a sequence stops after any of them. None: none.
        pad_token_id: fills sequences that stopped early; None: the first eos id, else 0.
        num_return_sequences: independent continuations per prompt.
        prompt_lookup_num_tokens: check up to that many tokens per step (15 at most) that earlier text suggests; None:
            none. Same tokens, fewer steps where text repeats; see docs/prompt_lookup.md.
        max_matching_ngram_size: tokens at the end that earlier text must share to suggest some, at most; down to 2.
        vocab_ranges: up to 16 half-open, ascending ranges (begin, end) of the tokens that may be generated; the head
            does not read the others, whose logits count as -inf. None: all. `PersimmonTokenizer.emittable_ranges`.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    num_return_sequences: int = 1
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 3
    vocab_ranges: Sequence[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"generation: {name} must be {expected}, got {getattr(self, name)!r}")

        for name in ("max_new_tokens", "max_length", "prompt_lookup_num_tokens"):
            value = getattr(self, name)
            check(name, value is None or (is_int(value) and value > 0), "an integer > 0 or None")
        check("do_sample", isinstance(self.do_sample, bool), "True or False")
        check("temperature", _is_number(self.temperature) and self.temperature > 0, "a number > 0")
        check("top_k", is_int(self.top_k) and 0 <= self.top_k < 2**31, "an integer >= 0")
        check("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]")
        check("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "a number in [0, 1]")
        check("repetition_penalty", _is_number(self.repetition_penalty) and self.repetition_penalty > 0, "a number > 0")
        check("eos_token_id", all(is_int(i) for i in self.eos_token_ids), "an integer, several, or None")
        check("pad_token_id", self.pad_token_id is None or is_int(self.pad_token_id), "an integer or None")
        for name in ("num_return_sequences", "max_matching_ngram_size"):
            check(name, is_int(getattr(self, name)) and getattr(self, name) > 0, "an integer > 0")
        if self.vocab_ranges is not None:
            check("vocab_ranges", _are_ranges(self.vocab_ranges), "pairs (begin, end), ascending, or None")
            # lists of a JSON file too: they are hashed
            object.__setattr__(self, "vocab_ranges", tuple((begin, end) for begin, end in self.vocab_ranges))
            held = all(any(begin <= i < end for begin, end in self.vocab_ranges) for i in self.eos_token_ids)
            check("vocab_ranges", held, f"ranges that hold eos_token_id {list(self.eos_token_ids)}")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_model_config(cls, config: PersimmonConfig) -> Self:
        return cls(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], config: PersimmonConfig) -> Self:
        """generation_config.json of the folder where there is one, else the ids of the model's config. Fields that this
        loop has no counterpart for (beams, ...) are reported once, since ignoring them changes what is generated."""
        defaults = cls.from_model_config(config)
        path = Path(folder) / "generation_config.json"
        if not path.is_file():
            return defaults
        try:
            named = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file ({error})") from error
        if not isinstance(named, dict):
            raise ValueError(f"{path}: expected a JSON object, found {type(named).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            loaded = defaults.replace(**{k: v for k, v in named.items() if k in known and v is not None})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        ignored = sorted(k for k in named if k not in known and k not in _HARMLESS_KEYS and named[k] is not None)
        if ignored:
            warnings.warn(f"{path}: ignored, not supported by generate: {', '.join(ignored)}", stacklevel=3)
        return loaded

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the fields that differ from the defaults to generation_config.json, in one step."""
        default = type(self)()
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {k: v for k, v in named.items() if v != getattr(default, k)}
        path = Path(folder) / "generation_config.json"
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(changed, indent=2, default=list) + "\n", encoding="utf-8")
        unfinished.replace(path)


# Keys of generation_config.json that change no token here.
_HARMLESS_KEYS = {
    "_from_model_config",
    "bos_token_id",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "return_dict_in_generate",
    "transformers_version",
    "use_cache",
}


def _are_ranges(value: object) -> bool:
    """Whether these are pairs of integers 0 <= begin < end, each behind the one before."""
    if not isinstance(value, Sequence) or not value:
        return False
    if not all(isinstance(pair, Sequence) and len(pair) == 2 and all(is_int(i) for i in pair) for pair in value):
        return False
    bounds = [i for pair in value for i in pair]
    ascending = all(begin < end for begin, end in value) and all(a <= b for a, b in itertools.pairwise(bounds))
    return ascending and bounds[0] >= 0


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
