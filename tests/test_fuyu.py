"""Fuyu against transformers' on random weights: logits, loss and gradients, generation, and the errors of images."""

from __future__ import annotations

import pytest
import torch
from fuyu_helpers import IMAGE, WIDTH, batch, hf_fuyu, indices_of, joined, ours_like, tiny_fuyu
from helpers import max_error, randn

from persimmon_fast import FuyuConfig, FuyuForCausalLM
from persimmon_fast.generation import GenerateOutput

TOLERANCE = 1e-5
IMAGES = [[3], [], [4, 1], [5]]  # patches of each image of each sample


@pytest.fixture(scope="module")
def pair():
    config = tiny_fuyu(eos_token_id=None)
    theirs = hf_fuyu(config)
    return ours_like(theirs, config), theirs


@pytest.fixture
def ours(pair):
    return pair[0]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def forms(ids, patches):
    """The ways to give the same images: of transformers 5, of transformers 4, and ours."""
    return {
        "all": {"image_patches": joined(patches)},
        "pixel_values": {"pixel_values": joined(patches)},
        "list": {"image_patches": patches},
        "list_v4": {
            "image_patches": [torch.empty(1, 0, WIDTH) if p is None else p.unsqueeze(0) for p in patches],
            "image_patches_indices": indices_of(ids),
        },
        "lists": {"image_patches": [[] if p is None else [p[:1], p[1:]] for p in patches]},
        "all_indices": {"image_patches": joined(patches), "image_patches_indices": indices_of(ids)},
    }


@pytest.mark.parametrize("form", list(forms(*batch(IMAGES)[::2])))
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_transformers(pair, form, side):
    ours, theirs = pair
    ids, mask, patches = batch(IMAGES, side)
    expected = theirs(ids, attention_mask=mask, pixel_values=joined(patches)).logits
    actual = ours(ids, attention_mask=mask, **forms(ids, patches)[form]).logits
    assert max_error(actual[mask.bool()], expected[mask.bool()]) < TOLERANCE


def test_a_tensor_of_three_dimensions_is_by_sample(pair):
    ours, theirs = pair
    ids, mask, patches = batch([[3], [2, 1]])
    expected = theirs(ids, attention_mask=mask, pixel_values=joined(patches)).logits
    actual = ours(ids, attention_mask=mask, image_patches=torch.stack(patches)).logits
    assert max_error(actual[mask.bool()], expected[mask.bool()]) < TOLERANCE


def test_indices_choose_patches(ours):
    """A prompt that was cut takes fewer patches than there are, and indices may name them in any order."""
    ids, _, (patches,) = batch([[4]])
    order = torch.tensor([2, 0, 3, 1])
    indices = indices_of(ids)
    expected = ours(ids, image_patches=patches[order]).logits
    more = torch.cat([patches, randn(2, WIDTH)]).unsqueeze(0)
    indices[indices >= 0] = order
    assert max_error(ours(ids, image_patches=more, image_patches_indices=indices).logits, expected) < TOLERANCE
    assert max_error(ours(ids, image_patches=patches).logits, expected) > 100 * TOLERANCE


def test_inputs_embeds(pair):
    """Merged by hand into the language model alone; and with the placeholders found by their embedding."""
    ours, theirs = pair
    ids, mask, patches = batch(IMAGES)
    expected = theirs(ids, attention_mask=mask, pixel_values=joined(patches)).logits[mask.bool()]
    embeds = ours.language_model.model.embed_tokens(ids)
    found = ours(inputs_embeds=embeds, attention_mask=mask, image_patches=patches).logits
    assert max_error(found[mask.bool()], expected) < TOLERANCE
    embeds[ids == IMAGE] = ours.vision_embed_tokens(joined(patches))
    merged = ours.language_model(inputs_embeds=embeds, attention_mask=mask).logits
    assert max_error(merged[mask.bool()], expected) < TOLERANCE


def test_text_alone(pair):
    ours, theirs = pair
    ids, mask, _ = batch([[], []])
    expected = theirs(ids, attention_mask=mask).logits
    for images in ({}, {"image_patches": None}, {"image_patches": [None, None]}):
        assert (
            max_error(ours(ids, attention_mask=mask, **images).logits[mask.bool()], expected[mask.bool()]) < TOLERANCE
        )


def test_a_cache_goes_on_with_text_and_with_a_second_image(ours):
    ids, _, (patches,) = batch([[4, 2]], text=9)
    whole = ours(ids, image_patches=patches).logits
    cut = int((ids[0] == IMAGE).nonzero()[3]) + 2  # after the first image and its newline
    first = ours(ids[:, :cut], image_patches=patches[:4], use_cache=True)
    cache = first.past_key_values
    second = ours(ids[:, cut:-3], image_patches=patches[4:], past_key_values=cache)
    steps = [ours(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1] - 3, ids.shape[1])]
    assert max_error(torch.cat([first.logits, second.logits, *steps], dim=1), whole) < TOLERANCE


def test_loss_and_gradients_equal_transformers(pair):
    ours, theirs = pair
    ids, mask, patches = batch(IMAGES)
    after_padding = torch.cat([mask[:, :1], mask[:, :-1]], dim=1) == 0  # predicted by a padding token: of no meaning
    labels = ids.masked_fill((mask == 0) | after_padding | (ids == IMAGE), -100)
    with torch.enable_grad():
        expected = theirs(ids, attention_mask=mask, pixel_values=joined(patches), labels=labels).loss
        actual = ours(ids, attention_mask=mask, image_patches=patches, labels=labels).loss
        assert abs(actual.item() - expected.item()) < TOLERANCE
        expected.backward()
        actual.backward()
    text, language_model = ours.language_model, theirs.model.language_model
    for mine, other in [
        (ours.vision_embed_tokens.weight, theirs.model.vision_embed_tokens.weight),
        (ours.vision_embed_tokens.bias, theirs.model.vision_embed_tokens.bias),
        (text.model.embed_tokens.weight, language_model.embed_tokens.weight),
        (
            text.model.layers[0].self_attn.query_key_value.weight,
            language_model.layers[0].self_attn.query_key_value.weight,
        ),
        (text.lm_head.weight, theirs.lm_head.weight),
    ]:
        assert other.grad.abs().max() > 1e-4
        assert max_error(mine.grad, other.grad) < TOLERANCE * max(1.0, float(other.grad.abs().max()))
    ours.zero_grad()
    theirs.zero_grad()


def test_patches_take_the_dtype_of_the_model(ours):
    model = FuyuForCausalLM(ours.config).eval()
    model.load_state_dict(ours.state_dict())
    ids, mask, patches = batch(IMAGES)
    expected = ours(ids, attention_mask=mask, image_patches=patches).logits[mask.bool()]
    actual = model.to(torch.bfloat16)(ids, attention_mask=mask, image_patches=patches).logits[mask.bool()]
    assert actual.dtype == torch.bfloat16
    assert max_error(actual, expected) < 0.05 * float(expected.abs().max())


def test_default_config_is_fuyu_8b():
    with torch.device("meta"):
        assert FuyuForCausalLM(FuyuConfig()).num_parameters() == 9_397_175_296 + 2700 * 4096 + 4096


def test_embeddings_are_those_of_the_language_model():
    model = FuyuForCausalLM(tiny_fuyu(tie_word_embeddings=True)).eval()
    text = model.language_model
    assert model.get_input_embeddings() is text.model.embed_tokens
    assert model.get_output_embeddings() is text.lm_head
    model.set_input_embeddings(torch.nn.Embedding(160, 48))
    assert text.lm_head.weight is text.model.embed_tokens.weight
    ids, mask, patches = batch(IMAGES)
    before = model(ids, attention_mask=mask, image_patches=patches).logits
    model.resize_token_embeddings(170)
    assert model.config.text_config.vocab_size == text.config.vocab_size == 170
    after = model(ids, attention_mask=mask, image_patches=patches).logits
    assert max_error(after[..., :160], before) < TOLERANCE
    with pytest.raises(ValueError, match="image_token_id 7 is past a vocabulary of 7 tokens"):
        model.resize_token_embeddings(7)


# ---- generation ----


@pytest.mark.parametrize("form", ["all", "list_v4"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers(pair, form, penalty):
    ours, theirs = pair
    ids, mask, patches = batch(IMAGES)
    settings = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": penalty}
    expected = theirs.generate(ids, attention_mask=mask, pixel_values=joined(patches), pad_token_id=0, **settings)
    actual = ours.generate(ids, mask, **forms(ids, patches)[form], **settings)
    assert torch.equal(actual, expected)
    without = ours.generate(ids, mask, **settings)
    assert not torch.equal(without[:, ids.shape[1] :], expected[:, ids.shape[1] :])  # the images were looked at


def test_padding_on_either_side_and_singles_give_the_same_tokens(ours):
    settings = {"max_new_tokens": 10, "do_sample": True, "seed": 5}
    new = {}
    for side in ("left", "right"):
        ids, mask, patches = batch(IMAGES, side)
        new[side] = ours.generate(ids, mask, image_patches=patches, **settings)[:, ids.shape[1] :]
    assert torch.equal(new["left"], new["right"])
    assert len(set(new["left"].flatten().tolist())) > 4
    ids, mask, patches = batch(IMAGES)
    row = ids[:1, mask[0].bool()]
    alone = ours.generate(row, image_patches=patches[0], **settings)  # row 0 draws the same numbers
    assert torch.equal(alone[0, row.shape[1] :], new["left"][0])
    for index in range(1, 4):
        row = ids[index : index + 1, mask[index].bool()]
        greedy = ours.generate(row, image_patches=[patches[index]], max_new_tokens=10)[0, row.shape[1] :]
        together = ours.generate(ids, mask, image_patches=patches, max_new_tokens=10)[index, ids.shape[1] :]
        assert torch.equal(greedy, together)


def test_prompt_lookup_gives_the_same_tokens(ours):
    ids, mask, patches = batch(IMAGES)
    plain = ours.generate(ids, mask, image_patches=patches, max_new_tokens=40)
    assert torch.equal(
        ours.generate(ids, mask, image_patches=patches, max_new_tokens=40, prompt_lookup_num_tokens=5), plain
    )


def test_several_sequences_per_prompt_and_logprobs(ours):
    ids, mask, patches = batch([[3], [4, 1]])
    output = ours.generate(
        ids,
        mask,
        image_patches=patches,
        max_new_tokens=5,
        do_sample=True,
        num_return_sequences=3,
        seed=1,
        return_dict_in_generate=True,
    )
    assert isinstance(output, GenerateOutput)
    assert output.sequences.shape == (6, ids.shape[1] + 5)
    assert torch.equal(output.sequences[:, : ids.shape[1]], ids.repeat_interleave(3, 0))
    for row in range(6):  # the log-probabilities are those of a forward pass over prompt and new tokens
        prompt, new = ids[row // 3, mask[row // 3].bool()][None], output.sequences[row : row + 1, ids.shape[1] :]
        first = ours(prompt, image_patches=patches[row // 3], use_cache=True)
        rest = ours(new, past_key_values=first.past_key_values).logits  # new tokens may be placeholders: text then
        logits = torch.cat([first.logits[:, -1:], rest[:, :-1]], dim=1)
        expected = logits.log_softmax(-1).gather(2, new[..., None])[0, :, 0]
        assert max_error(output.logprobs[row], expected) < 1e-4


def test_streamer_and_generation_config(ours):
    class Recorder:
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended = True

    ids, _, patches = batch([[4]])
    streamer = Recorder()
    out = ours.generate(ids, image_patches=patches, max_new_tokens=4, streamer=streamer)
    assert torch.equal(streamer.values[0], ids)
    assert [int(v) for v in streamer.values[1:]] == out[0, ids.shape[1] :].tolist()
    assert streamer.ended
    before = ours.generation_config
    ours.generation_config = before.replace(eos_token_id=int(out[0, ids.shape[1]]))
    assert ours.generate(ids, image_patches=patches, max_new_tokens=4).shape[1] == ids.shape[1] + 1
    ours.generation_config = before


def test_generate_from_embeddings_returns_new_tokens(ours):
    ids, mask, patches = batch([[3], [2]])
    expected = ours.generate(ids, mask, image_patches=patches, max_new_tokens=6)[:, ids.shape[1] :]
    embeds = ours.language_model.model.embed_tokens(ids)
    new = ours.generate(inputs_embeds=embeds, attention_mask=mask, image_patches=patches, max_new_tokens=6)
    assert torch.equal(new, expected)


def test_ids_and_embeddings_of_generate_must_agree(ours):
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"input_ids must be \[1, 3\] as inputs_embeds, got \[1, 4\]"):
        ours.language_model.generate(ids, inputs_embeds=torch.zeros(1, 3, 48))


# ---- errors ----


def ones(*shape):
    return torch.ones(*shape)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"image_patches": [ones(3, WIDTH), ones(4, WIDTH)]},
            r"sample 1 has 4 patches for 5 placeholder tokens \(config.image_token_id = 7\)$",
        ),
        ({"image_patches": [None, ones(8, WIDTH)]}, "sample 0 has 0 patches for 3 placeholder"),
        ({"image_patches": ones(2, 4, WIDTH)}, "sample 0 has 4 patches for 3 placeholder"),
        ({"image_patches": ones(7, WIDTH)}, r"7 patches for 8 \(by sample \[3, 5\]\) placeholder tokens"),
        ({"image_patches": ones(8, 47)}, r"patch_size\^2 \* num_channels = 4\^2 \* 3 = 48 values, got \[8, 47\]$"),
        ({"image_patches": [ones(3, WIDTH), ones(5, 49)]}, r"image_patches of sample 1 must hold .*got \[5, 49\]$"),
        ({"pixel_values": ones(2, 3, 8, 48)}, r"got \[2, 3, 8, 48\]: FuyuProcessor cuts images into patches"),
        ({"image_patches": ones(1, 8, WIDTH)}, r"must be \[batch_size=2, num_patches, 48\], got \[1, 8, 48\]: flatten"),
        ({"image_patches": [ones(8, WIDTH)]}, "one entry per sample .*, 2, got 1"),
        ({"image_patches": "image.png"}, "a tensor, or a list with one entry per sample, got str"),
        ({"image_patches": ["a", "b"]}, "image_patches of sample 0 must be a tensor, got str"),
        ({"image_patches": ones(8, WIDTH), "pixel_values": ones(8, WIDTH)}, "two names of the same argument"),
        ({"image_patches_indices": "made"}, "image_patches_indices is given without image_patches"),
        (
            {"image_patches": [ones(3, WIDTH), ones(4, WIDTH)], "image_patches_indices": "made"},
            r"sample 1 names patch 4 of 4 \(they start at 0\)",
        ),
        (
            {"image_patches": ones(9, WIDTH), "image_patches_indices": "made"},
            "9 patches, image_patches_indices names 8",
        ),
        (
            {"image_patches": ones(8, WIDTH), "image_patches_indices": torch.full((2, 5), -1)},
            r"image_patches_indices must be \[batch_size=2, seqlen=.* or more\], got \[2, 5\]",
        ),
        (
            {"image_patches": ones(8, WIDTH), "image_patches_indices": torch.zeros(2, 40, dtype=torch.long)},
            "image_patches_indices must be -1 past the 15 tokens",
        ),
        (
            {"image_patches": ones(8, WIDTH), "image_patches_indices": torch.full((2, 15), -1)},
            "must be >= 0 exactly where input_ids is 7",
        ),
        ({"inputs_embeds": ones(2, 15, 48)}, "exactly one of input_ids and inputs_embeds"),
    ],
)
def test_errors(ours, arguments, match):
    ids, mask, _ = batch([[3], [4, 1]])
    if isinstance(arguments.get("image_patches_indices"), str):
        arguments = arguments | {"image_patches_indices": indices_of(ids)}
    with pytest.raises(ValueError, match=match):
        ours(ids, attention_mask=mask, **arguments)
    with pytest.raises(ValueError, match=match):
        ours.generate(ids, mask, **arguments)


def test_images_again_with_a_later_token_are_an_error(ours):
    ids, _, patches = batch([[4]])
    cache = ours(ids, image_patches=patches, use_cache=True).past_key_values
    match = f"sample 0 has 4 patches for 0 placeholder tokens .*holds {ids.shape[1]} columns already: give images with"
    with pytest.raises(ValueError, match=match):
        ours(ids[:, -1:], image_patches=patches, past_key_values=cache)
