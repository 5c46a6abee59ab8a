"""A patched model of transformers in generate, in training and under torch.compile."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import CUDA, EMU, EMU_SM90, FLOOR, backend, max_error
from hf_helpers import IS_TRANSFORMERS_4, calls_of, hf_config, left_padded, pair, randomised, tokens
from torch import nn
from transformers import DynamicCache, PersimmonForCausalLM, StaticCache

from persimmon_fast import apply_persimmon_fast
from persimmon_fast.integrations import attention

TOLERANCE = 2e-5  # fp32, logits of about 10
pytestmark = pytest.mark.usefixtures("kernels_alone")


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
