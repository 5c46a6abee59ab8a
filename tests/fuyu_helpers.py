"""Small Fuyu models, ours and transformers', and batches of images and text for them."""

from __future__ import annotations

from typing import Any

import torch
from helpers import randn, tiny_config
from torch import Tensor

from persimmon_fast import FuyuConfig, FuyuForCausalLM

IMAGE, NEWLINE, WIDTH = 7, 8, 48  # placeholder token, token after a row of patches, values of a patch


def tiny_fuyu(**text: object) -> FuyuConfig:
    """Patches of 4 * 4 * 3 values on the tiny Persimmon."""
    return FuyuConfig(text_config=tiny_config(**text), patch_size=4, image_token_id=IMAGE)


def hf_fuyu(config: FuyuConfig) -> Any:
    """transformers' FuyuForCausalLM in fp32 with every parameter random."""
    from transformers import FuyuConfig as HFConfig
    from transformers import FuyuForCausalLM as HFModel

    model = HFModel(HFConfig(**config.to_dict())).eval()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            noise = randn(*parameter.shape, seed=seed)
            parameter.copy_(1 + 0.2 * noise if "layernorm.weight" in name else 0.1 * noise)
    model.generation_config.eos_token_id = None  # random weights stop at random otherwise
    return model


def ours_like(theirs: Any, config: FuyuConfig) -> FuyuForCausalLM:
    """Our model with the weights of theirs."""
    model = FuyuForCausalLM(config).eval()
    model.load_state_dict({file_name(name): tensor for name, tensor in theirs.state_dict().items()})
    return model


def file_name(name: str) -> str:
    """The name that transformers' save_pretrained gives to a tensor of its module."""
    name = name.replace("model.language_model.", "language_model.model.").replace("model.vision", "vision")
    return "language_model." + name if name.startswith("lm_head") else name


def batch(images: list[list[int]], side: str = "left", text: int = 6) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(input_ids, attention_mask, patches of each sample): per sample, images of that many patches in rows of two, each
    followed by some text, `text + sample` tokens of it in all; padded on `side` with zeros."""
    rows, patches = [], []
    for sample, counts in enumerate(images):
        words = (20 + torch.randint(130, (text + sample,), generator=torch.Generator().manual_seed(sample))).tolist()
        row: list[int] = []
        for count in counts:
            for start in range(0, count, 2):
                row += [IMAGE] * min(2, count - start) + [NEWLINE]
            row.append(words.pop())
        rows.append(row + words)
        patches.append(randn(sum(counts), WIDTH, seed=100 + sample) if counts else None)
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[index, where], mask[index, where] = torch.tensor(row), 1
    return ids, mask, patches


def joined(patches: list[Tensor | None]) -> Tensor:
    """All patches, as transformers 5 takes them."""
    return torch.cat([p for p in patches if p is not None])


def indices_of(input_ids: Tensor) -> Tensor:
    """image_patches_indices as FuyuProcessor of transformers 4 makes them, ten columns longer than the prompt."""
    image = input_ids == IMAGE
    indices = torch.where(image, image.cumsum(1) - 1, -1)
    return torch.cat([indices, torch.full((len(input_ids), 10), -1)], dim=1)
