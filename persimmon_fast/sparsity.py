"""How many neurons squared ReLU leaves at exactly zero, and what skipping them saves.

The convention is that of `ops.squared_relu_mlp` on up to 16 rows: the pre-activation z = x U^T + b_u is a product of
the stored values in fp32, not rounded to 16 bits, and a neuron is active where relu(z)^2 != 0 in fp32: where z > 0 or
NaN, save for positive z so small that the square is 0. A sum of another order can decide otherwise where z is within
fp32 rounding of 0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persimmon_fast import ops
from persimmon_fast.costs import DTYPE_BYTES, model_costs
from persimmon_fast.kv_cache import PagedKVCache
from persimmon_fast.model import PersimmonForCausalLM, PersimmonMLP, PersimmonModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from persimmon_fast.tokenizer import PersimmonTokenizer

WINDOWS = (1, 2, 4, 8, 16)  # each twice the one before it; 16: the most rows that share one reading of the weights
_CHUNK_POSITIONS = 256  # of one forward pass
_PLOT_COLUMNS = 512  # fewer than its pixels: none is dropped
_CHUNK_NEURONS = 2048  # converted to fp32 at a time: 32 MB of the 8B model's up-projection


@dataclass(frozen=True)
class Saving:
    """What skipping saves in a decode step over `window` successive positions. Weights only: the cache comes on top.

    Attributes:
        window: number of positions (rows) whose step reads the weights once.
        zeros: share of the neurons that are zero at all of these positions; mean over layers and windows.
        down_bytes: bytes of down-projection weights that a step reads, all layers together; mean over windows.
        step_bytes: bytes of weights that the whole step reads: all but the embedding and what is skipped.
        speed_up_bound: bytes of a step without skipping / step_bytes: where bandwidth is the limit, no step gains more.
    """

    window: int
    zeros: float
    down_bytes: float
    step_bytes: float
    speed_up_bound: float


@dataclass(frozen=True)
class SparsityReport:
    """Active neurons of a model on one text.

    Attributes:
        dtype: of the model: "float32", "float16" or "bfloat16".
        intermediate_size: neurons per layer.
        active: {window: [num_layers, num_positions - window + 1] int32, on the CPU}. Entry [l, p]: neurons of layer l
            that are active at one or more of the positions p .. p + window - 1; those that a step over these positions
            has to read. Windows longer than the text are left out.
        down_bytes: bytes of all down-projection weights.
        step_bytes: bytes of weights that a decode step without skipping reads: all but the embedding.
    """

    dtype: str
    intermediate_size: int
    active: dict[int, Tensor]
    down_bytes: int
    step_bytes: int

    @property
    def num_layers(self) -> int:
        return self.active[1].shape[0]

    @property
    def num_positions(self) -> int:
        return self.active[1].shape[1]

    @property
    def zeros(self) -> Tensor:
        """Share of exact zeros, [num_layers, num_positions] fp64."""
        return 1 - self.active[1].double() / self.intermediate_size

    @property
    def savings(self) -> list[Saving]:
        """One per window, ascending."""
        return [self._saving(window, active) for window, active in self.active.items()]

    def _saving(self, window: int, active: Tensor) -> Saving:
        read = active.double().mean().item() / self.intermediate_size
        step_bytes = self.step_bytes - (1 - read) * self.down_bytes
        return Saving(window, 1 - read, read * self.down_bytes, step_bytes, self.step_bytes / step_bytes)


def report(
    model: PersimmonForCausalLM | PersimmonModel,
    text_or_ids: str | Sequence[int] | Tensor,
    tokenizer: PersimmonTokenizer | None = None,
) -> SparsityReport:
    """Counts the active neurons of every layer at every position of a text.

    The text goes through the model in pieces, with a cache, so memory grows with the text by its cache and by 20 bytes
    per layer and position alone.

    Args:
        model: in float32, float16 or bfloat16; in evaluation mode if it has dropout.
        text_or_ids: a text, or its ids: a sequence of int, or an integer tensor [num_positions] or [1, num_positions];
            at least one, and no more than the model has positions.
        tokenizer: makes the ids of a text, with its own setting of BOS; not used for ids.
    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    if not isinstance(model, PersimmonForCausalLM | PersimmonModel):
        raise TypeError(
            f"sparsity.report: model must be PersimmonForCausalLM or PersimmonModel, got {type(model).__name__}"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"sparsity.report: model must be in {', '.join(DTYPE_BYTES)}, got {dtype}")
    if model.training and (model.config.hidden_dropout or model.config.attention_dropout):
        raise ValueError("sparsity.report: model must be in evaluation mode, got one that drops out: call model.eval()")
    backbone = model.model if isinstance(model, PersimmonForCausalLM) else model
    input_ids = _input_ids(backbone, text_or_ids, tokenizer)
    mlps = [module for module in backbone.modules() if isinstance(module, PersimmonMLP)]  # in the order of the layers
    counters = [_Counter() for _ in mlps]
    hooks = [
        mlp.register_forward_pre_hook(partial(_count_input, counter))
        for mlp, counter in zip(mlps, counters, strict=True)
    ]
    cache = PagedKVCache(backbone.config, 1, input_ids.shape[1], dtype=model.dtype, device=model.device)
    try:
        with torch.no_grad():
            for chunk in input_ids.split(_CHUNK_POSITIONS, dim=1):
                backbone(chunk, past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()
    costs = model_costs(backbone.config, dtype)
    return SparsityReport(
        dtype=dtype,
        intermediate_size=backbone.config.intermediate_size,
        active={
            window: torch.stack([torch.cat(counter.counts[window]) for counter in counters])
            for window in WINDOWS
            if window <= input_ids.shape[1]
        },
        down_bytes=costs.skippable_bytes_per_token,
        step_bytes=costs.weight_bytes_per_token,
    )


def active_neurons(x: Tensor, up_weight: Tensor, up_bias: Tensor | None) -> Tensor:
    """Where relu(x U^T + b_u)^2 is nonzero in fp32; NaN counts.

    Args:
        x: [num_rows, hidden_size]; up_weight: [intermediate_size, hidden_size]; up_bias: [intermediate_size] or None.
    Returns:
        [num_rows, intermediate_size] bool.
    """
    wide = x.float()
    blocks = []
    for begin in range(0, up_weight.shape[0], _CHUNK_NEURONS):
        block = slice(begin, begin + _CHUNK_NEURONS)
        bias = None if up_bias is None else up_bias[block].float()
        blocks.append(F.linear(wide, up_weight[block].float(), bias).relu().square() != 0)
    return torch.cat(blocks, dim=1)


class _Counter:
    """Counts the active neurons of one layer's windows, from rows that come in pieces."""

    def __init__(self) -> None:
        self.counts: dict[int, list[Tensor]] = {window: [] for window in WINDOWS}
        self._last: Tensor | None = None  # rows that a window may share with the next piece

    def add(self, active: Tensor) -> None:
        """active: [num_rows, intermediate_size] bool, the next positions."""
        rows = active if self._last is None else torch.cat([self._last, active])
        num_old = rows.shape[0] - active.shape[0]
        union = rows  # [i]: of the rows i .. i + window - 1
        for window in WINDOWS:
            if rows.shape[0] < window:
                break
            if window > 1:
                union = union[: -(window // 2)] | union[window // 2 :]
            new = union[max(0, num_old - window + 1) :]  # windows that end in this piece
            self.counts[window].append(new.sum(1, dtype=torch.int32).cpu())
        self._last = rows[-(WINDOWS[-1] - 1) :].clone()


def up_projection_input(args: tuple[Tensor, nn.LayerNorm]) -> Tensor:
    """What the up-projection of a PersimmonMLP multiplies, from the arguments of its forward pre-hook."""
    x, norm = args
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _count_input(counter: _Counter, mlp: PersimmonMLP, args: tuple[Tensor, nn.LayerNorm]) -> None:
    """A forward pre-hook of an MLP."""
    up = mlp.dense_h_to_4h
    counter.add(active_neurons(up_projection_input(args), up.weight, up.bias))


def _input_ids(
    model: PersimmonModel, text_or_ids: str | Sequence[int] | Tensor, tokenizer: PersimmonTokenizer | None
) -> Tensor:
    """[1, num_positions] int64 on the model's device, checked."""
    name = "sparsity.report: text_or_ids"
    if isinstance(text_or_ids, str):
        if tokenizer is None:
            raise ValueError("sparsity.report: tokenizer must be given with a text, got None")
        text_or_ids = tokenizer.encode(text_or_ids)
    try:
        ids = torch.as_tensor(text_or_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a str or integers, got {type(text_or_ids).__name__}: {error}") from None
    if ids.numel() == 0:
        raise ValueError(f"{name} must hold at least one token, got none")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be a str or integers, got {ids.dtype}")
    if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != 1):
        raise ValueError(f"{name} must be [num_positions] or [1, num_positions], got {list(ids.shape)}")
    ids = ids.reshape(1, -1).to(device=model.device, dtype=torch.int64)
    if ids.shape[1] > model.rotary.limit:
        raise ValueError(f"{name} must fit into the model's {model.rotary.limit} positions, got {ids.shape[1]} tokens")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(f"{name} must lie in 0 .. {model.config.vocab_size - 1}, got {low if low < 0 else high}")
    return ids


# ---------------------------------------------------------------- picture


def figure(result: SparsityReport, title: str = "") -> Figure:
    """A heat map of the share of zeros, layers from the bottom up, positions to the right; each layer's mean beside it.
    Of a long text a column is the mean of neighbouring positions.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"the plot needs matplotlib, which cannot be imported ({error}): pip install 'persimmon_fast[plot]'"
        ) from None
    zeros = result.zeros
    drawing = Figure(figsize=(9, 1.8 + 0.32 * max(4, min(result.num_layers, 40))), layout="constrained")
    axes = drawing.subplots()
    columns = F.adaptive_avg_pool1d(zeros, min(result.num_positions, _PLOT_COLUMNS))
    extent = (-0.5, result.num_positions - 0.5, -0.5, result.num_layers - 0.5)
    image = axes.imshow(
        columns.numpy(), aspect="auto", origin="lower", extent=extent, vmax=1, cmap="viridis", interpolation="nearest"
    )
    axes.set_xlabel("position")
    axes.set_ylabel("layer")
    axes.set_yticks(range(0, result.num_layers, 1 + result.num_layers // 40))
    means = axes.secondary_yaxis("right")
    means.set_yticks(axes.get_yticks(), [f"{zeros[int(layer)].mean():.1%}" for layer in axes.get_yticks()])
    means.tick_params(length=0)
    for frame in (*axes.spines.values(), *means.spines.values()):
        frame.set_visible(False)
    drawing.colorbar(image, label="share of exact zeros", format=lambda value, _: f"{value:.0%}")
    facts = f"{zeros.mean():.1%} of neurons are zero after squared ReLU ({result.dtype})"
    axes.set_title(f"{title}: {facts}" if title else facts, loc="left", fontsize=11)
    return drawing


def plot(result: SparsityReport, path: str | os.PathLike[str], title: str = "") -> None:
    """Writes `figure` as a PNG."""
    figure(result, title).savefig(path, format="png", dpi=150)
