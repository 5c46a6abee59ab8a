from mutants import Mutant

RANGES = "test_lm_head_ranges.py"
STATS = "csrc/cuda/lm_head_stats.cuh"

MUTANTS = [
    Mutant("tokens beyond the vocabulary count", "(1u << n) - 1", "0xff"),
    Mutant("a tile that a range cuts is skipped", "!holds<false>(ranges", "!holds<true>(ranges", tests=RANGES),
    Mutant("all tokens of such a tile count", "if (!whole)", "if (false)", tests=RANGES),
    Mutant("a range ends one token late", "end <= ranges.end[i]", "begin <= ranges.end[i]", STATS, RANGES),
    Mutant("a tile that is skipped keeps old statistics", "tiles.max[place] = -INFINITY;", "", tests=RANGES),
    Mutant("a tile that is skipped keeps old logits", "if (logits == nullptr) return;", "return;", tests=RANGES),
    Mutant(
        "a tile that is skipped can be the best",
        "tiles.token[place] = INT32_MAX;",
        "tiles.token[place] = 0;",
        tests=RANGES,
    ),
    Mutant("a token that is not kept can be the best", "kept &= ~(1u << i);", "", tests=RANGES),
    Mutant(
        "a skipped token has the log-probability of another",
        "holds<true>(p.ranges, token, token + 1)",
        "true",
        tests=RANGES,
    ),
    Mutant(
        "weights of tiles that are skipped are copied",
        "while (row0 < n && epilogue.skips(row0))",
        "while (false)",
        "csrc/cuda/stream.cuh",
        RANGES,
    ),
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
