from mutants import Mutant

SHARED = "csrc/cuda/attention.cuh"
LOAD_K = "if (has_next) load_tile<kHeadDim, kN>(s_k + stage(tile_idx + 1)"
LOAD_V = "if (has_next) load_tile<kHeadDim, kN>(s_v + stage(tile_idx + 1)"
MUTANTS = [
    Mutant("a query sees one key too many", "n * 8 + j >= num_visible", "n * 8 + j > num_visible"),
    Mutant("the end of the keys is not masked", "if (key_begin + kN > unmasked_keys)", "if (p.causal && false)"),
    Mutant(
        "only the diagonal is masked",
        "if (key_begin + kN > unmasked_keys)",
        "if (p.causal && key_begin + kN > unmasked_keys)",
    ),
    Mutant("the denominator is not rescaled", "fmaf(denominator, correction, sum)", "denominator + sum", SHARED),
    Mutant("sums are not rescaled", "if (__any_sync(kFullMask, moved))", "if (moved && false)"),
    Mutant(
        "keys are not waited for",
        f"ptx::cp_async_wait<1>();\n    __syncthreads();\n    {LOAD_K}",
        f"ptx::cp_async_wait<2>();\n    __syncthreads();\n    {LOAD_K}",
    ),
    Mutant(
        "values are not waited for",
        f"ptx::cp_async_wait<1>();\n    __syncthreads();\n    {LOAD_V}",
        f"ptx::cp_async_wait<2>();\n    __syncthreads();\n    {LOAD_V}",
    ),
    Mutant("no barrier before keys", f"__syncthreads();\n    {LOAD_K}", LOAD_K),
    Mutant("no barrier before values", f"__syncthreads();\n    {LOAD_V}", LOAD_V),
    Mutant("keys are overwritten in use", LOAD_K, LOAD_K.replace("tile_idx + 1)", "tile_idx)")),
    Mutant("values are overwritten in use", LOAD_V, LOAD_V.replace("tile_idx + 1)", "tile_idx)")),
    Mutant(
        "the last tile commits no group",
        "ptx::cp_async_commit();  // an empty group keeps the count",
        "if (has_next) ptx::cp_async_commit();",
    ),
    Mutant("a row too many is written", "in_range = row < s.num_queries", "in_range = row <= s.num_queries"),
    Mutant("rows are read past the end", "valid = first + row < end;", "valid = true;"),
    Mutant("values are not transposed", "ptx::ldmatrix_trans(r,", "ptx::ldmatrix(r,", SHARED),
    Mutant("a negative scale is taken as positive", "r_q[m][i] ^= sign_bits", "r_q[m][i] ^= 0u"),
    Mutant("every head has the keys of the first", "+ head_idx * head_stride;", "+ 0 * head_stride;", SHARED),
    Mutant(
        "a warp stops at the keys of its first query",
        "num_visible_keys(p, s, warp_row + kWarpRows - 1)",
        "num_visible_keys(p, s, warp_row)",
    ),
    Mutant("hidden values reach other queries", "p.causal && in_range && probe != 0.0f", "false"),
    Mutant(
        "a row that is done again sees all keys", "k, v, 0, num_visible_keys(p, s, row)", "k, v, 0, s.num_keys", SHARED
    ),
    Mutant("lse without the scale", "maximum * fabsf(p.softmax_scale) + logf", "maximum + logf", SHARED),
    Mutant("lse of another head", "p.lse[head_idx * p.total_q", "p.lse[(p.num_heads - 1 - head_idx) * p.total_q"),
    Mutant("alignment is not looked at", "if (aligned) {", "if (true || aligned) {", SHARED),
    Mutant(
        "all keys are used", "s.num_keys = p.seqlens_k != nullptr ?", "s.num_keys = p.page_table != nullptr ?", SHARED
    ),
    Mutant("weights in the order of the accumulator", "[n % 2 * 2 + h] = pack2", "[n % 2 + 2 * h] = pack2"),
    Mutant("sums start as they are", "state.clear();", ""),
    Mutant("groups of keys are not added up", "sum_of_groups(denominator * weight)", "denominator * weight", SHARED),
    Mutant("a group's weights are not made comparable", "rescale(maximum, row_maximum, scale_log2)", "1.0f", SHARED),
    Mutant("a key past the end is weighed", "if (key_idx >= end) continue;", "", SHARED),
]
