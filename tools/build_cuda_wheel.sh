#!/usr/bin/env bash
# A wheel with CUDA kernels for a machine that has no compiler or no time: needs nvcc, no GPU.
#
#   tools/build_cuda_wheel.sh PYTHON TORCH OUT
#
# PYTHON: the interpreter of the version that will load the wheel, with pip; TORCH: the version of torch there, such as
# 2.11.0; OUT: the folder that receives the wheel. Example: tools/build_cuda_wheel.sh python3.12 2.11.0 dist
set -euo pipefail

[ $# -eq 3 ] || { sed -n '2,7p' "$0"; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(mkdir -p "$3" && cd "$3" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$1" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip -q --disable-pip-version-check)
"${pip[@]}" install --no-deps "torch==$2" # without the CUDA libraries: nothing is run
"${pip[@]}" install "setuptools>=77,<82" cmake ninja wheel
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-8.0;9.0a+PTX} PERSIMMON_CUDA=ON PERSIMMON_BUILD_DIR=$work/build \
  "${pip[@]}" wheel --no-deps --no-build-isolation -w "$out" "$root"
ls "$out"/*.whl
