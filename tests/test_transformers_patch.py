"""apply_persimmon_fast on models of transformers: the same tokens and logits, under every mask and in every class."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers
from helpers import FLOOR, max_error
from hf_helpers import IS_TRANSFORMERS_4, calls_of, hf_config, left_padded, pair, randomised, tokens
from prompts import PROMPTS
from torch import nn
from transformers import (
    AttentionMaskInterface,
    DynamicCache,
    PersimmonForCausalLM,
    PersimmonForSequenceClassification,
    PersimmonForTokenClassification,
    PersimmonModel,
)

from persimmon_fast import SMALL_MODEL, PersimmonTokenizer, apply_persimmon_fast, revert
from persimmon_fast.integrations import attention

TOLERANCE = 2e-5  # fp32, logits of about 10


pytestmark = pytest.mark.usefixtures("kernels_alone")


# ---- the shipped model ----


@pytest.fixture(scope="module")
def tokenizer():
    return PersimmonTokenizer.from_pretrained(SMALL_MODEL)


def load_small(dtype):
    name = "torch_dtype" if IS_TRANSFORMERS_4 else "dtype"
    return PersimmonForCausalLM.from_pretrained(SMALL_MODEL, **{name: dtype}).eval()


def test_greedy_tokens_equal_on_200_prompts(tokenizer):
    model = load_small(torch.float32)
    expected = []
    settings = {"max_new_tokens": 16, "do_sample": False, "repetition_penalty": 1.0, "pad_token_id": 0}
    for prompt in PROMPTS:
        expected.append(model.generate(**tokenizer(prompt, return_tensors="pt"), **settings).tolist())
    apply_persimmon_fast(model)
    for prompt, tokens_before in zip(PROMPTS, expected, strict=True):
        actual = model.generate(**tokenizer(prompt, return_tensors="pt"), **settings)
        assert actual.tolist() == tokens_before, prompt


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_logits_within_the_contract(tokenizer, dtype):
    """Against fp32 transformers: at most twice the error of transformers in this dtype, plus the floor."""
    ids = tokenizer((SMALL_MODEL / "README.md").read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :300]
    exact = load_small(torch.float32)(ids).logits
    model = load_small(dtype)
    bound = 2 * max_error(model(ids).logits, exact) + FLOOR[dtype] * float(exact.abs().max())
    apply_persimmon_fast(model)
    assert max_error(model(ids).logits, exact) <= bound
    cache, steps = DynamicCache(config=model.config), []
    for start, stop in [(0, 40), (40, 41), (41, 57), (57, 120), (120, 121)]:
        steps.append(model(ids[:, start:stop], past_key_values=cache).logits)
    assert max_error(torch.cat(steps, dim=1), exact[:, :121]) <= bound


# ---- logits of one forward pass ----


def masks():
    ids, left = left_padded(3, 12)
    right = left.flip(1)
    holes = torch.ones_like(left)
    holes[1, 4:6] = 0
    return {
        "no mask": (ids, {}),
        "ones": (ids, {"attention_mask": torch.ones_like(left)}),
        "left padding": (ids, {"attention_mask": left}),
        "left padding, positions": (
            ids,
            {"attention_mask": left, "position_ids": (left.cumsum(1) - 1).clamp_min(0)},
        ),
        "right padding": (ids, {"attention_mask": right}),
        "holes": (ids, {"attention_mask": holes}),
        "4-D": (ids, {"attention_mask": full_mask(left)}),
        "later positions": (ids, {"position_ids": torch.arange(100, 112).expand(3, -1)}),
    }


def full_mask(mask):
    """A caller's own additive mask: causal, and a sliding window of 5 keys."""
    distance = torch.arange(12)[:, None] - torch.arange(12)
    visible = ((distance >= 0) & (distance < 5))[None, None] & mask[:, None, None].bool() | (distance == 0)
    return torch.zeros(3, 1, 12, 12).masked_fill(~visible, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("qk_layernorm", [True, False], ids=["qk norm", "no qk norm"])
@torch.no_grad()
def test_logits_equal_under_every_mask(name, qk_layernorm):
    model, fast = pair(qk_layernorm=qk_layernorm)
    ids, arguments = masks()[name]
    expected, actual = model(ids, **arguments).logits, fast(ids, **arguments).logits
    mask = arguments.get("attention_mask", torch.ones_like(ids))
    real = mask.bool() if mask.dim() == 2 else torch.ones_like(ids).bool()
    assert max_error(actual[real], expected[real]) < TOLERANCE


@torch.no_grad()
def test_without_a_mask_function_transformers_drops_the_padding():
    """The trap that registering the attention alone would be: logits move far beyond rounding."""
    model, fast = pair()
    ids, mask = left_padded(3, 12)
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    assert max_error(fast(ids, attention_mask=mask).logits[mask.bool()], expected) < TOLERANCE
    if IS_TRANSFORMERS_4:
        return  # this model makes its own mask there
    registered = AttentionMaskInterface._global_mapping.pop(attention.NAME)
    try:
        assert max_error(fast(ids, attention_mask=mask).logits[mask.bool()], expected) > 0.1
    finally:
        AttentionMaskInterface._global_mapping[attention.NAME] = registered


@pytest.mark.skipif(IS_TRANSFORMERS_4, reason="Persimmon of transformers 4 knows no packed sequences")
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other():
    model, fast = pair()
    ids, positions = tokens(1, 12), torch.cat([torch.arange(5), torch.arange(7)])[None]
    expected = model(ids, position_ids=positions, use_cache=False).logits
    assert max_error(fast(ids, position_ids=positions, use_cache=False).logits, expected) < TOLERANCE
    alone = model(ids[:, 5:], use_cache=False).logits
    assert max_error(fast(ids, position_ids=positions, use_cache=False).logits[:, 5:], alone) < TOLERANCE


def mask_of(mask, *, q_offset, q_length, kv_length, **arguments):
    """attention.attention_mask in the words of either version."""
    if IS_TRANSFORMERS_4:
        arguments["cache_position"] = torch.arange(q_offset, q_offset + q_length)
    else:
        arguments |= {"q_offset": q_offset, "q_length": q_length}
    return attention.attention_mask(1, attention_mask=mask, kv_length=kv_length, **arguments)


def test_which_form_a_mask_takes():
    ones = torch.ones(1, 6, dtype=torch.bool)
    assert mask_of(None, q_offset=0, q_length=6, kv_length=6) is None
    assert mask_of(ones, q_offset=0, q_length=6, kv_length=6) is None
    ranges = mask_of(ones, q_offset=4, q_length=2, kv_length=6)
    assert ranges.tolist() == [[[[6, 6], [0, 1], [0, 2]]]]
    assert ranges.dtype == torch.int32
    static = mask_of(ones, q_offset=4, q_length=2, kv_length=32)
    assert torch.equal(static, ranges)
    for hidden in (ones[:, :5], torch.tensor([[0, 1, 1, 1, 1, 1]]).bool()):  # a key without a mask is hidden too
        dense = mask_of(hidden, q_offset=4, q_length=2, kv_length=6)
        assert dense.dtype == torch.bool
        assert dense[0, 0, 1].tolist() == [*hidden[0].tolist(), *[False] * (6 - hidden.shape[1])]


def test_a_mask_that_is_not_causal_is_never_skipped():
    """None means causal to our attention."""
    everything = mask_of(
        None, q_offset=0, q_length=4, kv_length=4, mask_function=lambda b, h, q, k: k >= 0,
        allow_is_bidirectional_skip=True, allow_is_causal_skip=True,
    )  # fmt: skip
    assert everything.shape == (1, 1, 4, 4)
    assert everything.all()


@torch.no_grad()
def test_keys_that_are_not_contiguous():
    q, keys = torch.randn(2, 4, 1, 16), torch.randn(2, 4, 9, 16)
    ranges = attention.key_ranges(2, 1, 7, "cpu")
    actual, _ = attention.attention(torch.nn.Module(), q, keys[:, :, :7], keys[:, :, :7], ranges)
    expected = nn.functional.scaled_dot_product_attention(q, keys[:, :, :7], keys[:, :, :7]).transpose(1, 2)
    assert max_error(actual, expected) < 1e-6


@torch.no_grad()
def test_inputs_embeds_and_tuples():
    model, fast = pair()
    embeds = model.get_input_embeddings()(tokens(2, 9))
    expected, actual = model(inputs_embeds=embeds, return_dict=False), fast(inputs_embeds=embeds, return_dict=False)
    assert len(actual) == len(expected)
    assert max_error(actual[0], expected[0]) < TOLERANCE


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
@torch.no_grad()
def test_rope_types(rope_type):
    scaling = {"rope_type": rope_type, "factor": 2.0}
    if IS_TRANSFORMERS_4:
        changes = {"rope_scaling": scaling}
    else:
        changes = {"rope_parameters": {**scaling, "rope_theta": 25000.0, "partial_rotary_factor": 0.5}}
    model, fast = pair(**changes, max_position_embeddings=16)
    ids = tokens(1, 30)
    assert max_error(fast(ids).logits, model(ids).logits) < TOLERANCE


@torch.no_grad()
def test_hidden_states_and_attentions():
    model, fast = pair()
    ids, mask = left_padded(2, 8)
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    actual = fast(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 3
    assert len(actual.attentions) == len(expected.attentions) == 2
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert max_error(ours[mask.bool()], theirs[mask.bool()]) < TOLERANCE
    for ours, theirs in zip(actual.attentions, expected.attentions, strict=True):
        real = mask.bool()[:, None, :, None]
        assert max_error(ours * real, theirs * real) < 1e-6
    no_mask = fast(ids, output_attentions=True).attentions
    for ours, theirs in zip(no_mask, model(ids, output_attentions=True).attentions, strict=True):
        assert max_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_another_attention_can_be_chosen_afterwards(implementation):
    model, fast = pair()
    fast.set_attn_implementation(implementation)
    ids, mask = left_padded(3, 12)
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    assert max_error(fast(ids, attention_mask=mask).logits[mask.bool()], expected) < TOLERANCE
    generated = fast.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False))
    revert(fast)
    assert fast.config._attn_implementation == implementation


@pytest.mark.parametrize("cls", [PersimmonModel, PersimmonForSequenceClassification, PersimmonForTokenClassification])
@torch.no_grad()
def test_every_class(cls, monkeypatch):
    model, fast = pair(cls, num_labels=3)
    ids, mask = left_padded(3, 10)
    counts = calls_of(monkeypatch, "squared_relu_mlp")
    expected, actual = model(ids, attention_mask=mask)[0], fast(ids, attention_mask=mask)[0]
    if cls is not PersimmonForSequenceClassification:
        expected, actual = expected[mask.bool()], actual[mask.bool()]
    assert max_error(actual, expected) < TOLERANCE
    assert counts["squared_relu_mlp"] == 2


def fuyu_pair():
    text = hf_config().to_dict()
    config = transformers.FuyuConfig(
        text_config=text, **{k: v for k, v in text.items() if k in ("vocab_size", "hidden_size", "pad_token_id")},
        patch_size=2, num_channels=3, image_token_id=5,
    )  # fmt: skip
    model = randomised(transformers.FuyuForCausalLM(config))
    return model, apply_persimmon_fast(copy.deepcopy(model))


@torch.no_grad()
def test_fuyu(monkeypatch):
    model, fast = fuyu_pair()
    counts = calls_of(monkeypatch, "squared_relu_mlp", "qkv_norm_rope")
    ids = tokens(2, 10).masked_fill_(tokens(2, 10) == 5, 6)
    ids[:, 1:5] = 5
    patches = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))
    accepted = inspect.signature(model.forward).parameters  # the name of the argument has changed
    images = {"pixel_values" if "pixel_values" in accepted else "image_patches": patches}
    if IS_TRANSFORMERS_4:
        indices = torch.full((2, 10), -1)
        indices[:, 1:5] = torch.arange(4)
        images["image_patches_indices"] = indices
    assert max_error(fast(ids, **images).logits, model(ids, **images).logits) < TOLERANCE
    assert counts == {"squared_relu_mlp": 2, "qkv_norm_rope": 2}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(ids, **images, **settings), model.generate(ids, **images, **settings))
    revert(fast)
    assert torch.equal(fast(ids, **images).logits, model(ids, **images).logits)
