"""LayerNorm and rotary embedding of a head (norm_rope.cuh), from global memory."""

from mutants import Mutant

HEAD = "csrc/cuda/norm_rope.cuh"

MUTANTS = [
    Mutant("lanes past the end store", "  if (is_active) {\n    scalar_t* g_q", "  {\n    scalar_t* g_q"),
    Mutant("the last (token, head) is left out", "item < num_items;", "item + 1 < num_items;"),
    Mutant("keys are normalised with the queries' weights", "p.head.k_norm, token", "p.head.q_norm, token"),
    Mutant("the statistics miss the last exchange", "lane_mask > 0; lane_mask /= 2) {\n    value +=",
           "lane_mask > 1; lane_mask /= 2) {\n    value +=", HEAD),
    Mutant("the deviations are not corrected",
           "const float correction = head_sum<Layout::kLanes>(deviation) / kHeadDim;", "const float correction = 0.0f;", HEAD),
    Mutant("columns behind the rotated ones are paired wrongly",
           "make_int2(column + half_rotary_dim, column + kHeadDim / 2)", "make_int2(column + half_rotary_dim, column)", HEAD),
    Mutant("the rotation has the wrong sign", "-(second * sin[j])", "second * sin[j]", HEAD),
    Mutant("the sines begin one column too early", "cos_sin + half_rotary_dim + column, sin",
           "cos_sin + half_rotary_dim + column - 1, sin", HEAD),
    Mutant("every head takes the first head's weights", "head_idx * norm.head_stride", "0 * norm.head_stride", HEAD),
]  # fmt: skip
