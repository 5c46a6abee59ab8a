"""PersimmonConfig and the rotary tables: values against transformers, every refusal by its message."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.persimmon.modeling_persimmon import PersimmonRotaryEmbedding

from persimmon_fast.config import ConfigError, PersimmonConfig
from persimmon_fast.rope import rope_cos_sin, rope_inv_freq

TINY = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}


def hf_config(config: PersimmonConfig) -> transformers.PersimmonConfig:
    return transformers.PersimmonConfig.from_dict(config.to_dict())


# ---- values ----


def test_defaults_are_persimmon_8b() -> None:
    config = PersimmonConfig()
    assert (config.head_dim, config.rotary_dim, config.rope_theta) == (64, 32, 25000.0)
    assert config.num_parameters == 9_397_175_296


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_num_parameters_is_that_of_transformers(tied: bool, qk_layernorm: bool) -> None:
    config = PersimmonConfig(**TINY, tie_word_embeddings=tied, qk_layernorm=qk_layernorm)
    with torch.device("meta"):
        model = transformers.PersimmonForCausalLM(hf_config(config))
        model.tie_weights()
    assert config.num_parameters == model.num_parameters()


def test_config_is_immutable_hashable_copyable_and_checked_on_replace() -> None:
    config = PersimmonConfig(**TINY, rope_scaling={"rope_type": "linear", "factor": 2}, extra={"a": [1]})
    with pytest.raises(AttributeError):
        config.hidden_size = 1  # type: ignore[misc]
    assert config == pickle.loads(pickle.dumps(config)) == copy.deepcopy(config)
    assert hash(config) == hash(copy.deepcopy(config))
    assert config.replace(vocab_size=98).vocab_size == 98
    with pytest.raises(ConfigError, match="vocab_size"):
        config.replace(vocab_size=0)


def test_config_does_not_share_the_callers_objects() -> None:
    extra, scaling = {"labels": ["a"]}, {"rope_type": "linear", "factor": 2.0}
    config = PersimmonConfig(**TINY, extra=extra, rope_scaling=scaling)
    extra["labels"].append("b")
    scaling["factor"] = 0.0
    config.to_dict()["labels"].append("c")
    assert config.extra == {"labels": ["a"]}
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(("given", "name"), [(torch.bfloat16, "bfloat16"), ("float16", "float16"), (None, None)])
def test_dtype_by_object_and_by_name(given: Any, name: str | None) -> None:
    config = PersimmonConfig(dtype=given)
    assert config.dtype == name
    assert config.torch_dtype == (None if name is None else getattr(torch, name))


def test_eos_token_ids() -> None:
    assert PersimmonConfig().eos_token_ids == (2,)
    assert PersimmonConfig(eos_token_id=None).eos_token_ids == ()
    config = PersimmonConfig(eos_token_id=[2, 71013])
    assert config.eos_token_ids == (2, 71013)
    assert config.to_dict()["eos_token_id"] == [2, 71013]


def test_importing_config_does_not_import_torch() -> None:
    code = "import sys, persimmon_fast.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- reading and writing ----

ROPE_SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn_options": {
        "rope_type": "yarn",
        "factor": 8.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "truncate": False,
    },
    "yarn_attention_factor": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.25},
    "yarn_one_point_ramp": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 6},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 64},
    "longrope_factor": {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 16.0},
    "longrope_attention_factor": {"rope_type": "longrope", "attention_factor": 1.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "proportional": {"rope_type": "proportional", "factor": 3.0},
}


def rope_config(name: str, fraction: float, theta: float = 25000.0) -> PersimmonConfig:
    scaling = copy.deepcopy(ROPE_SCALINGS[name])
    if name.startswith("longrope"):
        assert scaling is not None
        count = int(64 * fraction) // 2
        scaling["short_factor"] = [1.0 + 0.01 * i for i in range(count)]
        scaling["long_factor"] = [2.0 + 0.1 * i for i in range(count)]
    return PersimmonConfig(**TINY, rope_scaling=scaling, partial_rotary_factor=fraction, rope_theta=theta)


@pytest.mark.parametrize("name", ROPE_SCALINGS)
def test_round_trip_through_json_and_through_transformers(name: str, tmp_path: Path) -> None:
    fraction = 1.0 if name == "proportional" else 0.5
    config = rope_config(name, fraction).replace(dtype="bfloat16", eos_token_id=[2, 3], id2label={0: "a"})
    config.save_pretrained(tmp_path / "ours")
    assert PersimmonConfig.from_pretrained(tmp_path / "ours") == config
    theirs = transformers.PersimmonConfig.from_pretrained(tmp_path / "ours")
    assert theirs.rope_parameters["rope_theta"] == 25000.0
    assert theirs.dtype == torch.bfloat16
    assert theirs.id2label == {0: "a"}
    theirs.save_pretrained(tmp_path / "theirs")
    back = PersimmonConfig.from_pretrained(tmp_path / "theirs")
    assert back.extra["transformers_version"] == transformers.__version__
    assert back.replace(extra=config.extra) == config


def test_labels_agree_with_one_another() -> None:
    assert PersimmonConfig().num_labels == 2
    assert "id2label" not in PersimmonConfig().to_dict()
    three = PersimmonConfig(num_labels=3)
    assert three.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert three.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert three.replace(num_labels=5).label2id == PersimmonConfig(num_labels=5).label2id
    named = PersimmonConfig(id2label={"1": "no", "0": "yes"})
    assert named.num_labels == 2
    assert named.label2id == {"yes": 0, "no": 1}
    assert named.replace(vocab_size=9) == PersimmonConfig(id2label={0: "yes", 1: "no"}, vocab_size=9)
    assert named.replace(num_labels=2) == named
    assert named.replace(num_labels=3) == three
    assert three.replace(id2label=named.id2label) == named
    own_ids = PersimmonConfig(label2id={"x": 0, "y": "1"})
    assert own_ids.label2id == {"x": 0, "y": 1}
    for config in (three, named, own_ids, PersimmonConfig(num_labels=1, problem_type="regression")):
        assert PersimmonConfig.from_dict(json.loads(config.to_json_string())) == config
        theirs = transformers.PersimmonConfig(**config.to_dict())
        assert (theirs.num_labels, theirs.id2label) == (config.num_labels, config.id2label)
        assert theirs.problem_type == config.problem_type


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"num_labels": 0}, r"num_labels: expected an integer in \[1, 1048576\], found 0 \(int\)"),
        (
            {"num_labels": 3, "id2label": {0: "a"}},
            r"id2label: expected num_labels = 3 names \(or none\), found 1 names",
        ),
        ({"id2label": {1: "a"}}, r"id2label: expected a mapping of the label ids 0, 1, ... to names, found \{1: 'a'\}"),
        ({"id2label": {}}, "id2label: expected a mapping"),
        ({"id2label": ["a"]}, "id2label: expected a mapping"),
        ({"label2id": {"a": "b"}}, "label2id: expected a mapping of names to label ids"),
        ({"label2id": {0: "a"}}, "label2id: expected a mapping of names to label ids"),
        ({"problem_type": "ranking"}, "problem_type: expected one of regression, .*, found 'ranking'"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "num_labels: expected at least 2"),
        ({"classifier_dropout": 1.5}, r"classifier_dropout: expected a probability in \[0, 1\], or null, found 1.5"),
    ],
)
def test_wrong_labels_are_errors(values: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        PersimmonConfig(**values)


def test_reads_the_flat_layout_of_transformers_4() -> None:
    data = {
        "architectures": ["PersimmonForCausalLM"],
        "bos_token_id": 71013,
        "eos_token_id": 71013,
        "hidden_act": "relu2",
        "max_position_embeddings": 16384,
        "model_type": "persimmon",
        "num_key_value_heads": 64,
        "qk_layernorm": True,
        "rope_scaling": {"type": "linear", "factor": 2},
        "rope_theta": 25000,
        "partial_rotary_factor": 0.25,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0",
    }
    config = PersimmonConfig.from_dict(data)
    assert (config.rope_theta, config.rotary_dim, config.dtype, config.bos_token_id) == (25000, 16, "bfloat16", 71013)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert config.extra == {"num_key_value_heads": 64, "transformers_version": "4.34.0"}
    assert config.to_dict()["num_key_value_heads"] == 64


def test_dtype_wins_over_torch_dtype_as_in_transformers() -> None:
    data = PersimmonConfig(**TINY).to_dict() | {"dtype": "float16", "torch_dtype": "float32"}
    assert PersimmonConfig.from_dict(data).dtype == "float16"
    assert transformers.PersimmonConfig.from_dict(data).dtype == torch.float16


def test_missing_theta_is_25000_and_says_so_once(tmp_path: Path) -> None:
    data = PersimmonConfig(**TINY).to_dict()
    del data["rope_theta"], data["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = PersimmonConfig.from_pretrained(tmp_path)
    assert config.rope_theta == 25000.0
    assert [str(warning.message)[:32] for warning in caught] == ["config.json names no rope_theta:"]


@pytest.mark.parametrize(
    "named",
    [{"rope_theta": 5e4}, {"rope_parameters": {"rope_theta": 5e4}}, {"rope_scaling": {"rope_theta": 5e4}}],
    ids=lambda named: next(iter(named)),
)
def test_named_theta_is_taken_without_a_word(named: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PersimmonConfig.from_dict(TINY | named).rope_theta == 5e4


def test_save_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    PersimmonConfig(**TINY).save_pretrained(tmp_path)
    PersimmonConfig(**TINY, qk_layernorm=False).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert not PersimmonConfig.from_pretrained(tmp_path).qk_layernorm


# ---- refusals ----

NAN, INF, HUGE = float("nan"), float("inf"), 10**5000
NONSENSE: list[tuple[str, Any, str]] = [
    *[("vocab_size", value, "an integer in [1, ") for value in (0, -1, 2**31, HUGE, 64.0, True, "64", None, [64])],
    ("hidden_size", 0, "an integer in [1, "),
    ("hidden_size", 129, "a multiple of num_attention_heads = 2"),
    ("hidden_size", 2**31 - 8, "sizes whose bytes fit in 63 bits"),
    ("intermediate_size", 0, "an integer in [1, "),
    ("num_hidden_layers", 0, "an integer in [1, 4096]"),
    ("num_hidden_layers", 2**31 - 1, "an integer in [1, 4096]"),
    ("num_attention_heads", 0, "an integer in [1, "),
    ("num_attention_heads", 2.0, "an integer in [1, "),
    ("max_position_embeddings", 0, "an integer in [1, 16777216]"),
    ("max_position_embeddings", 2**24 + 1, "an integer in [1, 16777216]"),
    ("hidden_act", "gelu", "'relu2'"),
    ("hidden_act", None, "'relu2'"),
    *[("layer_norm_eps", value, "a finite number > 0") for value in (NAN, INF, -1e-5, 0, True, "1e-5", None, HUGE)],
    ("initializer_range", -0.1, "a finite number >= 0"),
    ("initializer_range", NAN, "a finite number >= 0"),
    *[("hidden_dropout", value, "a probability in [0, 1]") for value in (-0.1, 1.1, NAN, None, False)],
    ("attention_dropout", 2, "a probability in [0, 1]"),
    *[("partial_rotary_factor", value, "a fraction in (0, 1]") for value in (0, -0.5, 1.5, NAN, "half", True)],
    ("partial_rotary_factor", 0.02, "an even number >= 2"),
    ("partial_rotary_factor", 3 / 64, "an even number >= 2"),
    *[("rope_theta", value, "a finite number > 1") for value in (0, 1, -25000, NAN, INF, 1e300, HUGE, True, "1e4")],
    *[("use_cache", value, "true or false") for value in (1, "true", None)],
    ("tie_word_embeddings", 0, "true or false"),
    ("qk_layernorm", "yes", "true or false"),
    *[("bos_token_id", value, "a token id in [0, 96] or null") for value in (-1, 97, 1.0, True, "1", [1])],
    ("pad_token_id", -1, "a token id in [0, 96] or null"),
    *[("eos_token_id", value, "a token id in [0, 96] or null, or a list") for value in (97, [], [1, 97], [None], "2")],
    *[("dtype", value, "one of float32, float16, bfloat16") for value in ("int8", "float64", 16, torch.int8, [])],
    ("rope_scaling", "linear", "a mapping or null"),
]


@pytest.mark.parametrize(
    ("key", "value", "expected"), NONSENSE, ids=lambda v: repr(v)[:20] if v is not HUGE else "huge"
)
def test_nonsense_is_refused_by_name(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PersimmonConfig(**TINY | {key: value})
    message = str(caught.value)
    assert message.startswith(f"{key}: expected "), message
    assert expected in message
    assert ", found " in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type: expected 'persimmon', found 'llama'"),
        ({"head_dim": 32}, "head_dim: expected 64, which the other sizes imply, found 32"),
        ({"num_key_value_heads": 1}, "num_key_value_heads: expected 2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected none"),
        ({"rope_theta": 1e4}, "rope_parameters.rope_theta: expected the same as rope_theta = 10000.0, found 25000.0"),
        ({"partial_rotary_factor": 1}, "rope_parameters.partial_rotary_factor: expected the same as partial_rotary"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling: expected the same as rope_parameters"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear"}}, "rope_scaling.type: expected rope_type = 'linear'"),
        ({"rope_parameters": [1]}, "rope_parameters: expected a mapping or null, found [1]"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor: expected a value, which rope_type"),
        ({"rope_parameters": {"rope_type": "yarn9"}}, "rope_parameters.rope_type: expected one of default, linear"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters.rope_type: expected one of default, linear"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention: expected no such key"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_file_that_contradicts_itself_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PersimmonConfig(**TINY).to_dict() | change))
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {message}")) as caught:
        PersimmonConfig.from_pretrained(tmp_path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "expected JSON, found garbage"),
        (b"\xff\xfe{}", "expected JSON in UTF-8"),
        (b'{"vocab_size": 97', "expected JSON, found garbage"),
        (b'{"vocab_size": 97} x', "expected JSON, found garbage"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (b'{"vocab_size": 97, "vocab_size": 98}', "expected each key once, found 'vocab_size' 2 times"),
        (b'{"x": {"a": 1, "a": 1}}', "expected each key once, found 'a' 2 times"),
        (b'{"layer_norm_eps": NaN}', "expected finite numbers, found NaN"),
        (b'{"rope_theta": Infinity}', "expected finite numbers, found Infinity"),
        (b'{"x": -1e999}', "expected finite numbers, found -1e999"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "expected JSON, found garbage"),
        (b'{"x":' * 70 + b"1" + b"}" * 70, "expected at most 64 nested levels"),
        (b'{"x":' * 100_000, "expected at most 64 nested levels"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "found a Git LFS pointer"),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else "",
)
def test_files_that_are_no_strict_json(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'config.json'}: file: ")) as caught:
        PersimmonConfig.from_pretrained(tmp_path)
    assert message in str(caught.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"adept/persimmon-8b-base: folder: .*run `hf download adept/persimmon-8b-base"
    ):
        PersimmonConfig.from_pretrained(Path("adept/persimmon-8b-base"))  # of a path, nothing is downloaded
    with pytest.raises(ConfigError, match=r"folder that holds config.json, found nothing there$"):
        PersimmonConfig.from_pretrained(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"config.json: file: expected a readable file, found No such file"):
        PersimmonConfig.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"folder that holds config.json, found a file there"):
        PersimmonConfig.from_pretrained(tmp_path / "file")


def test_extra_refuses_the_names_of_fields() -> None:
    with pytest.raises(
        ConfigError, match=r"extra: expected names that are no field of the config, found \['hidden_size'"
    ):
        PersimmonConfig(extra={"hidden_size": 1, "torch_dtype": "float32"})
    with pytest.raises(ConfigError, match="extra: expected a mapping"):
        PersimmonConfig(extra=["a"])  # type: ignore[arg-type]


SCALING_NONSENSE: list[tuple[str, dict[str, Any], str]] = [
    ("linear", {"factor": None}, ".factor: expected a value"),
    *[
        ("linear", {"factor": value}, ".factor: expected a number in [1, 16777216]")
        for value in (0.5, -2, NAN, INF, "2", True)
    ],
    ("dynamic", {"factor": 1e25}, ".factor: expected a number in [1, 16777216]"),  # 1e25 - (1e25 - 1) is 0
    ("linear", {"factor": 10**400}, ".factor: expected a number in [1, 16777216]"),
    ("linear", {"facter": 2}, ".facter: expected no such key: rope_type 'linear' takes factor"),
    ("dynamic", {"original_max_position_embeddings": 64}, ".original_max_position_embeddings: expected no such key"),
    ("yarn", {"original_max_position_embeddings": 1}, ".original_max_position_embeddings: expected an integer in [2,"),
    ("yarn", {"original_max_position_embeddings": 64.0}, ".original_max_position_embeddings: expected an integer"),
    ("yarn", {"beta_fast": 0}, ".beta_fast: expected a number in [1e-30, 1e+30]"),
    ("yarn", {"beta_fast": 0.5}, ".beta_fast: expected at least beta_slow = 1.0, found 0.5"),
    ("yarn", {"attention_factor": 0}, ".attention_factor: expected a number in [1e-30, 1e+30]"),
    ("yarn", {"mscale": -1}, ".mscale: expected a number in [0, 1e+30]"),
    ("yarn", {"truncate": 1}, ".truncate: expected true or false"),
    ("longrope", {"short_factor": None}, ".short_factor: expected a value"),
    ("longrope", {"short_factor": [1.0] * 15}, ".short_factor: expected a list of rotary_dim / 2 = 16 numbers"),
    ("longrope", {"long_factor": [1.0] * 15 + [0]}, ".long_factor[15]: expected a number in [1e-30, 1e+30]"),
    ("longrope", {"long_factor": "x" * 16}, ".long_factor: expected a list"),
    ("llama3", {"low_freq_factor": 0}, ".low_freq_factor: expected a number in [1e-30, 1e+30]"),
    ("llama3", {"high_freq_factor": 1.0}, ".high_freq_factor: expected more than low_freq_factor = 1.0, found 1.0"),
    ("llama3", {"low_freq_factor": None}, ".low_freq_factor: expected a value"),
]


@pytest.mark.parametrize(("name", "change", "message"), SCALING_NONSENSE)
def test_rope_scaling_nonsense_is_refused_by_name(name: str, change: dict[str, Any], message: str) -> None:
    scaling = {**(rope_config(name, 0.5).rope_scaling or {}), **change}
    with pytest.raises(ConfigError, match=re.escape(f"rope_scaling{message}")):
        PersimmonConfig(**TINY, rope_scaling=scaling)


def test_rope_types_that_this_fraction_cannot_carry() -> None:
    with pytest.raises(ConfigError, match=r"rope_type: expected another type: 'proportional' needs"):
        rope_config("proportional", 0.5)
    with pytest.raises(ConfigError, match=r"rope_type: expected rotary_dim > 2"):
        rope_config("dynamic", 2 / 64)


# ---- rotary tables against transformers ----

FRACTIONS = [0.25, 0.5, 0.75, 1.0, 2 / 64, 6 / 64]


def cases() -> list[tuple[str, float]]:
    def carries(name: str, fraction: float) -> bool:
        return not (name == "proportional" and fraction != 1) and not (name == "dynamic" and fraction == 2 / 64)

    return [(name, fraction) for name in ROPE_SCALINGS for fraction in FRACTIONS if carries(name, fraction)]


@pytest.mark.parametrize(("name", "fraction"), cases())
def test_rope_table_is_that_of_transformers(name: str, fraction: float) -> None:
    """Bit for bit, at every position of a sequence; the types that look at its length see it on both sides."""
    for seq_len, theta in ((64, 25000.0), (65, 10000.0), (256, 25000.0), (300, 25000.0)):
        config = rope_config(name, fraction, theta)
        half = config.rotary_dim // 2
        theirs = PersimmonRotaryEmbedding(hf_config(config))
        if name == "dynamic":
            # Inside its forward transformers computes the new theta in fp32; with the length as an int in fp64, as here
            inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS["dynamic"](theirs.config, seq_len=seq_len)
            theirs.inv_freq.copy_(inv_freq)
            theirs.max_seq_len_cached = seq_len
        cos, sin = theirs(torch.zeros(1), torch.arange(seq_len)[None])
        expected = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)
        table = rope_cos_sin(config, seq_len, seq_len=seq_len)
        assert (table.shape, table.dtype) == ((seq_len, config.rotary_dim), torch.float32)
        assert table.is_contiguous()
        assert torch.equal(table, expected), (seq_len, (table - expected).abs().max())
        inv_freq, attention_scaling = rope_inv_freq(config, seq_len)
        assert torch.equal(inv_freq, theirs.inv_freq)
        assert attention_scaling == pytest.approx(float(theirs.attention_scaling), rel=1e-15)


def test_rope_without_seq_len_is_what_transformers_starts_with() -> None:
    for name in ROPE_SCALINGS:
        config = rope_config(name, 1.0)
        inv_freq, _ = rope_inv_freq(config)
        torch.testing.assert_close(inv_freq, PersimmonRotaryEmbedding(hf_config(config)).inv_freq, rtol=0, atol=0)


def test_rope_table_of_nothing_and_of_less_than_nothing() -> None:
    config = PersimmonConfig(**TINY)
    assert rope_cos_sin(config, 0).shape == (0, 32)
    with pytest.raises(ValueError, match="rope_cos_sin: num_positions must be >= 0, got -1"):
        rope_cos_sin(config, -1)
