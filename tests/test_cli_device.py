"""--device: which device a command runs on, what it says where CUDA cannot be used, and how a GPU is timed.

Machines without a GPU pretend to have some: `gpus` answers in torch's place. A model "on" such a GPU stays on the CPU.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import PROMPT, generated, run, tiny_model
from helpers import CUDA, DTYPES, EMU, backend

from persimmon_fast import _C, SMALL_MODEL, PersimmonForCausalLM, measure
from persimmon_fast.cli import doctor, selfcheck, session, terminal
from persimmon_fast.cli.device import choose_device
from persimmon_fast.decode_step import DecodeStep

DEFAULT_ARCHS = "80-real, 90a-real, 90-virtual"
Pretend = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("cli") / "tiny-model")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """gpus((8, 0), ...): torch finds GPUs of these compute capabilities; the build has the kernels of `archs`."""

    def index(device: torch.device | int) -> int:
        return device if isinstance(device, int) else device.index

    def pretend(*capabilities: tuple[int, int], archs: str = DEFAULT_ARCHS, torch_has_cuda: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[index(device)])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {index(device)}")
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: torch_has_cuda)
        monkeypatch.setattr(_C, "cuda_archs", archs)
        monkeypatch.setattr(_C, "cuda_summary", f"{archs} (nvcc 13.0)" if archs else "none (nvcc was not found)")

    return pretend


# ---- which device ----


@pytest.mark.parametrize(
    ("archs", "runs_on", "not_on"),
    [
        (DEFAULT_ARCHS, [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 0), (7, 5)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90a-real", [(9, 0)], [(8, 9), (10, 0)]),
        ("100a-real", [(10, 0)], [(10, 3)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("80-real, 80-virtual", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("", [], [(8, 0), (9, 0)]),
    ],
)
def test_auto_takes_cuda_where_the_kernels_run(
    gpus: Pretend, archs: str, runs_on: list[tuple[int, int]], not_on: list[tuple[int, int]]
) -> None:
    for capability in runs_on:
        gpus(capability, archs=archs)
        assert choose_device("auto") == choose_device("cuda") == "cuda:0", capability
        assert choose_device("cpu") == "cpu"
    for capability in not_on:
        gpus(capability, archs=archs)
        assert choose_device("auto") == "cpu", capability
        with pytest.raises(terminal.UsageError):
            choose_device("cuda")


def test_auto_is_the_cpu_without_a_gpu_and_numbers_choose_one_of_several(gpus: Pretend) -> None:
    gpus()
    assert choose_device("auto") == "cpu"
    gpus((7, 5), (9, 0))
    assert choose_device("auto") == "cpu"
    assert choose_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize("command", ["generate x", "chat"])
@pytest.mark.parametrize("name", ["tpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cuda0", ""])
def test_unknown_names(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command.split(), "--device", name) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: --device must be auto, cpu, cuda or cuda:N, got {name}".rstrip() + "\n"


PROBLEMS = [  # GPUs, what there is beside them, --device, what the error says
    ((), {"torch_has_cuda": False}, "cuda", ["is a CPU build", "install a CUDA build of torch, then persimmon_fast"]),
    ((), {}, "cuda", ["torch finds no CUDA device", "nvidia-smi", "CUDA_VISIBLE_DEVICES"]),
    (((9, 0),), {"archs": ""}, "cuda", ["without CUDA kernels (nvcc was not found)", "install it again beside nvcc"]),
    (((9, 0),), {}, "cuda:1", ["torch finds 1 CUDA device: use one up to cuda:0"]),
    (((9, 0), (9, 0)), {}, "cuda:7", ["torch finds 2 CUDA devices: use one up to cuda:1"]),
    (((9, 0), (7, 5)), {}, "cuda:1", ["cuda:1 (GPU 1) has compute capability 7.5, the kernels need 8.0"]),
    (((8, 0),), {"archs": "86-real"}, "cuda:0", ["capability 8.0", "built for 86-real", "TORCH_CUDA_ARCH_LIST=8.0"]),
]


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(("capabilities", "rest", "name", "parts"), PROBLEMS)
def test_unusable_devices_say_what_to_do(
    gpus: Pretend,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    capabilities: tuple[tuple[int, int], ...],
    rest: dict[str, Any],
    name: str,
    parts: list[str],
) -> None:
    gpus(*capabilities, **rest)
    assert run(command, "-m", folder, "--device", name, *(["x"] if command == "generate" else [])) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: --device {name}: ")
    assert captured.err.endswith(", or use --device cpu\n")
    assert captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err


# ---- what runs there ----


@pytest.fixture
def pretended_gpu(gpus: Pretend, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two H100; a model that goes there stays on the CPU. Returns the devices that models were loaded to."""
    loaded: list[torch.device] = []
    load = PersimmonForCausalLM.from_pretrained

    def from_pretrained(folder: Path, *, device: torch.device, **rest: Any) -> PersimmonForCausalLM:
        loaded.append(device)
        return load(folder, **rest)

    gpus((9, 0), (9, 0))
    monkeypatch.setattr(PersimmonForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12_345_678 + device.index)
    return loaded


def test_json_names_the_device(
    folder: Path, pretended_gpu: list[torch.device], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    set_threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_threads.append)
    on_cpu = generated(folder, capsys, PROMPT, "-n", 2, "--device", "cpu")
    assert (on_cpu["device"], on_cpu["peak_device_memory_bytes"]) == ("cpu", None)
    assert 1 in set_threads  # a tiny model
    set_threads.clear()
    on_gpu = generated(folder, capsys, PROMPT, "-n", 2, "--device", "cuda:1")
    assert (on_gpu["device"], on_gpu["peak_device_memory_bytes"]) == ("cuda:1", 12_345_679)
    assert on_gpu["peak_memory_bytes"] > 50e6  # of the process, as on the CPU
    assert 1 not in set_threads  # nothing that a GPU's model needs to decide
    assert generated(folder, capsys, PROMPT, "-n", 2, "--device", "auto")["device"] == "cuda:0"
    assert pretended_gpu == [torch.device(name) for name in ("cpu", "cuda:1", "cuda:0")]
    generated(folder, capsys, PROMPT, "-n", 2, "--device", "cuda", "--threads", 3)
    assert 3 in set_threads


def test_header_and_figures_name_the_device(
    folder: Path, pretended_gpu: list[torch.device], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def shown_by(*arguments: object) -> str:
        assert run(*arguments, "-m", folder) == 0
        return " ".join(capsys.readouterr().err.split())  # without line ends

    shown = shown_by("generate", PROMPT, "-n", 3, "--device", "cuda:1")
    assert ", float32, cuda:1 (GPU 1), loaded in" in shown
    assert "peak 12 MB on cuda:1," in shown
    assert "thread" not in shown
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert ", float32, cuda:1 (GPU 1), loaded in" in shown_by("chat", "--device", "cuda:1")
    shown = shown_by("generate", PROMPT, "-n", 3, "--device", "cpu")
    assert ", float32, cpu, 1 thread, loaded in" in shown
    assert "cuda" not in shown


def test_a_gpu_is_waited_for_before_a_time_is_taken(
    folder: Path, pretended_gpu: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was queued before the prompt belongs to loading or to nothing: neither to the prefill nor to the decode."""
    clock, waited = [0.0], []

    def synchronize(device: torch.device) -> None:
        waited.append(device)
        clock[0] += 1000.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(session.time, "perf_counter", lambda: clock[0])
    opened = session.Session(session.Options(model=folder, device="cuda:1", quiet=True, max_new_tokens=3))
    assert opened.load_seconds == 1000.0
    assert len(waited) == 1
    steps = iter([1.0, 10.0, 100.0])
    forward_batch, run = opened.model.model.forward_batch, DecodeStep.run

    def timed_forward(*arguments: Any, **settings: Any) -> Any:
        clock[0] += next(steps)
        return forward_batch(*arguments, **settings)

    def timed_run(step: DecodeStep) -> None:
        clock[0] += next(steps)
        run(step)

    monkeypatch.setattr(opened.model.model, "forward_batch", timed_forward)
    monkeypatch.setattr(DecodeStep, "run", timed_run)
    result = opened.generate(opened.encode("x"), lambda text: None)
    assert waited == [torch.device("cuda:1")] * 2
    assert (result.prefill_seconds, result.decode_seconds) == (1.0, 110.0)


def test_a_model_that_a_gpu_cannot_hold_says_what_to_do(
    folder: Path, gpus: Pretend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def from_pretrained(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
            "30.00 MiB is free. Of the allocated memory 78.00 GiB is allocated by PyTorch."
        )

    gpus((9, 0))
    monkeypatch.setattr(PersimmonForCausalLM, "from_pretrained", from_pretrained)
    assert run("generate", "-m", folder, "x", "--device", "cuda") == 1
    assert capsys.readouterr().err == (
        "error: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 30.00 "
        "MiB is free: --device cpu runs it in the machine's memory\n"
    )


# ---- doctor ----


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_READ_BYTES", 2**24)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("capabilities", "archs", "device", "auto"),
    [
        ([], DEFAULT_ARCHS, "no device", "cpu, since torch finds no CUDA device"),
        ([(9, 0)], "", "GPU 0", "cpu, since persimmon_fast was built without CUDA kernels (nvcc was not found)"),
        (
            [(7, 5)],
            DEFAULT_ARCHS,
            "GPU 0",
            "cpu, since cuda:0 (GPU 0) has compute capability 7.5, the",
        ),
        ([(9, 0)], DEFAULT_ARCHS, "GPU 0", "cuda:0"),
    ],
)
def test_doctor_says_why_cuda_is_not_used(
    gpus: Pretend, capabilities: list[tuple[int, int]], archs: str, device: str, auto: str
) -> None:
    gpus(*capabilities, archs=archs)
    facts = doctor.runtime_facts()
    assert facts["CUDA device"] == device
    assert facts["--device auto"].startswith(auto)
    assert ("since" in facts["--device auto"]) == (choose_device("auto") == "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine whose GPU is only pretended")
@pytest.mark.usefixtures("quick")
def test_doctor_checks_the_ops_on_both_devices(gpus: Pretend, capsys: pytest.CaptureFixture[str]) -> None:
    """A pretended GPU takes no tensor, so every check on it fails, and none on the CPU."""
    gpus((9, 0))
    assert run("doctor", "--json") == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    verdicts = {(check["device"], check["ok"]) for check in checks}
    assert verdicts == {("cpu", True), ("cuda:0", False)}
    assert len(checks) == 2 * len(DTYPES) * len(selfcheck.registered_ops())
    assert run("doctor") == 1
    shown = capsys.readouterr().out
    on_cpu, _, on_gpu = shown.partition("Ops on cpu against their reference")[2].partition(
        "Ops on cuda:0 against their reference"
    )
    assert (on_cpu.count("ok "), on_cpu.count("FAILED")) == (39, 0)
    assert (on_gpu.count("ok "), on_gpu.count("FAILED")) == (0, 39)
    assert "layer_norm in float32, float16, bfloat16 on cuda:0: " in shown
    assert "39 of 78 checks of 13 ops failed" in shown


def test_doctor_names_an_op_without_a_kernel_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch to a backend without a kernel: "meta" stands for it, which an op of this test lacks."""
    library = torch.library.Library("persimmon_fast", "FRAGMENT")
    library.define("cpu_only(Tensor x) -> Tensor")
    library.impl("cpu_only", torch.clone, "CPU")
    case = selfcheck._Case(lambda dtype: (torch.ones(2, dtype=dtype),), torch.clone)
    monkeypatch.setitem(selfcheck._CASES, "cpu_only", case)
    try:
        assert selfcheck.check("cpu_only", torch.float32, "cpu").ok
        assert selfcheck.check("cpu_only", torch.float32, "meta").detail == "this build has no META kernel for it"
    finally:
        library._destroy()


@pytest.mark.parametrize("name", [EMU])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cuda_kernels_take_the_inputs_of_doctor(name: str, dtype: torch.dtype) -> None:
    """On a GPU doctor gives them to the CUDA kernels; here the emulated ones get the same."""
    with backend(name) as device:
        for op in selfcheck.registered_ops():
            error, bound = selfcheck.compare(op, getattr(torch.ops.persimmon_fast_emu, op), dtype, device)
            assert error <= bound, op


# ---- on a GPU ----


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("device", [CUDA])
def test_doctor_finds_every_op_well_on_a_gpu(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json") == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {check["device"] for check in checks} == {"cpu", "cuda:0"}
    assert [check for check in checks if not check["ok"]] == []


@pytest.mark.parametrize("device", [CUDA])
def test_a_gpu_continues_a_text_as_the_cpu_does(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (PROMPT, "--greedy", "--dtype", "float32", "-n", 16)
    expected = generated(SMALL_MODEL, capsys, *arguments, "--device", "cpu")
    actual = generated(SMALL_MODEL, capsys, *arguments, "--device", device)
    assert actual["device"] == "cuda:0"
    assert actual["token_ids"] == expected["token_ids"]
    assert actual["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-3)
    assert actual["peak_device_memory_bytes"] > 4 * 5.2e6  # the parameters
    timings = actual["timings"]
    assert timings["prefill_seconds"] > 0
    assert timings["decode_seconds"] > 0
