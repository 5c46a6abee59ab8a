"""Generation: prefill once, then one token per sequence and step until everything has stopped.

The loop works on packed sequences: padding of a prompt is dropped before the first product, and a sequence that has
stopped leaves the batch. Tokens are chosen by `ops.lm_head_argmax` or `ops.lm_head_sample`, which reduce the logits
where they are made. With prompt lookup a step also takes drafted tokens, and keeps those that it would have chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from persimmon_fast.config import PersimmonConfig
from persimmon_fast.decode_graph import DecodeGraphs
from persimmon_fast.decode_step import Continuation
from persimmon_fast.decoding import Decoder, LookupDecoder, StepDecoder
from persimmon_fast.generation_config import GenerationConfig, is_int
from persimmon_fast.kv_cache import PAGE_SIZE, PagedKVCache, pages_of
from persimmon_fast.streaming import StreamingDecoder
from persimmon_fast.token_choice import TokenChoice
from persimmon_fast.tokenizer import PersimmonTokenizer

if TYPE_CHECKING:
    from torch import nn

    from persimmon_fast.model import PersimmonModel

_DEFAULT_NEW_TOKENS = 256


class Streamer(Protocol):
    """Receives the prompt, then every token, as in transformers."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


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
    decode_graphs: DecodeGraphs
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
        use_cuda_graph: bool = True,
        **settings: Any,
    ) -> Tensor | GenerateOutput:
        """Continues each prompt.

        Args:
            input_ids: [batch_size, prompt] int64; attention_mask: like it, 0 at padding (on either side; padding
                changes no token). inputs_embeds: [batch_size, prompt, hidden_size] instead of input_ids; or with them,
                for prompts whose embeddings are not those of the ids (which are then only returned, penalised and
                looked up).
            generation_config: defaults of this call; None: the model's. `settings`: its fields, one by one.
            seed: of the draws; None: taken from torch's global generator, so that torch.manual_seed repeats a run.
                A sequence's draws depend on seed, its row and its length alone.
            stop_strings: a sequence also stops once its text contains one of them (needs tokenizer).
            streamer: gets the prompt, then each token (one sequence only).
            return_dict_in_generate: return a GenerateOutput with log-probabilities.
            use_cuda_graph: on a CUDA device, capture the decode step once per batch size and replay it. The graphs and
                the key/value pool stay with the model; `decode_graphs.free()` gives them back. docs/decode_graph.md
        Returns:
            [batch_size * num_return_sequences, prompt + new] int64; of inputs_embeds alone, the new tokens alone.
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
        choice = TokenChoice(config, _seed(seed))
        capacity = max(prompts.lengths) + max_new_tokens
        num_pages = sum(_pages_needed(n, max_new_tokens, config.num_return_sequences) for n in prompts.lengths)
        use_cuda_graph = use_cuda_graph and config.prompt_lookup_num_tokens is None
        if streamer is not None and input_ids is not None:
            streamer.put(input_ids.cpu())

        with self.decode_graphs.runner(self, num_pages, capacity, use_cuda_graph) as runner:
            cache = runner.cache
            cache.reset(prompts.batch_size)
            hidden = self._prefill(prompts, cache).repeat_interleave(config.num_return_sequences, dim=0)
            cache.repeat_interleave(config.num_return_sequences)
            sequences = prompts.continuations(config.num_return_sequences)
            cache.reserve([max_new_tokens] * len(sequences))
            decoder: Decoder
            if config.prompt_lookup_num_tokens is None:
                decoder = StepDecoder(runner, choice, sequences, hidden, max_new_tokens)
            else:
                decoder = LookupDecoder(self, runner, choice, sequences, hidden, max_new_tokens)
            active = sequences
            while True:
                for sequence, choices in zip(active, decoder.next_tokens(active), strict=True):
                    for token, logprob in choices:
                        sequence.tokens.append(token)
                        sequence.logprobs.append(logprob)
                        if streamer is not None:
                            streamer.put(torch.tensor([token]))
                        if stopping(sequence.row, token) or len(sequence.tokens) == max_new_tokens:
                            sequence.stopped = True
                            break
                going = [index for index, sequence in enumerate(active) if not sequence.stopped]
                if not going:
                    break
                if len(going) < len(active):
                    decoder.keep(going)
                    active = [active[index] for index in going]
        if streamer is not None:
            streamer.end()
        output = _output(prompts, sequences, config)
        return output if return_dict_in_generate else output.sequences

    def _prefill(self, prompts: _Prompts, cache: PagedKVCache) -> Tensor:
        """Final hidden state [batch_size, hidden_size] of each prompt's last token."""
        lengths = prompts.lengths
        hidden = self.model.forward_packed(prompts.embeds, prompts.position_ids, lengths, max(lengths), cache)
        return hidden[torch.tensor(lengths, device=self.device).cumsum(0) - 1]


@dataclass(frozen=True)
class _Prompts:
    """Prompts without their padding."""

    padded_ids: Tensor  # [batch_size, prompt], no columns for inputs_embeds
    embeds: Tensor  # [num_tokens, hidden_size]
    position_ids: Tensor  # [num_tokens]: 0, 1, ... in each sequence
    lengths: list[int]
    token_ids: list[list[int]]  # per sequence, empty for inputs_embeds

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @classmethod
    def from_padded(
        cls, model: GenerationMixin, input_ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None
    ) -> _Prompts:
        device = model.device
        input_ids = None if input_ids is None else input_ids.to(device)
        padded = model.model._embed(
            input_ids if embeds is None else None, None if embeds is None else embeds.to(device)
        )
        batch_size, width = padded.shape[:2]
        if input_ids is not None and input_ids.shape != padded.shape[:2]:
            raise ValueError(
                f"input_ids must be {list(padded.shape[:2])} as inputs_embeds, got {list(input_ids.shape)}"
            )
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

    def continuations(self, repeats: int) -> list[Continuation]:
        prompts = [prompt for prompt in zip(self.lengths, self.token_ids, strict=True) for _ in range(repeats)]
        return [Continuation(row, length, ids) for row, (length, ids) in enumerate(prompts)]


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


def _seed(seed: int | None) -> int:
    if seed is None:
        return int(torch.randint(2**63 - 1, ()))
    if not is_int(seed) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"generate: seed must be an integer of 64 bits, got {seed!r}")
    return seed


def _pages_needed(prompt_length: int, max_new_tokens: int, repeats: int) -> int:
    """Pages of one prompt and its continuations, which share its full pages."""
    shared = prompt_length // PAGE_SIZE
    return shared + repeats * (pages_of(prompt_length + max_new_tokens) - shared)


def _output(prompts: _Prompts, sequences: list[Continuation], config: GenerationConfig) -> GenerateOutput:
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
