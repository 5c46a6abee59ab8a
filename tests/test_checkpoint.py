"""Loading checkpoints: bits both ways with transformers, dtypes, layout, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm
import transformers
from checkpoint_helpers import (
    DOWN,
    EMBEDDING,
    FORMATS,
    HEAD,
    NORM,
    TINY,
    assert_same_bits,
    file_bytes,
    random_tensors,
    read_raw,
    storage_spans,
    write_checkpoint,
    write_raw,
)
from torch import Tensor

from persimmon_fast.checkpoint import (
    CheckpointMismatchError,
    expected_tensors,
    load_checkpoint,
    save_checkpoint,
)
from persimmon_fast.config import PersimmonConfig

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def hf_model(config: PersimmonConfig, dtype: torch.dtype) -> transformers.PersimmonForCausalLM:
    torch.manual_seed(0)
    model = transformers.PersimmonForCausalLM(transformers.PersimmonConfig.from_dict(config.to_dict()))
    for parameter in model.parameters():  # biases and norms too, which transformers starts at 0 and 1
        parameter.data.normal_()
    return model.to(dtype)


# ---- what there must be ----


@pytest.mark.parametrize("qk_layernorm", [True, False])
def test_expected_tensors_are_those_of_transformers(qk_layernorm: bool) -> None:
    config = TINY.replace(qk_layernorm=qk_layernorm)
    state = hf_model(config, torch.float32).state_dict()
    assert expected_tensors(config) == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert len(state) == (16 if qk_layernorm else 12) * 2 + 4


def test_expected_tensors_of_persimmon_8b() -> None:
    tensors = expected_tensors(PersimmonConfig())
    assert len(tensors) == 580
    assert sum(torch.Size(shape).numel() for shape in tensors.values()) == PersimmonConfig().num_parameters


# ---- bits, both ways ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_loads_what_transformers_writes(dtype: torch.dtype, shard_size: str, tmp_path: Path) -> None:
    model = hf_model(TINY, dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "1GB")
    config = PersimmonConfig.from_pretrained(tmp_path)
    assert config.torch_dtype == dtype
    assert_same_bits(load_checkpoint(tmp_path, config), model.state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_loads_every_format(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    tensors = random_tensors(TINY, dtype)
    write_checkpoint(tmp_path, TINY, tensors, form)
    assert_same_bits(load_checkpoint(tmp_path, TINY, dtype=None), tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_we_write(dtype: torch.dtype, shard_size: str, tied: bool, tmp_path: Path) -> None:
    config = TINY.replace(tie_word_embeddings=tied, dtype=None)
    tensors = random_tensors(config, dtype)
    if tied:
        tensors[HEAD] = tensors[EMBEDDING]
    save_checkpoint(tmp_path / "a", config, tensors, max_shard_size=shard_size)
    assert (tmp_path / "a" / "model.safetensors").exists() == (shard_size == "1GB")
    model, report = transformers.PersimmonForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == dtype
    assert_same_bits(model.state_dict(), tensors)


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_saves_and_loads_its_own_layout(shard_size: str, tmp_path: Path) -> None:
    tensors = random_tensors(TINY, torch.bfloat16)
    write_checkpoint(tmp_path / "a", TINY.replace(dtype="bfloat16"), tensors)
    loaded = load_checkpoint(tmp_path / "a", TINY, dtype=None)
    save_checkpoint(tmp_path / "b", TINY, loaded, max_shard_size=shard_size)
    config = PersimmonConfig.from_pretrained(tmp_path / "b")
    assert config.dtype == "bfloat16"
    assert_same_bits(load_checkpoint(tmp_path / "b", config), tensors)


def test_tied_head_is_left_out_and_must_not_differ(tmp_path: Path) -> None:
    config, tensors = TINY.replace(tie_word_embeddings=True), random_tensors(TINY)
    tensors[HEAD] = tensors[EMBEDDING].clone()
    for form in ("safetensors", "bin"):
        write_checkpoint(tmp_path / form, config, tensors, form)
        loaded = load_checkpoint(tmp_path / form, config)
        assert_same_bits(loaded, {name: tensor for name, tensor in tensors.items() if name != HEAD})
    tensors[HEAD][3, 4] += 1
    write_checkpoint(tmp_path / "c", config, tensors)
    with pytest.raises(
        CheckpointMismatchError, match=r"lm_head.weight: expected the same values as model.embed_tokens"
    ):
        load_checkpoint(tmp_path / "c", config)
    with pytest.raises(
        CheckpointMismatchError, match=r"lm_head.weight: expected the same values as model.embed_tokens"
    ):
        save_checkpoint(tmp_path / "d", config, tensors)


def test_extra_heads_are_loaded_and_saved_by_shape(tmp_path: Path) -> None:
    tensors = random_tensors(TINY) | {"score.weight": torch.randn(3, 32)}
    save_checkpoint(tmp_path / "a", TINY, tensors, heads={"score.weight": (3, 32)})
    assert_same_bits(load_checkpoint(tmp_path / "a", TINY, heads={"score.weight": (3, 32)}), tensors)
    with pytest.raises(CheckpointMismatchError, match=r"1 unexpected \(score.weight\)"):
        load_checkpoint(tmp_path / "a", TINY)
    with pytest.raises(CheckpointMismatchError, match=r"score.weight: expected shape \[4, 32\], found \[3, 32\]"):
        load_checkpoint(tmp_path / "a", TINY, heads={"score.weight": (4, 32)})


def test_harmless_buffers_of_old_releases_are_skipped(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64),
        "model.layers.1.self_attn.masked_bias": torch.ones((), dtype=torch.int64),
    }
    for form in FORMATS:
        write_checkpoint(tmp_path / form, TINY, tensors | old, form)
        assert_same_bits(load_checkpoint(tmp_path / form, TINY), tensors)


# ---- dtypes ----


@pytest.mark.parametrize("form", ["safetensors", "bin", "bin_legacy"])
@pytest.mark.parametrize(
    ("named", "asked", "result"),
    [
        (None, "auto", torch.bfloat16),
        ("float16", "auto", torch.float16),
        ("float16", None, torch.bfloat16),
        ("float16", torch.float32, torch.float32),
        (None, "float16", torch.float16),
    ],
)
def test_dtype_conversion(named: str | None, asked: Any, result: torch.dtype, form: str, tmp_path: Path) -> None:
    tensors = random_tensors(TINY, torch.bfloat16)
    write_checkpoint(tmp_path, TINY, tensors, form)
    loaded = load_checkpoint(tmp_path, TINY.replace(dtype=named), dtype=asked)
    assert_same_bits(loaded, {name: tensor.to(result) for name, tensor in tensors.items()})
    assert loaded[DOWN].t().is_contiguous()


def test_mixed_dtypes_stay_as_stored_or_become_one(tmp_path: Path) -> None:
    tensors = random_tensors(TINY, torch.bfloat16)
    tensors[NORM] = tensors[NORM].float()
    write_checkpoint(tmp_path, TINY, tensors)
    assert_same_bits(load_checkpoint(tmp_path, TINY, dtype=None), tensors)
    assert load_checkpoint(tmp_path, TINY.replace(dtype=None))[NORM].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "float8", "half", 16])
def test_dtypes_that_are_none(dtype: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, random_tensors(TINY))
    with pytest.raises(
        ValueError, match="load_checkpoint: dtype must be 'auto', None, float32, float16 or bfloat16, got"
    ):
        load_checkpoint(tmp_path, TINY, dtype=dtype)


# ---- layout and memory ----


@pytest.mark.parametrize("form", FORMATS)
def test_layout_of_the_result(form: str, tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    if form.startswith("bin"):  # one weight of two names, and a transposed one: both are legal in a pickle
        tensors[HEAD] = tensors[EMBEDDING]
        qkv = "model.layers.0.self_attn.query_key_value.weight"
        tensors[qkv] = torch.randn(32, 96).t()
    write_checkpoint(tmp_path, TINY, tensors, form)
    loaded = load_checkpoint(tmp_path, TINY)
    assert_same_bits(loaded, tensors)
    assert list(loaded) == list(expected_tensors(TINY))
    for name, tensor in loaded.items():
        if name.endswith("dense_4h_to_h.weight"):
            assert tensor.shape == (32, 48)
            assert tensor.stride() == (1, 32)
        else:
            assert tensor.is_contiguous(), name
        assert tensor.data_ptr() % tensor.element_size() == 0
        assert not tensor.requires_grad
        assert type(tensor) is Tensor
    spans = sorted(storage_spans(loaded))
    assert all(left[1] <= right[0] for left, right in pairwise(spans)), "tensors share memory"


def test_odd_offsets_in_a_foreign_file_give_aligned_tensors(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    write_checkpoint(tmp_path, TINY, tensors | {"model.rotary_emb.inv_freq": torch.zeros(3, dtype=torch.uint8)})
    header, body = read_raw(tmp_path / "model.safetensors")
    header.pop("__metadata__")
    first, rest = "model.rotary_emb.inv_freq", b""
    parts = {first: body[slice(*header[first]["data_offsets"])]}
    parts |= {name: body[slice(*info["data_offsets"])] for name, info in header.items() if name != first}
    for name, part in parts.items():  # three bytes first, everything else behind them
        header[name]["data_offsets"] = [len(rest), len(rest) + len(part)]
        rest += part
    write_raw(tmp_path / "model.safetensors", header, rest)
    loaded = load_checkpoint(tmp_path, TINY)
    assert_same_bits(loaded, tensors)
    assert all(tensor.data_ptr() % 4 == 0 for tensor in loaded.values())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_writing_into_weights_changes_no_file(form: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    write_checkpoint(tmp_path, TINY, tensors, form)
    before = file_bytes(tmp_path)
    loaded = load_checkpoint(tmp_path, TINY, dtype=dtype)
    for tensor in loaded.values():
        tensor.requires_grad_()
    sum(tensor.float().square().sum() for tensor in loaded.values()).backward()  # type: ignore[union-attr]
    torch.optim.SGD(list(loaded.values()), lr=1.0).step()
    assert all(not torch.equal(loaded[name].float(), tensor) for name, tensor in tensors.items())
    assert file_bytes(tmp_path) == before
    assert_same_bits(load_checkpoint(tmp_path, TINY), tensors)


def test_weights_outlive_their_replaced_and_deleted_files(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    write_checkpoint(tmp_path / "a", TINY, tensors)
    loaded = load_checkpoint(tmp_path / "a", TINY)
    save_checkpoint(tmp_path / "a", TINY, {name: tensor + 1 for name, tensor in loaded.items()}, overwrite=True)
    assert_same_bits(loaded, tensors)
    (tmp_path / "a" / "model.safetensors").unlink()
    assert_same_bits(loaded, tensors)


# hidden 1024, 20 layers: 634 MB in bf16, of which the down-projections are 168 MB
MEMORY_SCRIPT = """
import sys
import torch, tqdm
from pathlib import Path
from checkpoint_helpers import write_sparse
from persimmon_fast.checkpoint import expected_tensors, load_checkpoint, save_checkpoint
from persimmon_fast.config import PersimmonConfig

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key + ":"))

def peak_of(action):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    result = action()
    return status("VmHWM") - before, result

folder, layers, dtype = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
config = PersimmonConfig(vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers,
                         num_attention_heads=16, dtype=dtype)
write_sparse(folder / "model.safetensors", expected_tensors(config))
load = lambda: load_checkpoint(folder, config)
(folder / "warm").mkdir()
torch.ones(64, 64).to(torch.bfloat16).t().contiguous()
peak, tensors = peak_of(load)
print(peak, sum(t.nbytes for t in tensors.values()), sum(t.nbytes for n, t in tensors.items() if "4h_to_h.w" in n),
      max(t.nbytes for t in tensors.values()))
if dtype == "float32":
    peak, _ = peak_of(lambda: save_checkpoint(folder / "saved", config, tensors, max_shard_size="60MB"))
    print(peak)
"""


def measure_memory(folder: Path, layers: int, dtype: str) -> list[int]:
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(folder), str(layers), dtype]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    output = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    return [int(word) for word in output.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_memory_of_a_load_without_conversion_is_the_transposed_copy(tmp_path: Path) -> None:
    peak, total, transposed, _ = measure_memory(tmp_path, 20, "bfloat16")
    assert total > 600e6
    assert peak < 1.2 * transposed, f"{peak / 1e6:.0f} MB for {transposed / 1e6:.0f} MB of {total / 1e6:.0f} MB"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_memory_of_conversion_is_the_result_and_of_saving_is_one_shard(tmp_path: Path) -> None:
    peak, total, _, largest, saving = measure_memory(tmp_path, 4, "float32")
    assert peak < total + 1.2 * largest, f"{peak / 1e6:.0f} MB for {total / 1e6:.0f} MB"
    assert saving < 1.2 * 60e6, f"{saving / 1e6:.0f} MB"
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 5


@pytest.mark.parametrize(("terminal", "progress"), [(True, True), (True, False), (False, True)])
def test_the_bar_is_for_terminals(
    terminal: bool, progress: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the delay of a second taken away, so that this small checkpoint shows it."""
    patient = tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: patient(**options | {"delay": options["delay"] - 1}))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    save_checkpoint(tmp_path / "a", TINY, random_tensors(TINY), progress=progress)
    load_checkpoint(tmp_path / "a", TINY, progress=progress)
    output, bar = capfd.readouterr()
    assert output == ""
    assert [text in bar for text in ("Saving weights: 100%", "Loading weights: 100%")] == [terminal and progress] * 2
