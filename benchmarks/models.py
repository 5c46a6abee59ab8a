"""The models that are measured end to end: their shapes, their weights, and their share of zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import SMALL, Workspace
from persimmon_fast import PersimmonConfig, PersimmonForCausalLM
from persimmon_fast.checkpoint import expected_tensors, save_checkpoint
from persimmon_fast.sparsity import up_projection_input

DECODER_OPS = (
    "layer_norm",
    "qkv_norm_rope",
    "qkv_norm_rope_paged",
    "flash_attention",
    "paged_attention",
    "linear_residual",
    "squared_relu_mlp",
    "lm_head_argmax",
)
# A draw below the least of the sample has to stay active too: the least of some million normal numbers is 5 standard
# deviations down, this is 7.5.
_DENSE_MARGIN = 1.5


_NUM_POSITIONS = 16384 + 512  # the model's own, and those of the tokens that are decoded behind them


def slice_config(small: bool) -> PersimmonConfig:
    """Four layers of Persimmon-8B with 29,184 = 262,144 * 4 / 36 (rounded up to a multiple of 256) tokens of
    vocabulary: the proportions of the whole model; small: as many of the shape of the model that is shipped."""
    if small:
        return PersimmonConfig(
            vocab_size=SMALL.vocab_size,
            hidden_size=SMALL.hidden_size,
            intermediate_size=SMALL.intermediate_size,
            num_hidden_layers=4,
            num_attention_heads=SMALL.num_heads,
            max_position_embeddings=4096,
            eos_token_id=None,
        )
    return PersimmonConfig(
        vocab_size=29184, num_hidden_layers=4, max_position_embeddings=_NUM_POSITIONS, eos_token_id=None
    )


def full_config() -> PersimmonConfig:
    """Persimmon-8B, with room for what is decoded behind its whole context."""
    return PersimmonConfig(max_position_embeddings=_NUM_POSITIONS, eos_token_id=None)


def describe(model: PersimmonForCausalLM) -> dict[str, Any]:
    config = model.config
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "parameters": model.num_parameters(),
        "weight_bytes": model.num_parameters() * model.dtype.itemsize,
    }


def random_model(
    config: PersimmonConfig, dtype: torch.dtype, device: torch.device
) -> tuple[PersimmonForCausalLM, Workspace]:
    """Normal weights of the initialisation's width, biases 0, LayerNorms 1 and 0; down-projections neuron-major. Also
    returns the workspace that the matrices lie in."""
    with torch.device("meta"):
        model = PersimmonForCausalLM(config)
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    workspace = Workspace(device, dtype, working_set=1)
    matrices = [shape for shape in sizes.values() if len(shape) == 2]
    (cut,) = workspace.rotate(*matrices)
    weights, remaining = {}, iter(cut)
    for name, shape in sizes.items():
        if len(shape) == 2:
            weight = next(remaining)
            weights[name] = weight.view(shape[::-1]).t() if "dense_4h_to_h" in name else weight
        else:
            weights[name] = _vector(name, shape, dtype, device)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval(), workspace


def write_random_checkpoint(folder: Path, config: PersimmonConfig, dtype: torch.dtype) -> None:
    """A checkpoint as `random_model` makes one, in the memory of one shard. Rows are windows of one sequence of
    normal numbers that begin at different places: no two are equal, and a matrix needs no memory before it is
    written."""
    stride = 61  # elements from one row to the next
    shapes = expected_tensors(config)
    rows, columns = (max(shape[i] for shape in shapes.values() if len(shape) == 2) for i in (0, 1))
    pool = torch.randn(rows * stride + columns, generator=torch.Generator().manual_seed(0)) * Workspace.STD
    pool = pool.to(dtype)
    tensors = {
        name: pool.as_strided(shape, (stride, 1))
        if len(shape) == 2
        else _vector(name, shape, dtype, torch.device("cpu"))
        for name, shape in shapes.items()
    }
    save_checkpoint(folder, config, tensors, max_shard_size="2GB")


def load_checkpoint_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PersimmonForCausalLM:
    """Weights that need no conversion stay mapped from the files. The biases of the up-projections, which `UpBiases`
    overwrites, are copies."""
    model = PersimmonForCausalLM.from_pretrained(folder, dtype=dtype, device=device)
    layers: Any = model.model.layers
    for layer in layers:
        up = layer.mlp.dense_h_to_4h
        up.bias = torch.nn.Parameter(up.bias.detach().clone())
    return model


def _vector(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, 1.0 if name.endswith("norm.weight") else 0.0, dtype=dtype, device=device)


class UpBiases:
    """The biases of the up-projections: as they were, or shifted so that given shares of neurons are zero.

    Attributes:
        zeros: mean share of zeros after relu^2, as measured on `input_ids`, by what was asked for; None: as it was.
    """

    def __init__(self, model: PersimmonForCausalLM, input_ids: Tensor, shares: Sequence[float]) -> None:
        self._model = model
        self._mlps: list[Any] = [layer.mlp for layer in model.model.layers]
        self._biases: dict[float | None, list[Tensor]] = {None: self._copies()}
        self.zeros: dict[float | None, float] = {None: self._mean_zeros(input_ids)}
        for share in shares:
            self._shift(input_ids, share)
            self.zeros[share] = self._mean_zeros(input_ids)
        self.use(None)

    def use(self, zeros: float | None) -> None:
        """None: as it was; else one of the shares."""
        for mlp, bias in zip(self._mlps, self._biases[zeros], strict=True):
            mlp.dense_h_to_4h.bias.data.copy_(bias)

    def count(self, forward: Callable[[], object]) -> tuple[float, float]:
        """(mean share of zeros, mean share of neurons that are zero in every row) over the layers, while forward()
        runs the model on some rows."""
        shares: list[tuple[float, float]] = []

        def count(mlp: Any, x: Tensor) -> None:
            up = mlp.dense_h_to_4h
            zero = F.linear(x, up.weight, up.bias).flatten(0, -2) <= 0
            shares.append((float(zero.float().mean()), float(zero.all(0).float().mean())))

        with self._before_mlps(count):
            forward()
        zeros, common = (sum(values) / len(shares) for values in zip(*shares, strict=True))
        return zeros, common

    @contextmanager
    def _before_mlps(self, action: Callable[[Any, Tensor], None]) -> Iterator[None]:
        hooks = [
            m.register_forward_pre_hook(lambda mlp, args: action(mlp, up_projection_input(args))) for m in self._mlps
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _shift(self, input_ids: Tensor, zeros: float) -> None:
        """Layer by layer in one pass: a layer's bias is set before it runs, so the next sees what it will see."""

        def shift(mlp: Any, x: Tensor) -> None:
            up = mlp.dense_h_to_4h
            pre = F.linear(x, up.weight).float().flatten()
            rank = round(zeros * pre.numel())
            threshold = pre.kthvalue(rank).values if rank > 0 else _DENSE_MARGIN * pre.min()
            up.bias.data.fill_(-float(threshold))

        with self._before_mlps(shift):
            self._run(input_ids)
        self._biases[zeros] = self._copies()

    def _mean_zeros(self, input_ids: Tensor) -> float:
        return self.count(lambda: self._run(input_ids))[0]

    def _run(self, input_ids: Tensor) -> None:
        self._model(input_ids, use_cache=False, logits_to_keep=1)

    def _copies(self) -> list[Tensor]:
        return [mlp.dense_h_to_4h.bias.clone() for mlp in self._mlps]
