#!/usr/bin/env bash
# Everything that needs a GPU, in one command of about a quarter of an hour.
#
#   tools/check_on_gpu.sh OUT [WHEEL]
#
# OUT receives one log per step, summary.txt, and the JSON and PNG of the benchmarks; OUT/compiled those of a quick run
# beside torch.compile. WHEEL: persimmon_fast built with
# CUDA for this machine's Python and torch (tools/build_cuda_wheel.sh); without one it is built here first. A step that
# fails does not stop the others; the exit status is 1 if any did. Steps and their limits in seconds are at the bottom.
set -uo pipefail

[ $# -ge 1 ] || { sed -n '2,9p' "$0"; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
wheel=${2:+$(realpath "$2")}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$site PYTHONDONTWRITEBYTECODE=1
failed=0
cd "$root" || exit 2

# step NAME LIMIT_S COMMAND...
step() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=1
  printf '%-14s %4d s  exit %d  %s\n' "$name" $((SECONDS - start)) $status "$(tail -n 1 "$out/$name.log")" |
    tee -a "$out/summary.txt"
}

# One of compute-sanitizer's tools over the small tests; the caching allocator would hide out-of-bounds accesses.
sanitizer() {
  step "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    --target-processes all python3 -m pytest -q -x -m "cuda and sanitize" tests
}

: >"$out/summary.txt"
step device 20 nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader
step install 300 python3 -m pip install --no-deps --no-build-isolation --target "$site" "${wheel:-.}"
step versions 60 python3 -c "import torch, persimmon_fast; from persimmon_fast import _C; print(_C.build_summary, torch.version.cuda)"
step tests 240 python3 -m pytest -q -m cuda tests
if command -v compute-sanitizer >/dev/null; then
  sanitizer memcheck 120
  sanitizer racecheck 120
  sanitizer synccheck 90
else
  echo "compute-sanitizer was not found: not run" | tee -a "$out/summary.txt"
fi
step benchmarks 200 python3 benchmarks/run.py --device cuda --seconds 1 --out "$out"
step prefill 400 python3 benchmarks/run.py prefill --device cuda --out "$out"
step compiled 120 python3 benchmarks/run.py --device cuda --quick --compile --out "$out/compiled"
exit $failed
