"""apply_persimmon_fast and what users do to models around it: each test is a use in which transformers' model works."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from helpers import max_error
from hf_helpers import IS_TRANSFORMERS_4, hf_config, left_padded, pair, randomised, tokens
from processes import environment
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PersimmonForCausalLM

from persimmon_fast import apply_persimmon_fast, revert
from persimmon_fast.integrations import transformers as integration

TOLERANCE = 2e-5  # fp32, logits of about 10


@pytest.fixture(autouse=True)
def no_warning_is_due_to_an_earlier_test(monkeypatch):
    monkeypatch.setattr(integration, "_warned", set())


# ---- another process, another replica ----


def test_a_pickle_runs_in_a_process_that_patched_nothing(tmp_path):
    """The attention implementation and its mask are then known to transformers too."""
    model, fast = pair()
    torch.save(fast, tmp_path / "model.pt")
    program = (
        "import sys, torch; fast = torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
        "ids, mask = torch.arange(3, 15).view(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])\n"
        "with torch.no_grad(): torch.save(fast(ids, attention_mask=mask).logits, sys.argv[1] + '/logits.pt')"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(command, check=True, env=environment(), cwd=tmp_path)
    ids, mask = torch.arange(3, 15).view(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
    assert max_error(torch.load(tmp_path / "logits.pt")[mask.bool()], expected) < TOLERANCE


@torch.no_grad()
def test_a_replica_of_data_parallel_uses_its_own_weights():
    """nn.DataParallel copies the __dict__ of every module and then gives the copy the weights of its device."""
    _, fast = pair()
    mlp, attention = fast.model.layers[0].mlp, fast.model.layers[0].self_attn
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    positions = fast.model.rotary_emb(x, position_ids=torch.arange(3)[None])
    for module, arguments in ((mlp, {}), (attention, {"position_embeddings": positions, "attention_mask": None})):
        replica = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            setattr(replica, name, child)
        for name in ("dense_4h_to_h", "dense"):
            if hasattr(module, name):
                zero = nn.Linear(getattr(module, name).in_features, 64)
                setattr(replica, name, zero.requires_grad_(False))
                zero.weight.zero_()
                zero.bias.zero_()
        out = replica(x, **arguments)
        assert torch.count_nonzero(out if module is mlp else out[0]) == 0
        out = module(x, **arguments)
        assert torch.count_nonzero(out if module is mlp else out[0]) > 0
    assert "_replicate_for_data_parallel" not in revert(fast).model.layers[0].mlp.__dict__


# ---- modules inside a layer ----


@pytest.mark.parametrize("name", ["act", "q_layernorm", "k_layernorm"])
@torch.no_grad()
def test_hooks_inside_a_layer_still_run(name):
    """As those that collect activations."""
    model, fast = pair()
    seen = []
    for one in (model, fast):
        layer = one.model.layers[0]
        module = getattr(layer.mlp if name == "act" else layer.self_attn, name)
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the kernel is not used around it
        expected, actual = model(tokens(1, 5)).logits, fast(tokens(1, 5)).logits
    assert max_error(actual, expected) < TOLERANCE
    assert len(seen) == 2
    assert max_error(seen[1], seen[0]) < TOLERANCE * float(seen[0].abs().max())


NORMS = {
    "another class": lambda: nn.RMSNorm(16),
    "none": lambda: nn.Identity(),
    "no weights": lambda: nn.LayerNorm(16, elementwise_affine=False),
    "no bias": lambda: nn.LayerNorm(16, bias=False),
    "its own eps": lambda: nn.LayerNorm(16, eps=0.5),
}


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
@torch.no_grad()
def test_a_norm_replaced_after_patching(make):
    model, fast = pair()
    for one in (model, fast):
        one.model.layers[0].self_attn.k_layernorm = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the kernel is not used around it
        assert max_error(fast(tokens(2, 7)).logits, model(tokens(2, 7)).logits) < TOLERANCE


@torch.no_grad()
def test_an_activation_replaced_after_patching():
    model, fast = pair()
    for one in (model, fast):
        one.model.layers[0].mlp.act = nn.GELU()
    assert max_error(fast(tokens(2, 7)).logits, model(tokens(2, 7)).logits) < TOLERANCE


@torch.no_grad()
def test_a_layer_called_with_positional_arguments():
    model, fast = pair()
    x, position_ids = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)), torch.arange(4)[None]
    outputs = []
    for one in (model, fast):
        positions = one.model.rotary_emb(x, position_ids)
        # attention_mask, position_ids, past_key_values, output_attentions, use_cache
        outputs.append(one.model.layers[0].self_attn(x, None, position_ids, None, False, False,
                                                     position_embeddings=positions)[0])  # fmt: skip
    assert max_error(outputs[1], outputs[0]) < TOLERANCE


# ---- masks ----


@torch.no_grad()
def test_attention_that_is_not_causal():
    """As models of sentence embeddings are made: transformers' sdpa asks each attention module."""
    model, fast = pair()
    causal = fast(tokens(2, 7)).logits
    for one in (model, fast):
        for layer in one.model.layers:
            layer.self_attn.is_causal = False
    expected = model(tokens(2, 7)).logits
    assert max_error(expected, causal) > 0.1
    assert max_error(fast(tokens(2, 7)).logits, expected) < TOLERANCE
    _, fast = pair()
    if not IS_TRANSFORMERS_4:  # where the model takes no such argument
        assert max_error(fast(tokens(2, 7), is_causal=False).logits, expected) < TOLERANCE


def test_an_int32_mask_of_the_caller_is_refused_as_transformers_refuses_it():
    """Ours, of int32 too, has another shape."""
    model, fast = pair()
    mask = torch.ones(2, 1, 7, 7, dtype=torch.int32).tril()
    for one in (model, fast):
        with torch.no_grad(), pytest.raises(RuntimeError, match="Expected attn_mask dtype to be bool or float"):
            one(tokens(2, 7), attention_mask=mask)


@pytest.mark.parametrize("asked", ["argument", "config"])
def test_attentions_of_a_model_in_training(asked):
    """Of a model that was loaded with eager attention, which alone has them."""
    model, fast = pair()
    revert(fast)
    for one in (model, fast):
        one.set_attn_implementation("eager")
        one.config.output_attentions = asked == "config"
    apply_persimmon_fast(fast)
    arguments = {"output_attentions": True} if asked == "argument" else {}
    for training in (True, False):
        for one in (model, fast):
            one.train(training)
        expected, actual = model(tokens(2, 7), **arguments).attentions, fast(tokens(2, 7), **arguments).attentions
        assert len(actual) == len(expected) == 2
        assert max_error(actual[0].detach(), expected[0].detach()) < 1e-6
        with torch.no_grad():
            actual = fast(tokens(2, 7), **arguments).attentions
        assert max_error(actual[0], expected[0].detach()) < 1e-6


@torch.no_grad()
def test_one_mask_with_padding_for_every_sequence():
    if not IS_TRANSFORMERS_4:
        pytest.skip("transformers 5 refuses a mask of another batch size")
    model, fast = pair()
    mask = left_padded(3, 9)[1][2:]
    expected, actual = model(tokens(3, 9), attention_mask=mask).logits, fast(tokens(3, 9), attention_mask=mask).logits
    assert max_error(actual[:, 2:], expected[:, 2:]) < TOLERANCE


# ---- differentiation, tracing, shapes alone ----


@pytest.mark.parametrize("implementation", ["eager", "persimmon_fast"])
def test_forward_mode_differentiation(implementation):
    """The tangent of the eager model, or the refusal of sdpa, but never the part of it that passes by our kernels."""
    model, fast = pair()
    model.set_attn_implementation("eager")
    fast.set_attn_implementation(implementation)
    embeds, direction = torch.randn(2, 2, 5, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    tangents = []
    for one in (model, fast):
        one.requires_grad_(False)

        def logits(x, one=one):
            return one(inputs_embeds=x, use_cache=False).logits

        if one is fast and implementation == "persimmon_fast":
            with pytest.raises(NotImplementedError, match="forward AD"):
                torch.func.jvp(logits, (embeds,), (direction,))
        else:
            tangents.append(torch.func.jvp(logits, (embeds,), (direction,))[1])
    for tangent in tangents[1:]:
        assert max_error(tangent, tangents[0]) < TOLERANCE * float(tangents[0].abs().max())


class LogitsAlone(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.filterwarnings("ignore")  # that tracing is deprecated, and what it takes for a constant
@torch.no_grad()
def test_a_trace_of_a_batch_without_padding_serves_one_with_padding():
    model, fast = pair()
    traced = torch.jit.trace(LogitsAlone(fast), (tokens(3, 9), torch.ones(3, 9, dtype=torch.long)))
    ids, mask = left_padded(3, 9)
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    assert max_error(traced(ids, mask)[mask.bool()], expected) < TOLERANCE


@torch.no_grad()
def test_shapes_alone():
    """The meta device, where memory is planned, and fake tensors."""
    if not IS_TRANSFORMERS_4:  # whose rotary embedding knows no meta device
        with torch.device("meta"):
            model = apply_persimmon_fast(PersimmonForCausalLM(hf_config()).eval())
        assert model(tokens(2, 5).to("meta")).logits.shape == (2, 5, 160)
    fast = apply_persimmon_fast(randomised(PersimmonForCausalLM(hf_config())))
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids, mask = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
        assert fast(ids, attention_mask=mask).logits.shape == (2, 5, 160)
