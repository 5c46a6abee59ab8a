from mutants import Mutant

GEMM = "csrc/cuda/gemm_sm90.cuh"
EPILOGUE = "csrc/cuda/gemm_sm90_epilogue.cuh"
QKV = "csrc/cuda/qkv_epilogue.cuh"
MLP = "csrc/cuda/squared_relu_mlp.cu"


def linear(what: str, old: str, new: str, file: str = GEMM) -> Mutant:
    return Mutant(what, old, new, file, kernels=("linear_residual",))


def mlp(what: str, old: str, new: str, file: str = GEMM) -> Mutant:
    return Mutant(what, old, new, file, kernels=("squared_relu_mlp",))


def qkv_gemm(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, old, new, GEMM, kernels=("qkv_norm_rope",))


def qkv(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, old, new, QKV, kernels=("qkv_norm_rope",))


MUTANTS = [
    linear(
        "the ring is filled without a wait",
        "position.parity ^ 1);\n      ptx::mbarrier_arrive_expect",
        "1);\n      ptx::mbarrier_arrive_expect",
    ),
    linear(
        "the first lap waits for a lap that never was",
        "position.stage), position.parity ^ 1);",
        "position.stage), position.parity);",
    ),
    linear(
        "fewer bytes are announced than come",
        "expect_tx(full, Shape::kStageBytes)",
        "expect_tx(full, Shape::kStageBytes - Shape::kBoxBytes)",
    ),
    linear(
        "more bytes are announced than come",
        "expect_tx(full, Shape::kStageBytes)",
        "expect_tx(full, Shape::kStageBytes + 16)",
    ),
    linear("the lap has no parity", "      parity ^= 1;\n", "", "csrc/cuda/ring_sm90.cuh"),
    linear(
        "products read a stage before it has arrived",
        "position.parity);\n    if constexpr (kAInRegisters) {\n#pragma unroll",
        "position.parity ^ 1);\n    if constexpr (kAInRegisters) {\n#pragma unroll",
    ),
    linear(
        "a stage is released while products read it",
        "        ptx::wgmma_wait<1>();\n        release(position.previous());",
        "        release(position.previous());\n        ptx::wgmma_wait<1>();",
    ),
    linear(
        "the stage in use is released",
        "        ptx::wgmma_wait<1>();\n        release(position.previous());",
        "        ptx::wgmma_wait<1>();\n        release(position.stage);",
    ),
    linear("the last products are not waited for", "    ptx::wgmma_wait<0>();\n", ""),
    linear(
        "the last stage of a tile is not released",
        "    ptx::wgmma_registers(acc);\n    release(position.previous());",
        "    ptx::wgmma_registers(acc);",
    ),
    linear(
        "a warpgroup without rows keeps the stages",
        "      release(position.stage);\n      position.advance();",
        "      position.advance();",
    ),
    linear(
        "a warpgroup without rows releases what has not arrived",
        "      ptx::mbarrier_wait(block.full_barrier(position.stage), position.parity);\n      release",
        "      release",
    ),
    linear(
        "a stage is released to the own block alone",
        "if (lane < Shape::kCluster) ptx::mbarrier_arrive_cluster(empty, lane);",
        "if (lane < Shape::kCluster) ptx::mbarrier_arrive(empty);",
    ),
    linear("the release of one block is enough", "kConsumerWarps * Shape::kCluster);", "kConsumerWarps);"),
    linear("no fence before the products", "    ptx::wgmma_fence();\n", ""),
    linear("sums of the last tile are kept", "multiply(k_tile > 0, r_a", "multiply(true, r_a"),
    linear("sums of the last stage are dropped", "accumulate || step > 0", "step > 0"),
    linear("steps of A read the first 16 of k", "ptx::wgmma_operand_at(a, step * kStepBytesA)", "a"),
    linear("both warpgroups read the same rows", "uniform(warp / 4) * 64 * 128;  // of", "0;  // of"),
    linear(
        "both blocks of a cluster fetch the same boxes",
        "box % Shape::kCluster == block.rank",
        "box % Shape::kCluster == 0",
    ),
    linear("a box reaches the own block alone", "(1 << Shape::kCluster) - 1", "1"),
    linear(
        "blocks wait for barriers that may not be there",
        "  sync_cluster();  // before anyone waits, or copies into the other block\n",
        "  __syncthreads();\n",
    ),
    linear(
        "a block leaves while the other writes into it", "  sync_cluster();  // nobody leaves", "  // nobody leaves"
    ),
    linear(
        "both blocks of a cluster compute the same rows",
        "Shape::kCluster + rank) * Shape::kBlockM",
        "Shape::kCluster) * Shape::kBlockM",
    ),
    linear("tiles are visited by every cluster", "index += num_clusters", "index += 1"),
    linear("more registers than a block has", "increase_registers<232>", "increase_registers<240>"),
    linear("the last k-tile is left out", "k0 < p.k; k0 +=", "k0 + Shape::kBlockK <= p.k; k0 +="),
    linear("rows behind the last are written", "min(rows, 16), p.n", "16, p.n"),
    linear("columns behind the last are written", "index * kSlabCols + slab.column() < cols;", "true;", EPILOGUE),
    linear(
        "no __syncwarp between a slab's writers and readers",
        "    __syncwarp();\n    const bool column_exists = index * kSlabCols + slab.column() < cols;",
        "    const bool column_exists = index * kSlabCols + slab.column() < cols;",
        EPILOGUE,
    ),
    linear("one slab is written while its rows go out", "i % 2 * kWarpSlabBytes", "0 * i", EPILOGUE),
    linear(
        "rows for stmatrix are not swizzled",
        "lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;\n    return (ptx::smem_u32(s_bytes) + first) ^ block * 32;",
        "lane % 16 * 128 + lane / 16 * 16;\n    return ptx::smem_u32(s_bytes) + first + block * 32;",
        EPILOGUE,
    ),
    linear(
        "the residual is not waited for",
        "    ptx::cp_async_wait<1>();\n    __syncwarp();",
        "    __syncwarp();",
        EPILOGUE,
    ),
    linear(
        "the residual is waited for by its own lane alone",
        "    ptx::cp_async_wait<1>();\n    __syncwarp();",
        "    ptx::cp_async_wait<1>();",
        EPILOGUE,
    ),
    linear(
        "the residual of the next slab but one comes too early",
        "    fetch_residual(epilogue, tile, index + 2);  // this lane",
        "    // this lane",
        EPILOGUE,
    ),
    linear(
        "the residual of rows that are not there is read",
        "const bool exists = column_exists && slab.row(pass) < tile.rows;",
        "const bool exists = column_exists;",
        EPILOGUE,
    ),
    linear("bias behind the last column is read", "has_bias && j * 8 < tile.cols", "has_bias", EPILOGUE),
    mlp(
        "the fragments of one stage replace those in flight",
        "kSets - 1);\n    }\n    ptx::wgmma_wait<0>",
        "0);\n    }\n    ptx::wgmma_wait<0>",
    ),
    mlp(
        "lanes read on while a stage is overwritten",
        "    if constexpr (kAInRegisters) __syncwarp();  // every lane's ldmatrix\n",
        "",
    ),
    mlp(
        "the halves of a fragment are swapped",
        "step * 2 + lane / 16));\n        transform",
        "step * 2 + 1 - lane / 16));\n        transform",
    ),
    mlp(
        "groups of 64 columns lie closer than they do",
        "Shape::kBytesA, Shape::kBoxBytes);",
        "Shape::kBytesA, Shape::kBoxBytes / 2);",
    ),
    mlp("steps of a transposed B are 8 rows", "kTransB ? 16 * 128", "kTransB ? 8 * 128"),
    mlp(
        "an N-major B is fetched K-major",
        "kBOrder == BOrder::kKMajor ? k0 : n0, kBOrder == BOrder::kKMajor ? n0 : k0",
        "k0, n0",
    ),
    mlp(
        "both rows of a lane have the scale of one",
        "transform.apply(r_a[step], factor[0], factor[1])",
        "transform.apply(r_a[step], factor[0], factor[0])",
    ),
    mlp(
        "the scale is that of the warp's first row",
        "p.transform.factor(warp_row0 + row)",
        "p.transform.factor(warp_row0)",
    ),
    mlp("the largest of a row misses three lanes", "reduce_lanes<4>(largest[h]", "reduce_lanes<1>(largest[h]", MLP),
    qkv_gemm(
        "the last slab of a tile is still read when the next one writes it",
        "      __syncwarp();  // the rows of the last slab have been read: the next tile may begin with it\n",
        "",
    ),
    qkv(
        "columns are rotated with their neighbours",
        "values[h][2 * (j + kHalf / 8) + e];",
        "values[h][2 * (j + 1) + e];",
    ),
    qkv("sines are cosines", "g_cos + kHalf)", "g_cos)"),
    qkv("the statistics are of one lane", "sum_lanes<4>(total[h]", "sum_lanes<1>(total[h]"),
    qkv(
        "every row goes to the slot of the first",
        "q_row : cache_row, pass * 4 + lane / 8)",
        "q_row : cache_row, 0)",
    ),
    qkv("v is rotated", "    if (part.kind < 2) {\n      const HeadNorm&", "    {\n      const HeadNorm&"),
    qkv(
        "the bias is that of the tile's first part",
        "epilogue.bias + part.index * kHeadDim",
        "epilogue.bias + tile.col0",
    ),
    qkv("the second slab of a head is the first", "first / kSlabCols + slab", "first / kSlabCols"),
]
