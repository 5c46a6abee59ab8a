"""The decode step as a CUDA graph: captured once per batch size, replayed per token. docs/decode_graph.md

A step of Persimmon-8B is hundreds of launches, which the host may need longer to make than the GPU to run. A replay is
one. A graph holds addresses, so the tensors of a step, the pool of keys and values and the captured steps
outlive the `generate` call: `DecodeGraphs` owns them, one per model. Where a step cannot be captured it runs op by op.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

from persimmon_fast import _C, ops
from persimmon_fast.decode_step import DecodeStep
from persimmon_fast.kv_cache import PagedKVCache, pages_of
from persimmon_fast.token_choice import TokenChoice

if TYPE_CHECKING:
    from persimmon_fast.generation import GenerationMixin

MAX_GRAPHS = 16  # per model; the one that was captured first makes room
# A pool that moves is captured again, so it is larger than asked for by up to 512 tokens: a chat, whose prompt grows
# from call to call, then captures once per so many.
PAGES_ROUNDED_TO = 8


class Replayable(Protocol):
    """A captured step, as torch.cuda.CUDAGraph."""

    def replay(self) -> None: ...


Capture = Callable[[Callable[[], None]], Replayable]


@contextmanager
def _dependent_launches() -> Iterator[None]:
    """Kernels of this thread may order their weights before the kernels in front of them are done: nothing in a decode
    step writes weights. csrc/cuda/dependent_launch.cuh"""
    before = _C.set_dependent_launches(True)
    try:
        yield
    finally:
        _C.set_dependent_launches(before)


class CudaGraphCapture:
    """Captures steps on one device. The graphs share one memory pool: no tensor of a step outlives its replay, and
    replays follow one another on a stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], None]) -> Replayable:
        graph = torch.cuda.CUDAGraph()
        # The outer block gives the current stream back also where the end of a failed capture raises inside the inner
        # one. thread_local: what other threads allocate meanwhile does not disturb the capture.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            _dependent_launches(),
        ):
            run()
        return graph


def cuda_capture(device: torch.device) -> Capture | None:
    """How steps are captured on this device; None: not at all."""
    return CudaGraphCapture(device) if device.type == "cuda" else None


class StepRunner:
    """Runs steps op by op. The cache holds the sequences of one `generate` call."""

    def __init__(self, model: GenerationMixin, cache: PagedKVCache, capacity: int) -> None:
        """capacity: tokens of the longest sequence."""
        self.cache = cache
        self._model = model
        self._num_columns = pages_of(capacity)
        self._depends_on_length = model.model.rotary.depends_on_length
        # steps that are enqueued before the host has read the one before; a CPU would only compute them in vain
        self.num_ahead = int(cache.device.type == "cuda" and not self._depends_on_length)

    def step(self, batch_size: int, choice: TokenChoice) -> DecodeStep:
        """A step for that many sequences, to be loaded."""
        return DecodeStep(
            self._model,
            self.cache,
            batch_size,
            self._num_columns,
            draws=choice.draws,
            penalises=choice.penalises,
            vocab_ranges=choice.config.vocab_ranges,
        )

    def launch(self, step: DecodeStep) -> None:
        if self._depends_on_length:
            step.serve(max(self.cache.seqlens) + 1)
        self._enqueue(step)
        self.cache.advance()

    def shrinks(self, num_rows: int, num_going: int) -> bool:
        """Whether a step of num_rows gives way to a smaller one when num_going of its rows go on."""
        return num_going < num_rows

    def _enqueue(self, step: DecodeStep) -> None:
        step.run()


class GraphRunner(StepRunner):
    """Runs the first step of a batch size op by op, which loads its kernels, and captures and replays the others."""

    def __init__(self, model: GenerationMixin, cache: PagedKVCache, graphs: DecodeGraphs) -> None:
        super().__init__(model, cache, model.model.rotary.limit)
        self._graphs = graphs
        self.num_ahead = 1

    def step(self, batch_size: int, choice: TokenChoice) -> DecodeStep:
        key = (batch_size, choice.draws, choice.penalises, choice.config.vocab_ranges)
        return self._graphs.step(key, lambda: super(GraphRunner, self).step(batch_size, choice))

    def shrinks(self, num_rows: int, num_going: int) -> bool:
        # Each size is a capture, while rows that have stopped cost little beside the weights: not before half are idle.
        return num_going <= num_rows // 2

    def _enqueue(self, step: DecodeStep) -> None:
        self._graphs.enqueue(step)


class DecodeGraphs:
    """The captured steps of one model and what they hold in memory: see `free`.

    Args:
        capture_on: how to capture on a device, None: not there. For tests.
    """

    def __init__(self, capture_on: Callable[[torch.device], Capture | None] = cuda_capture) -> None:
        self._capture_on = capture_on
        self._capture: Capture | None = None
        self._cache: PagedKVCache | None = None
        self._signature: Hashable = None  # what the graphs were captured with
        self._steps: dict[Hashable, DecodeStep] = {}
        self._graphs: dict[DecodeStep, Replayable | None] = {}  # None: it has run, so that its kernels are loaded
        self._failure: str | None = None
        self._warned: set[str] = set()
        self._in_use = threading.Lock()
        self._last_use: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return DecodeGraphs, ()  # a copy of the model captures its own

    @contextmanager
    def runner(
        self, model: GenerationMixin, num_pages: int, capacity: int, use_cuda_graph: bool
    ) -> Iterator[StepRunner]:
        """What runs the steps of one `generate` call, with a cache of at least num_pages.

        Args:
            capacity: tokens of the longest sequence.
            use_cuda_graph: whether steps may be captured.
        """
        dtype, device = model.dtype, model.device
        if use_cuda_graph and self._capture_on(device) is not None:
            reason = self._failure or _obstacle(model)
            if reason is None and not self._in_use.acquire(blocking=False):
                reason = "another generate call of this model is running"
            if reason is None:
                try:
                    yield GraphRunner(model, self._borrow(model, num_pages), self)
                finally:
                    self._give_back()
                    self._in_use.release()
                return
            self._warn(reason, stacklevel=6)
        cache = PagedKVCache(model.config, 1, 0, num_pages=num_pages, dtype=dtype, device=device)
        yield StepRunner(model, cache, capacity)

    def free(self) -> None:
        """Gives back the captured steps and the pool of keys and values that they work on, which is as large as the
        largest `generate` call needed. The next call captures again."""
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError("decode_graphs.free: a generate call of this model is running")
        self._drop()
        self._failure = None
        self._in_use.release()

    def step(self, key: Hashable, make: Callable[[], DecodeStep]) -> DecodeStep:
        if key not in self._steps:
            if len(self._steps) == MAX_GRAPHS:
                self._synchronize()
                self._graphs.pop(self._steps.pop(next(iter(self._steps))), None)
            self._steps[key] = make()
        return self._steps[key]

    def enqueue(self, step: DecodeStep) -> None:
        if step in self._graphs and self._graphs[step] is None and self._failure is None:
            self._try_to_capture(step)
        graph = self._graphs.get(step)
        if graph is not None:
            graph.replay()
        else:
            step.run()
            self._graphs[step] = None

    def _try_to_capture(self, step: DecodeStep) -> None:
        assert self._capture is not None
        try:
            self._graphs[step] = self._capture(step.run)
        except Exception as error:  # whatever it is, the step can still run op by op
            first = error.__context__ or error  # the end of a failed capture raises too
            self._failure = f"the capture failed: {type(first).__name__}: {first}"
            self._warn(self._failure, stacklevel=10)

    def _borrow(self, model: GenerationMixin, num_pages: int) -> PagedKVCache:
        """The cache, with room for num_pages. Everything captured stays valid or is gone."""
        signature = _signature(model)
        if self._cache is None or signature != self._signature or self._cache.num_pages < num_pages:
            self._drop()
            self._failure = None
            self._capture = self._capture_on(model.device)
            rounded = -(-num_pages // PAGES_ROUNDED_TO) * PAGES_ROUNDED_TO
            self._cache = PagedKVCache(model.config, 1, 0, num_pages=rounded, dtype=model.dtype, device=model.device)
            self._signature = signature
        if self._last_use is not None:  # on another stream, perhaps
            torch.cuda.current_stream(model.device).wait_event(self._last_use)
        return self._cache

    def _give_back(self) -> None:
        if self._failure is not None:
            self._drop()
        elif self._cache is not None and self._cache.device.type == "cuda":
            self._last_use = torch.cuda.Event()
            self._last_use.record(torch.cuda.current_stream(self._cache.device))

    def _drop(self) -> None:
        self._synchronize()
        self._steps.clear()
        self._graphs.clear()
        self._cache = self._capture = self._last_use = None

    def _synchronize(self) -> None:
        """A step that nobody waited for may still run on what is freed next."""
        if self._cache is not None and self._cache.device.type == "cuda":
            torch.cuda.synchronize(self._cache.device)

    def _warn(self, reason: str, stacklevel: int) -> None:
        """Once per reason; the levels lead to the caller of `generate`."""
        if reason not in self._warned:
            self._warned.add(reason)
            message = f"generate runs its decode steps op by op, not as one CUDA graph: {reason}"
            warnings.warn(message, stacklevel=stacklevel)


def _obstacle(model: GenerationMixin) -> str | None:
    """Why the steps of this model cannot be captured."""
    if model.model.rotary.depends_on_length:
        return f"the rotary table of rope type {model.config.rope_type} changes with the length of the sequence"
    decode_ops = ("qkv_norm_rope_paged", "paged_attention")
    if not ops.has_kernels(model.lm_head.weight, *decode_ops, head_dim=model.config.head_dim):
        return "some ops run the pure-torch reference"
    modules = list(model.model.modules())
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return "a module has a forward hook, which a replay would not call"
    if any(module.training for module in modules):
        return "the model is in training mode: call eval()"
    return None


def _signature(model: GenerationMixin) -> Hashable:
    """Equal where a captured step still does what running it would: same weights in the same place, same ops."""
    weights = (*model.model.parameters(), model.lm_head.weight)
    rotary = model.model.rotary
    return (
        tuple((w.data_ptr(), w.dtype, w.shape, w.stride()) for w in weights),
        rotary(rotary.limit, model.device).data_ptr(),
        torch.is_autocast_enabled(model.device.type),
        torch.get_autocast_dtype(model.device.type),
    )
