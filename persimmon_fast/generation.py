"""Generation: prefill once, then one token per sequence and step until everything has stopped.

The loop works on packed sequences: padding of a prompt is dropped before the first product, and a sequence that has
stopped leaves the batch. Tokens are chosen by `ops.lm_head_argmax` or `ops.lm_head_sample`, which reduce the logits
where they are made. With prompt lookup a step also takes drafted tokens, and keeps those that it would have chosen.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from persimmon_fast import ops
from persimmon_fast.config import PersimmonConfig
from persimmon_fast.kv_cache import PagedKVCache
from persimmon_fast.prompt_lookup import PromptLookup
from persimmon_fast.streaming import StreamingDecoder
from persimmon_fast.tokenizer import PersimmonTokenizer

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

    from persimmon_fast.model import PersimmonModel


class Streamer(Protocol):
    """Receives the prompt, then every token, as in transformers."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


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

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"generation: {name} must be {expected}, got {getattr(self, name)!r}")

        for name in ("max_new_tokens", "max_length", "prompt_lookup_num_tokens"):
            value = getattr(self, name)
            check(name, value is None or (_is_int(value) and value > 0), "an integer > 0 or None")
        check("do_sample", isinstance(self.do_sample, bool), "True or False")
        check("temperature", _is_number(self.temperature) and self.temperature > 0, "a number > 0")
        check("top_k", _is_int(self.top_k) and 0 <= self.top_k < 2**31, "an integer >= 0")
        check("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]")
        check("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "a number in [0, 1]")
        check("repetition_penalty", _is_number(self.repetition_penalty) and self.repetition_penalty > 0, "a number > 0")
        check("eos_token_id", all(_is_int(i) for i in self.eos_token_ids), "an integer, several, or None")
        check("pad_token_id", self.pad_token_id is None or _is_int(self.pad_token_id), "an integer or None")
        for name in ("num_return_sequences", "max_matching_ngram_size"):
            check(name, _is_int(getattr(self, name)) and getattr(self, name) > 0, "an integer > 0")

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
_DEFAULT_NEW_TOKENS = 256


@dataclass
class GenerateOutput:
    """What `generate(..., return_dict_in_generate=True)` returns.

    Attributes:
        sequences: [batch_size * num_return_sequences, prompt + new] int64, prompts as given, padded on the right.
        logprobs: [batch_size * num_return_sequences, new] fp32: log-probability of each new token under the model's
            bare distribution (before temperature, penalty and filters); 0 at padding.
        num_new_tokens: new tokens of each sequence, its stop id included.
    """

    sequences: Tensor
    logprobs: Tensor
    num_new_tokens: list[int]


class GenerationMixin:
    """`generate` for a model with `model.forward_packed` and `lm_head`."""

    generation_config: GenerationConfig
    if TYPE_CHECKING:  # what the model brings
        config: PersimmonConfig
        model: PersimmonModel
        lm_head: nn.Linear

        @property
        def dtype(self) -> torch.dtype: ...
        @property
        def device(self) -> torch.device: ...

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        seed: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: PersimmonTokenizer | None = None,
        streamer: Streamer | None = None,
        return_dict_in_generate: bool = False,
        **settings: Any,
    ) -> Tensor | GenerateOutput:
        """Continues each prompt.

        Args:
            input_ids: [batch_size, prompt] int64; attention_mask: like it, 0 at padding (on either side; padding
                changes no token). inputs_embeds: [batch_size, prompt, hidden_size] instead of input_ids.
            generation_config: defaults of this call; None: the model's. `settings`: its fields, one by one.
            seed: of the draws; None: taken from torch's global generator, so that torch.manual_seed repeats a run.
                A sequence's draws depend on seed, its row and its length alone.
            stop_strings: a sequence also stops once its text contains one of them (needs tokenizer).
            streamer: gets the prompt, then each token (one sequence only).
            return_dict_in_generate: return a GenerateOutput with log-probabilities.
        Returns:
            [batch_size * num_return_sequences, prompt + new] int64; of inputs_embeds, the new tokens alone.
        Raises:
            ValueError: naming the argument; also where prompt and new tokens pass the last position of the model.
        """
        config = _settings(generation_config or self.generation_config, settings)
        prompts = _Prompts.from_padded(self, input_ids, attention_mask, inputs_embeds)
        if streamer is not None and prompts.batch_size * config.num_return_sequences != 1:
            raise ValueError(
                f"streamer needs one sequence, got batch_size={prompts.batch_size}, "
                f"num_return_sequences={config.num_return_sequences}"
            )
        max_new_tokens = _max_new_tokens(config, prompts, self.model.rotary.limit)
        stopping = _Stopping(config, stop_strings, tokenizer, prompts)
        chooser = _TokenChooser(self, config, prompts, seed)
        cache = PagedKVCache(
            self.config,
            prompts.batch_size,
            max(prompts.lengths) + max_new_tokens,
            dtype=self.dtype,
            device=self.device,
        )
        if streamer is not None and input_ids is not None:
            streamer.put(input_ids.cpu())

        seq_len = max(prompts.lengths)
        hidden, _ = self.model.forward_packed(prompts.embeds, prompts.position_ids, prompts.lengths, seq_len, cache)
        last = torch.tensor(prompts.lengths, device=self.device).cumsum(0) - 1
        hidden = hidden[last].repeat_interleave(config.num_return_sequences, dim=0)
        cache.repeat_interleave(config.num_return_sequences)

        lookup = _prompt_lookup(config, prompts)
        sequences = [_Sequence(row) for row in range(cache.batch_size)]
        active = sequences
        while True:
            num_rejected = []
            for sequence, choices in zip(active, chooser(hidden, active), strict=True):
                num_before = len(sequence.tokens)
                for token, logprob in _accepted(choices, sequence.draft):
                    sequence.tokens.append(token)
                    sequence.logprobs.append(logprob)
                    if streamer is not None:
                        streamer.put(torch.tensor([token]))
                    if stopping(sequence.row, token) or len(sequence.tokens) == max_new_tokens:
                        sequence.stopped = True
                        break
                num_rejected.append(1 + len(sequence.draft) - (len(sequence.tokens) - num_before))
            going = [index for index, sequence in enumerate(active) if not sequence.stopped]
            if not going:
                break
            if lookup is not None:
                cache.drop_last(num_rejected)
            if len(going) < len(active):
                cache.keep(going)
                active = [active[index] for index in going]
            if lookup is not None:
                for sequence in active:
                    room = max_new_tokens - len(sequence.tokens) - 1  # the step adds one token more than it drafts
                    sequence.draft = lookup.draft(sequence.row, sequence.tokens, room, len(active))
            hidden = self._decode_step([[s.tokens[-1], *s.draft] for s in active], cache)
        if streamer is not None:
            streamer.end()
        output = _output(prompts, sequences, config)
        return output if return_dict_in_generate else output.sequences

    def _decode_step(self, token_ids: list[list[int]], cache: PagedKVCache) -> Tensor:
        """Final hidden states [num_tokens, hidden_size] after each of these tokens of each sequence."""
        lengths = [len(ids) for ids in token_ids]
        starts = cache.seqlens
        positions = [start + i for start, length in zip(starts, lengths, strict=True) for i in range(length)]
        embeds = self.model.embed_tokens(torch.tensor([i for ids in token_ids for i in ids], device=self.device))
        position_ids = torch.tensor(positions, device=self.device)
        hidden, _ = self.model.forward_packed(embeds, position_ids, lengths, max(positions) + 1, cache)
        return hidden


@dataclass
class _Sequence:
    """A continuation: what it has, and the draft that the current step checks."""

    row: int  # of the output
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    stopped: bool = False


def _accepted(choices: list[tuple[int, float]], draft: list[int]) -> Iterator[tuple[int, float]]:
    """Choices up to the first that differs from the draft: what comes after that was computed from a wrong token."""
    for choice, drafted in zip(choices, [*draft, None], strict=True):
        yield choice
        if choice[0] != drafted:
            return


def _prompt_lookup(config: GenerationConfig, prompts: _Prompts) -> PromptLookup | None:
    if config.prompt_lookup_num_tokens is None:
        return None
    rows = [ids for ids in prompts.token_ids for _ in range(config.num_return_sequences)]
    return PromptLookup(rows, config.prompt_lookup_num_tokens, config.max_matching_ngram_size)


@dataclass(frozen=True)
class _Prompts:
    """Prompts without their padding."""

    padded_ids: Tensor  # [batch_size, prompt], no columns for inputs_embeds
    embeds: Tensor  # [num_tokens, hidden_size]
    position_ids: Tensor  # [num_tokens]: 0, 1, ... in each sequence
    lengths: list[int]
    token_ids: list[list[int]]  # per sequence, for the repetition penalty

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @classmethod
    def from_padded(
        cls, model: GenerationMixin, input_ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None
    ) -> _Prompts:
        device = model.device
        input_ids = None if input_ids is None else input_ids.to(device)
        padded = model.model._embed(input_ids, None if embeds is None else embeds.to(device))
        batch_size, width = padded.shape[:2]
        if mask is not None and mask.shape != padded.shape[:2]:
            raise ValueError(f"attention_mask must be {list(padded.shape[:2])} as the prompts, got {list(mask.shape)}")
        real = torch.ones(batch_size, width, dtype=torch.bool) if mask is None else mask.cpu().bool()
        lengths = real.sum(1).tolist()
        if batch_size == 0 or 0 in lengths:
            raise ValueError(f"generate needs at least one token per prompt, got prompts of {lengths} tokens")
        kept = real.flatten().nonzero().squeeze(1).to(device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
        if input_ids is None:
            padded_ids = torch.empty(batch_size, 0, dtype=torch.long)
            token_ids: list[list[int]] = [[] for _ in lengths]
        else:
            padded_ids = input_ids.cpu()
            token_ids = [row[keep].tolist() for row, keep in zip(padded_ids, real, strict=True)]
        return cls(padded_ids, padded.flatten(0, 1)[kept], positions, lengths, token_ids)


class _TokenChooser:
    """Chooses the next token after each token of a step, from the final hidden states. The choice does not depend on
    what else is in the step: a draw is a function of seed, row and number of new tokens."""

    def __init__(self, model: GenerationMixin, config: GenerationConfig, prompts: _Prompts, seed: int | None) -> None:
        self._weight = model.lm_head.weight
        self._config = config
        self._greedy = not config.do_sample and config.repetition_penalty == 1.0
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        elif not _is_int(seed) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"generate: seed must be an integer of 64 bits, got {seed!r}")
        self._seed = seed
        self._seen: list[set[int]] = []  # of each row of the output
        if config.repetition_penalty != 1.0:
            self._seen = [set(ids) for ids in prompts.token_ids for _ in range(config.num_return_sequences)]

    def __call__(self, hidden: Tensor, active: list[_Sequence]) -> list[list[tuple[int, float]]]:
        """hidden [num_tokens, hidden_size]: of each sequence its last token, then its draft. Returns for each sequence
        the (token, log-probability) after each of these."""
        chosen = ops.lm_head_argmax(hidden, self._weight) if self._greedy else self._sample(hidden, active)
        choices = list(zip(*(values.tolist() for values in chosen), strict=True))
        ends = list(itertools.accumulate(1 + len(sequence.draft) for sequence in active))
        return [choices[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _sample(self, hidden: Tensor, active: list[_Sequence]) -> tuple[Tensor, Tensor]:
        config, rows, device = self._config, hidden.shape[0], hidden.device

        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        places = [(sequence, i) for sequence in active for i in range(1 + len(sequence.draft))]
        penalty_ids = None
        if self._seen:
            # a draft repeats earlier tokens: it brings none that was not seen
            for s in active:
                self._seen[s.row].update(s.tokens)
            seen = [self._seen[s.row] for s, _ in places]
            width = max(len(ids) for ids in seen)
            padded = [[*ids, *[-1] * (width - len(ids))] for ids in seen]
            penalty_ids = torch.tensor(padded, dtype=torch.long, device=device).view(rows, width)
        return ops.lm_head_sample(
            hidden,
            self._weight,
            full(config.temperature if config.do_sample else 0.0, torch.float32),
            full(config.top_k, torch.int32),
            full(config.top_p, torch.float32),
            full(config.min_p, torch.float32),
            full(self._seed, torch.long),
            # one stream per seed: the row in the high half of the counter, the number of new tokens in the low one
            torch.tensor([(s.row << 32) + len(s.tokens) + i for s, i in places], device=device),
            penalty_ids,
            full(config.repetition_penalty, torch.float32) if penalty_ids is not None else None,
        )


class _Stopping:
    """Whether a sequence ends with the token it just got."""

    def __init__(
        self,
        config: GenerationConfig,
        stop_strings: str | Sequence[str] | None,
        tokenizer: PersimmonTokenizer | None,
        prompts: _Prompts,
    ) -> None:
        self._eos = frozenset(config.eos_token_ids)
        self._strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        if not all(isinstance(s, str) and s for s in self._strings):
            raise ValueError(f"stop_strings must be non-empty strings, got {stop_strings!r}")
        rows = [ids for ids in prompts.token_ids for _ in range(config.num_return_sequences)]
        self._decoders: list[StreamingDecoder] = []
        if self._strings:
            if tokenizer is None:
                raise ValueError("stop_strings needs tokenizer=, to turn tokens into text")
            self._decoders = [StreamingDecoder(tokenizer) for _ in rows]
            for decoder, ids in zip(self._decoders, rows, strict=True):
                for token in ids[-1:]:  # so that a first new token keeps its leading space
                    decoder.put(token)
        self._tails = [""] * len(rows)
        self._keep = max((len(s) for s in self._strings), default=1) - 1

    def __call__(self, row: int, token: int) -> bool:
        if token in self._eos:
            return True
        if not self._strings:
            return False
        text = self._tails[row] + self._decoders[row].put(token)
        self._tails[row] = text[len(text) - self._keep :] if self._keep else ""
        return any(s in text for s in self._strings)


def _settings(defaults: GenerationConfig, settings: dict[str, Any]) -> GenerationConfig:
    known = {f.name for f in dataclasses.fields(GenerationConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise TypeError(f"generate: unknown argument {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return defaults.replace(**settings)


def _max_new_tokens(config: GenerationConfig, prompts: _Prompts, limit: int) -> int:
    longest = max(prompts.lengths)
    if config.max_new_tokens is not None:
        wanted = config.max_new_tokens
    elif config.max_length is not None:
        wanted = config.max_length - longest
        if wanted < 1:
            raise ValueError(f"max_length={config.max_length} leaves no room after a prompt of {longest} tokens")
    else:
        wanted = max(1, min(_DEFAULT_NEW_TOKENS, limit - longest))
    if longest + wanted > limit:
        raise ValueError(
            f"prompt ({longest} tokens) + max_new_tokens ({wanted}) = {longest + wanted} passes this model's limit of "
            f"{limit} positions: shorten the prompt or ask for at most {max(0, limit - longest)} tokens"
        )
    return wanted


def _output(prompts: _Prompts, sequences: list[_Sequence], config: GenerationConfig) -> GenerateOutput:
    width = max(len(s.tokens) for s in sequences)
    pad = config.pad_token_id
    if pad is None:
        pad = config.eos_token_ids[0] if config.eos_token_ids else 0
    new = torch.tensor([s.tokens + [pad] * (width - len(s.tokens)) for s in sequences], dtype=torch.long)
    padded_logprobs = torch.tensor([s.logprobs + [0.0] * (width - len(s.logprobs)) for s in sequences])
    prompt_ids = prompts.padded_ids.repeat_interleave(config.num_return_sequences, dim=0)
    device = prompts.embeds.device
    return GenerateOutput(
        sequences=torch.cat([prompt_ids, new], dim=1).to(device),
        logprobs=padded_logprobs.to(device),
        num_new_tokens=[len(s.tokens) for s in sequences],
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
