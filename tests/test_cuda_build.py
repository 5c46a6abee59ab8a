"""The CUDA sources, where nvcc is found: they compile for every architecture without spills or local memory, use the
tensor cores, and link against a CUDA torch. Needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import persimmon_toolchain as toolchain
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = "8.0;8.6;8.9;9.0a+PTX"
KNOWN = {"80", "86", "89", "90"}
# Kernels on the tensor cores in 16-bit types, as their mangled names have them; qkv_norm_rope, squared_relu_mlp,
# linear_residual and lm_head are epilogues of gemm_kernel and stream_kernel.
TENSOR_CORE_KERNELS = (
    "gemm_kernelI", "stream_kernelI", "squared_relu_down_kernelI", "flash_attention_kernelI", "paged_attention_kernelI",
)  # fmt: skip

# On wgmma and TMA; elsewhere empty. Their registers are what setmaxnreg expects: 65,536 / 384 or 512 threads.
SM90A_KERNELS = {"gemm_sm90_kernelI": {168}, "flash_attention_sm90_kernelI": {128, 168}}


def cmake_build(folder: Path, target: str, torch_directory: Path, mode: str) -> str:
    """Configures in `folder`, builds one target for all architectures, returns what the tools printed."""
    cmake = shutil.which("cmake")
    if cmake is None or toolchain.cmake_version(cmake) < toolchain.CMAKE_FIRST:
        pytest.skip("cmake >= 3.25 is not on PATH")
    nvcc = toolchain.find_nvcc()
    if nvcc is None or toolchain.nvcc_version(nvcc) < toolchain.NVCC_FIRST:
        pytest.skip("nvcc >= 12.0 was not found")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_ARCHITECTURES": ";".join(toolchain.cuda_architectures(ARCHITECTURES, KNOWN)),
        "PERSIMMON_CUDA": mode,
        "Python_EXECUTABLE": sys.executable,
        "TORCH_DIR": torch_directory,
    }
    if launcher := shutil.which("ccache"):
        options |= {"CMAKE_CXX_COMPILER_LAUNCHER": launcher, "CMAKE_CUDA_COMPILER_LAUNCHER": launcher}
    configure = [cmake, "-S", ROOT, "-B", folder, *(f"-D{name}={value}" for name, value in options.items())]
    output = ""
    for command in (configure, [cmake, "--build", folder, "--target", target, "--parallel", "2"]):
        env = {**os.environ, "CUDACXX": nvcc, "CCACHE_BASEDIR": str(ROOT), "CCACHE_NOHASHDIR": "1"}
        result = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        output += result.stdout
        assert result.returncode == 0, output
    return output


class Kernel(NamedTuple):
    """What ptxas says of one kernel on one architecture."""

    architecture: str
    name: str  # mangled
    stack_bytes: int
    spill_bytes: int
    registers: int


def ptxas_report(output: str) -> list[Kernel]:
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    return [
        Kernel(arch, name, int(stack), int(stores) + int(loads), int(registers))
        for name, arch, stack, stores, loads, registers in pattern.findall(output)
    ]


def find_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: of the toolkit, or of the package nvidia-cuda-<name>."""
    toolkit = os.pathsep.join(str(Path(nvcc).parent) for nvcc in [toolchain.find_nvcc()] if nvcc)
    if path := shutil.which(name) or shutil.which(name, path=toolkit):
        return path
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place, cuda, "bin") for place in (spec.submodule_search_locations or [] if spec else [])
               for cuda in ("cu13", "cuda_cuobjdump", "cuda_nvdisasm")]  # fmt: skip
    return shutil.which(name, path=os.pathsep.join(map(str, folders)))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[str, Path]:
    """Output of the build, and the folder with the linked kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    return cmake_build(folder, "pf_cuda_check", Path(torch.__file__).parent, "KERNELS"), folder


def test_no_spills_and_no_local_memory(built):
    kernels = ptxas_report(built[0])
    assert {kernel.architecture for kernel in kernels} == {"sm_80", "sm_86", "sm_89", "sm_90a"}
    assert [kernel for kernel in kernels if kernel.spill_bytes] == []
    assert [kernel for kernel in kernels if kernel.stack_bytes] == []


def disassemble(folder: Path, architecture: str) -> dict[str, str]:
    """Machine code of each kernel, by its mangled name."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        pytest.skip("cuobjdump and nvdisasm were not found (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    library = next(folder.glob("libpf_cuda_check.so"))
    env = {**os.environ, "PATH": str(Path(nvdisasm).parent) + os.pathsep + os.environ["PATH"]}
    sass = subprocess.check_output([cuobjdump, "-sass", "-arch", architecture, library], text=True, env=env)
    return dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\t*Function :|\Z)", sass, re.DOTALL))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90a"])
def test_products_use_the_tensor_cores(built, architecture):
    """HMMA in every 16-bit kernel that multiplies matrices, and in no fp32 one: TF32 would round."""
    functions = disassemble(built[1], architecture)
    products = {part: {name for name in functions if part in name} for part in TENSOR_CORE_KERNELS}
    assert all(products.values()), (products, sorted(functions))
    names = set().union(*products.values())
    sixteen_bit = {name for name in names if "__half" in name or "__nv_bfloat16" in name}
    with_mma = {name for name, code in functions.items() if "HMMA" in code}
    assert sixteen_bit - with_mma == set()
    assert with_mma - sixteen_bit == set()


def test_kernels_for_sm_90a_use_wgmma_and_tma(built):
    """HGMMA and UTMALDG in each of them, no mma of older GPUs."""
    functions = disassemble(built[1], "sm_90a")
    for part in SM90A_KERNELS:
        kernels = {name: code for name, code in functions.items() if part in name}
        assert kernels, part
        for name, code in kernels.items():
            assert {"HGMMA", "UTMALDG", "USETMAXREG", "SYNCS"} <= set(re.findall(r"[A-Z]+", code)), name
            assert "HMMA" not in re.findall(r"[A-Z]+", code), name
    report = [kernel for kernel in ptxas_report(built[0]) if kernel.architecture == "sm_90a"]
    for part, registers in SM90A_KERNELS.items():
        assert {kernel.registers for kernel in report if part in kernel.name} == registers


def test_wgmma_runs_asynchronously(built):
    """Where ptxas cannot follow the registers of a wgmma in flight it serialises, and says so (C7508 and its kin)."""
    assert "Compiling entry function" in built[0]
    assert re.findall(r".*(?:C75\d\d|serializ).*", built[0]) == []


def test_newer_gpus_get_ptx(built):
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump was not found (pip install nvidia-cuda-cuobjdump)")
    library = next(built[1].glob("libpf_cuda_check.so"))
    listed = subprocess.check_output([cuobjdump, "--list-ptx", library], text=True)
    assert "sm_90.ptx" in listed


def test_no_sum_is_contracted(built):
    """Without .rn the assembler may make one FMA of a product and a sum: other bits than those the emulator tests."""
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump was not found (pip install nvidia-cuda-cuobjdump)")
    ptx = subprocess.check_output([cuobjdump, "-ptx", next(built[1].glob("libpf_cuda_check.so"))], text=True)
    forms = set(re.findall(r"\b(?:add|sub|mul)(?:\.\w+)*\.f(?:32|64)\b", ptx))
    assert {form for form in forms if ".rn" not in form} == set()
    assert {"add.rn.f32", "mul.rn.f32", "add.rn.f64", "mul.rn.f64"} <= forms  # the pattern finds them


def test_cuda_ops_link_against_a_cuda_torch(tmp_path):
    """PERSIMMON_TEST_CUDA_TORCH names the folder `torch` of a CUDA build of torch (no GPU is needed to link)."""
    directory = os.environ.get("PERSIMMON_TEST_CUDA_TORCH")
    if not directory:
        pytest.skip("PERSIMMON_TEST_CUDA_TORCH names no CUDA build of torch")
    cmake_build(tmp_path, "_C", Path(directory), "ON")
    wanted = {symbol for symbol in symbols(next(tmp_path.glob("_C*.so")), "--undefined-only") if "3c10" in symbol}
    assert any("4cuda20getCurrentCUDAStream" in symbol for symbol in wanted)  # the CUDA ops are in
    provided = set()
    for library in ("libc10.so", "libc10_cuda.so", "libtorch_cpu.so", "libtorch_cuda.so", "libtorch_python.so"):
        provided |= symbols(Path(directory) / "lib" / library, "--defined-only")
    assert not wanted - provided


def symbols(library: Path, which: str) -> set[str]:
    """Mangled names in the dynamic symbol table."""
    lines = subprocess.check_output(["nm", "-D", which, library], text=True).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}
