"""`persimmon-fast info` and `doctor`, the costs and measurements that they report."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import run

from persimmon_fast import PersimmonConfig, PersimmonForCausalLM, measure
from persimmon_fast.cli import doctor, selfcheck
from persimmon_fast.costs import model_costs


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_READ_BYTES", 2**24)


# ---- info and costs ----


def test_info_of_persimmon_8b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of Adept's model, from its config.json alone."""
    config = {"model_type": "persimmon", "rope_theta": 25000.0, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run("info", tmp_path, "--bandwidth", "31", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["total"] == 9_397_175_296
    assert facts["parameters"]["MLP up"] + facts["parameters"]["MLP down"] == 36 * (2 * 4096 * 16384 + 16384 + 4096)
    assert facts["bytes"] == {"float32": 4 * 9_397_175_296, "float16": 2 * 9_397_175_296, "bfloat16": 2 * 9_397_175_296}
    assert facts["cache_bytes_per_token"] == 589_824
    assert facts["cache_bytes_full"] == 9 * 2**30
    assert facts["decode_bytes_per_token"] == pytest.approx(16.65e9, rel=1e-3)
    assert facts["zero_skipping_share"] == pytest.approx(0.290, abs=5e-4)
    dense, sparse, full, _ = facts["expected"]
    assert dense["tokens_per_second"] == pytest.approx(31 / 16.647, rel=1e-3)
    assert sparse["bytes_per_token"] == pytest.approx((1 - 0.9 * 0.290) * 16.647e9, rel=1e-3)
    assert full["bytes_per_token"] == pytest.approx(16.647e9 + 9 * 2**30, rel=1e-3)
    assert full["tokens_per_second"] == pytest.approx(31e9 / full["bytes_per_token"])

    assert run("info", tmp_path, "--bandwidth", "31") == 0
    shown = capsys.readouterr().out
    for part in ("9,397,175,296", "589,824 bytes", "16.65 GB", "9.66 GB", "29.0%", "31.0 GB/s (given)", "1.86"):
        assert part in shown
    assert max(map(len, shown.splitlines()[1:])) <= 80  # the first line names the folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_costs_count_a_real_model(tied: bool, qk_layernorm: bool) -> None:
    config = PersimmonConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=tied,
        qk_layernorm=qk_layernorm,
    )
    model = PersimmonForCausalLM(config)
    costs = model_costs(config, "float16")
    assert costs.total_parameters == model.num_parameters() == config.num_parameters
    layers = sum(p.numel() for p in model.model.layers.parameters())
    norm = sum(p.numel() for p in model.model.final_layernorm.parameters())
    assert costs.weight_bytes_per_token == 2 * (layers + norm + model.lm_head.weight.numel())
    down = sum(layer.mlp.dense_4h_to_h.weight.numel() for layer in model.model.layers)
    assert costs.skippable_bytes_per_token == 2 * down
    assert costs.decode_bytes(context=10, zeros=0.5) == costs.weight_bytes_per_token - down + 10 * 2 * 3 * 32 * 2


@pytest.mark.usefixtures("quick")
def test_info_measures_the_bandwidth_it_predicts_with(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"rope_theta": 25000.0}')
    assert run("info", tmp_path, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bandwidth_source"].startswith("measured now")
    speed = facts["expected"][0]
    assert speed["tokens_per_second"] == facts["bandwidth_bytes_per_second"] / speed["bytes_per_token"]


# ---- doctor ----


def diagnosis(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = run("doctor", "--json")
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("quick")
def test_doctor_finds_every_op_well(capsys: pytest.CaptureFixture[str]) -> None:
    status, facts = diagnosis(capsys)
    assert [check for check in facts["checks"] if not check["ok"]] == []
    assert (status, facts["ok"]) == (0, True)
    source = (Path(__file__).parents[1] / "csrc" / "ops" / "schemas.h").read_text()
    declared = set(re.findall(r'm\.def\(\s*"(\w+)\(', source))
    assert {check["op"] for check in facts["checks"]} == declared
    assert {check["dtype"] for check in facts["checks"]} == {"float32", "float16", "bfloat16"}
    assert run("doctor") == 0
    shown = capsys.readouterr().out
    for part in ("compiler", "CUDA kernels", "read bandwidth", "squared_relu_mlp", f"{len(declared)} ops passed"):
        assert part in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.usefixtures("quick")
def test_doctor_sees_a_broken_op(capsys: pytest.CaptureFixture[str]) -> None:
    """An op that is off by a little: the kernel itself is replaced, as a miscompiled one would be."""
    library = torch.library.Library("persimmon_fast", "IMPL")

    def broken(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps * 1e4)

    library.impl("layer_norm", broken, "CPU", allow_override=True)
    try:
        assert run("doctor") == 1
    finally:
        library._destroy()
    shown = capsys.readouterr().out
    assert re.search(r"^layer_norm in float32 on cpu: error \S+ exceeds", shown, re.MULTILINE)
    assert re.search(r"3 of (39|78) checks of 13 ops failed", shown)  # with a GPU every op is checked there, too


@pytest.mark.usefixtures("quick")
def test_doctor_refuses_an_op_that_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    library = torch.library.Library("persimmon_fast", "FRAGMENT")
    library.define("forgotten(Tensor x) -> Tensor")
    try:
        status, facts = diagnosis(capsys)
    finally:
        library._destroy()
    failed = {check["op"]: check["detail"] for check in facts["checks"] if not check["ok"]}
    assert status == 1
    assert failed == {"forgotten": "no self-check covers this op"}


def test_doctor_checks_kernels_even_when_the_reference_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    from persimmon_fast import ops

    monkeypatch.setattr(ops, "_FORCE_REFERENCE", True)
    monkeypatch.setattr(torch.ops.persimmon_fast, "layer_norm", lambda x, *_: torch.full_like(x, math.nan))
    assert not selfcheck.check("layer_norm", torch.float32, "cpu").ok


def test_doctor_names_switches_and_misspelt_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSIMMON_FAST_CPU_ISO", "avx2")
    monkeypatch.setenv("PERSIMMON_FAST_TRACEBACK", "1")
    monkeypatch.delenv("PERSIMMON_FAST_FORCE_REFERENCE", raising=False)
    facts = doctor.environment_facts()
    assert facts["PERSIMMON_FAST_TRACEBACK"] == "1"
    assert facts["PERSIMMON_FAST_FORCE_REFERENCE"] == "not set: the kernels run"
    assert facts["PERSIMMON_FAST_CPU_ISO"] == "avx2 (not a switch of this version)"
    root = Path(__file__).parents[1]
    sources = [*(root / "persimmon_fast").rglob("*.py"), *(root / "csrc").rglob("*.cpp")]
    used = {name for source in sources for name in re.findall(r"PERSIMMON_FAST_[A-Z_]*[A-Z]", source.read_text())}
    assert used == set(doctor.SWITCHES)
