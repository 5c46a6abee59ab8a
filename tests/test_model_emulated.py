"""A whole Persimmon on the CUDA kernels, emulated and on a GPU: the greedy tokens of the reference."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import CUDA, DTYPES, EMU, EMU_SM90, backend, tiny_config

from persimmon_fast import PersimmonForCausalLM, ops

HEAD_DIM_64 = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
HEAD_DIM_128 = {"hidden_size": 256, "num_attention_heads": 2, "intermediate_size": 320}


def model(shape: dict[str, int], dtype: torch.dtype) -> PersimmonForCausalLM:
    """Random weights, large enough that the most likely token leads by more than 16-bit rounding."""
    torch.manual_seed(4)
    made = PersimmonForCausalLM(tiny_config(**shape)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "layernorm.weight" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "lm_head" in name else 0.1))
    return made.to(dtype)


@pytest.mark.parametrize("name", [EMU, EMU_SM90, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [HEAD_DIM_64, HEAD_DIM_128], ids=["head_dim 64", "head_dim 128"])
def test_greedy_tokens_are_those_of_the_reference(name, dtype, shape, monkeypatch):
    prompts = torch.randint(3, 160, (3, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompts)
    mask[1, :30] = 0  # left padding
    mask[2, :69] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "eos_token_id": -1}
    lm = model(shape, dtype)
    monkeypatch.setattr(ops, "_FORCE_REFERENCE", True)
    expected = lm.generate(prompts, **arguments)
    monkeypatch.setattr(ops, "_FORCE_REFERENCE", False)
    with backend(name) as device, warnings.catch_warnings():
        warnings.simplefilter("error")  # that no op falls back to the reference
        lm = lm.to(device)
        arguments["attention_mask"] = mask.to(device)
        actual = lm.generate(prompts.to(device), **arguments)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("name", [EMU, CUDA])
def test_sampled_tokens_are_those_of_the_reference(name, monkeypatch):
    prompts = torch.randint(3, 160, (2, 20), generator=torch.Generator().manual_seed(2))
    arguments = {
        "max_new_tokens": 6, "eos_token_id": -1, "do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9,
        "repetition_penalty": 1.2, "seed": 7,
    }  # fmt: skip
    lm = model(HEAD_DIM_64, torch.float32)
    monkeypatch.setattr(ops, "_FORCE_REFERENCE", True)
    expected = lm.generate(prompts, **arguments)
    monkeypatch.setattr(ops, "_FORCE_REFERENCE", False)
    with backend(name) as device:
        actual = lm.to(device).generate(prompts.to(device), **arguments)
    assert torch.equal(actual.cpu(), expected)
