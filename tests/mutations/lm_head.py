from mutants import Mutant

STATS = "csrc/cuda/lm_head_stats.cuh"

MUTANTS = [
    Mutant("tokens beyond the vocabulary count", "i < n && candidate > best", "candidate > best"),
    Mutant("their exp counts", "if (i < n) sum += expf", "sum += expf"),
    Mutant("the sum is not relative to the maximum", "expf(values[i] - shift)", "expf(values[i])"),
    Mutant("every tile has the first one's tokens", "static_cast<uint32_t>(tile.col0) + col", "uint32_t(col)"),
    Mutant(
        "rows beyond the first of a warp are not written",
        "if (row >= tile.rows) continue;",
        "if (row != first) continue;",
    ),
    Mutant("a row too many is written", "if (row >= tile.rows) continue;", "if (row > tile.rows) continue;"),
    Mutant(
        "no padding after the vocabulary", "i < n ? values[i] : -INFINITY", "values[i]", tests="test_lm_head_sample.py"
    ),
    Mutant("the wrong target logit", "place >= 0 && place < n", "place >= -1 && place < n - 1"),
    Mutant("tokens of other tiles are not merged", "(best, u64{0}, s_best", "(u64{best & 0}, u64{0}, s_best", STATS),
    Mutant("the highest of equal tokens wins", "<< 32 | ~token", "<< 32 | token", STATS),
    Mutant(
        "sums of tiles are not rescaled",
        "g_sum[tile] * exp(static_cast<double>(g_max[tile]) - stats.max)",
        "g_sum[tile]",
        STATS,
    ),
    Mutant(
        "no barrier between the warps' results and their reader",
        "  __syncthreads();\n  return warp_reduce",
        "  return warp_reduce",
        STATS,
    ),
]
