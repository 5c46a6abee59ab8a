from mutants import Mutant

STREAM = "csrc/cuda/stream.cuh"
INPUT = "csrc/cuda/stream_input.cuh"
SUMS = "csrc/cuda/stream_sums.cuh"


def in_stream(what: str, old: str, new: str, file: str = STREAM) -> Mutant:
    return Mutant(what, old, new, file, kernels=("linear_residual",))


def in_norm(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, old, new, INPUT, tests="test_input_norm.py", kernels=("linear_residual", "qkv_norm_rope"))


MUTANTS = [
    in_stream(
        "the wait allows one group too many", "cp_async_wait<kStreamStages - 1>()", "cp_async_wait<kStreamStages>()"
    ),
    in_stream(
        "no empty groups at the end",
        "      next.advance(warp, num_steps);\n    }\n    ptx::cp_async_commit();",
        "      next.advance(warp, num_steps);\n      ptx::cp_async_commit();\n    }",
    ),
    in_stream(
        "a copy overwrites weights that are in flight",
        "        issue(slot);  //",
        "        issue(slot + 1 == kStreamStages ? 0 : slot + 1);  //",
    ),
    Mutant(  # needs units of several groups
        "partial sums have one buffer",
        "      buffer ^= 1;\n",
        "",
        STREAM,
        tests="test_lm_head.py",
        kernels=("lm_head",),
    ),
    in_stream(
        "no barrier between partial sums and their reader",
        "      __syncthreads();\n      if (static_cast<int>(threadIdx.x) < partial_size)",
        "      if (static_cast<int>(threadIdx.x) < partial_size)",
    ),
    in_stream(
        "no barrier between sums and epilogue",
        "    __syncthreads();\n    if (threadIdx.x < kEpilogueThreads)",
        "    if (threadIdx.x < kEpilogueThreads)",
    ),
    in_stream("no barrier behind the staging of x", "  __syncthreads();\n\n  int slot = 0;", "\n  int slot = 0;"),
    in_stream("nobody waits for the preceding kernel", "  ptx::wait_for_predecessors();\n", ""),
    in_stream(
        "x is read before the preceding kernel is done",
        "  ptx::wait_for_predecessors();\n  if (input.in_shared) input.stage("
        "num_steps * kStepChunks, s_x, reinterpret_cast<float2*>(s_partial));\n",
        "  if (input.in_shared) input.stage(num_steps * kStepChunks, s_x, reinterpret_cast<float2*>(s_partial));\n"
        "  ptx::wait_for_predecessors();\n",
    ),
    in_stream("the tail of k holds neighbours", "row < p.n && column < input.k;", "row < p.n;"),
    in_stream("rows behind the last are read", "row < p.n && column < input.k;", "column < input.k;"),
    in_stream("unaligned rows behind the last are read", "row < p.n ? input.k : 0", "input.k"),
    in_stream("the copies go to the next unit, not to this block's", "(gridDim.x - 1) * kUnit", "(1 - 1) * kUnit"),
    in_stream(
        "the copies pass over the last step", "if (step < num_steps) return;", "if (step + 1 < num_steps) return;"
    ),
    in_stream(
        "the last warp's partial sum is left out", "i < kStreamWarps; ++i) sum", "i < kStreamWarps - 1; ++i) sum"
    ),
    in_stream("sums of the second half in the first", "half * 8 + lane % 4 * 2", "lane % 4 * 2", SUMS),
    in_stream("registers of two mma exchanged", "mma(sums[half], second, b[1]", "mma(sums[half], second, b[0]", SUMS),
    in_stream("fp32: half of the lanes' sums", "sum_lanes<4>", "sum_lanes<2>", SUMS),
    in_stream("unaligned: the tail of x holds neighbours", "if (column + i < size)", "if (column < size)", INPUT),
    in_stream("the tail of x holds neighbours", "if (column < size) bits =", "bits =", INPUT),
    in_stream(
        "rows of x lie in one another's place", "(chunk / 4) * rows + row", "(chunk / 4) * rows + 0 * row", INPUT
    ),
    in_stream(
        "a plan that does not fit",
        "fits = with_x <= limits.smem_per_block",
        "fits = with_x > 0",
        "csrc/cuda/stream_plan.h",
    ),
    in_norm(
        "norm: no barrier between a row's sums and its mean",
        "    __syncthreads();\n    for_parts([&](int row, int part) {\n      const float rough_mean = row_sums("
        "s_sums + row * kMaxNormWarps).x / k;\n      float2 deviation",
        "    for_parts([&](int row, int part) {\n      const float rough_mean = row_sums("
        "s_sums + row * kMaxNormWarps).x / k;\n      float2 deviation",
    ),
    in_norm(
        "norm: no barrier between a row's deviations and its variance",
        "    __syncthreads();\n    for_parts([&](int row, int part) {\n      const float rough_mean = row_sums("
        "s_sums + row * kMaxNormWarps).x / k;\n      const float2",
        "    for_parts([&](int row, int part) {\n      const float rough_mean = row_sums("
        "s_sums + row * kMaxNormWarps).x / k;\n      const float2",
    ),
    in_norm(
        "norm: sums and deviations share memory",
        "s_deviations = s_sums + rows * kMaxNormWarps",
        "s_deviations = s_sums",
    ),
    in_norm("norm: chunks in another order", "chunk = part * kWarpSize + lane;", "chunk = lane * num_parts + part;"),
    in_norm("norm: the tail is not zero", "int padding = num_chunks - used_chunks", "int padding = 0"),
    in_norm(
        "norm: elements behind the row count", "const float d = to_float", "} {\n            const float d = to_float"
    ),
]
