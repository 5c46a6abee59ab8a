"""Linear layers of other libraries inside a patched model: PEFT's adapters, torchao's and bitsandbytes' quantised
weights. Around such a layer the kernels that would read its weight are not used, with one warning; results stay."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import max_error
from hf_helpers import calls_of, hf_config, left_padded, randomised, tokens
from torch import nn
from transformers import PersimmonForCausalLM

from persimmon_fast import apply_persimmon_fast, ops, revert
from persimmon_fast.integrations import transformers as integration

TOLERANCE = 2e-5  # fp32, logits of about 10
KERNELS = ("squared_relu_mlp", "qkv_norm_rope", "qk_norm_rope")
NUM_LAYERS = 2  # of hf_config
LINEARS = ("query_key_value", "dense_h_to_4h", "dense_4h_to_h")


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    """The kernels run, not their definitions in torch; and every test hears the integration's warnings."""
    monkeypatch.setattr(ops, "_warn_once", lambda message: pytest.fail(f"a slow path: {message}"))
    monkeypatch.setattr(integration, "_warned", set())


@pytest.fixture
def calls(monkeypatch):
    return calls_of(monkeypatch, *KERNELS)


def kernel_calls(calls, **expected):
    """Compares the counts since the last time, and starts anew."""
    assert calls == dict.fromkeys(KERNELS, 0) | expected
    calls.update(dict.fromkeys(KERNELS, 0))


def messages(caught) -> list[str]:
    return [str(warning.message) for warning in caught if "apply_persimmon_fast" in str(warning.message)]


@torch.no_grad()
def compare(model, fast, *, num_warnings, tolerance=TOLERANCE) -> str:
    """Logits of both, twice: equal, with this many warnings of the integration. Returns the warnings."""
    ids, mask = left_padded(3, 12)
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert max_error(fast(ids, attention_mask=mask).logits[mask.bool()], expected) < tolerance
    assert len(messages(caught)) == num_warnings, messages(caught)
    return "\n".join(messages(caught))


def plain_model(**changes):
    return randomised(PersimmonForCausalLM(hf_config(**changes)))


# ---- PEFT ----


def with_adapter(model, seed=0, **changes):
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings | changes))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # B begins at zero, where a lost adapter would not show
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return adapted.eval()


@pytest.fixture(params=["patched first", "adapted first"])
def lora(request):
    """(transformers' model with LoRA, the same patched, the base model without either)."""
    base = plain_model()
    model = with_adapter(copy.deepcopy(base))
    if request.param == "patched first":
        return model, with_adapter(apply_persimmon_fast(copy.deepcopy(base))), base
    fast = with_adapter(copy.deepcopy(base))
    assert apply_persimmon_fast(fast) is fast
    return model, fast, base


def test_lora_has_its_logits_and_one_warning(lora, calls):
    model, fast, base = lora
    warning = compare(model, fast, num_warnings=1)
    assert "peft.tuners.lora" in warning
    kernel_calls(calls, qk_norm_rope=2 * NUM_LAYERS)  # the rest of an attention still runs ours
    ids = tokens(2, 9)
    with torch.no_grad():
        assert max_error(model(ids).logits, base(ids).logits) > 0.1
        generated = [one.generate(input_ids=ids, max_new_tokens=6, do_sample=False) for one in (model, fast)]
    assert torch.equal(*generated)


def test_a_disabled_adapter_gives_the_base_model(lora):
    model, fast, base = lora
    compare(model, fast, num_warnings=1)
    with fast.disable_adapter():
        compare(base, fast, num_warnings=0)
    compare(model, fast, num_warnings=0)


def test_merging_brings_the_kernels_back(lora, calls):
    model, fast, _ = lora
    merged = fast.merge_and_unload()
    assert type(merged) is PersimmonForCausalLM
    compare(model.merge_and_unload(), merged, num_warnings=0)
    kernel_calls(calls, squared_relu_mlp=2 * NUM_LAYERS, qkv_norm_rope=2 * NUM_LAYERS)


def test_merged_inside_and_unmerged_again(lora):
    model, fast, base = lora
    fast.merge_adapter()
    compare(model, fast, num_warnings=1)
    fast.unmerge_adapter()
    compare(model, fast, num_warnings=0)
    compare(base, fast.unload(), num_warnings=0)


def test_reverting_leaves_the_adapter(lora):
    model, fast, _ = lora
    revert(fast)
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(fast(ids).logits, model(ids).logits)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_gradients_of_adapters(lora, checkpointing):
    model, fast, _ = lora
    ids = tokens(2, 10)
    results = []
    for one in (model, fast):
        one.train()
        if checkpointing:
            one.enable_input_require_grads()
            one.gradient_checkpointing_enable({"use_reentrant": True})
        loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {name: p.grad for name, p in one.named_parameters() if p.requires_grad}
        assert len(gradients) == 2 * len(LINEARS) * NUM_LAYERS
        assert all("lora_" in name for name in gradients)
        results.append((loss.detach(), gradients))
    (loss, expected), (fast_loss, actual) = results
    assert max_error(fast_loss, loss) < 1e-5
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        assert float(gradient.abs().max()) > 1e-3, name
        assert max_error(actual[name], gradient) <= 1e-5 * max(1.0, float(gradient.abs().max())), name


def test_a_training_step_of_adapters(lora):
    model, fast, _ = lora
    ids = tokens(2, 10)
    for one in (model, fast):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        one.train()
        one(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        one.eval()
    compare(model, fast, num_warnings=1, tolerance=1e-4)


def test_only_the_adapted_half_of_a_layer_falls_back(calls):
    base = plain_model()
    model = with_adapter(copy.deepcopy(base), target_modules=["query_key_value"])
    fast = apply_persimmon_fast(with_adapter(copy.deepcopy(base), target_modules=["query_key_value"]))
    compare(model, fast, num_warnings=1)
    kernel_calls(calls, squared_relu_mlp=2 * NUM_LAYERS, qk_norm_rope=2 * NUM_LAYERS)


def test_a_saved_adapter_of_a_patched_model_loads_into_an_ordinary_one(lora, tmp_path):
    peft = pytest.importorskip("peft")
    model, fast, base = lora
    fast.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("method", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens(method, calls):
    """Prefix tuning hands every layer a cache of trained keys; prompt tuning puts embeddings in front."""
    peft = pytest.importorskip("peft")
    adapted = []
    for patch in (lambda model: model, apply_persimmon_fast):
        settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "token_dim": 64}
        torch.manual_seed(0)
        one = peft.get_peft_model(patch(plain_model()), getattr(peft, method)(**settings))
        adapted.append(one.eval())
    ids = tokens(2, 9)
    results = []
    for one in adapted:
        with torch.no_grad():
            logits = one(input_ids=ids).logits
            generated = one.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        one.train()
        one(input_ids=ids, labels=ids).loss.backward()
        gradients = [p.grad for p in one.parameters() if p.requires_grad]
        results.append((logits, generated, gradients))
    assert max_error(results[1][0], results[0][0]) < TOLERANCE
    assert torch.equal(results[1][1], results[0][1])
    assert len(results[0][2]) == 1
    assert float(results[0][2][0].abs().max()) > 0
    assert max_error(results[1][2][0], results[0][2][0]) <= 1e-5
    assert calls["squared_relu_mlp"] > 0


# ---- torchao ----


@pytest.mark.parametrize("first", ["patched", "quantised"])
def test_torchao_int8_weights(first, calls):
    torchao = pytest.importorskip("torchao.quantization")

    def quantise(model):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        return model

    base = plain_model()
    model = quantise(copy.deepcopy(base))
    steps = (apply_persimmon_fast, quantise) if first == "patched" else (quantise, apply_persimmon_fast)
    fast = copy.deepcopy(base)
    for step in steps:
        fast = step(fast)
    down = fast.model.layers[0].mlp.dense_4h_to_h
    assert type(down) is nn.Linear
    assert type(down.weight) is not nn.Parameter
    warning = compare(model, fast, num_warnings=1)
    assert f"Linear with a weight of type {type(down.weight).__name__}" in warning
    kernel_calls(calls, qk_norm_rope=2 * NUM_LAYERS)
    ids = tokens(2, 9)
    with torch.no_grad():
        assert max_error(model(ids).logits, base(ids).logits) > 1e-3  # it is quantised
        assert torch.equal(revert(fast)(ids).logits, model(ids).logits)


# ---- bitsandbytes ----

BLOCKS_OF_64 = {"intermediate_size": 128}  # its 4-bit product for CPUs takes nothing else


def quantised_by_bitsandbytes(model, bits):
    """Every linear layer of the decoder replaced, as transformers does with a BitsAndBytesConfig."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for layer in model.model.layers:
        for owner, name in [
            (layer.self_attn, "query_key_value"),
            (layer.self_attn, "dense"),
            (layer.mlp, "dense_h_to_4h"),
            (layer.mlp, "dense_4h_to_h"),
        ]:
            linear = getattr(owner, name)
            shape = linear.in_features, linear.out_features
            if bits == 4:
                new = bitsandbytes.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
            else:
                new = bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            new.load_state_dict(linear.state_dict())
            setattr(owner, name, new.to("cpu"))
    return model.eval()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("first", ["patched", "quantised"])
def test_bitsandbytes(first, bits, calls):
    base = plain_model(**BLOCKS_OF_64)
    model = quantised_by_bitsandbytes(copy.deepcopy(base), bits)
    fast = copy.deepcopy(base)
    if first == "patched":
        fast = quantised_by_bitsandbytes(apply_persimmon_fast(fast), bits)
    else:
        fast = apply_persimmon_fast(quantised_by_bitsandbytes(fast, bits))
    down = fast.model.layers[0].mlp.dense_4h_to_h
    assert down.weight.dtype in (torch.uint8, torch.int8)
    warning = compare(model, fast, num_warnings=1)
    assert "bitsandbytes.nn.modules.Linear" in warning
    kernel_calls(calls, qk_norm_rope=2 * NUM_LAYERS)
    with torch.no_grad():
        assert max_error(model(tokens(2, 9)).logits, base(tokens(2, 9)).logits) > 1e-3  # it is quantised


def test_a_bitsandbytes_config_of_transformers(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig

    plain_model(**BLOCKS_OF_64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model, fast = (
        PersimmonForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"}).eval()
        for _ in range(2)
    )
    assert fast.model.layers[0].mlp.dense_4h_to_h.weight.dtype == torch.uint8
    compare(model, apply_persimmon_fast(fast), num_warnings=1)
