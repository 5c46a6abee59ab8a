"""What the op tests share: the numerics contract, inputs, backends.

The contract: a kernel's largest error against the fp32 reference is at most twice that of plain torch computing the
same formula in the tested dtype, plus a floor per dtype (one table, below) for results where torch happens to be exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import emulator
import pytest
import torch
from torch import Tensor

from persimmon_fast import _C, ops
from persimmon_fast.config import PersimmonConfig

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative to the largest magnitude in the expected tensor: about two roundings of the dtype.
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_LEVELS = ["scalar", "avx2", "avx512", "avx512_bf16", "amx"]
ISAS = _LEVELS[: _LEVELS.index(_C.best_cpu_isa()) + 1]

# The CUDA kernels, executed on the CPU. Emulation is slow: tests of "emu" take small shapes.
_EMU_MARKS = [
    pytest.mark.emu,
    pytest.mark.skipif(emulator.missing() is not None, reason=f"no emulator: {emulator.missing()}"),
]
EMU = pytest.param("emu", marks=_EMU_MARKS)
# The same as an H100 runs them: on wgmma and TMA where there is such a kernel.
EMU_SM90 = pytest.param("emu_sm90", marks=_EMU_MARKS)
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(
            not (torch.cuda.is_available() and _C.cuda_archs),
            reason="needs a CUDA device and a build with CUDA kernels",
        ),
    ],
)
# Every instruction set, the CUDA kernels emulated and on a GPU. Tests that take a backend run
# `with backend(name) as device`.
BACKENDS = [*ISAS, EMU, CUDA]


@contextmanager
def backend(name: str) -> Iterator[str]:
    """Inside the block the kernels of `name` (one of BACKENDS) run for tensors on the device that it gives."""
    if name == "cuda":
        yield "cuda"
    elif name in ("emu", "emu_sm90"):
        with emulated(architecture=90 if name == "emu_sm90" else 80):
            yield "cpu"
    else:
        with cpu_isa(name):
            yield "cpu"


@contextmanager
def emulated(architecture: int = 80) -> Iterator[None]:
    """Runs `ops` on CPU tensors with the emulated CUDA kernels inside the block. Outputs start as NaN."""
    emulator.load()
    torch.ops.persimmon_fast_emu.set_architecture(architecture)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    ops._library = "persimmon_fast_emu"
    try:
        yield
    finally:
        ops._library = "persimmon_fast"
        torch.ops.persimmon_fast_emu.set_architecture(80)
        torch.use_deterministic_algorithms(deterministic)


def emulator_counts(run: Callable[[], object]) -> dict[str, int]:
    """What the emulator counts while `run` runs."""
    before = dict(torch.ops.persimmon_fast_emu.stats())
    run()
    return {name: count - before[name] for name, count in torch.ops.persimmon_fast_emu.stats().items()}


@contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Runs the CPU kernels at the instruction set `name` inside the block."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(name)
    try:
        yield
    finally:
        _C.set_cpu_isa(before)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same for the same seed and shape, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def max_error(actual: Tensor, expected: Tensor) -> float:
    return 0.0 if expected.numel() == 0 else float((actual.double() - expected.double()).abs().max())


def assert_within_contract(actual: Tensor, expected: Tensor, plain: Tensor, what: str) -> None:
    """actual: the kernel's result; expected: the reference on the same values in fp32 or fp64; plain: plain torch in
    the dtype of actual, all on one device. Fails with the worst place, its values and both errors."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    assert torch.equal(torch.isfinite(actual), torch.isfinite(expected.to(actual.dtype))), f"{what}: NaN or inf differ"
    bound = 2 * max_error(plain, expected) + FLOOR[actual.dtype] * float(expected.abs().max())
    error = (actual.double() - expected.double()).abs()
    if float(error.max()) > bound:
        worst = int(error.argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
        raise AssertionError(
            f"{what}: error {float(error.max()):.3e} at {index} (got {actual.flatten()[worst].item():.7g}, expected "
            f"{expected.flatten()[worst].item():.7g}) exceeds {bound:.3e} = 2 x torch's "
            f"{max_error(plain, expected):.3e} + floor; dtype {actual.dtype}"
        )


def assert_same_whatever_the_alignment(actual: Tensor, expected: Tensor, what: object = "") -> None:
    """The same bits; on compute capability 9.0, where alignment chooses the kernel, the same but for rounding
    (docs/kernels/gemm_sm90.md)."""
    if actual.is_cuda and torch.cuda.get_device_capability(actual.device) == (9, 0):
        assert max_error(actual, expected) <= FLOOR[actual.dtype] * float(expected.abs().max()), what
    else:
        assert torch.equal(actual, expected), what


def tiny_config(**changes: object) -> PersimmonConfig:
    """A Persimmon of two layers that runs in milliseconds; rotary_dim 8 of head_dim 16."""
    values: dict[str, object] = {
        "vocab_size": 160,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return PersimmonConfig(**(values | changes))


def hf_model(config: PersimmonConfig, seed: int = 0, kind: str = "PersimmonForCausalLM") -> Any:
    """transformers' class of that name in fp32 with every parameter random, biases and LayerNorms included."""
    import transformers

    model = getattr(transformers, kind)(transformers.PersimmonConfig(**config.to_dict())).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm_weight = "layernorm.weight" in name
            parameter.copy_(1 + 0.2 * noise if is_norm_weight else 0.1 * noise)
    return model
