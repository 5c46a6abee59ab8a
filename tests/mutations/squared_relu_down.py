from mutants import Mutant

LIST = "csrc/cuda/squared_relu_list.cuh"
UP = "csrc/cuda/squared_relu_mlp.cu"


def in_up(what: str, old: str, new: str, tests: str = "") -> Mutant:
    return Mutant(what, old, new, UP, tests, kernels=("squared_relu_mlp",))


MUTANTS = [
    # ---- what the first product leaves ----
    in_up("nobody sets the counters to zero", "scratch.arrived[i] = 0;", "scratch.arrived[i] |= 0;"),
    in_up("NaN is inactive", "to_float(chunk.values[i]) != 0.0f", "to_float(chunk.values[i]) > 0.0f"),
    in_up("the last row decides what is active", "is_active |=", "is_active ="),
    in_up("neurons behind the last one are active", "exists && row < tile.rows ?", "row < tile.rows ?",
          "test_squared_relu_mlp.py"),
    in_up("the largest values of the second group of rows replace the first's",
          "scratch.largest[(mask_idx * num_groups + group)", "scratch.largest[(mask_idx * num_groups + 0 * group)"),
    in_up("a row's largest value is that of one neuron", "if (lane == i) largest = most;",
          "if (lane == i) largest = bits;"),
    # ---- the list ----
    Mutant("the list starts one neuron late", "mask & ((1u << lane) - 1)", "mask & ((2u << lane) - 1)", LIST),
    Mutant("a part begins with the neurons of the next masks",
           "lane < kListThreads / kWarpSize && s_start[place] <= from)) - 1",
           "lane < kListThreads / kWarpSize && s_start[place] <= from))", LIST),
    Mutant("warps do not know of those before them", "if (w < warp) before += s_warp[w];", "", LIST),
    Mutant("the end of the list holds old neurons", "i < kSegment; i += kListThreads) s_list[i] = -1",
           "i < 0; i += kListThreads) s_list[i] = -1", LIST),
    Mutant("no barrier between the counts of the warps",
           "  if (lane == kWarpSize - 1) s_warp[warp] = inclusive;\n  __syncthreads();",
           "  if (lane == kWarpSize - 1) s_warp[warp] = inclusive;", LIST),
    Mutant("parts are too short", "ceil_div(total, static_cast<int>(p.shape.num_parts))",
           "total / static_cast<int>(p.shape.num_parts)"),
    Mutant("parts overlap", "list.begin = part * part_length;", "list.begin = max(part * part_length - 1, 0);"),
    Mutant("the list is made where it is read", "kListRing = 4 * kSegment", "kListRing = 2 * kSegment"),
    # ---- the pipeline ----
    Mutant("the list is read before the first product is done", "  ptx::wait_for_predecessors();", "  "),
    Mutant("no barrier between segments", "    __syncthreads();  // all have come", "    // all have come"),
    Mutant("the next activations replace those in use", "kHiddenRing = 2 * kSegment", "kHiddenRing = kSegment"),
    Mutant("the wait allows one group too many", "ptx::cp_async_wait<kStages - 1>();\n      const Chunk",
           "ptx::cp_async_wait<kStages>();\n      const Chunk"),
    Mutant("a step overwrites the one in use", "ring.load(step + kStages - 1);", "ring.load(step + kStages);"),
    Mutant("columns behind the last one are read", "max(min(p.hidden_size - column0 - slice_column, T::kChunk), 0)",
           "T::kChunk"),
    Mutant("neuron -1 is read", "const int n = neuron >= 0 ? num_elements : 0;", "const int n = num_elements;"),
    # ---- the product ----
    Mutant("both halves of a word are the low one", "a[1] = __byte_perm(w0, w1, 0x7632);",
           "a[1] = __byte_perm(w0, w1, 0x5410);"),
    Mutant("neurons 8 places apart are exchanged", "lane % 4 * 2 + i % 2 + i / 2 * 8",
           "lane % 4 * 2 + i % 2 + (1 - i / 2) * 8"),
    Mutant("every row has the scale of the first", "row_largest<S::kRows>(s_largest, group * 8 + lane / 4)",
           "row_largest<S::kRows>(s_largest, 0)"),
    Mutant("sums are not scaled back", "sum *= square_unscale(row_largest<S::kRows>(s_largest, row));", "{}"),
    # ---- the end ----
    Mutant("the other warps' sums are left out", "w < T::kNeuronWarps; ++w", "w < 1; ++w"),
    Mutant("sums replace copies that are being read", "  __syncthreads();  // all copies have arrived",
           "  // all copies have arrived"),
    Mutant("no fence before the arrival", "    __threadfence();  // the block's", "    // the block's"),
    Mutant("no fence after the arrival", "    __threadfence();  // the other", "    // the other"),
    Mutant("no barrier before the arrival", "  __syncthreads();\n  if (threadIdx.x == 0) {",
           "  if (threadIdx.x == 0) {"),
    Mutant("the last but one adds up", "1u) + 1 == p.shape.num_parts", "1u) + 2 == p.shape.num_parts"),
    Mutant("parts that have no neuron are added", "part_length > 0 ? ceil_div(total, part_length) : 0",
           "static_cast<int>(p.shape.num_parts)"),
    Mutant("columns behind the last one are written", "if (c < n) from_float((sums[c]", "from_float((sums[c]"),
]  # fmt: skip
