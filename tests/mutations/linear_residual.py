from mutants import Mutant

GEMM = "csrc/cuda/gemm.cuh"
EPILOGUE = "csrc/cuda/gemm_epilogue.cuh"
SIMT = "csrc/cuda/gemm_simt.cuh"

MUTANTS = [
    Mutant(
        "no barrier before the next stage is read and refilled",
        "        __syncthreads();                    // ... and for all, and all have read this one\n",
        "",
        GEMM,
    ),
    Mutant(
        "the wait allows one group too many",
        "cp_async_wait<kStages - 2>();  // the",
        "cp_async_wait<kStages - 1>();  // the",
        GEMM,
    ),
    Mutant(
        "the first wait allows one group too many",
        "cp_async_wait<kStages - 2>();\n  __sync",
        "cp_async_wait<kStages - 1>();\n  __sync",
        GEMM,
    ),
    Mutant(
        "no empty groups at the end of k",
        "if (k_tile + kStages - 1 < k_tiles) issue(k_tile + kStages - 1);\n        ptx::cp_async_commit();",
        "if (k_tile + kStages - 1 < k_tiles) { issue(k_tile + kStages - 1); ptx::cp_async_commit(); }",
        GEMM,
    ),
    Mutant("a copy overwrites the stage in use", "issue(k_tile + kStages - 1);", "issue(k_tile + kStages);", GEMM),
    Mutant(
        "no barrier before the results replace the ring",
        "  __syncthreads();  // all have read",
        "  // all have read",
        GEMM,
    ),
    Mutant(
        "no barrier between the results and the epilogue",
        "  __syncthreads();\n  p.epilogue(tile);",
        "  p.epilogue(tile);",
        GEMM,
    ),
    Mutant(
        "one row too many is read",
        "first_row + pass * kRowsPerPass < rows",
        "first_row + pass * kRowsPerPass <= rows",
        GEMM,
    ),
    Mutant("the tail of k holds neighbours", "row_exists && i < elements", "row_exists", GEMM),
    Mutant("whole chunks behind k are not zero", "row_exists && elements > 0 ? 16 : 0", "row_exists ? 16 : 0", GEMM),
    Mutant(
        "operands of B are swapped",
        "pair[j % 2 * 2], pair[j % 2 * 2 + 1]",
        "pair[j % 2 * 2 + 1], pair[j % 2 * 2]",
        GEMM,
    ),
    Mutant(
        "the second half of a step is read from the first", "step * 2 + lane / 16));\n    }", "step * 2));\n    }", GEMM
    ),
    Mutant("the last k-tile is left out", "k_tile < k_tiles; ++k_tile", "k_tile < k_tiles - 1; ++k_tile", GEMM),
    Mutant("the results of one half are 4 rows off", "tile.at(row + 8, col)", "tile.at(row + 4, col)", GEMM),
    Mutant(
        "a tile is written past the last column",
        "max(0, min(cols - col, kPiece))",
        "min(max(cols, 8), kPiece)",
        EPILOGUE,
    ),
    Mutant("a tile is written past the last row", "row < rows ? columns_left : 0", "columns_left", EPILOGUE),
    Mutant("halves of a piece are exchanged", "first == 0 ? b : a", "b", EPILOGUE),
    Mutant("bias of column 0 everywhere", "read_piece(bias + col_idx", "read_piece(bias", EPILOGUE),
    Mutant(
        "the residual's stride is the output's", "row_idx * residual_row_stride", "row_idx * out_row_stride", EPILOGUE
    ),
    Mutant(
        "fp32: no barrier before the k-tile is overwritten",
        "    __syncthreads();  // before the next",
        "    // before the next",
        SIMT,
    ),
    Mutant("fp32: no barrier before the k-tile is read", "    __syncthreads();\n    if (k0", "    if (k0", SIMT),
    Mutant("fp32: the tail of k holds neighbours", "row < rows && col < cols ?", "row < rows ?", SIMT),
    Mutant(
        "tiles of a short last group are computed twice",
        "in_group % height, in_group / height",
        "in_group % kGroup, in_group / kGroup",
        "csrc/cuda/gemm_tile.h",
    ),
]
