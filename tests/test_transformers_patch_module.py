"""What apply_persimmon_fast leaves as it was: modules, parameters, copies, checkpoints, hooks, foreign layers."""

from __future__ import annotations

import copy
import io
import json
import warnings

import pytest
import torch
from helpers import FLOOR, max_error
from hf_helpers import VOCAB_SIZE, calls_of, hf_config, left_padded, pair, randomised, tokens
from torch import nn
from transformers import AttentionInterface, PersimmonForCausalLM

from persimmon_fast import apply_persimmon_fast, revert
from persimmon_fast.integrations import attention

TOLERANCE = 2e-5  # fp32, logits of about 10
pytestmark = pytest.mark.usefixtures("kernels_alone")


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
