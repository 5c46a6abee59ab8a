"""The decode benchmark: all variants decode the same thing, zeros and bytes are what is said, nothing fits silently."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Last, so that an installed persimmon_fast goes before the source tree; benchmarks/ is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import decode
from benchmarks.models import (
    UpBiases,
    load_checkpoint_model,
    random_model,
    slice_config,
    write_random_checkpoint,
)
from benchmarks.modes import OurMode, Past
from benchmarks.runner import BenchmarkError
from benchmarks.static_model import StaticMode
from benchmarks.transformers_modes import row_major_weights, transformers_modes

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return random_model(slice_config(small=True), torch.float32, CPU)[0]


def benchmark(*arguments, skipped=None):
    args = decode.parse(["--small", "--quick", "--no-transformers", "--dtype", "fp32", "--seconds", "0.01", *arguments])
    with torch.no_grad():
        return decode.DecodeBenchmark(args, [] if skipped is None else skipped)


@torch.no_grad()
def test_every_mode_continues_the_same_past_and_can_be_wound_back(model):
    # 150: two full pages of the paged cache and a part of a third; four steps cross no page, 42 more would
    past = Past(model.config, 3, 150, 4, torch.float32, CPU)
    tokens = torch.randint(model.config.vocab_size, (4, 3, 1), generator=torch.Generator().manual_seed(1))
    weights = row_major_weights(model)
    modes = [
        OurMode("ours", model, None),
        StaticMode(model.config, weights, compiled=False),
        *transformers_modes(model, weights, compiled=False, freezing=False),
    ]
    caches = {}
    expected = None
    for mode in modes:
        mode.take_over(past, caches.get(mode.cache_kind))
        caches.setdefault(mode.cache_kind, mode)
        for _ in range(2):
            mode.rewind()
            logits = torch.stack([mode.step(step) for step in tokens])
            expected = logits if expected is None else expected
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item(), msg=mode.name)
        mode.rewind()
        assert mode.decode(tokens) == expected.argmax(-1).tolist()
    assert len({mode.cache_kind for mode in modes}) == 4  # eager and sdpa share one


@torch.no_grad()
def test_a_past_of_whole_pages(model):
    past = Past(model.config, 1, 128, 2, torch.float32, CPU)
    ours, plain = OurMode("ours", model, None), StaticMode(model.config, row_major_weights(model), compiled=False)
    for mode in (ours, plain):
        mode.take_over(past, None)
    for token in (5, 6):  # the first opens a page
        step = torch.tensor([[token]])
        torch.testing.assert_close(ours.step(step), plain.step(step), rtol=0, atol=1e-5)


@torch.no_grad()
def test_shares_of_zeros_are_made_and_counted(model):
    ids = torch.randint(model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(2))
    biases = UpBiases(model, ids, [0.0, 0.5, 0.95])
    assert biases.zeros[0.0] == 0  # exactly: the dense case has none
    assert biases.zeros[0.5] == pytest.approx(0.5, abs=0.002)
    assert biases.zeros[0.95] == pytest.approx(0.95, abs=0.002)
    biases.use(0.5)
    mean, common = biases.count(lambda: model(ids[:, :4], use_cache=False))
    inputs = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[1](args[0])))
        for layer in model.model.layers
    ]
    model(ids[:, :4], use_cache=False)
    for hook in hooks:
        hook.remove()
    zero = torch.stack([layer.mlp.dense_h_to_4h(x) <= 0 for layer, x in zip(model.model.layers, inputs, strict=True)])
    assert mean == pytest.approx(zero.double().mean().item())
    assert common == pytest.approx(zero.all(1).double().mean().item())
    assert common < mean - 0.1
    biases.use(None)


def test_bytes_of_a_step_hold_the_weights_once_and_the_cache_of_every_sequence():
    bench = benchmark()
    one, four = (bench._step_bytes(decode.Cell(128, rows), 0.0) for rows in (1, 4))
    layers, hidden, inner = 4, 256, 1024
    cached = 2 * layers * hidden * (128 + 1.5) * 4  # four steps: 128 to 131 tokens lie in the cache before them
    assert four - one == pytest.approx(3 * cached)
    assert one - cached == 4 * (bench.model.num_parameters() - 4096 * hidden)
    assert one - bench._step_bytes(decode.Cell(128, 1), 0.5) == pytest.approx(0.5 * layers * hidden * inner * 4)


def test_what_does_not_fit_is_reported_with_its_arithmetic(monkeypatch):
    skipped = []
    bench = benchmark(skipped=skipped)
    monkeypatch.setattr(decode, "_SPARE_BYTES", 3e6)
    monkeypatch.setattr("persimmon_fast.measure.available_memory", lambda: 9_000_000)
    # 8 KiB a token: 132 tokens of four sequences; 3 MB spare, 128 tokens to fill them from, a layer that grows
    with torch.no_grad():
        assert bench.cell(decode.Cell(128, 4)) is None
    record = next(record for record in skipped if "llama" not in record["op"])  # which may be installed or not
    assert record == {
        "op": "decode: context 128, 4 sequences, all",
        "reason": "a cache of 2 x 4 layers x 256 x 132 tokens x 4 sequences x 4 bytes = 0.00433 GB, with 0.00513 GB "
        "for the rest, does not fit into the 0.009 GB that are free",
    }
    monkeypatch.setattr("persimmon_fast.measure.available_memory", lambda: 10_000_000)
    with torch.no_grad():
        assert bench.cell(decode.Cell(128, 4)) is not None


@pytest.mark.parametrize("method", ["step", "decode"])
def test_modes_that_disagree_are_an_error(method, monkeypatch):
    bench = benchmark()
    weights = row_major_weights(bench.model)
    rival = StaticMode(bench.config, weights, compiled=False)
    rival.zeros = 0.0
    wrong = {"step": lambda tokens: torch.zeros(1, 4096), "decode": lambda tokens: [[0]]}
    bench.rivals = [rival]
    with torch.no_grad():
        assert bench.cell(decode.Cell(128, 1)) is not None
        monkeypatch.setattr(rival, method, wrong[method])
        with pytest.raises(BenchmarkError, match="hand-made static model differ by"):
            bench.cell(decode.Cell(128, 1))


@torch.no_grad()
def test_a_random_checkpoint_is_mapped_and_gives_sensible_numbers(tmp_path):
    write_random_checkpoint(tmp_path / "model", slice_config(small=True), torch.bfloat16)
    model = load_checkpoint_model(tmp_path / "model", torch.bfloat16, CPU)
    head = model.lm_head.weight
    assert head.float().std() == pytest.approx(0.02, rel=0.05)
    assert len({tuple(row.tolist()) for row in head[::16, :8]}) == 256  # no two rows are equal
    ids = torch.tensor([[1, 2, 3, 4]])
    biases = UpBiases(model, ids, [0.0, 0.9])  # writes to the biases
    assert biases.zeros[0.0] == 0
    assert model(ids, use_cache=False).logits.isfinite().all()


# ---- a run ----


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "decode", "--small", "--quick", "--batches", "1", "2"]
    done = subprocess.run(
        [*command, "--seconds", "0.05", "--threads", "1", "--out", out],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((out / "cpu-bf16-small-decode-quick-batches_1_2.json").read_text()), out


def test_result_holds_every_cell_with_rates_and_limits(quick_run):
    _, result, _ = quick_run
    assert [record for record in result["skipped"] if "llama" not in record["op"]] == []
    sections = result["decode"]["sections"]
    assert [(s["context"], s["batch_size"]) for s in sections] == [(128, 1), (128, 2)]
    for section in sections:
        names = list(section["variants"])
        assert names[:2] == ["persimmon_fast, dense", "persimmon_fast, 90% zeros"]
        assert section["transformers_default"] in names
        assert sum(name.startswith("transformers") for name in names) == 3
        assert sum(name.startswith("patched transformers") for name in names) == 2
        rate = section["read_bytes_per_s"]["median"]
        for variant in section["variants"].values():
            stats = variant["tokens_per_s"]
            assert stats["n"] == len(variant["samples_tokens_per_s"]) >= 1
            assert variant["limit_tokens_per_s"] == pytest.approx(rate / variant["bytes_per_token"])
            assert variant["share_of_limit"] == pytest.approx(stats["median"] / variant["limit_tokens_per_s"])
        dense, sparse = (section["variants"][name] for name in names[:2])
        assert dense["zeros"] == dense["zeros_common_to_batch"] == 0
        assert dense["share_of_dense_limit"] == dense["share_of_limit"]
        assert sparse["zeros"] == pytest.approx(0.9, abs=0.03)
        assert sparse["bytes_per_token"] < dense["bytes_per_token"]
    one, two = (section["variants"]["persimmon_fast, 90% zeros"] for section in sections)
    assert one["zeros_common_to_batch"] == one["zeros"]
    assert two["zeros_common_to_batch"] < two["zeros"]


def test_run_prints_a_table_and_draws_a_picture(quick_run):
    stdout, _, out = quick_run
    assert "vs default" in stdout
    assert (out / "cpu-bf16-small-decode-quick-batches_1_2.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "0"], "--contexts must lie in 1 .. "),
        (["--zeros", "1.5"], "--zeros must lie in 0 .. 0.999, got 1.5"),
        (["--checkpoint", "somewhere"], "--checkpoint needs --full"),
        (["--threads", "0"], "--threads must be > 0, got 0"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        decode.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_dense_case_is_always_measured():
    assert decode.parse(["--zeros", "0.9", "0.5"]).zeros == [0.0, 0.5, 0.9]
