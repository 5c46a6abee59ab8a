"""`sparsity.report` against zeros known by construction, fp64, the kernel itself and brute force; the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cli_helpers import run, tiny_model
from helpers import DTYPES, ISAS, cpu_isa, randn, tiny_config
from torch import Tensor

from persimmon_fast import SMALL_MODEL, PersimmonForCausalLM, PersimmonTokenizer, ops, sparsity

WINDOWS = (1, 2, 4, 8, 16)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text crosses pieces, and every neuron blocks, of unequal sizes."""
    monkeypatch.setattr(sparsity, "_CHUNK_POSITIONS", 7)
    monkeypatch.setattr(sparsity, "_CHUNK_NEURONS", 24)


def random_model(dtype: torch.dtype = torch.float32) -> PersimmonForCausalLM:
    torch.manual_seed(0)
    model = PersimmonForCausalLM(tiny_config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def random_ids(count: int) -> Tensor:
    return torch.randint(3, 160, (count,), generator=torch.Generator().manual_seed(1))


@contextmanager
def mlp_inputs() -> Iterator[list[Tensor]]:
    """Collects what the op gets: one tensor per call, in the order of pieces and layers."""
    inputs: list[Tensor] = []
    op = ops.squared_relu_mlp

    def recorded(x: Tensor, *rest: Tensor, norm_weight: Tensor, norm_bias: Tensor, norm_eps: float) -> Tensor:
        inputs.append(ops.layer_norm(x, norm_weight, norm_bias, norm_eps))
        return op(inputs[-1], *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "squared_relu_mlp", recorded)
        yield inputs


def pre_activation(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(z in fp64, how far an fp32 sum of any order may be from it)."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    terms = weight.shape[1] + 1
    return x @ weight.T + bias, terms * 2**-24 * (x.abs() @ weight.abs().T + bias.abs())


# ---- counts ----


def test_zeros_known_by_construction() -> None:
    """Each neuron's up bias is shifted so that it is active at `kept` of the positions, unlike in the two layers."""
    model, ids = random_model(), random_ids(40)
    kept = [4, 13]
    for index, layer in enumerate(model.model.layers):
        with mlp_inputs() as inputs, torch.no_grad():
            model(ids.unsqueeze(0), use_cache=False)
        up = layer.mlp.dense_h_to_4h
        z, error = pre_activation(inputs[index], up.weight, up.bias)
        ordered = z.sort(0, descending=True).values
        above, below = ordered[kept[index] - 1], ordered[kept[index]]
        assert ((above - below) / 2 > 4 * error.amax(0)).double().mean() > 0.95  # few are too near 0 to be certain
        with torch.no_grad():
            up.bias -= ((above + below) / 2).float()
    result = sparsity.report(model, ids)
    assert (result.num_layers, result.num_positions) == (2, 40)
    assert result.intermediate_size == model.config.intermediate_size
    for zeros, count in zip(result.zeros, kept, strict=True):
        assert zeros.mean().item() == pytest.approx(1 - count / 40, abs=1e-3)
    assert result.zeros.dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_fp64(dtype: torch.dtype) -> None:
    model, ids = random_model(dtype), random_ids(30)
    with mlp_inputs() as inputs:
        result = sparsity.report(model, ids)
    for index, layer in enumerate(model.model.layers):
        x = torch.cat(inputs[index::2])
        assert x.dtype == dtype
        z, error = pre_activation(x, layer.mlp.dense_h_to_4h.weight, layer.mlp.dense_h_to_4h.bias)
        least, most = (z > error).sum(1), (z > -error).sum(1)
        assert (most - least).sum() <= 2
        assert ((least <= result.active[1][index]) & (result.active[1][index] <= most)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_what_the_kernel_reads(isa: str, dtype: torch.dtype) -> None:
    """D = inf on its diagonal: an output is finite where the kernel did not read the neuron, and nowhere else."""
    neurons = 100  # and as many outputs
    weight, bias = randn(neurons, neurons, dtype=dtype, seed=1), randn(neurons, dtype=dtype, seed=2)
    weight[:4] = 0
    bias[:4] = torch.tensor([0.0, -0.0, 6e-8, -1.0])  # 6e-8: the least fp16 > 0; its square is > 0 in fp32 alone
    down = ops.to_neuron_major(torch.full((neurons,), torch.inf).diag().to(dtype))
    x = randn(9, neurons, dtype=dtype)
    x[8, 5] = torch.nan
    active = sparsity.active_neurons(x, weight, bias)
    assert active[0, :4].tolist() == [False, False, True, False]
    assert active[8].all()
    z, error = pre_activation(x, weight, bias)
    certain = ~(z.abs() <= error) | (torch.arange(neurons) < 4)
    assert certain.double().mean() > 0.99
    with cpu_isa(isa):
        read = torch.cat([~ops.squared_relu_mlp(row, weight, bias, down, None).isfinite() for row in x.split(1)])
    assert torch.equal(read[certain], active[certain])


def test_squares_that_underflow_are_not_active() -> None:
    weight, bias = torch.zeros(2, 2), torch.tensor([1e-30, 1e-20])
    assert sparsity.active_neurons(torch.zeros(1, 2), weight, bias).tolist() == [[False, True]]
    down = ops.to_neuron_major(torch.full((2,), torch.inf).diag())
    assert ops.squared_relu_mlp(torch.zeros(1, 2), weight, bias, down, None).isfinite().tolist() == [[True, False]]
    assert sparsity.active_neurons(torch.ones(1, 2), torch.ones(2, 2), None).all()


@pytest.mark.parametrize("count", [37, 16, 3, 1])
def test_windows_are_unions(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor] = []
    active_neurons = sparsity.active_neurons

    def recorded(*arguments: Tensor) -> Tensor:
        masks.append(active_neurons(*arguments))
        return masks[-1]

    monkeypatch.setattr(sparsity, "active_neurons", recorded)
    result = sparsity.report(random_model(), random_ids(count))
    assert list(result.active) == [window for window in WINDOWS if window <= count]
    for window, active in result.active.items():
        for index in range(2):
            mask = torch.cat(masks[index::2])
            expected = [int(mask[p : p + window].any(0).sum()) for p in range(count - window + 1)]
            assert active[index].tolist() == expected, (window, index)


def test_savings_count_the_bytes_of_a_real_model() -> None:
    model = random_model(torch.bfloat16)
    result = sparsity.report(model, random_ids(30))
    embedding = model.model.embed_tokens.weight.numel()
    assert result.step_bytes == 2 * (model.num_parameters() - embedding)
    row_bytes = 2 * model.config.hidden_size  # of one neuron
    assert result.down_bytes == 2 * model.config.intermediate_size * row_bytes
    assert [saving.window for saving in result.savings] == list(WINDOWS)
    for saving in result.savings:
        read = row_bytes * result.active[saving.window].sum(0).double().mean().item()
        assert saving.down_bytes == pytest.approx(read)
        assert saving.zeros == pytest.approx(1 - read / result.down_bytes)
        assert saving.step_bytes == pytest.approx(result.step_bytes - result.down_bytes + read)
        assert saving.speed_up_bound == pytest.approx(result.step_bytes / saving.step_bytes)
    bounds = [saving.speed_up_bound for saving in result.savings]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[-1] >= 1


def test_text_backbone_and_ids_agree_and_no_hook_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PersimmonForCausalLM.from_pretrained(SMALL_MODEL)
    tokenizer = PersimmonTokenizer.from_pretrained(SMALL_MODEL)
    text = "def read_config(path):\n    return open(path).read()\n"
    ids = tokenizer.encode(text)
    expected = sparsity.report(model, text, tokenizer)
    assert expected.num_positions == len(ids)
    for other in (ids, torch.tensor([ids], dtype=torch.int32)):
        assert torch.equal(sparsity.report(model.model, other).active[4], expected.active[4])

    def broken(*_: object, **__: object) -> Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(ops, "squared_relu_mlp", broken)
    with pytest.raises(RuntimeError, match="broken"):
        sparsity.report(model, ids)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ("text", ValueError, "tokenizer must be given with a text, got None"),
        ([], ValueError, "text_or_ids must hold at least one token, got none"),
        ([3, 160], ValueError, "text_or_ids must lie in 0 .. 159, got 160"),
        ([3, -1], ValueError, "text_or_ids must lie in 0 .. 159, got -1"),
        ([1.5], TypeError, "text_or_ids must be a str or integers, got torch.float32"),
        (None, TypeError, "text_or_ids must be a str or integers, got NoneType"),
        (torch.ones(2, 3, dtype=torch.int64), ValueError, r"text_or_ids must be \[num_positions\] .* got \[2, 3\]"),
        ([3] * 5000, ValueError, r"text_or_ids must fit into the model's \d+ positions, got 5000 tokens"),
    ],
)
def test_wrong_arguments_are_named(ids: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="sparsity.report: " + message):
        sparsity.report(random_model(), ids)  # type: ignore[arg-type]


def test_wrong_models_are_named() -> None:
    with pytest.raises(TypeError, match="model must be PersimmonForCausalLM or PersimmonModel, got Linear"):
        sparsity.report(torch.nn.Linear(2, 2), [3])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must be in float32, float16, bfloat16, got float64"):
        sparsity.report(random_model(torch.float64), [3])
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        sparsity.report(PersimmonForCausalLM(tiny_config(hidden_dropout=0.1)), [3])


# ---- picture ----


def test_figure_shows_layers_by_positions() -> None:
    pytest.importorskip("matplotlib")
    result = sparsity.report(random_model(), random_ids(20))
    drawing = sparsity.figure(result, "tiny")
    axes = drawing.axes[0]
    shown = torch.as_tensor(axes.images[0].get_array().data)
    assert torch.allclose(shown, result.zeros)
    assert axes.get_title(loc="left").startswith("tiny: ")


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    result = sparsity.report(random_model(), [3, 4])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*pip install 'persimmon_fast\[plot\]'"):
        sparsity.plot(result, "unused.png")


# ---- command line ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_command_prints_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "import os\nprint(os.name, 'é')\n"
    file = tmp_path / "text.py"
    file.write_text(text, encoding="utf-8")
    assert run("sparsity", file, "--model", folder, "--device", "cpu", "--json") == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert captured.err == ""
    assert captured.out.count("\n") == 1
    result = sparsity.report(PersimmonForCausalLM.from_pretrained(folder), facts["token_ids"])
    assert facts["token_ids"] == PersimmonTokenizer.from_pretrained(folder).encode(text)
    assert facts["active_neurons"] == result.active[1].tolist()
    assert facts["zeros_by_layer"] == result.zeros.mean(1).tolist()
    assert (facts["dtype"], facts["neurons_per_layer"]) == (result.dtype, 128)
    assert facts["text"] == f"{len(facts['token_ids'])} tokens of {file}"
    assert [saving["step_bytes"] for saving in facts["savings"]] == [saving.step_bytes for saving in result.savings]


def test_command_prints_tables_of_the_default_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped model, and the text that it did not see in training; cut to the model's positions."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sparsity, "_CHUNK_POSITIONS", 256)
    picture = tmp_path / "zeros.png"
    assert run("sparsity", "--device", "cpu", "--plot", picture) == 0
    shown = capsys.readouterr().out
    for part in ("persimmon-small", "bfloat16", "the first 1,024 of", "plistlib.py", "layer 3", "16 positions"):
        assert part in shown
    assert max(map(len, shown.splitlines()[1:])) <= 80
    zeros = {line.split("  ")[0]: line.split()[2] for line in shown.splitlines() if line.startswith("layer")}
    assert list(zeros) == [f"layer {index}" for index in range(4)]
    for value, published in zip(zeros.values(), (72.6, 93.8, 91.2, 88.3), strict=True):  # on all held-out text
        assert float(value.rstrip("%")) == pytest.approx(published, abs=4)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_refuses_what_it_cannot_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(status: int, *arguments: object) -> str:
        assert run("sparsity", "--model", folder, "--device", "cpu", *arguments) == status
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    binary = tmp_path / "binary"
    binary.write_bytes(b"ab\xff")
    assert "not UTF-8 text, byte 2 is 0xff" in error(1, binary)
    assert "No such file" in error(1, tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.touch()
    assert "empty is empty: give some text" in error(2, empty).replace("\n", "")
    pytest.importorskip("matplotlib")
    assert "--plot must name a file in a folder that exists" in error(2, "--plot", tmp_path / "absent" / "p.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--plot needs matplotlib: pip install 'persimmon_fast[plot]'" in error(2, "--plot", tmp_path / "p.png")


def test_command_reads_stdin(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x = 1\n")))
    assert run("sparsity", "-", "--model", folder, "--device", "cpu", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["text"].endswith("of stdin")
    assert facts["token_ids"] == PersimmonTokenizer.from_pretrained(folder).encode("x = 1\n")
