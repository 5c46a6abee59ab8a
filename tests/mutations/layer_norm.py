from mutants import Mutant

MUTANTS = [
    Mutant("no barrier between the warps' partial sums and their reader", "    __syncthreads();\n", ""),
    Mutant("the tail of a row is one element too long", "min(size - column, kChunk)", "min(size - column + 1, kChunk)"),
    Mutant(
        "the mean is not corrected",
        "- stats.rough_mean) - stats.correction) *",
        "- stats.rough_mean)) *",
        "csrc/cuda/layer_norm_order.cuh",
    ),
    Mutant("variance and mean share their partial sums", "s_partial + kMaxWarps)", "s_partial)"),
    Mutant(
        "the residual is dropped",
        "to_float(r_row[k].values[i]) + to_float(residual.values[i])",
        "to_float(r_row[k].values[i])",
    ),
    Mutant("the last row of a block of warps is left out", "row >= p.num_rows", "row >= p.num_rows - 1"),
    Mutant("a lane's last exchange is missing", "lane_mask > 0;", "lane_mask > 1;", "csrc/cuda/reduce.cuh"),
    Mutant(
        "rows longer than the registers are not read again",
        "if (!held) r_row[k] = load_chunk<kAligned>(g_row + column, n);\n#pragma",
        "\n#pragma",
    ),
]
