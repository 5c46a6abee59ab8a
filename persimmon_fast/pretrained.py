"""What every Persimmon class shares: loading, saving, and the facts of its parameters."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from persimmon_fast.checkpoint import load_checkpoint, save_checkpoint
from persimmon_fast.checkpoint_tensors import ModelConfig, text_tensors
from persimmon_fast.config import PersimmonConfig
from persimmon_fast.fuyu_config import read_config
from persimmon_fast.generation import GenerationMixin
from persimmon_fast.generation_config import GenerationConfig

if TYPE_CHECKING:
    from typing_extensions import Self


class PersimmonPreTrainedModel(nn.Module):
    """Loading, saving and the facts that every Persimmon class shares."""

    config: PersimmonConfig

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = "auto",
        device: torch.device | str = "cpu",
        check_finite: bool = False,
        progress: bool = True,
    ) -> Self:
        """Loads a checkpoint folder in the layout of transformers.

        Args:
            folder: holds config.json and model.safetensors, its shards, or pytorch_model*.bin. Of a Fuyu checkpoint,
                the classes of Persimmon take the language model.
            dtype: a torch.dtype or its name ("bfloat16"); "auto" or None: the dtype that config.json names, else
                the stored one. Weights that need no conversion stay memory-mapped.
            device: where the weights go.
            check_finite: also look for NaN and inf in the weights (reads all of them once).
            progress: a bar on a terminal when loading takes long.
        Raises:
            CheckpointError, ValueError: naming file, key, what was expected and what was found.
        """
        stored = read_config(folder)
        config = cls._config_from(stored)
        tensors = load_checkpoint(
            folder, stored, dtype=dtype, device=device, check_finite=check_finite, progress=progress
        )
        if config is not stored:
            tensors = text_tensors(stored, tensors)
        with torch.device("meta"):
            model = cls(config)
        cls._load(model, tensors)
        for module in model.modules():
            if isinstance(module, GenerationMixin):
                module.generation_config = GenerationConfig.from_pretrained(folder, module.config)
        return model.eval()

    @classmethod
    def _config_from(cls, stored: ModelConfig) -> Any:
        """The config of this class in a checkpoint: the language model's, also where that is a part of Fuyu."""
        return stored.get_text_config()

    @staticmethod
    def _load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
        model.load_state_dict(tensors, strict=True, assign=True)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB", overwrite: bool = False
    ) -> None:
        """Writes config.json, the weights and generation_config.json, in the layout of transformers. The folder is at
        every moment the old one or the new one; `overwrite`: whether it may hold a checkpoint already."""
        save_checkpoint(folder, self.config, self.state_dict(), max_shard_size=max_shard_size, overwrite=overwrite)
        for module in self.modules():
            if isinstance(module, GenerationMixin):
                module.generation_config.save_pretrained(folder)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
