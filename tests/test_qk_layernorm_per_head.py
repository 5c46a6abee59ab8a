"""One LayerNorm per head for queries and keys, a mode of Adept's training code."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import DTYPES, FLOOR, max_error, tiny_config
from torch import nn

from persimmon_fast import PersimmonConfig, PersimmonForCausalLM, reference
from persimmon_fast.checkpoint import CheckpointMismatchError, expected_tensors
from persimmon_fast.config import ConfigError

PER_HEAD = tiny_config(qk_layernorm_per_head=True)
IDS = torch.randint(160, (2, 70), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def make_model(config: PersimmonConfig, seed: int = 0) -> PersimmonForCausalLM:
    """Random weights, those of LayerNorms included."""
    model = PersimmonForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + noise if "layernorm.weight" in name else noise)
    return model


def test_num_parameters_and_tensors_count_the_heads():
    model = PersimmonForCausalLM(PER_HEAD)
    assert PER_HEAD.num_parameters == model.num_parameters()
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected_tensors(PER_HEAD)
    for x in "qk":
        assert expected_tensors(PER_HEAD)[f"model.layers.1.self_attn.{x}_layernorm.bias"] == (3, 16)


def qkv_by_a_loop(model: PersimmonForCausalLM, x: torch.Tensor) -> list[torch.Tensor]:
    """q and k of layer 0 before rotary, each head by an nn.LayerNorm of its own, and v."""
    attention = model.model.layers[0].self_attn
    heads = attention.query_key_value(x).view(len(x), 3, 3, 16)
    q, k, v = heads.unbind(2)
    result = []
    for states, norm in ((q, attention.q_layernorm), (k, attention.k_layernorm)):
        normed = []
        for head in range(3):
            layer_norm = nn.LayerNorm(16, PER_HEAD.layer_norm_eps)
            layer_norm.weight.copy_(norm.weight[head])
            layer_norm.bias.copy_(norm.bias[head])
            normed.append(layer_norm(states[:, head]))
        result.append(torch.stack(normed, 1))
    return [*result, v]


def test_attention_and_cache_are_those_of_a_loop_over_the_heads():
    model, outputs = make_model(PER_HEAD), []
    layer = model.model.layers[0]
    layer.self_attn.register_forward_hook(lambda module, args, output: outputs.append(output))
    cache = model(IDS[:1, :60], use_cache=True).past_key_values
    model(IDS[:1, :60], use_cache=False)
    x = model.model.embed_tokens(IDS[0, :60])
    q, k, v = qkv_by_a_loop(model, layer.input_layernorm(x))
    cos_sin = model.model.rotary(60, x.device)
    q, k = (reference.apply_rope(states, cos_sin, torch.arange(60)) for states in (q, k))
    page = cache._pages[0][0]
    assert max_error(cache.k[0][page, :, :60].transpose(0, 1), k) < 1e-5
    assert max_error(cache.v[0][page, :, :60].transpose(0, 1), v) < 1e-5
    expected = x + layer.self_attn.dense(reference.attention(q, k, v, 16**-0.5, causal=True)[0].flatten(1))
    assert max_error(outputs[0], expected) < 1e-5
    assert max_error(outputs[1], expected) < 1e-5


def test_gradients_are_those_of_a_loop_over_the_heads():
    """q and k reach the loss through rotary of position 0 alone, which rotates by nothing."""
    model = make_model(PER_HEAD)
    attention = model.model.layers[0].self_attn
    x, weights = torch.randn(5, 48, generator=torch.Generator().manual_seed(2)), torch.randn(5, 3, 16)
    cos_sin = model.model.rotary(1, x.device)

    def gradients(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        parameters = [*attention.q_layernorm.parameters(), *attention.k_layernorm.parameters()]
        return list(torch.autograd.grad((weights * (q + 2 * k)).sum(), parameters))

    with torch.enable_grad():
        q, k = attention.query_key_value(x).view(5, 3, 3, 16).unbind(2)[:2]
        norms = [p for norm in (attention.q_layernorm, attention.k_layernorm) for p in (norm.weight, norm.bias)]
        ours = gradients(*reference.qk_norm_rope(q, k, *norms, cos_sin, torch.zeros(5, dtype=torch.long), 1e-5))
        normed = [
            torch.stack([nn.functional.layer_norm(s[:, h], (16,), n.weight[h], n.bias[h]) for h in range(3)], 1)
            for s, n in ((q, attention.q_layernorm), (k, attention.k_layernorm))
        ]
        expected = gradients(*normed)
    for actual, wanted in zip(ours, expected, strict=True):
        assert max_error(actual, wanted) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_heads_are_the_shared_layer_norm(dtype):
    """Every head with the weights of a shared LayerNorm: the same bits as sharing them."""
    shared = make_model(tiny_config()).to(dtype)
    per_head = PersimmonForCausalLM(PER_HEAD).eval().to(dtype)
    state = shared.state_dict()
    for name in state:
        if "q_layernorm" in name or "k_layernorm" in name:
            state[name] = state[name].expand(3, 16)
    per_head.load_state_dict(state)
    assert torch.equal(per_head(IDS).logits, shared(IDS).logits)


def test_heads_have_weights_of_their_own():
    model = make_model(PER_HEAD)
    before = model(IDS).logits
    for layer in model.model.layers:  # what a single [head_dim] weight cannot say
        layer.self_attn.q_layernorm.weight.copy_(layer.self_attn.q_layernorm.weight.flip(0))
    assert max_error(model(IDS).logits, before) > 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_equals_decode_steps(dtype):
    model = make_model(PER_HEAD).to(dtype)
    whole, cache, steps = model(IDS, use_cache=False).logits, None, []
    for i in range(IDS.shape[1]):
        out = model(IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert max_error(torch.cat(steps, 1), whole) <= 4 * FLOOR[dtype] * float(whole.abs().max())


def test_config_file_names_it_only_where_it_is_true(tmp_path):
    assert "qk_layernorm_per_head" not in tiny_config().to_dict()
    PER_HEAD.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["qk_layernorm_per_head"] is True
    assert PersimmonConfig.from_pretrained(tmp_path) == PER_HEAD


def test_config_errors():
    with pytest.raises(ConfigError, match=r"qk_layernorm_per_head: expected true or false, found 1 \(int\)"):
        tiny_config(qk_layernorm_per_head=1)
    with pytest.raises(ConfigError, match="qk_layernorm_per_head: expected false, since qk_layernorm is false"):
        tiny_config(qk_layernorm_per_head=True, qk_layernorm=False)


def test_checkpoint_goes_both_ways_and_warns_of_transformers(tmp_path):
    model = make_model(PER_HEAD)
    with pytest.warns(UserWarning, match="qk-layernorm per head .* transformers refuses"):
        model.save_pretrained(tmp_path / "model")
    loaded = PersimmonForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    from transformers import PersimmonForCausalLM as HFModel

    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        HFModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(("stored", "named"), [(True, False), (False, True)])
def test_files_of_the_other_kind_say_which_key_decides(tmp_path, stored, named):
    model = make_model(tiny_config(qk_layernorm_per_head=stored))
    if stored:
        with pytest.warns(UserWarning, match="per head"):
            model.save_pretrained(tmp_path / "model")
    else:
        model.save_pretrained(tmp_path / "model")
    tiny_config(qk_layernorm_per_head=named).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointMismatchError, match=f"set qk_layernorm_per_head to {str(stored).lower()}"):
        PersimmonForCausalLM.from_pretrained(tmp_path / "model")
