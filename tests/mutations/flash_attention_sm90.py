from mutants import Mutant

SHARED = "csrc/cuda/attention.cuh"
ITEMS = "csrc/cuda/flash_attention_sm90.cuh"
LOAD = "csrc/cuda/flash_attention_sm90_load.cuh"
MULTIPLY = "csrc/cuda/flash_attention_sm90_multiply.cuh"
RING = "csrc/cuda/ring_sm90.cuh"
MUTANTS = [
    # Rings
    Mutant("every lap of a ring has the same parity", "stage = 0;\n      parity ^= 1;", "stage = 0;", RING),
    Mutant("half of a tile's bytes are waited for", "(full, S::kTileBytes)", "(full, S::kTileBytes / 2)", LOAD),
    Mutant(
        "a tile is loaded over one in use",
        "ptx::mbarrier_wait(empty, parity ^ 1)",
        "ptx::mbarrier_wait(empty, parity)",
        LOAD,
    ),
    Mutant(
        "keys are free when one warpgroup is done",
        "k_empty(stage), S::kGroups * kGroupWarps",
        "k_empty(stage), kGroupWarps",
        ITEMS,
    ),
    Mutant(
        "every lane frees a stage",
        "if (lane == 0) ptx::mbarrier_arrive(barrier);",
        "ptx::mbarrier_arrive(barrier);",
        MULTIPLY,
    ),
    Mutant("keys are not waited for", "ptx::mbarrier_wait(smem.k_full(k_stage), k_at.parity);", "", MULTIPLY),
    Mutant(
        "values are not waited for",
        "      ptx::mbarrier_wait(smem.v_full(v_stage), at.parity);\n      if",
        "      if",
        MULTIPLY,
    ),
    Mutant("tiles that others see are not freed", "skip_tiles(item", "skip_tiles(0 * item", MULTIPLY),
    Mutant("queries are always those of an even item", "q_parity ^= 1;", "", MULTIPLY),
    Mutant(
        "queries are free after every tile",
        "if (last) release(smem.q_empty(group))",
        "release(smem.q_empty(group))",
        MULTIPLY,
    ),
    Mutant("queries are loaded over those in use", "(parities >> group & 1u) ^ 1u", "parities >> group & 1u", LOAD),
    # Products
    Mutant("scores are read in flight", "ptx::wgmma_wait<1>();", "ptx::wgmma_wait<2>();", MULTIPLY),
    Mutant(
        "sums are rescaled in flight",
        "softmax();\n      ptx::wgmma_wait<0>();",
        "softmax();\n      ptx::wgmma_wait<1>();",
        MULTIPLY,
    ),
    Mutant(
        "the last sums are read in flight",
        "multiply_values(v_stage);\n    ptx::wgmma_wait<0>();",
        "multiply_values(v_stage);\n    ptx::wgmma_wait<1>();",
        MULTIPLY,
    ),
    Mutant("no fence before the products", "    ptx::wgmma_fence();\n", "", MULTIPLY),
    Mutant("steps of 8 values", "step * 16 * kRowBytes", "step * 8 * kRowBytes", MULTIPLY),
    Mutant(
        "groups of dims lie 64 rows apart",
        "v_tile(stage), kBlockN * kRowBytes",
        "v_tile(stage), kGroupRows * kRowBytes",
        MULTIPLY,
    ),
    Mutant("queries of other dims", "(q, box * kGroupRows * kRowBytes + offset)", "(q, offset)", MULTIPLY),
    Mutant("sums are not rescaled", "rescale_sums();\n      round", "round", MULTIPLY),
    Mutant("the denominator is not rescaled", "fmaf(denominator, correction, sum)", "denominator + sum", SHARED),
    Mutant("weights in another order", "weights[i / 4][i % 4]", "weights[i / 4][i % 4 ^ 1]", MULTIPLY),
    # Turns
    Mutant(
        "the turn goes to a warpgroup without queries",
        "if (ordered_tiles > 0) turn.pass(num_groups)",
        "if (ordered_tiles > 0) turn.pass(S::kGroups)",
        MULTIPLY,
    ),
    Mutant(
        "a turn is waited for that nobody passes",
        "num_groups > 1 ? item.num_key_tiles(p, num_groups - 1) : 0",
        "item.num_key_tiles(p, group)",
        MULTIPLY,
    ),
    # Masks and ends
    Mutant("a query sees one key too many", "i % 2 >= num_visible", "i % 2 > num_visible", MULTIPLY),
    Mutant(
        "a tile is masked too late",
        "num_visible[0] < kBlockN)) return",
        "num_visible[0] < kBlockN - 16)) return",
        MULTIPLY,
    ),
    Mutant("masks stay at the first tile", "num_visible[1] -= kBlockN;", "", MULTIPLY),
    Mutant(
        "what lies behind the end is weighed",
        "const bool is_end = key_begin + kBlockN > item.s.num_keys;",
        "const bool is_end = false;",
        LOAD,
    ),
    Mutant(
        "a row behind the end stays",
        "(item.s.num_keys - key_begin) * kRowBytes",
        "(item.s.num_keys - key_begin + 1) * kRowBytes",
        LOAD,
    ),
    Mutant(
        "the last row before the end becomes zero",
        "(item.s.num_keys - key_begin) * kRowBytes",
        "(item.s.num_keys - key_begin - 1) * kRowBytes",
        LOAD,
    ),
    Mutant("zeros that wgmma need not see", "ptx::fence_proxy_async();", "", LOAD),
    Mutant("the bytes of one end in two are waited for", "end_parity ^= 1;", "", LOAD),
    Mutant("hidden values reach other queries", "p.causal && in_range && probe != 0.0f", "false", MULTIPLY),
    Mutant(
        "a row too many is written",
        "in_range = row >= 0",
        "in_range = row >= -1",
        MULTIPLY,
    ),
    Mutant(
        "pieces of a row in another order", "upper ? r[i] : r[i | bit], bit", "upper ? r[i | bit] : r[i], bit", MULTIPLY
    ),
    # Coordinates
    Mutant(
        "every warpgroup has the first queries",
        "item.first_query(group);\n#pragma",
        "item.first_query(0);\n#pragma",
        LOAD,
    ),
    Mutant(
        "every head has the keys of the first",
        "{dim, item.head_idx, static_cast<int>(item.s.k_begin)",
        "{dim, 0, static_cast<int>(item.s.k_begin)",
        LOAD,
    ),
    Mutant("a tile has one page", "pages[key_idx >> params.page_shift]", "pages[key_begin >> params.page_shift]", LOAD),
    Mutant("a page has one tile", "key_idx & (p.page_size - 1)", "0", LOAD),
    Mutant("the page table is read behind the keys", "key_idx < item.s.num_keys ? pages", "true ? pages", LOAD),
    # Items
    Mutant("an item twice, another never", "gridDim.x - 1 - blockIdx.x", "gridDim.x - 1 - (blockIdx.x + 1) / 2", ITEMS),
    # Predicate
    Mutant("a negative scale is taken as positive", "!(p.softmax_scale >= 0.0f)", "false"),
    Mutant("pages of any size are taken", "!(is_power_of_two && p.page_size >= 8)", "false"),
    Mutant(
        "rows of any alignment are taken",
        "return is_encodable(boxes.q) && is_encodable(boxes.k)",
        "return is_encodable(boxes.q) && true",
    ),
]
