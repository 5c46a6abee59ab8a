"""Models of transformers for the tests of the integration, in any of its versions from 4.57 on."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor

from persimmon_fast import apply_persimmon_fast, ops

IS_TRANSFORMERS_4 = int(transformers.__version__.split(".")[0]) == 4
VOCAB_SIZE = 160


def hf_config(**changes: Any) -> transformers.PersimmonConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return transformers.PersimmonConfig(**values | changes)


def randomised(model: Any, seed: int = 0) -> Any:
    """The model in eval mode with no weight or bias at 0 or 1, where a wrong one would not show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data * 0 + noise * 0.1 + (1.0 if parameter.dim() == 1 else 0.0)
    return model.eval()


def pair(cls: Any = transformers.PersimmonForCausalLM, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """(transformers' model, a patched copy)."""
    model = randomised(cls(hf_config(**changes))).to(dtype)
    return model, apply_persimmon_fast(copy.deepcopy(model))


def tokens(batch_size: int, seqlen: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch_size, seqlen), generator=torch.Generator().manual_seed(seed))


def left_padded(batch_size: int, seqlen: int) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask): row b has b padding tokens before its text."""
    ids, mask = tokens(batch_size, seqlen), torch.ones(batch_size, seqlen, dtype=torch.long)
    for row in range(batch_size):
        ids[row, :row], mask[row, :row] = 0, 0
    return ids, mask


def calls_of(monkeypatch: Any, *names: str) -> dict[str, int]:
    """Counts the calls of these ops from now on."""
    counts = dict.fromkeys(names, 0)

    def counting(name, op):
        def call(*args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    return counts
