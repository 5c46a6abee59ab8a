"""The benchmark: every op has one, its arithmetic is right, and a run leaves a complete result."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Last, so that an installed persimmon_fast goes before the source tree; benchmarks/ is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import counts, runner, timing
from benchmarks.cases import PERSIMMON_8B, SMALL, Call, Workspace
from benchmarks.limits import copy_limit, matmul_limit, measure_limits, read_limit
from benchmarks.timing import Budget, Plan, Stats, interleave, measure, plan_rounds
from persimmon_fast import _C

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


# ---- every op ----


def registered_ops() -> set[str]:
    schemas = (ROOT / "csrc" / "ops" / "schemas.h").read_text()
    return set(re.findall(r'm\.def\(\s*"(\w+)\(', schemas))


def test_every_op_has_a_benchmark():
    assert len(registered_ops()) >= 13  # the pattern still finds them
    assert registered_ops() - {case.op for case in runner.all_cases(PERSIMMON_8B)} == set()


@pytest.mark.parametrize("shapes", [PERSIMMON_8B, SMALL], ids=lambda s: s.name)
def test_quick_runs_a_decode_and_a_prefill_shape_of_each_op(shapes):
    phases: dict[str, set[str]] = {}
    for case in runner.all_cases(shapes):
        phases.setdefault(case.op, set())
        if case.quick:
            phases[case.op].add(case.phase)
    for op, found in phases.items():
        assert found == {"flash_attention": {"prefill"}}.get(
            op, {"decode"} if "lm_head" in op else {"decode", "prefill"}
        )
    assert len({(case.op, case.label) for case in runner.all_cases(shapes)}) == len(list(runner.all_cases(shapes)))


# ---- bytes and flops, by hand ----


def test_counts_of_a_decode_row_of_the_8b_model():
    h, itemsize = 4096, 2
    # weight, bias, x, q + k + v, four LayerNorm vectors of 64; a position (8) and 32 fp32 angles
    assert counts.qkv_norm_rope(1, h, 64, 32, itemsize).num_bytes == (
        12288 * 4096 * 2 + 12288 * 2 + 4096 * 2 + 12288 * 2 + 4 * 64 * 2 + 8 + 32 * 4
    )
    assert counts.qkv_norm_rope(1, h, 64, 32, itemsize).flops == 2 * 4096 * 12288
    assert counts.qkv_norm_rope_paged(3, h, 64, 32, itemsize).num_bytes == (
        counts.qkv_norm_rope(3, h, 64, 32, itemsize).num_bytes + 3 * 8
    )
    assert counts.linear_residual(1, h, h, itemsize).num_bytes == 2 * (4096 * 4096 + 4 * 4096)
    assert counts.lm_head(1, h, 262144, itemsize).num_bytes == 262144 * 4096 * 2 + 4096 * 2 + 12
    assert counts.layer_norm(1, h, itemsize).num_bytes == 4 * 4096 * 2
    assert counts.add_layer_norm(5, h, itemsize).num_bytes == 22 * 4096 * 2
    assert counts.qk_norm_rope(2, 64, 64, 32, itemsize).num_bytes == 2 * (4 * 4096 * 2 + 8 + 128) + 4 * 64 * 2


def test_counts_of_the_mlp_follow_the_zeros():
    dense, sparse = (counts.squared_relu_mlp(1, 4096, 16384, 2, active) for active in (1.0, 0.1))
    assert dense.num_bytes == 2 * (2 * 16384 * 4096 + 16384 + 4096 + 3 * 4096)
    assert dense.num_bytes - sparse.num_bytes == pytest.approx(0.9 * 16384 * 4096 * 2)
    assert dense.flops == 4 * 4096 * 16384


def test_counts_of_attention():
    assert counts.attended_pairs(4, 4) == 1 + 2 + 3 + 4
    assert counts.attended_pairs(2, 5) == 4 + 5
    assert counts.attended_pairs(1, 16384) == 16384
    decode = counts.paged_attention(1, 1, 16384, 64, 64, 2)
    assert decode.num_bytes == 2 * 16384 * 4096 * 2 + 2 * 4096 * 2
    assert decode.flops == 4 * 64 * 64 * 16384
    prefill = counts.flash_attention(2, 3, 64, 64, 2)
    assert prefill.num_bytes == 2 * 3 * (4 * 4096 * 2 + 64 * 4)
    assert prefill.flops == 4 * 2 * 64 * 64 * 6


def test_counts_of_a_decode_step_equal_the_known_size_of_the_model():
    # 9,397,175,296 parameters, embedding 262,144 x 4,096; 16.65 GB a token at 16 bit, 589,824 bytes of cache per token
    layers, down = 36, 16384 * 4096
    step = counts.decode_step(9_397_175_296, 262144 * 4096, layers * down, 0.0, 0, 2)
    assert step.num_bytes == pytest.approx(16.647e9, rel=1e-4)
    cached = counts.decode_step(9_397_175_296, 262144 * 4096, layers * down, 0.0, 2 * layers * 4096, 2)
    assert cached.num_bytes - step.num_bytes == 589_824
    skipping = counts.decode_step(9_397_175_296, 262144 * 4096, layers * down, 0.9, 0, 2)
    assert step.num_bytes - skipping.num_bytes == pytest.approx(0.9 * layers * down * 2)


def test_limit_is_the_larger_of_the_two_times():
    work = counts.Counts(num_bytes=30e9, flops=1e12)
    assert work.limit_seconds(30e9, 2e12) == 1.0
    assert work.is_memory_bound(30e9, 2e12)
    assert work.limit_seconds(60e9, 1e12) == 1.0
    assert not work.is_memory_bound(60e9, 1e12)


# ---- statistics and rounds ----


def test_stats():
    stats = Stats.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (stats.n, stats.median, stats.min, stats.max) == (5, 3.0, 1.0, 5.0)
    assert (stats.p10, stats.p90) == pytest.approx((1.4, 4.6))
    assert Stats.of([7.0]).to_dict() == {"n": 1, "median": 7.0, "p10": 7.0, "p90": 7.0, "min": 7.0, "max": 7.0}
    with pytest.raises(ValueError, match="no samples"):
        Stats.of([])


def test_interleave_rotates_the_order_and_never_repeats_a_call_number():
    calls = []
    variants = {name: lambda call, name=name: calls.append((name, call)) for name in "abc"}
    samples = interleave(variants, timing.WallTimer(CPU), 3, {"a": Plan(2, 1), "b": Plan(1, 1), "c": Plan(1, 2)})
    assert [name for name, _ in calls] == list("aabc" + "baa" + "caab")
    assert [call for _, call in calls] == list(range(len(calls)))
    assert {name: len(s) for name, s in samples.items()} == {"a": 3, "b": 3, "c": 2}


def test_plan_repeats_short_calls_and_lets_slow_variants_sit_out():
    budget = Budget(seconds=4.0, min_rounds=7, max_rounds=50, min_sample_seconds=3e-4, min_slow_samples=2)
    rounds, plans = plan_rounds({"short": 1e-5, "medium": 0.1, "slow": 3.0}, budget)
    assert rounds == 39  # 4 s / (0.0003 + 0.1)
    assert plans["short"] == Plan(30, 1)
    assert plans["medium"] == Plan(1, 1)
    assert math.ceil(rounds / plans["slow"].stride) in (2, 3)
    rounds, plans = plan_rounds({"ours": 2.0, "other": 2.5, "limit": 0.1}, budget)  # not slow beside the first
    assert rounds == 7
    assert plans == {"ours": Plan(1, 1), "other": Plan(1, 1), "limit": Plan(1, 1)}


def test_timer_measures_seconds_per_call():
    import time

    seconds = timing.WallTimer(CPU)(lambda call: time.sleep(0.02), 0, 10)
    assert 0.02 <= seconds < 0.2  # ten of them last at least that
    samples = measure({"sleep": lambda call: time.sleep(0.01)}, timing.WallTimer(CPU), Budget(0.05, 3, 5))
    assert 3 <= len(samples["sleep"]) <= 5
    assert min(samples["sleep"]) >= 0.01


# ---- memory and limits ----


def test_workspace_cuts_copies_that_do_not_overlap_and_fill_the_working_set():
    workspace = Workspace(CPU, torch.bfloat16, 1_000_000)
    sets = workspace.rotate((64, 512), (512,))
    assert len(sets) * sum(t.nbytes for t in sets[0]) >= 1_000_000 * 0.9
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for tensors in sets for t in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert all(t.data_ptr() % 64 == 0 for tensors in sets for t in tensors)
    assert len(workspace.rotate((1024, 1024))) == 1  # larger than the working set: one copy
    big = workspace.rotate((4096, 4096))[0][0]
    assert big.float().std() == pytest.approx(Workspace.STD, rel=0.01)
    assert len({tuple(row.tolist()) for row in big[::64, :8]}) == 64  # no two rows are equal


def test_read_limit_reads_all_of_a_block_that_grows(monkeypatch):
    workspace = Workspace(CPU, torch.float32, 1 << 20)
    limit = read_limit(workspace.block)
    assert limit.work == 1 << 20
    block = workspace.block(3 << 20)
    read = []
    monkeypatch.setattr(_C, "read_memory", lambda address, num_bytes: read.append((address, num_bytes)))
    for call in range(4):
        limit.variant(call)
    starts = [(address - block.data_ptr()) >> 20 for address, _ in read]
    assert starts == [0, 1, 2, 0]
    assert {num_bytes for _, num_bytes in read} == {1 << 20}
    assert limit.rate([0.5]).median == 2 << 20


def test_copy_limit_copies_one_part_to_the_next():
    block = torch.empty(3 * 4096, dtype=torch.uint8)
    block[:4096], block[4096:8192], block[8192:] = 1, 2, 3
    limit = copy_limit(lambda: block[: 2 * 4096])
    assert limit.work == 2 * 4096
    limit.variant(0)
    assert [int(block[i * 4096]) for i in range(3)] == [1, 1, 3]
    block[4096:8192] = 2
    three = copy_limit(lambda: block)  # of 6,144 bytes, cut to pages
    three.variant(1)  # part 2 to part 0
    assert [int(block[i * 4096]) for i in range(3)] == [3, 2, 3]


def test_copies_are_measured_on_gpus_alone():
    workspace = Workspace(CPU, torch.float32, 1 << 20)
    budget = Budget(seconds=0.01, min_rounds=1, max_rounds=1)
    assert measure_limits(workspace.block, torch.float32, timing.WallTimer(CPU), budget, 64).copy is None


def test_matmul_limit_counts_two_flops_per_multiply_add():
    limit = matmul_limit(torch.float32, CPU, 64)
    limit.variant(0)
    assert limit.work == 2 * 64**3


# ---- results that would mean nothing ----


def test_disagreeing_results_are_an_error():
    workspace = Workspace(CPU, torch.float32, 1 << 16)
    case = next(c for c in runner.all_cases(SMALL) if c.op == "layer_norm")
    prepared = case.prepare(workspace)
    assert runner.check_agreement(case, prepared) < 1e-5
    prepared.ours = Call(lambda *args: torch.zeros(1, SMALL.hidden_size), prepared.ours.arguments)
    with pytest.raises(runner.BenchmarkError, match=r"layer_norm, 1 row, ours: result differs .* by 1"):
        runner.check_agreement(case, prepared)
    prepared.ours = Call(lambda *args: torch.full((1, SMALL.hidden_size), math.nan), prepared.ours.arguments)
    with pytest.raises(runner.BenchmarkError, match="differs"):
        runner.check_agreement(case, prepared)


def test_the_plain_versions_compute_what_the_reference_does():
    """On every shape of the small model, in fp32: a baseline that skips work would be no baseline."""
    workspace = Workspace(CPU, torch.float32, 1 << 16)
    checked = 0
    with torch.inference_mode():
        for case in runner.all_cases(SMALL):
            prepared = case.prepare(workspace)
            if prepared.result is None:
                continue
            prepared.ours = prepared.reference
            runner.check_agreement(case, prepared)
            checked += 1
    assert checked > 40


# ---- a run ----


def run(*arguments: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--out", out, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=os.environ | environment
    )


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    arguments = ("--quick", "--small", "--seconds", "0.02", "--working-set", "0.004", "--threads", "1")
    done = run(*arguments, out=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, json.loads((out / "cpu-bf16-small-quick.json").read_text()), out


def test_result_says_where_it_was_taken(quick_run):
    _, result, _ = quick_run
    assert set(result) == {
        "schema", "date", "arguments", "machine", "versions", "git", "shapes", "limits", "ops", "end_to_end",
        "skipped", "seconds",
    }  # fmt: skip
    machine = result["machine"]
    assert machine["cpu"]
    assert machine["threads"] == 1
    assert machine["memory_bytes"] > 1e8
    assert result["versions"]["torch"] == torch.__version__
    assert result["arguments"]["quick"] is True
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}", result["git"]["commit"])
        assert result["git"]["dirty"] in (True, False)


def test_result_holds_every_op_with_samples_rates_and_limits(quick_run):
    _, result, _ = quick_run
    assert result["skipped"] == []
    assert {record["op"] for record in result["ops"]} == registered_ops()
    assert all(rate > 0 for rate in result["limits"]["read_bytes_per_s"] + result["limits"]["matmul_flops_per_s"])
    for record in result["ops"]:
        assert {"ours", "reference", record["best_torch"]} <= set(record["variants"])
        assert record["bound"] in ("memory", "compute", "overhead")
        assert record["working_set_bytes"] > 0
        for variant in record["variants"].values():
            samples = variant["samples_us"]
            assert variant["us"]["n"] == len(samples) >= 1
            assert min(samples) > 0
            assert variant["gb_per_s"] == pytest.approx(record["bytes"] / variant["us"]["median"] / 1e3)
            if record["bound"] != "overhead":
                assert variant["share_of_limit"] == pytest.approx(record["limit"]["us"] / variant["us"]["median"])


def test_result_holds_the_decoder_beside_transformers(quick_run):
    _, result, _ = quick_run
    record = result["end_to_end"]
    assert record["zeros"]["random weights"] == pytest.approx(0.5, abs=0.05)
    assert record["zeros"]["shifted"] == pytest.approx(0.9, abs=0.02)
    assert {section["kind"] for section in record["sections"]} == {"prefill", "decode", "generate"}
    for section in record["sections"]:
        names = list(section["variants"])
        assert names[0] == "persimmon_fast"
        assert any(name.startswith("transformers") for name in names)
        assert all(v["tokens_per_s"]["median"] > 0 for v in section["variants"].values())


def test_run_prints_tables_and_draws_pictures(quick_run):
    done, _, out = quick_run
    assert "squared_relu_mlp" in done.stdout
    assert "vs torch" in done.stdout
    for name in ("cpu-bf16-small-quick-ops.png", "cpu-bf16-small-quick-end_to_end.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "no_such_op"], "invalid choice: 'no_such_op'"),
        (["--threads", "0"], "--threads must be > 0, got 0"),
        pytest.param(
            ["--device", "cuda"],
            "finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    from benchmarks import run as program

    with pytest.raises(SystemExit) as stop:
        program.parse([*arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_forced_reference_is_refused(monkeypatch, capsys):
    from benchmarks import run as program

    monkeypatch.setattr("persimmon_fast.ops._FORCE_REFERENCE", True)
    with pytest.raises(SystemExit):
        program.parse([])
    assert "PERSIMMON_FAST_FORCE_REFERENCE" in capsys.readouterr().err


def test_without_matplotlib_the_numbers_are_still_written(tmp_path, monkeypatch, capsys):
    from benchmarks import report

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmarks.plot", raising=False)
    report.write({"seconds": 1.0, "ops": [], "end_to_end": None}, tmp_path, "name")
    assert json.loads((tmp_path / "name.json").read_text())["seconds"] == 1.0
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_without_transformers_ours_is_measured_alone(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ModuleNotFoundError('hidden', name='transformers')")
    # no empty entry: it would mean this folder, whose persimmon_fast may not be the one under test
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = run("--quick", "--small", "--threads", "1", "--op", "end_to_end", out=tmp_path / "out", PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped end_to_end with transformers: transformers is not installed" in done.stdout
    result = json.loads((tmp_path / "out" / "cpu-bf16-small-quick-end_to_end.json").read_text())
    names = {name for section in result["end_to_end"]["sections"] for name in section["variants"]}
    assert names == {"persimmon_fast", "persimmon_fast, 90% zeros"}
