"""The decoder on its kernels: against transformers, against itself (cache, padding, batching), and its errors."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from helpers import DTYPES, FLOOR, hf_model, max_error, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from persimmon_fast import PersimmonConfig, PersimmonForCausalLM, PersimmonModel
from persimmon_fast.kv_cache import PAGE_SIZE, PagedKVCache

TOLERANCE = 1e-5


def random_ids(batch_size: int, seqlen: int, vocab: int = 160, seed: int = 3) -> torch.Tensor:
    return torch.randint(vocab, (batch_size, seqlen), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair():
    """(ours, theirs) with the same random weights, fp32."""
    config = tiny_config()
    theirs, ours = hf_model(config), PersimmonForCausalLM(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture
def ours(pair):
    return pair[0]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("seqlen", [1, 2, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_equal_transformers(pair, seqlen, use_cache):
    ours, theirs = pair
    ids = random_ids(2, seqlen)
    actual = ours(ids, use_cache=use_cache)
    assert max_error(actual.logits, theirs(ids).logits) < TOLERANCE
    assert (actual.past_key_values is not None) == use_cache


@pytest.mark.parametrize("qk_layernorm", [True, False])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_config_variants_equal_transformers(qk_layernorm, fraction):
    config = tiny_config(qk_layernorm=qk_layernorm, partial_rotary_factor=fraction)
    theirs, ours = hf_model(config), PersimmonForCausalLM(config).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = random_ids(3, 30)
    assert max_error(ours(ids).logits, theirs(ids).logits) < TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_within_the_contract(pair, dtype):
    """At most twice the error that transformers makes in the same dtype, against its fp32 logits."""
    config, ids = pair[0].config, random_ids(4, 50)
    exact = pair[1](ids).logits
    theirs = hf_model(config).to(dtype)
    theirs.model.rotary_emb.inv_freq = pair[1].model.rotary_emb.inv_freq  # .to() rounds it: not our baseline
    ours = PersimmonForCausalLM(config).eval()
    ours.load_state_dict(pair[1].state_dict())
    error = max_error(ours.to(dtype)(ids).logits, exact)
    assert error <= 2 * max_error(theirs(ids).logits, exact) + FLOOR[dtype] * float(exact.abs().max())


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_masks_equal_transformers(pair, side):
    ours, theirs = pair
    ids, mask = random_ids(3, 40), torch.ones(3, 40, dtype=torch.long)
    if side == "left":
        mask[1, :7], mask[2, :39] = 0, 0
    elif side == "right":
        mask[1, 33:], mask[2, 1:] = 0, 0
    else:
        mask[1, 5:9], mask[2, ::3] = 0, 0
    expected, actual = theirs(ids, attention_mask=mask).logits, ours(ids, attention_mask=mask).logits
    assert max_error(actual[mask.bool()], expected[mask.bool()]) < TOLERANCE


def test_prefill_of_n_equals_n_decode_steps(ours):
    ids = random_ids(2, 70)  # past one page
    whole = ours(ids).logits
    cache, steps = None, []
    for i in range(70):
        out = ours(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert max_error(torch.cat(steps, 1), whole) < TOLERANCE


@pytest.mark.parametrize("cut", [1, 30, 64, 65, 99])
def test_prefill_in_two_parts_equals_one(ours, cut):
    ids, mask = random_ids(2, 100), torch.ones(2, 100, dtype=torch.long)
    mask[0, :20] = 0
    whole = ours(ids, attention_mask=mask).logits
    first = ours(ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
    second = ours(ids[:, cut:], attention_mask=mask, past_key_values=first.past_key_values)
    both = torch.cat([first.logits, second.logits], 1)
    assert max_error(both[mask.bool()], whole[mask.bool()]) < TOLERANCE


def test_batch_equals_singles(ours):
    ids = random_ids(5, 33)
    together = ours(ids).logits
    for row in range(5):
        assert max_error(ours(ids[row : row + 1]).logits[0], together[row]) < TOLERANCE


def test_same_bits_twice(ours):
    ids = random_ids(2, 90)
    assert torch.equal(ours(ids).logits, ours(ids).logits)


def test_inputs_embeds_and_position_ids(pair):
    ours, theirs = pair
    ids, positions = random_ids(2, 20), torch.arange(7, 47, 2).unsqueeze(0)
    embeds = ours.model.embed_tokens(ids)
    expected = theirs(ids, position_ids=positions).logits
    assert max_error(ours(inputs_embeds=embeds, position_ids=positions).logits, expected) < TOLERANCE
    assert max_error(ours(ids).logits, expected) > 100 * TOLERANCE  # the positions were looked at


def test_hidden_states_equal_transformers(pair):
    ours, theirs = pair
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    actual = ours(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) == 3
    for a, e in zip(actual, expected, strict=True):
        assert max_error(a[mask.bool()], e[mask.bool()]) < TOLERANCE


def test_loss_equals_transformers(pair):
    ours, theirs = pair
    ids = random_ids(2, 20)
    labels = ids.clone()
    labels[1, 10:] = -100
    assert abs(ours(ids, labels=labels).loss.item() - theirs(ids, labels=labels).loss.item()) < TOLERANCE


KEPT = [
    0, 1, 5, 20, 100,  # more than there are: all
    -3,  # all but the first three
    torch.tensor([0, 3]), torch.tensor([-1, 2]), torch.tensor([], dtype=torch.long),
    torch.tensor([[0, 3, 19], [4, 4, 1]]),
    torch.arange(40).view(2, 20) % 3 == 0,
]  # fmt: skip


@pytest.mark.parametrize("keep", KEPT, ids=lambda keep: str(keep) if isinstance(keep, int) else f"{list(keep.shape)}")
def test_logits_to_keep(pair, keep):
    ours, theirs = pair
    ids = random_ids(2, 20)
    expected = theirs(ids, logits_to_keep=keep).logits
    actual = ours(ids, logits_to_keep=keep).logits
    assert actual.shape == expected.shape
    assert max_error(actual, expected) < TOLERANCE


def test_logits_to_keep_past_the_last_position(pair):
    for model in pair:
        with pytest.raises(IndexError):
            model(random_ids(2, 20), logits_to_keep=torch.tensor([20]))


@pytest.fixture
def eager(pair):
    """(ours, theirs), theirs with attention that gives its weights."""
    pair[1].set_attn_implementation("eager")
    pair[0].model._warned_of_attentions = True  # `test_attentions_warn_once` looks at it
    yield pair
    pair[1].set_attn_implementation("sdpa")


@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
def test_attentions_equal_transformers(eager, side):
    ours, theirs = eager
    ids, mask = random_ids(3, 70), torch.ones(3, 70, dtype=torch.bool)
    if side == "left":
        mask[1, :7], mask[2, :69] = False, False
    elif side == "right":
        mask[1, 33:], mask[2, 1:] = False, False
    elif side == "holes":
        mask[1, 5:9], mask[2, ::3] = False, False
    options = {"output_attentions": True, "attention_mask": None if side == "none" else mask.long()}
    actual, expected = ours(ids, **options), theirs(ids, **options)
    assert max_error(actual.logits[mask], expected.logits[mask]) < TOLERANCE
    assert len(actual.attentions) == len(expected.attentions) == 2
    for a, e in zip(actual.attentions, expected.attentions, strict=True):
        assert a.shape == e.shape == (3, 3, 70, 70)
        assert max_error(a.transpose(1, 2)[mask], e.transpose(1, 2)[mask]) < TOLERANCE
        assert not a.transpose(1, 2)[~mask].any()


@pytest.mark.parametrize("cut", [1, 30, 64, 66, 69])
def test_attentions_over_a_cache_equal_those_of_one_pass(eager, cut):
    ours, _ = eager
    ids, mask = random_ids(2, 70), torch.ones(2, 70, dtype=torch.long)
    mask[0, :20], mask[1, 3:6] = 0, 0
    whole = ours(ids, attention_mask=mask, output_attentions=True)
    cache = ours(ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True).past_key_values
    rest = ours(ids[:, cut:], attention_mask=mask, past_key_values=cache, output_attentions=True)
    assert max_error(rest.logits[mask[:, cut:].bool()], whole.logits[:, cut:][mask[:, cut:].bool()]) < TOLERANCE
    for a, e in zip(rest.attentions, whole.attentions, strict=True):
        assert max_error(a, e[:, :, cut:]) < TOLERANCE


def test_attentions_over_a_padded_cache_need_its_mask(eager):
    ours, _ = eager
    ids, mask = random_ids(2, 6), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    cache = ours(ids[:, :5], attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"needs attention_mask .*the \[4, 5\] tokens of the past 5 columns marked"):
        ours(ids[:, 5:], past_key_values=cache, output_attentions=True)


def test_attentions_warn_once():
    model = PersimmonForCausalLM(tiny_config()).eval()
    with pytest.warns(UserWarning, match="output_attentions: attention is computed in plain torch") as caught:
        _ = [model(random_ids(1, 4), output_attentions=True) for _ in range(3)]
    assert len(caught) == 1


def test_attentions_and_hidden_states_that_are_returned_have_gradients(eager):
    ours, _ = eager
    ids, mask = random_ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.enable_grad():
        out = ours(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        for tensor in (*out.attentions, *out.hidden_states):
            tensor.retain_grad()
        out.logits[mask.bool()].square().sum().backward()
    for tensor in (*out.attentions, *out.hidden_states):
        assert tensor.grad.abs().max() > 0
    ours.zero_grad(set_to_none=True)


def test_dropout_of_attention_is_applied_in_training_alone():
    model = PersimmonModel(tiny_config(attention_dropout=0.5))
    ids = random_ids(2, 30)
    plain = model.eval()(ids).last_hidden_state
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = (model.train()(ids).last_hidden_state for _ in range(2))
    assert max_error(first, second) > 100 * TOLERANCE
    assert max_error(model.eval()(ids).last_hidden_state, plain) == 0
    assert model.train()(ids).attentions is None


@pytest.mark.parametrize("selected", [-1, [1], [0, -1], [0], 2])
def test_some_hidden_states_equal_transformers(pair, selected):
    ours, theirs = pair
    ids = random_ids(2, 9)
    expected = theirs(ids, output_hidden_states=selected).hidden_states
    actual = ours(ids, output_hidden_states=selected).hidden_states
    assert [h is None for h in actual] == [h is None for h in expected]
    for a, e in zip(actual, expected, strict=True):
        assert a is None or max_error(a, e) < TOLERANCE


def test_options_of_the_config(ours):
    model = PersimmonForCausalLM(ours.config.replace(extra={"output_hidden_states": True, "return_dict": False})).eval()
    ids = random_ids(1, 4)
    logits, cache, hidden_states = model(ids)
    assert isinstance(cache, PagedKVCache)
    assert logits.shape == (1, 4, 160)
    assert len(hidden_states) == 3
    assert list(model(ids, output_hidden_states=False, return_dict=True)) == ["logits", "past_key_values"]


def test_output_is_a_dict_that_follows_its_attributes(ours):
    out = ours(random_ids(1, 3))
    out.loss = torch.tensor(2.0)
    assert out.to_tuple()[0] is out["loss"] is out.loss
    out["logits"] = None
    assert "logits" not in out
    assert out.logits is None
    assert dict(copy.deepcopy(out)).keys() == out.keys()


def test_logits_of_the_last_token_copy_no_weight():
    """As a slice of three dimensions, torch hands them to a batched product with a copy of the whole head where the
    weights need no gradient."""

    class Recorder(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    model = PersimmonForCausalLM(tiny_config()).eval().requires_grad_(False)
    with Recorder() as recorder:
        assert model(random_ids(2, 20), logits_to_keep=1).logits.shape == (2, 1, model.config.vocab_size)
    assert "aten.mm.default" in recorder.names
    assert "aten.bmm.default" not in recorder.names


def test_output_access(ours):
    out = ours(random_ids(1, 3))
    assert list(out) == ["logits", "past_key_values"]
    assert out["logits"] is out.logits is out[0]
    assert out[:1] == (out.logits,)
    with pytest.raises(KeyError):
        out["loss"]


def test_cache_pages_grow_are_shared_and_freed(ours):
    ids = random_ids(1, 100)
    cache = PagedKVCache(ours.config, 1, 1, dtype=torch.float32)  # room for one page: it must grow
    ours(ids, past_key_values=cache)
    assert cache.seqlens == [100]
    cache.repeat_interleave(3)
    pages = cache._pages
    assert pages[0][0] == pages[1][0] == pages[2][0]  # the full page is shared
    assert len({p[1] for p in pages}) == 3  # the last one is not
    following = random_ids(3, 40, seed=8)
    together = ours(following, past_key_values=cache).logits
    for row in range(3):
        alone = ours(torch.cat([ids, following[row : row + 1]], 1)).logits[:, 100:]
        assert max_error(together[row], alone[0]) < TOLERANCE
    cache.keep([2])
    assert cache.seqlens == [140]
    held = {page for pages in cache._pages for page in pages}
    assert set(cache._free).isdisjoint(held)
    assert len(cache._free) + len(held) == cache.k[0].shape[0]
    more = random_ids(1, 3 * PAGE_SIZE, seed=9)[:, :100]
    alone = ours(torch.cat([ids, following[2:], more], 1)).logits[:, 140:]
    assert max_error(ours(more, past_key_values=cache).logits, alone) < TOLERANCE


def test_padding_takes_no_cache_and_no_products(ours):
    ids, mask = random_ids(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :45] = 0
    cache = ours(ids, attention_mask=mask).past_key_values
    assert cache.seqlens == [5, 50]
    assert cache.get_seq_length() == 50


def test_dtype_move_keeps_rotary_angles_and_memory_order(ours):
    config = ours.config
    model = PersimmonForCausalLM(config).eval()
    model.load_state_dict(ours.state_dict())
    moved = model.to(torch.float16).to(torch.float32)
    assert moved.model.rotary(10, torch.device("cpu")).dtype == torch.float32
    assert moved.model.layers[0].mlp.dense_4h_to_h.weight.stride() == (1, config.hidden_size)


def test_backbone_equals_the_model_inside(ours):
    backbone = PersimmonModel(ours.config).eval()
    backbone.load_state_dict(ours.model.state_dict())
    ids = random_ids(2, 9)
    assert torch.equal(backbone(ids).last_hidden_state, ours.model(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"input_ids must be \[batch_size, seqlen\], got \[3\]"),
        ({"inputs_embeds": torch.zeros(1, 2, 47)}, r"hidden_size=48\], got \[1, 2, 47\]"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask must be .*seqlen=4.*, got \[1, 5\]"),
        ({"position_ids": torch.zeros(3, 4)}, r"position_ids must be .*seqlen=4\], got \[3, 4\]"),
        ({"position_ids": torch.tensor([[0, 1, 2, 256]])}, "position 256 is past this model's last position 255"),
        ({"position_ids": torch.tensor([[0, -1, 2, 3]])}, "position_ids must be >= 0, got -1"),
        ({"labels": torch.zeros(1, 3, dtype=torch.long)}, r"labels must be \[1, 4\] as the logits, got \[1, 3\]"),
        ({"output_hidden_states": 3}, r"output_hidden_states must be indices of 3 hidden states, got \[3\]"),
        ({"past_key_values": "x"}, "past_key_values must be a PagedKVCache, got str"),
    ],
)
def test_errors(ours, arguments, match):
    if arguments and "input_ids" not in arguments and "inputs_embeds" not in arguments:
        arguments = {"input_ids": random_ids(1, 4)} | arguments
    with pytest.raises(ValueError, match=match):
        ours(**arguments)


def test_past_the_last_position_is_an_error(ours):
    with pytest.raises(ValueError, match="position 256 is past"):
        ours(random_ids(1, 257))


def test_cache_with_gradients_is_an_error(ours):
    with torch.enable_grad(), pytest.raises(ValueError, match="cache does not carry gradients"):
        ours(random_ids(1, 4), use_cache=True)


def test_cache_of_another_batch_is_an_error(ours):
    cache = ours(random_ids(2, 4)).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 2 sequences, the batch 3"):
        ours(random_ids(3, 1), past_key_values=cache)


def test_default_config_is_the_8b_model():
    with torch.device("meta"):
        assert PersimmonForCausalLM(PersimmonConfig()).num_parameters() == 9_397_175_296


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_go_both_ways_bit_for_bit(tmp_path, tied):
    from transformers import PersimmonForCausalLM as HFModel

    config = tiny_config(tie_word_embeddings=tied)
    theirs = hf_model(config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PersimmonForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto")
    ours.save_pretrained(tmp_path / "ours")
    again = HFModel.from_pretrained(tmp_path / "ours")
    for (name, a), b in zip(theirs.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    ids = random_ids(2, 9)
    assert torch.equal(ours(ids).logits, PersimmonForCausalLM.from_pretrained(tmp_path / "ours")(ids).logits)
    assert max_error(ours(ids).logits, again(ids).logits) < TOLERANCE
    assert PersimmonModel.from_pretrained(tmp_path / "ours")(ids).last_hidden_state.shape == (2, 9, 48)
    assert ours.generation_config.eos_token_id == 2
    if tied:
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
