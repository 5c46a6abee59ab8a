"""What generate and chat share: a loaded model, one streamed generation, and its figures."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon_fast import SMALL_MODEL
from persimmon_fast.cli import terminal
from persimmon_fast.cli.terminal import UsageError
from persimmon_fast.config import PersimmonConfig
from persimmon_fast.costs import DTYPE_BYTES, model_costs
from persimmon_fast.streaming import StreamingDecoder
from persimmon_fast.tokenizer import PersimmonTokenizer

if TYPE_CHECKING:
    import torch

    from persimmon_fast.model import PersimmonForCausalLM

_MAX_THREADS = 4096
# Weights that one core streams in about 2 ms. Below, meeting other threads some twenty times a token costs as much as
# they save, and on a busy machine far more: a 10 MB model on two cores beside other work made 456 to 897 tokens/s with
# one thread, 11 to 21 with two.
_SMALL_BYTES = 32e6


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that generate and chat share; None: what the model's generation_config.json says, or automatic."""

    model: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    max_new_tokens: int | None = None
    greedy: bool = False
    sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    add_bos: bool | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        def check(option: str, value: float | None, fits: Callable[[float], bool], expected: str) -> None:
            if value is not None and not fits(value):
                raise UsageError(f"{option} must be {expected}, got {value}")

        check("--max-new-tokens", self.max_new_tokens, lambda x: x >= 1, "at least 1")
        check("--threads", self.threads, lambda x: 1 <= x <= _MAX_THREADS, f"between 1 and {_MAX_THREADS}")
        check("--temperature", self.temperature, lambda x: 0 <= x < math.inf, "a number >= 0")
        check("--top-k", self.top_k, lambda x: 0 <= x < 2**31, "at least 0")
        check("--top-p", self.top_p, lambda x: 0 < x <= 1, "above 0 and at most 1")
        check("--min-p", self.min_p, lambda x: 0 <= x <= 1, "between 0 and 1")
        check("--repetition-penalty", self.repetition_penalty, lambda x: 0 < x < math.inf, "a number > 0")
        check("--seed", self.seed, lambda x: -(2**63) <= x < 2**63, "an integer of 64 bits")
        if self.dtype not in ("auto", *DTYPE_BYTES):
            raise UsageError(f"--dtype must be auto, {', '.join(DTYPE_BYTES)}, got {self.dtype}")
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", self.device):
            raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {self.device}")
        if "" in self.stop:
            raise UsageError("--stop must not be empty")
        sampling = {"--sample": self.sample or None} | self._filters
        if (self.greedy or self.temperature == 0) and (given := [name for name, value in sampling.items() if value]):
            greedy = "--greedy" if self.greedy else "--temperature 0"
            raise UsageError(f"{greedy} takes the most likely token, so {', '.join(given)} cannot apply: drop one")

    @property
    def _filters(self) -> dict[str, float | None]:
        return {
            "--temperature": self.temperature,
            "--top-k": self.top_k,
            "--top-p": self.top_p,
            "--min-p": self.min_p,
        }

    def generation_settings(self) -> dict[str, Any]:
        """Keywords of `generate`: what was given, and whether that means to sample."""
        do_sample = None
        if self.greedy or self.temperature == 0:
            do_sample = False
        elif self.sample or any(value is not None for value in self._filters.values()):
            do_sample = True
        given = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": do_sample,
            "temperature": self.temperature or None,  # 0: said by do_sample
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class Generation:
    """One generation, finished or not.

    Attributes:
        prompt_tokens: number of them.
        token_ids: new tokens, a stop id included.
        logprobs: of each new token under the bare distribution; None where the generation was interrupted.
        text: what they say, without the stop string.
        finish_reason: "stop" (a stop id or stop string), "length", or "interrupted".
        prefill_seconds: from the prompt to the first token; None where none came.
        decode_seconds: from the first token to the last one.
        seed: of the draws.
    """

    prompt_tokens: int
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    text: str = ""
    finish_reason: str = "interrupted"
    prefill_seconds: float | None = None
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second; the first one belongs to the prefill."""
        return (len(self.token_ids) - 1) / self.decode_seconds if self.decode_seconds > 0 else None

    @property
    def mean_context(self) -> float:
        """Tokens in the cache during a decode step, on average: step i of n sees prompt + i of them."""
        return self.prompt_tokens + len(self.token_ids) / 2


class StopFilter:
    """Passes text on up to the first of some stop strings; what may be the start of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = stops
        self._held = ""

    def put(self, text: str) -> str:
        """What became final with `text`."""
        self._held += text
        if self.found:
            return ""
        ends = [self._held.index(stop) for stop in self._stops if stop in self._held]
        if ends:
            self.found = True
            return self._held[: min(ends)]
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return self._release(len(self._held) - length)
        return self._release(len(self._held))

    def end(self) -> str:
        """The rest, which started no stop string after all."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released


class _Stream:
    """A streamer for `generate`: writes the new text piece by piece and records tokens and times. `synchronize` waits
    for the model's device."""

    def __init__(
        self,
        tokenizer: PersimmonTokenizer,
        stops: Sequence[str],
        write: Callable[[str], object],
        synchronize: Callable[[], object] = lambda: None,
    ) -> None:
        self.result_text = ""
        self.token_ids: list[int] = []
        self.started: float | None = None
        self.first = self.last = 0.0
        self.stop_filter = StopFilter(stops)
        self._decoder = StreamingDecoder(tokenizer)
        self._write = write
        self._synchronize = synchronize

    def put(self, value: torch.Tensor) -> None:
        ids = value.flatten().tolist()
        if self.started is None:  # the prompt: decoded so that the text goes on from it, but not written
            for token_id in ids:
                self._decoder.put(token_id)
            self._synchronize()  # what a GPU still does is no part of the prefill
            self.started = time.perf_counter()
            return
        self.last = time.perf_counter()  # a GPU has finished the token: its id is here
        if not self.token_ids:
            self.first = self.last
        self.token_ids += ids
        for token_id in ids:
            self._emit(self.stop_filter.put(self._decoder.put(token_id)))

    def end(self) -> None:
        self._emit(self.stop_filter.put(self._decoder.end()) + self.stop_filter.end())

    def interrupted(self) -> None:
        """Ends without the bytes of an unfinished character."""
        self._emit(self.stop_filter.end())

    def _emit(self, text: str) -> None:
        if text:
            self.result_text += text
            self._write(text)


class Session:
    """A model and its tokenizer, ready to generate.

    Raises (on opening):
        CheckpointError, ConfigError, FileNotFoundError, ValueError: the folder holds no model that can be loaded.
    """

    def __init__(self, options: Options) -> None:
        start = time.perf_counter()
        folder = options.model or SMALL_MODEL
        if options.model is None and not folder.is_dir():
            raise FileNotFoundError(f"the model that ships with persimmon_fast is not at {folder}: give --model FOLDER")
        self.name = folder.resolve().name
        self.is_shipped = options.model is None
        with terminal.transient_line(f"Loading {self.name} ...", not options.quiet):
            # cheap and likely to be wrong first: importing torch takes a second
            self.config = PersimmonConfig.from_pretrained(folder)
            self.tokenizer = PersimmonTokenizer.from_pretrained(folder)
            if self.tokenizer.vocab_size > self.config.vocab_size:
                raise ValueError(
                    f"{folder}: the tokenizer has {self.tokenizer.vocab_size} pieces, the model a vocabulary of "
                    f"{self.config.vocab_size}: they do not belong together"
                )
            self._load(folder, options)
        self._options, self._settings = options, options.generation_settings()
        self.load_seconds = time.perf_counter() - start

    def _load(self, folder: Path, options: Options) -> None:
        import torch

        from persimmon_fast.cli.device import choose_device
        from persimmon_fast.model import PersimmonForCausalLM

        self.device = torch.device(choose_device(options.device))
        self.model: PersimmonForCausalLM = PersimmonForCausalLM.from_pretrained(
            folder, dtype=options.dtype, device=self.device, progress=not options.quiet
        )
        self._synchronize()
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        self.costs = model_costs(self.config, self.dtype)
        threads = options.threads
        if threads is None and self.device.type == "cpu" and self.costs.weight_bytes_per_token < _SMALL_BYTES:
            threads = 1
        if threads is not None:
            torch.set_num_threads(threads)
        self.num_threads = torch.get_num_threads()

    def _synchronize(self) -> None:
        """Waits until the model's device has done all that it was given."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_device_memory(self) -> int | None:
        """Most bytes of GPU memory that tensors took so far; None on the CPU."""
        import torch

        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    @property
    def max_positions(self) -> int:
        """Prompt and new tokens together never exceed this."""
        return self.model.model.rotary.limit

    @property
    def samples(self) -> bool:
        return bool(self._settings.get("do_sample", self.model.generation_config.do_sample))

    def header(self) -> list[str]:
        """What is about to speak, in short parts."""
        import torch

        from persimmon_fast import ops

        parts = [self.name, f"{terminal.count_text(self.costs.total_parameters)} parameters", self.dtype]
        if self.device.type == "cuda":
            parts.append(f"{self.device} ({torch.cuda.get_device_name(self.device)})")
        else:
            parts += [str(self.device), f"{self.num_threads} thread" + "s" * (self.num_threads != 1)]
        if ops._FORCE_REFERENCE:
            parts.append("reference ops (slow)")
        return [*parts, f"loaded in {self.load_seconds:.1f} s"]

    def encode(self, prompt: str) -> list[int]:
        ids = self.tokenizer.encode(prompt, add_bos=self._options.add_bos)
        if not ids:
            raise UsageError("the prompt is empty: give some text, or leave out --no-bos")
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation, ready for the model's answer."""
        ids: list[int] = self.tokenizer.apply_chat_template(messages, add_bos=self._options.add_bos)
        return ids

    def generate(self, ids: Sequence[int], write: Callable[[str], object], **settings: Any) -> Generation:
        """Continues a prompt of token ids; `write` gets the new text in pieces that are final. Ctrl-C ends the
        generation, not the process: the result then says "interrupted"."""
        import torch

        from persimmon_fast.generation import GenerateOutput

        options = self._options
        # torch's own default seed is a constant: every run would draw the same; few digits, to be typed again
        seed = random.randrange(10**4) if options.seed is None else options.seed
        stream = _Stream(self.tokenizer, options.stop, write, self._synchronize)
        result = Generation(prompt_tokens=len(ids), seed=seed)
        try:
            output = self.model.generate(
                torch.tensor([ids]),
                seed=seed,
                stop_strings=options.stop or None,
                tokenizer=self.tokenizer,
                streamer=stream,
                return_dict_in_generate=True,
                **(self._settings | settings),
            )
        except KeyboardInterrupt:
            stream.interrupted()
        else:
            assert isinstance(output, GenerateOutput)
            result.logprobs = output.logprobs[0].tolist()
            stop_ids = self.model.generation_config.eos_token_ids
            stopped = stream.stop_filter.found or stream.token_ids[-1] in stop_ids
            result.finish_reason = "stop" if stopped else "length"
        result.text, result.token_ids = stream.result_text, stream.token_ids
        if stream.token_ids and stream.started is not None:
            result.prefill_seconds = stream.first - stream.started
            result.decode_seconds = stream.last - stream.first
        return result
