"""Fuyu's config and checkpoints: each of transformers' forms, both ways; and what transformers' processor gives."""

from __future__ import annotations

import json
import string

import pytest
import torch
from fuyu_helpers import IMAGE, batch, file_name, hf_fuyu, joined, ours_like, tiny_fuyu
from helpers import max_error, randn
from safetensors.torch import load_file, save_file

from persimmon_fast import (
    CheckpointError,
    FuyuConfig,
    FuyuForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
    PersimmonForSequenceClassification,
)
from persimmon_fast.config import ConfigError
from persimmon_fast.model import PersimmonModel

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def write(folder, config, tensors):
    folder.mkdir()
    config.save_pretrained(folder)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


# ---- config ----

FLAT = {  # as transformers 4 and Adept's release name them
    "model_type": "fuyu",
    "architectures": ["FuyuForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 256,
    "rope_theta": 25000.0,
    "rope_scaling": None,
    "patch_size": 4,
    "num_channels": 3,
    "image_size": 300,
    "image_token_id": IMAGE,
    "torch_dtype": "float32",
    "tie_word_embeddings": True,
    "eos_token_id": 5,
}


def test_flat_and_nested_forms_are_the_same_config(tmp_path):
    from transformers import FuyuConfig as HFConfig

    flat = FuyuConfig.from_dict(FLAT)
    text = flat.text_config
    assert (text.hidden_size, text.rope_theta, text.dtype, text.eos_token_id) == (48, 25000.0, "float32", 5)
    assert text.tie_word_embeddings
    assert flat.patch_elements == 48
    assert flat.extra == {"image_size": 300}
    HFConfig(**FLAT).save_pretrained(tmp_path)
    nested = FuyuConfig.from_pretrained(tmp_path)  # of transformers 5: tied at the top, not in text_config
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["tie_word_embeddings"] is False
    for key in ("vocab_size", "hidden_size", "rope_theta", "dtype", "eos_token_id", "tie_word_embeddings"):
        assert getattr(nested.text_config, key) == getattr(text, key), key
    # of transformers 4.57: text_config decides, and Fuyu-8B's sizes stand at the top
    v4 = {"hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 262144, "eos_token_id": 5, "patch_size": 4}
    inner = {k: FLAT[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rope_theta")}
    config = FuyuConfig.from_dict({**v4, "text_config": {**inner, "num_attention_heads": 3}, "image_token_id": IMAGE})
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (48, 2)
    assert config.text_config.eos_token_id == 5


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"dtype": "bfloat16", "eos_token_id": [2, 3]}])
def test_config_round_trip(changes, tmp_path):
    config = tiny_fuyu(**changes).replace(extra={"image_size": 300, "note": [1]})
    config.save_pretrained(tmp_path)
    assert FuyuConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "persimmon"}, "model_type: expected 'fuyu', found 'persimmon'"),
        ({"patch_size": 0}, r"patch_size: expected an integer in \[1, .*found 0"),
        ({"num_channels": "3"}, "num_channels: expected an integer"),
        ({"patch_size": 2**30}, "patch_size: expected patches of at most"),
        ({"image_token_id": 160}, r"image_token_id: expected an integer in \[0, 159\], found 160"),
        ({"hidden_size": 47}, "^hidden_size: expected a multiple of num_attention_heads"),
        ({"text_config": {"hidden_size": 47}}, r"text_config\.hidden_size: expected a multiple"),
        ({"text_config": {"model_type": "llama"}}, r"text_config\.model_type: expected 'persimmon', found 'llama'"),
        ({"text_config": 3}, "text_config: expected a mapping or null, found 3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected none"),
    ],
)
def test_config_errors(changes, match):
    with pytest.raises(ConfigError, match=match):
        FuyuConfig.from_dict(FLAT | changes)


def test_constructor_errors():
    with pytest.raises(ConfigError, match="text_config: expected a PersimmonConfig"):
        FuyuConfig(text_config={"hidden_size": 48})
    with pytest.raises(ConfigError, match=r"extra: expected names .*hidden_size"):
        tiny_fuyu().replace(extra={"hidden_size": 3})


# ---- weights ----


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_go_both_ways_bit_for_bit(tmp_path, tied):
    from transformers import FuyuForCausalLM as HFModel

    theirs = hf_fuyu(tiny_fuyu(tie_word_embeddings=tied))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = FuyuForCausalLM.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again, report = HFModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    for (name, a), b in zip(theirs.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert again.config.tie_word_embeddings == tied
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == set(
        load_file(tmp_path / "theirs" / "model.safetensors")
    )
    ids, mask, patches = batch([[3], [4, 1]])
    expected = theirs(ids, attention_mask=mask, pixel_values=joined(patches)).logits[mask.bool()]
    for model in (ours, FuyuForCausalLM.from_pretrained(tmp_path / "ours")):
        actual = model(ids, attention_mask=mask, image_patches=patches).logits[mask.bool()]
        assert max_error(actual, expected) < TOLERANCE
    assert (ours.language_model.lm_head.weight is ours.language_model.model.embed_tokens.weight) == tied


def test_save_and_load_take_changes_of_the_config(tmp_path):
    FuyuForCausalLM(tiny_fuyu()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["FuyuForCausalLM"]
    assert FuyuForCausalLM.from_pretrained(tmp_path, image_token_id=9).config.image_token_id == 9


@pytest.mark.parametrize("form", ["files", "modules", "mixed"])
def test_old_and_new_names_load(tmp_path, form):
    config = tiny_fuyu(dtype="bfloat16", eos_token_id=9)
    theirs = hf_fuyu(config).to(torch.bfloat16)
    tensors = {}
    for number, (name, tensor) in enumerate(theirs.state_dict().items()):
        new = form == "modules" or (form == "mixed" and number % 2)
        tensors[name if new else file_name(name)] = tensor
    model = FuyuForCausalLM.from_pretrained(write(tmp_path / "a", config, tensors))
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 9
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[file_name(name)], tensor), name


def test_persimmon_is_loaded_out_of_a_fuyu_folder(tmp_path):
    config = tiny_fuyu()
    theirs = hf_fuyu(config)
    theirs.save_pretrained(tmp_path / "fuyu")
    text = PersimmonForCausalLM.from_pretrained(tmp_path / "fuyu")
    assert type(text.config) is PersimmonConfig
    ids = 20 + torch.arange(2 * 9).view(2, 9)
    expected = theirs(ids).logits
    assert max_error(text(ids).logits, expected) < TOLERANCE
    assert max_error(text(inputs_embeds=text.model.embed_tokens(ids)).logits, expected) < TOLERANCE
    backbone = PersimmonModel.from_pretrained(tmp_path / "fuyu")
    assert torch.equal(backbone(ids).last_hidden_state, text.model(ids).last_hidden_state)
    with pytest.warns(UserWarning, match=r"has no score.weight: random now"):
        classifier = PersimmonForSequenceClassification.from_pretrained(tmp_path / "fuyu", num_labels=3)
    assert classifier.score.weight.shape == (3, 48)
    text.save_pretrained(tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "persimmon"
    with pytest.raises(ConfigError, match="model_type: expected 'fuyu', found 'persimmon'"):
        FuyuForCausalLM.from_pretrained(tmp_path / "text")


def vision_of_another_width(tensors):
    tensors["vision_embed_tokens.weight"] = randn(48, 75)


def both_names(tensors):
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"]


def one_layer_more(tensors):
    tensors["language_model.model.layers.2.mlp.dense_4h_to_h.bias"] = randn(48)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("vision_embed_tokens.bias"), "Fuyu with 2 layers, found 1 missing .vision_embed_tokens.bias"),
        (vision_of_another_width, r"vision_embed_tokens.weight: expected shape \[48, 48\], found \[48, 75\]"),
        (both_names, r"found 1 unexpected \(lm_head.weight\)"),
        (one_layer_more, "num_hidden_layers is 2, the weights go up to layer 2"),
        (lambda t: t.pop("language_model.lm_head.weight"), "Was the model saved with a tied head"),
    ],
)
def test_checkpoint_errors(tmp_path, change, match):
    config = tiny_fuyu()
    tensors = dict(FuyuForCausalLM(config).state_dict())
    change(tensors)
    with pytest.raises(CheckpointError, match=match):
        FuyuForCausalLM.from_pretrained(write(tmp_path / "a", config, tensors))


# ---- transformers' processor ----


def processor():
    """FuyuProcessor on a tokenizer of letters and images of at most 32 * 32 pixels."""
    pytest.importorskip("PIL")
    from tokenizers import Tokenizer, models, normalizers
    from transformers import FuyuProcessor, PreTrainedTokenizerFast
    from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

    class ImageProcessor(FuyuImageProcessorPil):
        """transformers 5.23's processor gives tensors to it, and it takes arrays."""

        def patchify_image(self, image, patch_size=None):
            return torch.from_numpy(super().patchify_image(image.numpy(), patch_size))

    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02}>" for i in range(4)), "|SPEAKER|", "|NEWLINE|", "<0x04>"]
    letters = "▁" + string.ascii_letters + string.digits + ".\n"
    tokenizer = Tokenizer(models.Unigram([(s, 0.0) for s in special] + [(c, -1.0) for c in letters], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    images = ImageProcessor(size={"height": 32, "width": 32}, patch_size={"height": 4, "width": 4})
    return FuyuProcessor(image_processor=images, tokenizer=fast)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("second_image", [True, False])
def test_what_the_processor_gives_is_taken_as_it_is(legacy, second_image):
    process = processor()
    pixels = [randn(h, w, 3, seed=h).mul(60).clamp(0, 255).byte().numpy() for h, w in ((10, 13), (20, 9))]
    images = [[pixels[0]], [pixels[1]] if second_image else []]
    inputs = process(images=images, text=["Caption.\n", "Hi"], return_legacy_image_output=legacy, return_tensors="pt")
    assert process.image_token_id == IMAGE
    assert ("image_patches" in inputs) == legacy
    config = tiny_fuyu(eos_token_id=None)
    theirs = hf_fuyu(config)
    ours = ours_like(theirs, config)
    renamed = {("pixel_values" if key == "image_patches" else key): value for key, value in inputs.items()}
    mask = inputs["attention_mask"].bool()
    expected = theirs(**renamed).logits
    assert max_error(ours(**inputs).logits[mask], expected[mask]) < TOLERANCE
    tokens = theirs.generate(**renamed, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(**inputs, max_new_tokens=6), tokens)
