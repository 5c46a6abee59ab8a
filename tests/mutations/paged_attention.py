from mutants import Mutant

SHARED = "csrc/cuda/attention.cuh"
MUTANTS = [
    Mutant("the page of the slice before", "look_up(slice_idx + 1);", "look_up(slice_idx);"),
    Mutant("a slice is not waited for", "ptx::cp_async_wait<kStages - 2>", "ptx::cp_async_wait<kStages - 1>"),
    Mutant("lanes do not wait for each other", "__syncwarp();  // the slice has arrived", "// the slice has arrived"),
    Mutant("results over slices in use", "__syncwarp();  // before the ring,", "// before the ring,"),
    Mutant("no barrier before the merge", "__syncthreads();", ""),
    Mutant("warps are added as they are", "rescale(s_maximum[warp * warp_stride], maximum, scale_log2)", "1.0f"),
    Mutant("splits are added as they are", "rescale(g_stat[i].x, maximum, scale_log2)", "1.0f"),
    Mutant(
        "empty splits are added",
        "num_splits = ceil_div(s.num_keys, splits.length);",
        "num_splits = splits.num;",
    ),
    Mutant(
        "splits end inside a slice",
        "ceil_div(ceil_div(num_keys, num), kRoundKeys) * kRoundKeys",
        "ceil_div(num_keys, num)",
    ),
    Mutant(
        "room in the page table cuts the keys",
        "num(paged_attention_splits_of(num_keys, p.num_splits))",
        "num(p.num_splits)",
    ),
    Mutant("the only split is combined too", " || splits.num == 1) return;", ") return;"),
    Mutant("a query sees one key too many", ">= num_visible[h]) score", "> num_visible[h]) score"),
    Mutant("rows are read past the end", "valid = key_begin + row < end;", "valid = true;"),
    Mutant("hidden values reach other queries", "again &= (1u << (s.num_queries - 1)) - 1;", "again = 0;"),
    Mutant("a row that is done again reads every split", "loader.k, loader.v, begin,", "loader.k, loader.v, 0,"),
    Mutant("a row that is done again sees all keys", "min(end, num_visible_keys(p, s, row))", "end"),
    Mutant("queries share their partial results", "p.max_seqlen_q + query_idx)", "p.max_seqlen_q)"),
    Mutant("a slice is taken for a piece of one page", "p.page_size % kSliceKeys == 0;", "true;"),
    Mutant("queries without a place", "min(s.num_queries, static_cast<int>(p.max_seqlen_q))", "s.num_queries"),
    Mutant("keys for values", "v.head + (g_k - k.head)", "g_k"),
    Mutant("the ring is too short", "slice_idx % kStages *", "slice_idx % (kStages - 1) *"),
    Mutant("every block works on the first head", "head_idx = pair_idx % p.num_heads", "head_idx = pair_idx % 1"),
    Mutant("warps take the same slices", "begin + warp * kSliceKeys", "begin"),
    Mutant("the denominator is not rescaled", "denominator[h] *= correction;", ""),
    Mutant("pages are not looked up", "head + page * page_stride", "head + 0 * page * page_stride", SHARED),
    Mutant("slots are counted from the sequence's start", "% static_cast<unsigned>(page_size)", "% ~0u", SHARED),
]
