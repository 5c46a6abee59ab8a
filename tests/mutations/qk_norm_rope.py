from mutants import Mutant

_SHARED = "csrc/cuda/norm_rope.cuh"

MUTANTS = [
    Mutant("one item too many", "item < num_items;", "item <= num_items;"),
    Mutant("the last item is left out", "item < num_items;", "item + 1 < num_items;"),
    Mutant("k has the LayerNorm of q", "(k, p.head, p.head.k_norm", "(k, p.head, p.head.q_norm"),
    Mutant("alignment of q is not looked at", "is_aligned(p.q) &&", ""),
    Mutant("strides are taken for aligned", "stride % kVec == 0", "stride >= 0"),
    Mutant("LayerNorm weights per head are those of head 0", "head_idx * norm.head_stride", "0", _SHARED),
    Mutant("the sines are the cosines", "cos_sin + half_rotary_dim + column", "cos_sin + column", _SHARED),
    Mutant("the rotation goes backwards", "-(second * sin)", "second * sin", _SHARED),
    Mutant("columns past rotary_dim are rotated", "if (column >= half_rotary_dim) continue;", "", _SHARED),
    Mutant(
        "the last exchange of the statistics is missing", "lane_mask > 0;", "lane_mask > 1;", "csrc/cuda/reduce.cuh"
    ),
    Mutant("the mean is not corrected", "-correction * rstd", "0.0f", _SHARED),
    Mutant("an overflow of the variance is hidden", "variance + (variance - variance)", "variance", _SHARED),
    Mutant(
        "vectors straddle the rotary half",
        "% Chunk<scalar_t>::kSize == 0;\n}\n\n// Whether norm",
        ">= 0;\n}\n\n// Whether norm",
        _SHARED,
    ),
]
