from mutants import Mutant

MUTANTS = [
    Mutant("k has the LayerNorm of q", "part == 0 ? head.q_norm : head.k_norm", "head.q_norm"),
    Mutant("v is normalised too", "if (part < 2)", "if (part < 3)"),
    Mutant("k and v are swapped", "part == 1 ? out.k : out.v", "part == 1 ? out.v : out.k"),
    Mutant("slot -1 is kept", "slot < 0", "slot < -1"),
    Mutant("pages are as long as there are heads", "head_idx) * out.page_size", "head_idx) * head.num_heads"),
    Mutant("the bias is dropped", "add(values, r_bias);", ""),
    Mutant("the bias is that of another part", "bias + part_idx * kHeadDim", "bias + head_idx * kHeadDim"),
    Mutant("positions are read past the last token", "(is_active ? row : 0)", "row"),
    Mutant("rows past the last one are written", "row < tile.rows;  //", "row < Tile::kRows;  //"),
    Mutant("the last rows of a tile are left out", "row0 < tile.rows;", "row0 + kRowsPerPass < tile.rows;"),
    Mutant("the last part of a tile is left out", "column0 < tile.cols;", "column0 + kHeadDim < tile.cols;"),
    Mutant("two lanes take the same row", "(rank >> 1 & 1)", "(rank & 1)"),
    Mutant("alignment of the bias is not looked at", "is_aligned(p.bias) &&", ""),
    Mutant("alignment of k is not looked at", "is_aligned(p.out.k) &&", ""),
    Mutant("vectors straddle the rotary half", "p.head.rotary_dim / 2 % kPiece == 0", "true"),
]
