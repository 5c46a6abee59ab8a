from mutants import Mutant

TESTS = "test_lm_head_sample.py"
NUCLEUS = "csrc/cuda/sample_nucleus.cuh"

MUTANTS = [
    Mutant(
        "no barrier between reading and replacing bare logits",
        "  __syncthreads();  // all bare logits",
        "  // all bare logits",
        tests=TESTS,
    ),
    Mutant(
        "equal values are stored without exchanges",
        "atomicExch(reinterpret_cast<unsigned*>(&place), bits);",
        "place = value;",
        tests=TESTS,
    ),
    Mutant("a ballot orders memory", "    __syncwarp();  // body may", "    // body may", tests=TESTS),
    Mutant(
        "tiles keep the maximum of the bare logits",
        "(logits.tile_max[token / kVocabTile], NAN)",
        "(logits.tile_max[token / kVocabTile], logits.tile_max[token / kVocabTile])",
        tests=TESTS,
    ),
    Mutant(
        "ids of no token are penalised",
        "if (token < 0 || token >= p.vocab_size) continue;",
        "if (token < 0) continue;",
        tests=TESTS,
    ),
    Mutant("the k-th largest is the k+1-th", "s_found[1] = k - above;", "s_found[1] = k - above + 1;", tests=TESTS),
    Mutant("radix select counts all prefixes", "(key & prefix_mask) == prefix", "true", tests=TESTS),
    Mutant(
        "min_p is rounded to nearest",
        "return rounded < bound ? nextafterf(rounded, INFINITY) : rounded;",
        "return rounded;",
        tests=TESTS,
    ),
    Mutant("top-k is not used", "threshold = k > 0 && k < p.vocab_size", "threshold = k > 0 && k < 0", tests=TESTS),
    Mutant(
        "the bare logit of a penalised token is not found",
        "if (p.penalty_ids[row * p.penalty_row_stride + i] == token)",
        "if (false)",
        tests=TESTS,
    ),
    Mutant(
        "the first uniform number of a block serves all four",
        "consider(z.w, random.words[3], 3);",
        "consider(z.w, random.words[0], 3);",
        tests=TESTS,
    ),
    Mutant("the bar is too high", "score - 1e-3 -", "score + 0.5 -", tests=TESTS),
    Mutant("tiles near the bar are skipped", "bar - 23.0f", "bar - 1.0f", tests=TESTS),
    Mutant("filters are ignored by the draw", "value >= threshold && static", "static", tests=TESTS),
    Mutant("the last block's candidate is lost", "i < num_blocks; i +=", "i < num_blocks - 1; i +=", tests=TESTS),
    Mutant(
        "the nucleus ends one bin early",
        "if (to_double(next) / divisor >= top_p) break;",
        "if (to_double(above) / divisor >= top_p) break;",
        NUCLEUS,
        TESTS,
    ),
    Mutant("the second limb is lost", "  add_shared(bin.low, low);\n", "", NUCLEUS, TESTS),
    Mutant(
        "bins are added to without an atomic", "  add_shared(bin.high, high);", "  bin.high += high;", NUCLEUS, TESTS
    ),
    Mutant(
        "the last bins are not flushed",
        "    if (mass.high != 0) atomicAdd(&g_mass[bin].high, mass.high);\n",
        "    if (mass.high != 0) g_mass[bin].high = mass.high;\n",
        NUCLEUS,
        TESTS,
    ),
    Mutant("warps before this one do not count", "if (i < warp) before = before + s_warp[i];", "", NUCLEUS, TESTS),
    Mutant("mass above the bin is forgotten between levels", "before = before + state.above;", "", NUCLEUS, TESTS),
    Mutant(
        "no barrier before the bins are used",
        "    if (blockIdx.x == 0 && threadIdx.x == 0) state.nucleus[kLevel] = now;\n  }\n  __syncthreads();",
        "    if (blockIdx.x == 0 && threadIdx.x == 0) state.nucleus[kLevel] = now;\n  }",
        NUCLEUS,
        TESTS,
    ),
    Mutant("carries between the halves of a sum are lost", "(carries ? 1 : 0)", "0", NUCLEUS, TESTS),
]
