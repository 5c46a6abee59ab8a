"""Drives CMake for the extension module; all other metadata is in pyproject.toml.

Environment: MAX_JOBS (parallel compilations), CMAKE_ARGS, CMAKE_BUILD_TYPE, CXX, PERSIMMON_CUDA (AUTO, ON, OFF,
KERNELS), TORCH_CUDA_ARCH_LIST, PERSIMMON_BUILD_DIR. ccache and sccache are used when they are on PATH.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
import persimmon_toolchain as toolchain  # noqa: E402


def build_folder(torch: toolchain.Torch, cxx: str) -> Path:
    """The build tree for this Python and torch, kept between commands so that rebuilds are incremental.

    torch is reached through the link `torch` inside it, so that moving from pip's temporary build environment to the
    installed torch recompiles nothing. A tree that was made for another checkout, torch or compiler is emptied.
    """
    default = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch.version}"
    folder = Path(os.environ.get("PERSIMMON_BUILD_DIR") or default).resolve()
    made_for = "\n".join([str(ROOT), torch.version, torch.git, cxx, sysconfig.get_path("include")])
    stamp = folder / "made_for.txt"
    if stamp.exists() and stamp.read_text() != made_for:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stamp.write_text(made_for)
    link = folder / "torch"
    link.unlink(missing_ok=True)
    link.symlink_to(torch.directory)
    return folder


class CMakeBuild(build_ext):
    def run(self) -> None:
        super().run()
        print(toolchain.build_summary, flush=True)

    def build_extension(self, ext: Extension) -> None:
        torch = toolchain.find_torch()
        if torch is None:
            toolchain.fail("torch is not installed here", f"pip install '{toolchain.TORCH_RANGE}'")
        toolchain.check_python_headers()
        cxx, cmake, ninja = toolchain.find_cxx(), toolchain.find_cmake(), toolchain.find_tool("ninja")
        cuda = toolchain.find_cuda(torch)
        folder = build_folder(torch, cxx)
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "Python_EXECUTABLE": sys.executable,
            "PERSIMMON_VERSION": self.distribution.get_version(),
            "TORCH_DIR": folder / "torch",
            "TORCH_VERSION": torch.version,
            "PERSIMMON_CUDA": cuda.mode,
            "PERSIMMON_CUDA_REASON": cuda.reason,
            "CMAKE_CUDA_ARCHITECTURES": ";".join(cuda.architectures),
        }
        if launcher := shutil.which("sccache") or shutil.which("ccache"):
            options |= {f"CMAKE_{language}_COMPILER_LAUNCHER": launcher for language in ("CXX", "CUDA")}
        if ninja:
            options |= {"CMAKE_GENERATOR": "Ninja", "CMAKE_MAKE_PROGRAM": ninja}
        arguments = [f"-D{name}={value}" for name, value in options.items()]
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        environment = os.environ | {"CXX": cxx, "CUDACXX": cuda.nvcc}
        environment.setdefault("CUDAHOSTCXX", shutil.which(shlex.split(cxx)[0]) or cxx)
        environment.setdefault("CCACHE_BASEDIR", str(ROOT))  # one cache for all checkouts

        def run(*command: object) -> None:
            try:
                subprocess.run([cmake, *map(str, command)], env=environment, check=True)
            except subprocess.CalledProcessError:
                toolchain.fail(
                    f"`cmake {command[0]}` failed, its messages are above",
                    "see the first error; a compiler that was killed ran out of memory: set MAX_JOBS=1",
                )

        run("-S", ROOT, "-B", folder, *arguments)
        run("--build", folder, "--parallel", jobs)
        run("--install", folder, "--prefix", Path(self.get_ext_fullpath(ext.name)).resolve().parent)
        toolchain.build_summary = (folder / "summary.txt").read_text()


def requirements() -> list[str]:
    """The extension loads only into the torch that it was built for, so the wheel asks for exactly that one."""
    torch = toolchain.find_torch()
    return [
        f"torch=={torch.release}" if torch else toolchain.TORCH_RANGE,
        "numpy",
        "sentencepiece",
        "safetensors",
        "tqdm",
        "typer",
    ]


setup(
    install_requires=requirements(),
    ext_modules=[Extension("persimmon_fast._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
