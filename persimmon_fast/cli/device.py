"""Which device a command runs on, and why it is not CUDA where it is not."""

from __future__ import annotations

import re

import torch

from persimmon_fast.cli.terminal import UsageError
from persimmon_fast.extension import _C

_MIN_CAPABILITY = (8, 0)  # Ampere, the first generation with bfloat16 products and asynchronous copies


def choose_device(name: str) -> str:
    """The device that --device names.

    Args:
        name: "auto", "cpu", "cuda" (the first one) or "cuda:N".
    Returns:
        "cpu" or "cuda:N". "auto" is cuda:0 where the CUDA kernels run on it, else "cpu".
    Raises:
        UsageError: they do not run on the device named; says why, and what to do.
    """
    if name == "cpu":
        return name
    index = int(name.partition(":")[2] or 0)
    problem = cuda_problem(index)
    if problem is None:
        return f"cuda:{index}"
    if name == "auto":
        return "cpu"
    raise UsageError(f"--device {name}: {problem}, or use --device cpu")


def cuda_problem(index: int = 0) -> str | None:
    """Why the CUDA kernels do not run on device `index`, and what to do; None where they do."""
    if not torch.cuda.is_available():
        if not torch.backends.cuda.is_built():
            return (
                f"torch {torch.__version__} is a CPU build, which sees no GPU: install a CUDA build of torch, then "
                "persimmon_fast again"
            )
        return "torch finds no CUDA device: see what nvidia-smi says and what CUDA_VISIBLE_DEVICES hides"
    if not _C.cuda_archs:
        reason = _C.cuda_summary.removeprefix("none ")
        return (
            f"persimmon_fast was built without CUDA kernels {reason}: install it again beside nvcc and a CUDA build of "
            "torch"
        )
    count = torch.cuda.device_count()
    if index >= count:
        return f"torch finds {count} CUDA device{'s' * (count != 1)}: use one up to cuda:{count - 1}"
    capability = torch.cuda.get_device_capability(index)
    shown = "{}.{}".format(*capability)
    device = f"cuda:{index} ({torch.cuda.get_device_name(index)}) has compute capability {shown}"
    if capability < _MIN_CAPABILITY:
        return f"{device}, the kernels need {'{}.{}'.format(*_MIN_CAPABILITY)}: use a newer GPU"
    if not _has_kernels_for(capability):
        return (
            f"{device}, the kernels were built for {_C.cuda_archs}: install persimmon_fast again with "
            f"TORCH_CUDA_ARCH_LIST={shown}"
        )
    return None


def _has_kernels_for(capability: tuple[int, int]) -> bool:
    """Whether a GPU runs one of the architectures in `_C.cuda_archs`: "80-real" runs on 8.0 and later 8.x, "90a-real"
    on 9.0 alone, and "90-virtual" (PTX) on 9.0 and everything newer."""
    for major, minor, exact, kind in re.findall(r"(\d+)(\d)(a?)f?-(real|virtual)", _C.cuda_archs):
        built_for = (int(major), int(minor))
        if exact:
            runs = capability == built_for
        else:
            runs = capability >= built_for and (kind == "virtual" or capability[0] == built_for[0])
        if runs:
            return True
    return False
