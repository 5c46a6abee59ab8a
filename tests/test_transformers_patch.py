"""apply_persimmon_fast on models of transformers: same tokens and logits, everything around them untouched."""

from __future__ import annotations

import copy
import inspect
import io
import json
import warnings

import pytest
import torch
import transformers
from helpers import CUDA, EMU, EMU_SM90, FLOOR, backend, max_error
from hf_helpers import IS_TRANSFORMERS_4, VOCAB_SIZE, calls_of, hf_config, left_padded, pair, randomised, tokens
from prompts import PROMPTS
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PersimmonForCausalLM,
    PersimmonForSequenceClassification,
    PersimmonForTokenClassification,
    PersimmonModel,
    StaticCache,
)

from persimmon_fast import SMALL_MODEL, PersimmonTokenizer, apply_persimmon_fast, ops, revert
from persimmon_fast.integrations import attention

TOLERANCE = 2e-5  # fp32, logits of about 10


@pytest.fixture(autouse=True)
def no_reference(monkeypatch):
    """The kernels run, not their definitions in torch."""
    monkeypatch.setattr(ops, "_warn_once", lambda message: pytest.fail(f"a slow path: {message}"))


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


# ---- generate ----


def static_cache(model, length):
    """For two sequences."""
    if IS_TRANSFORMERS_4:
        return StaticCache(model.config, max_batch_size=2, max_cache_len=length)
    return StaticCache(config=model.config, max_cache_len=length)


GENERATE = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 4},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "scores": {"output_scores": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("padded", [False, True], ids=["alone", "left padding"])
@pytest.mark.parametrize("settings", GENERATE.values(), ids=GENERATE)
def test_generate_gives_the_same_tokens(settings, padded):
    if padded and "prompt_lookup_num_tokens" in settings:
        pytest.skip("transformers' prompt lookup takes one sequence")
    model, fast = pair()
    ids, mask = left_padded(3, 12) if padded else (tokens(1, 12), torch.ones(1, 12, dtype=torch.long))
    results = []
    for one in (model, fast):
        torch.manual_seed(3)
        result = one.generate(ids, attention_mask=mask, **{"do_sample": False} | settings, max_new_tokens=12)
        results.append(result if isinstance(result, torch.Tensor) else result.sequences)
    assert torch.equal(*results)
    assert results[0].shape[1] > 12


def test_assisted_decoding():
    """The draft model is patched too; a cache that is cropped after every rejected draft is no contiguous tensor."""
    model, fast = pair()
    draft = randomised(PersimmonForCausalLM(hf_config(num_hidden_layers=1)), seed=4)
    ids = tokens(1, 10)
    settings = {"max_new_tokens": 14, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert torch.equal(fast.generate(ids, assistant_model=draft, **settings), expected)
    apply_persimmon_fast(draft)
    assert torch.equal(fast.generate(ids, assistant_model=draft, **settings), expected)


def test_streamer_and_continued_conversation():
    model, fast = pair()
    ids = tokens(1, 10)

    class Collect(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            pass

    streamer = Collect()
    first = fast.generate(ids, streamer=streamer, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert streamer.seen == first.sequences[0].tolist()
    follow_up = torch.cat([first.sequences, tokens(1, 4, seed=9)], dim=1)
    again = fast.generate(follow_up, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False)
    assert torch.equal(again, model.generate(follow_up, max_new_tokens=5, do_sample=False))


@torch.no_grad()
def test_decoding_reads_the_caches_of_transformers_where_they_lie(monkeypatch):
    """Dynamic and static, prefilled in chunks: one call of paged_attention per layer, no copy of the cache."""
    model, fast = pair()
    ids = tokens(2, 20)
    expected = model(ids).logits
    for cache in (DynamicCache(config=model.config), static_cache(model, 32)):
        counts = calls_of(monkeypatch, "paged_attention")
        outputs = []
        for start, stop in [(0, 7), (7, 8), (8, 19), (19, 20)]:
            outputs.append(fast(ids[:, start:stop], past_key_values=cache).logits)
        assert max_error(torch.cat(outputs, dim=1), expected) < TOLERANCE
        assert counts["paged_attention"] >= 6
        monkeypatch.undo()


@pytest.mark.parametrize("name", [EMU, EMU_SM90, CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_cuda_kernels_read_the_caches_of_transformers(name, dtype):
    """Caches of 8, 9, 20 and 32 keys are pages of that size."""
    model, fast = pair(hidden_size=128, num_attention_heads=2, num_hidden_layers=1)
    ids = tokens(2, 24)
    exact = model(ids).logits
    model, fast = model.to(dtype), fast.to(dtype)
    bound = 2 * max_error(model(ids).logits, exact) + FLOOR[dtype] * float(exact.abs().max())
    with backend(name) as device:
        fast, ids = fast.to(device), ids.to(device)
        for cache in (None, DynamicCache(config=model.config), static_cache(model, 32)):
            if cache is None:
                steps = [fast(ids, use_cache=False).logits]
            else:
                pieces = ids.split([8, 1, 11, 4], dim=1)
                steps = [fast(piece, past_key_values=cache).logits for piece in pieces]
            assert max_error(torch.cat(steps, dim=1).cpu(), exact) <= bound


# ---- training ----


def loss_and_gradients(model, ids, mask):
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("padded", [False, True], ids=["alone", "left padding"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "checkpointed"])
def test_training_is_that_of_transformers(checkpointing, padded):
    model, fast = pair(hidden_dropout=0.1, attention_dropout=0.1)
    ids, mask = left_padded(2, 10) if padded else (tokens(2, 10), None)
    results = []
    for one in (model, fast):
        one.train()
        if checkpointing is not None:
            one.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        torch.manual_seed(0)
        results.append(loss_and_gradients(one, ids, mask))
    (loss, gradients), (fast_loss, fast_gradients) = results
    assert max_error(fast_loss, loss) < 1e-5
    for name, gradient in gradients.items():
        assert max_error(fast_gradients[name], gradient) <= 1e-5 * max(1.0, float(gradient.abs().max())), name


def test_gradients_in_eval_mode_and_of_the_embeddings():
    model, fast = pair()
    for one in (model, fast):
        one.requires_grad_(False)
    embeds = model.get_input_embeddings()(tokens(1, 8)).detach()
    gradients = []
    for one in (model, fast):
        leaf = embeds.clone().requires_grad_()
        one(inputs_embeds=leaf).logits.square().mean().backward()
        gradients.append(leaf.grad)
    assert max_error(*gradients) <= 1e-5 * float(gradients[0].abs().max())


@pytest.mark.parametrize("trained", ["q_layernorm.weight", "dense_h_to_4h.bias"])
def test_gradients_of_one_parameter_in_eval_mode(trained):
    """The input of its layer asks for no gradient, only the parameter does."""
    model, fast = pair()
    gradients = []
    for one in (model, fast):
        one.requires_grad_(False)
        parameter = next(p for name, p in one.named_parameters() if name.endswith(trained))
        parameter.requires_grad_()
        one(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
        gradients.append(parameter.grad)
    assert max_error(*gradients) <= 1e-5 * float(gradients[0].abs().max())


def test_gradients_of_cached_keys_alone():
    """As prefix tuning asks for: the keys are learnt, the queries are not."""
    q, past, new = torch.randn(1, 4, 2, 16), torch.randn(1, 4, 3, 16, requires_grad=True), torch.randn(1, 4, 2, 16)
    keys = torch.cat([past, new], dim=2)
    module = torch.nn.Module()
    out, _ = attention.attention(module, q, keys, keys, attention.key_ranges(1, 2, 5, "cpu"))
    out.square().sum().backward()
    visible = torch.ones(2, 5, dtype=torch.bool).tril(3)
    other = past.detach().clone().requires_grad_()
    keys = torch.cat([other, new], dim=2)
    expected = nn.functional.scaled_dot_product_attention(q, keys, keys, visible).transpose(1, 2)
    expected.square().sum().backward()
    assert max_error(out.detach(), expected.detach()) < 1e-6
    assert max_error(past.grad, other.grad) < 1e-5


def test_an_optimizer_step_reaches_the_patched_model():
    model, fast = pair()
    ids = tokens(2, 8)
    for one in (model, fast):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        one.train()
        loss_and_gradients(one, ids, None)
        one(ids, labels=ids).loss.backward()
        optimizer.step()
        one.eval()
    with torch.no_grad():
        assert max_error(fast(ids).logits, model(ids).logits) < 1e-4


# ---- compile ----


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiles_without_graph_breaks_and_not_again_per_length():
    from torch._dynamo.utils import counters

    model, fast = pair()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=True)
    ids, mask = left_padded(3, 12)
    for arguments in ({}, {"use_cache": False}, {"attention_mask": mask}):
        expected = model(ids, **arguments).logits[mask.bool()]
        assert max_error(compiled(ids, **arguments).logits[mask.bool()], expected) < TOLERANCE
    graphs = counters["stats"]["unique_graphs"]
    for seqlen in (5, 9, 30, 31):
        assert max_error(compiled(tokens(3, seqlen)).logits, model(tokens(3, seqlen)).logits) < TOLERANCE
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_decoding_over_a_static_cache_is_one_graph():
    from torch._dynamo.utils import counters

    model, fast = pair()
    ids = tokens(2, 12)
    expected = model(ids).logits
    cache = static_cache(model, 32)
    fast(ids[:, :8], past_key_values=cache)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    before = counters["stats"]["unique_graphs"]
    for column in range(8, 12):
        position = torch.tensor([column])
        extra = {"cache_position": position, "position_ids": position[None]} if IS_TRANSFORMERS_4 else {}
        step = compiled(ids[:, column : column + 1], past_key_values=cache, **extra).logits
        assert max_error(step[:, 0], expected[:, column]) < TOLERANCE
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_training_has_no_graph_breaks():
    model, fast = pair()
    ids = tokens(2, 10)
    loss, gradients = loss_and_gradients(model.train(), ids, None)
    compiled = torch.compile(fast.train(), fullgraph=True, backend="aot_eager")
    fast_loss = compiled(ids, labels=ids, use_cache=False).loss
    fast_loss.backward()
    assert max_error(fast_loss.detach(), loss) < 1e-5
    for name, parameter in fast.named_parameters():
        assert max_error(parameter.grad, gradients[name]) <= 1e-5 * max(1.0, float(gradients[name].abs().max())), name


# ---- what is around the model ----


@torch.no_grad()
def test_revert_is_bit_exact():
    model, fast = pair()
    ids, mask = left_padded(3, 12)
    fast.generate(ids, attention_mask=mask, max_new_tokens=3)
    assert revert(fast) is fast
    assert torch.equal(fast(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    for (name, ours), theirs in zip(fast.named_modules(), model.modules(), strict=True):
        assert not [key for key in ours.__dict__ if "persimmon_fast" in key], name
        assert "forward" not in ours.__dict__, name
        assert type(ours) is type(theirs), name
    for (name, ours), theirs in zip(fast.named_parameters(), model.parameters(), strict=True):
        assert ours.stride() == theirs.stride(), name
        assert torch.equal(ours, theirs), name
    assert fast.config._attn_implementation == model.config._attn_implementation
    revert(fast)  # nothing to do


@torch.no_grad()
def test_patching_twice_and_reverting_once():
    model, fast = pair()
    apply_persimmon_fast(fast)
    ids = tokens(2, 9)
    assert max_error(fast(ids).logits, model(ids).logits) < TOLERANCE
    assert torch.equal(revert(fast)(ids).logits, model(ids).logits)


def test_nothing_moves_but_the_down_projections():
    model = randomised(PersimmonForCausalLM(hf_config()))
    before = {name: (p, p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    apply_persimmon_fast(model)
    for name, parameter in model.named_parameters():
        old, address, strides = before[name]
        assert parameter is old, name
        if name.endswith("mlp.dense_4h_to_h.weight"):
            assert parameter.stride() == (1, 64)
        else:
            assert (parameter.data_ptr(), parameter.stride()) == (address, strides), name


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@torch.no_grad()
def test_copies_are_patched_models_of_their_own(way, monkeypatch):
    model, fast = pair()
    if way == "deepcopy":
        other = copy.deepcopy(fast)
    else:
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    other.model.layers[0].mlp.dense_h_to_4h.weight.zero_()
    ids = tokens(2, 9)
    assert max_error(fast(ids).logits, model(ids).logits) < TOLERANCE
    model.model.layers[0].mlp.dense_h_to_4h.weight.zero_()
    counts = calls_of(monkeypatch, "squared_relu_mlp")
    assert max_error(other(ids).logits, model(ids).logits) < TOLERANCE
    assert counts["squared_relu_mlp"] == 2
    assert torch.equal(revert(other)(ids).logits, model(ids).logits)


def test_a_saved_patched_model_is_an_ordinary_checkpoint(tmp_path):
    model, fast = pair()
    fast.save_pretrained(tmp_path)
    assert "persimmon_fast" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = PersimmonForCausalLM.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    fast.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()})
    assert fast.model.layers[0].mlp.dense_4h_to_h.weight.stride() == (1, 64)
    assert torch.equal(fast.lm_head.weight, model.lm_head.weight * 2)


@torch.no_grad()
def test_a_model_converted_after_patching(monkeypatch):
    model, fast = pair()
    ids = tokens(2, 9)
    counts = calls_of(monkeypatch, "squared_relu_mlp", "qkv_norm_rope")
    exact = model(ids).logits
    rounded = model.to(torch.bfloat16)(ids).logits
    bound = 2 * max_error(rounded, exact) + FLOOR[torch.bfloat16] * float(exact.abs().max())
    assert max_error(fast.to(torch.bfloat16)(ids).logits, exact) <= bound
    assert counts == {"squared_relu_mlp": 2, "qkv_norm_rope": 2}


@torch.no_grad()
def test_other_activations_dtypes_and_autocast_run_as_transformers_has_them(monkeypatch):
    ids = tokens(2, 9)
    model, fast = pair(hidden_act="gelu")
    assert max_error(fast(ids).logits, model(ids).logits) < TOLERANCE
    model, fast = pair(dtype=torch.float64)
    assert torch.equal(fast(ids).logits, model(ids).logits)
    model, fast = pair()
    counts = calls_of(monkeypatch, "squared_relu_mlp", "qkv_norm_rope")
    with torch.autocast("cpu", torch.bfloat16):
        assert max_error(fast(ids).logits, model(ids).logits) < 0.5
    assert counts == {"squared_relu_mlp": 0, "qkv_norm_rope": 0}


class Quantised(nn.Linear):
    """Stands for a linear layer of a quantisation library: its weight is not what it multiplies by."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 2, self.bias)


@pytest.mark.parametrize("name", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"])
@pytest.mark.parametrize("first", ["patched", "replaced"])
@torch.no_grad()
def test_foreign_linear_layers_are_called_and_warned_of_once(name, first, monkeypatch):
    from persimmon_fast.integrations import transformers as integration

    monkeypatch.setattr(integration, "_warned", set())
    model = randomised(PersimmonForCausalLM(hf_config()))
    fast = copy.deepcopy(model)

    def replace(one):
        for layer in one.model.layers:
            owner = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
            getattr(owner, name).__class__ = Quantised

    replace(model)
    for step in (apply_persimmon_fast, replace) if first == "patched" else (replace, apply_persimmon_fast):
        step(fast)
    ids = tokens(2, 9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert max_error(fast(ids).logits, model(ids).logits) < TOLERANCE
        fast(ids)
    ours = [w for w in caught if "Quantised" in str(w.message)]
    assert len(ours) == (0 if name == "dense" else 1)  # dense is called as a module in any case


@torch.no_grad()
def test_hooks_on_linear_layers_still_run():
    _, fast = pair()
    seen = []
    fast.model.layers[0].mlp.dense_h_to_4h.register_forward_hook(lambda *_: seen.append("hook"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the kernel is not used around it
        fast(tokens(1, 5))
    assert seen == ["hook"]


@pytest.mark.parametrize("first", ["patched", "offloaded"])
@torch.no_grad()
def test_offloaded_weights_of_accelerate(first, monkeypatch):
    """Its hooks replace forwards and keep weights on the meta device until a layer is called."""
    accelerate = pytest.importorskip("accelerate")
    model, _ = pair()
    fast = copy.deepcopy(model)
    ids = tokens(2, 9)
    expected = model(ids).logits
    if first == "patched":
        apply_persimmon_fast(fast)
        accelerate.cpu_offload(fast, execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(fast, execution_device=torch.device("cpu"))
        apply_persimmon_fast(fast)
    assert max_error(fast(ids).logits, expected) < TOLERANCE
    accelerate.hooks.remove_hook_from_submodules(fast)
    apply_persimmon_fast(fast)  # now that the down-projections are here, it can lay them out
    counts = calls_of(monkeypatch, "squared_relu_mlp", "qkv_norm_rope")
    assert max_error(fast(ids).logits, expected) < TOLERANCE
    assert counts == {"squared_relu_mlp": 2, "qkv_norm_rope": 2}
    assert torch.equal(revert(fast)(ids).logits, expected)


def test_device_map(tmp_path):
    pytest.importorskip("accelerate")
    model, _ = pair()
    model.save_pretrained(tmp_path)
    fast = apply_persimmon_fast(PersimmonForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).eval())
    with torch.no_grad():
        assert max_error(fast(tokens(2, 9)).logits, model(tokens(2, 9)).logits) < TOLERANCE


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), "a name"], ids=["module", "string"])
def test_what_is_no_persimmon_is_refused(wrong):
    with pytest.raises(TypeError, match="apply_persimmon_fast: model must be, or hold, a Persimmon"):
        apply_persimmon_fast(wrong)


def test_our_own_classes_are_refused_with_a_reason():
    from persimmon_fast import PersimmonForCausalLM as Ours
    from persimmon_fast.config import PersimmonConfig

    config = PersimmonConfig(vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                             num_attention_heads=4)  # fmt: skip
    with pytest.raises(TypeError, match="Classes of persimmon_fast run the kernels without it"):
        apply_persimmon_fast(Ours(config))


@torch.no_grad()
def test_the_attention_alone_serves_an_unpatched_model():
    """attn_implementation="persimmon_fast" is a name that transformers knows once it is registered."""
    attention.register()
    assert attention.NAME in AttentionInterface._global_mapping
    model, _ = pair()
    ids, mask = left_padded(3, 12)
    expected = model(ids, attention_mask=mask).logits[mask.bool()], model(ids).logits
    model.config._attn_implementation = attention.NAME
    assert max_error(model(ids, attention_mask=mask).logits[mask.bool()], expected[0]) < TOLERANCE
    assert max_error(model(ids).logits, expected[1]) < TOLERANCE
