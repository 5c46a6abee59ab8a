"""The prefill benchmark: rivals do the same work on the same weights, what cannot run is listed, ratios are right."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Last, so that an installed persimmon_fast goes before the source tree; benchmarks/ is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import counts, prefill, prefill_cases, prefill_prompts
from benchmarks.limits import matmul_limit
from benchmarks.models import slice_config
from benchmarks.prefill_acceptance import acceptance, best_sdpa_near, print_acceptance
from benchmarks.prefill_cases import GEMMS, Contest, Program
from benchmarks.runner import BenchmarkError
from benchmarks.timing import Budget, WallTimer

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SHORT = Budget(seconds=0.01, min_rounds=2, max_rounds=3)


@pytest.fixture(scope="module")
def setting():
    args = prefill.parse(["--small", "--dtype", "fp32", "--no-compile"])
    with torch.no_grad():
        return prefill.PrefillBenchmark(args, slice_config(small=True), [])._setting


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def run_contest(contest, *, dtype=torch.float32, compiled=False):
    """(record, what was skipped)."""
    skipped = {}
    limit = matmul_limit(dtype, CPU, 64)
    record = prefill.run_contest(contest, dtype, limit, WallTimer(CPU), SHORT, skipped.__setitem__, compiled=compiled)
    return record, skipped


def contest_of(programs, part="gemm"):
    return Contest(part, "a case", 4, 1e6, programs, lambda: torch.ones(3), products=1)


def one(call):
    return torch.ones(3)


def fails(call):
    raise RuntimeError("no such thing\nand a trace of it")


# ---- the cases ----


@pytest.mark.parametrize("gemm", GEMMS, ids=lambda gemm: gemm.name)
def test_products_agree_and_a_forgotten_bias_is_an_error(gemm, setting, monkeypatch):
    record, skipped = run_contest(prefill_cases.gemm_contest(setting, gemm, 70))
    assert list(record["variants"]) == ["ours", "torch.mm", "torch"]
    assert skipped == {}
    assert record["difference"] < 1e-5
    name = f"{gemm.matrices[-1]}.bias"
    without = [layer | {name: torch.zeros_like(layer[name])} for layer in setting.layers]
    monkeypatch.setattr(setting, "layers", without)
    with pytest.raises(BenchmarkError, match="ours: result differs"):
        run_contest(prefill_cases.gemm_contest(setting, gemm, 70))


def test_calls_go_through_the_layers(setting):
    contest = prefill_cases.gemm_contest(setting, GEMMS[1], 20)
    for name in ("ours", "torch"):
        outs = [contest.programs[name].run(call) for call in range(5)]
        assert torch.equal(outs[4], outs[0])
        assert all(not torch.equal(outs[i], outs[j]) for i in range(4) for j in range(i))
    layer = prefill_cases.layer_contest(setting, 20, None).programs["ours"]
    outs = [layer.run(call) for call in range(5)]
    assert torch.equal(outs[4], outs[0])
    assert not torch.equal(outs[1], outs[0])


def test_bare_products_take_each_layer_in_turn(setting, monkeypatch):
    multiplied = []
    real = torch.mm
    contests = [prefill_cases.gemm_contest(setting, gemm, 20) for gemm in GEMMS]
    monkeypatch.setattr(torch, "mm", lambda a, b, out: multiplied.append(b) or real(a, b, out=out))
    for contest in contests:
        for call in range(5):
            contest.programs["torch.mm"].run(call)
    found = {weight.data_ptr() for weight in multiplied}
    assert found == {
        layer[f"{name}.weight"].data_ptr() for layer in setting.torch_layers for gemm in GEMMS for name in gemm.matrices
    }
    assert len(found) == 16
    assert [tuple(b.shape) for b in multiplied[-2:]] == [(256, 1024), (1024, 256)]


def test_flops_of_the_parts_are_those_of_a_prompt(setting):
    products = sum(prefill_cases.gemm_contest(setting, gemm, 70).flops for gemm in GEMMS)
    attention = prefill_cases.attention_contest(setting, 70).flops
    layer = prefill_cases.layer_contest(setting, 70, None).flops
    assert products == 2 * 70 * 12 * 256 * 256
    assert layer == products + attention
    assert counts.prompt_flops(70, 4, 256, 1024, 4096) == 4 * layer + 2 * 256 * 4096


@pytest.mark.parametrize("seqlen", [64, 70])
def test_attention_lists_the_backends_that_refuse(setting, seqlen):
    record, skipped = run_contest(prefill_cases.attention_contest(setting, seqlen))
    assert record["difference"] < 1e-5
    assert list(record["variants"]) == ["ours", "ours, paged", "SDPA flash"]
    assert set(skipped) == {f"causal attention, {seqlen} tokens, SDPA {name}" for name in ("cuDNN", "efficient")}
    assert all(reason.startswith("RuntimeError: ") and "\n" not in reason for reason in skipped.values())


def test_a_layer_does_the_work_of_ours(setting):
    record, _ = run_contest(prefill_cases.layer_contest(setting, 70, "SDPA flash"))
    assert record["difference"] < 1e-5
    assert record["case"] == "decoder layer, 70 tokens, torch's with SDPA flash"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_layer_does_too(setting):
    torch._dynamo.reset()
    record, skipped = run_contest(prefill_cases.layer_contest(setting, 70, "SDPA flash"), compiled=True)
    assert skipped == {}
    assert list(record["variants"]) == ["ours", "torch", "torch.compile"]


# ---- what cannot run ----


def test_a_rival_that_raises_is_listed_with_the_first_line():
    programs = {"ours": Program(one), "torch": Program(one), "torch.compile": Program(fails)}
    record, skipped = run_contest(contest_of(programs), compiled=True)
    assert list(record["variants"]) == ["ours", "torch"]
    assert skipped == {"a case, torch.compile": "RuntimeError: no such thing"}
    record, skipped = run_contest(contest_of(programs), compiled=False)
    assert skipped == {}  # it was not asked for


def test_ours_must_run():
    with pytest.raises(RuntimeError, match="no such thing"):
        run_contest(contest_of({"ours": Program(fails)}))


def test_results_that_differ_are_an_error():
    programs = {"ours": Program(one), "torch": Program(lambda call: torch.full((3,), math.nan))}
    with pytest.raises(BenchmarkError, match="a case, torch: result differs by nan"):
        run_contest(contest_of(programs))
    programs["torch"] = Program(lambda call: torch.zeros(3), result=None)  # a bare product has no such result
    assert list(run_contest(contest_of(programs))[0]["variants"]) == ["ours", "torch"]


@pytest.mark.parametrize(("flash", "expected"), [(one, {"SDPA flash"}), (fails, {"SDPA math"})])
def test_the_last_resort_runs_where_nothing_else_does(flash, expected):
    programs = {
        "ours": Program(one),
        "ours, paged": Program(one),
        "SDPA flash": Program(flash),
        "SDPA math": Program(one, is_last_resort=True),
    }
    record, _ = run_contest(contest_of(programs, "attention"))
    assert set(record["variants"]) == {"ours", "ours, paged"} | expected


def test_prompts_of_rivals_that_fail_are_listed_and_wrong_logits_stop_the_run(setting, monkeypatch):
    skipped = {}
    limit = matmul_limit(torch.float32, CPU, 64)
    modes = prefill_prompts.modes_of(setting, None, skipped.__setitem__, compiled=False)
    names = [mode.name for mode in modes]
    assert names[:2] == ["persimmon_fast", "plain torch"]
    assert len(modes) == 3  # and transformers, by default with sdpa
    rest = (limit, WallTimer(CPU), SHORT, skipped.__setitem__)
    section = prefill_prompts.prompt_section(setting, modes, 20, *rest)
    assert list(section["variants"]) == names
    assert section["logits_difference"] < 1e-5
    for variant in section["variants"].values():
        assert variant["tokens_per_s"]["median"] > 0
    monkeypatch.setattr(modes[1], "prefill", lambda ids, length: fails(0))
    section = prefill_prompts.prompt_section(setting, modes, 20, *rest)
    assert list(section["variants"]) == [names[0], names[2]]
    assert skipped == {"prompt of 20 tokens, logits of the last one, plain torch": "RuntimeError: no such thing"}
    monkeypatch.setattr(modes[1], "prefill", lambda ids, length: torch.zeros(1, 4096))
    with pytest.raises(BenchmarkError, match=r"logits of plain torch differ by 1\.0e\+00"):
        prefill_prompts.prompt_section(setting, modes, 20, *rest)


# ---- the ratios ----


def case(part, tokens, products=0, **us):
    names = {"mm": "torch.mm", "compiled": "torch.compile", "flash": "SDPA flash", "cudnn": "SDPA cuDNN"}
    variants = {names.get(name, name): {"us": {"median": value}} for name, value in us.items()}
    return {"part": part, "case": f"{part} {tokens}", "tokens": tokens, "products": products, "variants": variants}


def test_acceptance_by_hand():
    cases = [
        case("gemm", 512, 1, ours=100.0, mm=200.0),
        case("gemm", 512, 2, ours=100.0, mm=50.0),  # both products of an op: twice in the mean
        case("gemm", 2048, 1, ours=10.0, mm=80.0),
        case("gemm", 2048, 2, ours=10.0, mm=10.0),
        case("attention", 2048, ours=10.0, flash=20.0, cudnn=11.0),
        case("attention", 8192, ours=10.0, flash=9.0, cudnn=11.0),
        case("layer", 2048, ours=10.0, torch=5.0, compiled=11.0),
    ]
    entries = acceptance(cases)
    assert [(e["part"], e["rival"], e["wanted"]) for e in entries] == [
        ("gemm", "torch.mm", 1.0),
        ("attention", "SDPA cuDNN", 1.05),
        ("attention", "SDPA flash", 1.05),
        ("layer", "torch.compile", 1.08),
    ]
    # 2 * 1/2 * 1/2 * 8 * 1 * 1 = 4, six products
    assert [e["ratio"] for e in entries] == pytest.approx([4 ** (1 / 6), 1.1, 0.9, 1.1])
    assert entries[0]["case"] == "3 products with their epilogues, 512, 2,048 rows, geometric mean"
    assert best_sdpa_near(cases, 1000) == "SDPA cuDNN"
    assert best_sdpa_near(cases, 16384) == "SDPA flash"
    assert best_sdpa_near(cases[:4], 16384) is None


def test_what_was_not_measured_has_no_ratio(capsys):
    cases = [
        case("gemm", 512, 1, ours=100.0, mm=200.0),
        case("gemm", 512, 1, ours=100.0),
        case("attention", 2048, ours=10.0),
        case("layer", 2048, ours=10.0, torch=5.0),
    ]
    entries = acceptance(cases)
    assert [e["ratio"] for e in entries] == [None] * 3
    assert [e["rival"] for e in entries] == ["torch.mm", None, "torch.compile"]
    assert acceptance([]) == []
    assert [e["part"] for e in acceptance(cases[2:3])] == ["attention"]
    print_acceptance(entries, "cuda")
    assert capsys.readouterr().out.count("not measured, see above") == 3


# ---- a run ----


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "prefill", "--small", "--no-compile"]
    done = subprocess.run(
        [*command, "--seconds", "0.02", "--threads", "1", "--out", out],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((out / "cpu-bf16-small-prefill.json").read_text()), out


def test_result_holds_every_part_with_samples_and_the_peak(small_run):
    _, result, _ = small_run
    record = result["prefill"]
    assert [(c["part"], c["tokens"]) for c in record["cases"]] == (
        [("gemm", 64)] * 3 + [("gemm", 150)] * 3 + [("attention", 150), ("attention", 256), ("layer", 150)]
    )
    assert sum(c["products"] for c in record["cases"]) == 8
    for c in record["cases"]:
        assert {"gemm": "torch.mm", "attention": "SDPA flash", "layer": "torch"}[c["part"]] in c["variants"]
        for variant in c["variants"].values():
            us = variant["us"]
            assert us["n"] == len(variant["samples_us"]) >= 2
            assert us["p10"] <= us["median"] <= us["p90"]
            assert variant["tflop_per_s"] == pytest.approx(c["flops"] / us["median"] / 1e6)
            rate = c["limit_flops_per_s"]["median"]
            assert variant["share_of_limit"] == pytest.approx(1e12 * variant["tflop_per_s"] / rate)
    assert set(record["peak_flops_per_s"]) == {"first", "last"}
    assert all(stats["n"] >= 5 and stats["min"] > 1e8 for stats in record["peak_flops_per_s"].values())
    assert record["acceptance"] == acceptance(record["cases"])
    assert [s["tokens"] for s in result["end_to_end"]["sections"]] == [64, 150]
    assert result["git"].keys() == {"commit", "dirty"}


def test_result_lists_what_did_not_run(small_run):
    _, result, _ = small_run
    skipped = {record["op"]: record["reason"] for record in result["skipped"]}
    assert skipped["prefill: torch.compile"] == "--no-compile"
    assert len(skipped) == 5  # and two backends of SDPA at two lengths
    assert result["prefill"]["acceptance"][-1]["ratio"] is None


def test_the_last_lines_are_the_ratios(small_run):
    stdout, result, out = small_run
    lines = stdout.rstrip().splitlines()[-4:]
    for line, entry in zip(lines, result["prefill"]["acceptance"], strict=True):
        assert line.startswith(f"  {entry['part']}: {entry['case']}")
        assert line.endswith(f"(wanted {entry['wanted']:.2f})")
        assert ("not measured" if entry["ratio"] is None else f"{entry['ratio']:.3f}") in line
    assert (out / "cpu-bf16-small-prefill-end_to_end.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "decode"], "invalid choice: 'decode'"),
        (["--seconds", "0"], "--seconds must be > 0, got 0"),
        (["--threads", "-1"], "--threads must be > 0, got -1"),
        (["--small", "--slice"], "not allowed with argument --small"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        prefill.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_that_does_not_fit_a_gpu_is_replaced_by_the_slice_and_said(monkeypatch):
    args = prefill.parse([])
    args.device, skipped = "cuda", []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (54e9, 80e9))
    assert prefill._model(args, skipped)[0] == "slice"
    assert [record["op"] for record in skipped] == ["prefill: all 36 layers"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80e9, 80e9))
    name, config = prefill._model(args, skipped)
    assert (name, config.num_hidden_layers, len(skipped)) == ("Persimmon-8B", 36, 1)
    assert prefill._stem(args, name) == "cuda-bf16-full-prefill"
    args.parts = ["gemm"]
    assert prefill._stem(args, name) == "cuda-bf16-full-prefill-gemm"
