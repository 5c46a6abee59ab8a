from mutants import Mutant

GEMM = "csrc/cuda/gemm.cuh"
SCALE = "csrc/cuda/squared_relu.cuh"

MUTANTS = [
    Mutant("NaN becomes zero", "return z <= 0.0f ? 0.0f : z;", "return z > 0.0f ? z : 0.0f;"),
    Mutant("no relu", "return z <= 0.0f ? 0.0f : z;", "return z;"),
    Mutant("a row's maximum is that of its first 8 columns", "reduce_lanes<Tile::kLanesPerRow>", "reduce_lanes<1>"),
    Mutant("a row's maximum is that of its last tile", "atomicMax(row_max + row_idx", "atomicExch(row_max + row_idx"),
    Mutant("rows are never divided", "7), 30); }", "22), 22); }", SCALE),
    Mutant("rows of small values are not multiplied", "7), 30); }", "22), 30); }", SCALE),
    Mutant("rows are divided by half as much", "15 + 22 - exponent", "15 + 23 - exponent", SCALE),
    Mutant("the sums are scaled back by 2^e", "2 * (exponent_field", "1 * (exponent_field", SCALE),
    Mutant("the halves of a fragment exchange their rows", "i % 2 == 0 ? low", "i % 2 == 1 ? low"),
    Mutant("bf16 is not squared", "__hmul2(values, values);\n      pair", "values;\n      pair"),
    Mutant("fp16 is scaled, not squared", "__hmul2(scaled, scaled)", "scaled", SCALE),
    Mutant("fp32 is not squared", "relu[i] *= relu[i];", "{}"),
    Mutant(
        "neuron-major chunks are off by one", "(warp_col + j * 16) / 8 + lane / 16", "(warp_col + j * 16) / 8", GEMM
    ),
    Mutant("neuron-major fragments are not transposed", "ptx::ldmatrix_trans", "ptx::ldmatrix", GEMM),
    Mutant("factors of the wrong half of rows", "half * 8 + lane / 4", "half * 4 + lane / 4", GEMM),
    Mutant(
        "sums are scaled back by the factor of row 0",
        "square_unscale(row_max[row])",
        "square_unscale(row_max[0])",
    ),
]
