from mutants import Mutant

EPILOGUE = "csrc/cuda/qkv_epilogue.cuh"

MUTANTS = [
    Mutant("k has the LayerNorm of q", "part.kind == 0 ? head.q_norm : head.k_norm", "head.q_norm", EPILOGUE),
    Mutant("v is normalised too", "if (part.kind < 2) norm", "if (part.kind < 3) norm", EPILOGUE),
    Mutant("k and v are swapped", "part.kind == 1 ? out.k : out.v", "part.kind == 1 ? out.v : out.k", EPILOGUE),
    Mutant("slot -1 is kept", "slot < 0", "slot < -1", EPILOGUE),
    Mutant("pages are as long as there are heads", "? 1 : out.page_size", "? 1 : head.num_heads", EPILOGUE),
    Mutant("the bias is dropped", "add(values, r_bias);", "", EPILOGUE),
    Mutant(
        "the bias is that of another part",
        "bias + part.index * kHeadDim, half",
        "bias + part.head_idx * kHeadDim, half",
        EPILOGUE,
    ),
    Mutant("positions are read past the last token", "(is_active ? row : 0)", "row", EPILOGUE),
    Mutant("rows past the last one are written", "row < tile.rows;  //", "row < Tile::kRows;  //", EPILOGUE),
    Mutant("the last rows of a tile are left out", "row0 < tile.rows;", "row0 + kRowsPerPass < tile.rows;", EPILOGUE),
    Mutant("the last part of a tile is left out", "column0 < tile.cols;", "column0 + kHeadDim < tile.cols;", EPILOGUE),
    Mutant("two lanes take the same row", "(rank >> 1 & 1)", "(rank & 1)", EPILOGUE),
    Mutant("alignment of the bias is not looked at", "is_aligned(p.bias) &&", ""),
    Mutant("alignment of k is not looked at", "is_aligned(p.out.k) &&", ""),
    Mutant("vectors straddle the rotary half", "p.head.rotary_dim / 2 % kPiece == 0", "true"),
]
