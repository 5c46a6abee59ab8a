"""The oracle's own oracle: the decoder composed of reference functions gives transformers' logits.

Tiny random models in fp32, all weights random (biases and LayerNorms too: zeros and ones would hide them).
"""

from __future__ import annotations

import pytest
import torch
from helpers import hf_model, randn, tiny_config

from persimmon_fast import ops, reference
from persimmon_fast.model import PersimmonForCausalLM

TOLERANCE = 1e-5
ROPE_SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(4)],
        "long_factor": [2.0 + 0.5 * i for i in range(4)],
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.fixture(autouse=True)
def _reference_only(monkeypatch):
    monkeypatch.setattr(ops, "_FORCE_REFERENCE", True)


def assert_logits_equal(config, seqlen=24, batch_size=2):
    theirs = hf_model(config)
    ours = PersimmonForCausalLM(config)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(config.vocab_size, (batch_size, seqlen), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
        actual = ours(ids, use_cache=False).logits
        cached = ours(ids, use_cache=True).logits
    assert float((actual - expected).abs().max()) < TOLERANCE * max(1.0, float(expected.abs().max()))
    assert float((cached - expected).abs().max()) < TOLERANCE * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("qk_layernorm", [True, False])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_qk_layernorm_and_rotary_fractions(qk_layernorm, fraction):
    assert_logits_equal(tiny_config(qk_layernorm=qk_layernorm, partial_rotary_factor=fraction))


@pytest.mark.parametrize("rope", ROPE_SCALINGS)
@pytest.mark.parametrize("seqlen", [24, 60])
def test_rope_scaling(rope, seqlen):
    limit = 40 if rope == "dynamic" else 128  # 60 tokens: past the original length, where these types differ
    config = tiny_config(rope_scaling=ROPE_SCALINGS[rope], max_position_embeddings=limit)
    assert_logits_equal(config, seqlen=seqlen)


@pytest.mark.parametrize("seed", range(8))
def test_random_configs(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    heads, head_dim = pick(1, 2, 3, 5), pick(8, 16, 40, 64)
    assert_logits_equal(
        tiny_config(
            hidden_size=heads * head_dim,
            num_attention_heads=heads,
            intermediate_size=pick(1, 33, 128),
            num_hidden_layers=pick(1, 2, 4),
            vocab_size=pick(7, 100, 333),
            partial_rotary_factor=pick(0.25, 0.5, 1.0),
            qk_layernorm=pick(True, False),
            rope_theta=pick(10000.0, 25000.0, 500000.0),
            layer_norm_eps=pick(1e-5, 1e-3),
        ),
        seqlen=pick(1, 2, 17, 33),
        batch_size=pick(1, 3),
    )


def test_loss_and_gradients_equal():
    config = tiny_config()
    theirs, ours = hf_model(config), PersimmonForCausalLM(config)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, :5] = -100
    expected, actual = theirs(ids, labels=labels).loss, ours(ids, labels=labels).loss
    assert abs(actual.item() - expected.item()) < TOLERANCE
    expected.backward()
    actual.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = max(1e-3, float(q.grad.abs().max()))
        assert float((p.grad - q.grad).abs().max()) < 1e-4 * scale, name


def test_philox_known_answer():
    """Random123's kat_vectors: philox4x32-10, key and counter 0."""
    uniform = reference.philox_uniform(torch.tensor([0]), torch.tensor([0]), 6)[0]
    words = [int(u * 2**32 - 0.5) for u in uniform]
    assert words[:4] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_sampling_follows_the_filtered_distribution():
    """20,000 draws against softmax probabilities, by chi-square at p = 1e-4 (35.6 at 9 degrees of freedom: 33.7)."""
    draws, vocab = 20000, 10
    logits = randn(1, vocab, seed=5)
    weight = logits.t().contiguous()  # [vocab, 1]: x = 1 gives these logits
    x = torch.ones(draws, 1)
    ones, zeros = torch.ones(draws), torch.zeros(draws, dtype=torch.int32)
    offsets = torch.arange(draws)
    ids, logprobs = reference.lm_head_sample(
        x, weight, ones * 0.7, zeros, ones, ones * 0, torch.full((draws,), 9), offsets, None, None
    )
    expected = (logits[0] / 0.7).softmax(0) * draws
    chi_square = float(((ids.bincount(minlength=vocab) - expected) ** 2 / expected).sum())
    assert chi_square < 33.7
    assert torch.allclose(logprobs, logits[0].log_softmax(0)[ids])


def test_keep_mask_by_hand():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()

    def kept(top_k=0, top_p=1.0, min_p=0.0):
        one = torch.ones(1)
        mask = reference.keep_mask(logits, (one * top_k).int(), one * top_p, one * min_p)
        return mask[0].nonzero().flatten().tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=1) == [0]
    assert kept(top_k=2) == [0, 1, 2]  # the tie at the boundary stays
    assert kept(top_p=0.45) == [0]
    assert kept(top_p=0.55) == [0, 1, 2]
    assert kept(top_p=0.95) == [0, 1, 2, 3]
    assert kept(min_p=0.3) == [0, 1, 2]
    assert kept(top_k=3, min_p=0.5) == [0]
