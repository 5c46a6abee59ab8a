// Operations of a warp: __syncwarp, shuffles, votes, reductions; the matrix instructions build on collect().
#pragma once

#include "csrc/emu/scheduler.h"

namespace emu {

enum WarpOperationKind { kSyncwarp = 1, kShuffle, kVote, kMatch, kReduce, kMma, kLdmatrix, kStmatrix, kSetmaxnreg };

struct Nothing {
  EMU_RT void operator()(Warp&, uint32_t) const {}
};

EMU_RT WarpOperation& find_operation(Warp& warp, uint32_t mask) {
  WarpOperation* free = nullptr;
  for (int i = 0; i < warp.num_operations; ++i) {
    WarpOperation& operation = warp.operations[i];
    if (operation.mask == mask) return operation;
    if (operation.arrived == 0 && operation.leaving == 0 && free == nullptr) free = &operation;
  }
  // One per mask at most, and masks in use at a time are disjoint or wait for each other: kWarpSize is enough.
  if (free == nullptr) free = &warp.operations[warp.num_operations++];
  free->mask = mask;
  return *free;
}

// Brings `count` words of this lane, waits until all lanes of the mask have come, and returns what there is for this
// lane. The lane that comes last calls all(warp, mask), which computes warp.out from warp.in for every lane of the
// mask. Only __syncwarp orders memory accesses; the other operations exchange registers.
template <class All>
EMU_RT const uint32_t* collect(uint32_t mask, int kind, const uint32_t* words, int count, Site site, All&& all) {
  CudaThread* thread = self();
  Warp& warp = *thread->warp;
  const uint32_t lane_bit = 1u << thread->lane;
  ++machine.stats.warp_operations;
  EMU_CHECK((mask & lane_bit) != 0, site, "warp operation: the calling lane is not in its own mask 0x%08x", mask);
  EMU_CHECK((mask & ~warp.live) == 0, site,
            "warp operation: mask 0x%08x names lanes that have exited or do not exist (running: 0x%08x)", mask,
            warp.live);
  WarpOperation& operation = find_operation(warp, mask);
  if (operation.arrived == 0) {
    operation.kind = kind;
    operation.site = site;
  } else {
    EMU_CHECK(operation.kind == kind && (kind == kSyncwarp || operation.site.line == site.line), site,
              "divergent warp operation: other lanes of mask 0x%08x are at %s:%d", mask, base_name(operation.site.file),
              operation.site.line);
  }
  for (int i = 0; i < count; ++i) warp.in[thread->lane][i] = words[i];
  const uint64_t* token = &operation.token[operation.generation % 2];
  if (kind == kSyncwarp) hb_release(token);
  operation.arrived |= lane_bit;
  if (operation.arrived == mask) {
    all(warp, mask);
    operation.arrived = 0;
    operation.leaving |= mask & ~lane_bit;
    ++operation.generation;
    wake_all(operation.waiting);
  } else {
    block_in(operation.waiting, "a warp operation", site);
    operation.leaving &= ~lane_bit;
  }
  if (kind == kSyncwarp) hb_acquire(token);
  return warp.out[thread->lane];
}

EMU_RT void sync_warp(uint32_t mask, Site site) { collect(mask, kSyncwarp, nullptr, 0, site, Nothing{}); }

struct ShuffleAll {
  EMU_RT void operator()(Warp& warp, uint32_t mask) const {
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      const uint32_t* from = warp.in[warp.in[lane][4]];
      for (int i = 0; i < 4; ++i) warp.out[lane][i] = from[i];
    }
  }
};

template <class T>
EMU_RT T shuffle(uint32_t mask, T value, int source_lane, Site site) {
  static_assert(sizeof(T) <= 16, "a shuffle moves up to 16 bytes here");
  EMU_CHECK(mask >> source_lane & 1, site, "shuffle: reads lane %d, which is not in mask 0x%08x", source_lane, mask);
  uint32_t words[5] = {};
  __builtin_memcpy(words, &value, sizeof(T));
  words[4] = static_cast<uint32_t>(source_lane);
  const uint32_t* out = collect(mask, kShuffle, words, 5, site, ShuffleAll{});
  __builtin_memcpy(&value, out, sizeof(T));
  return value;
}

EMU_RT void check_width(int width, Site site) {
  EMU_CHECK(width > 0 && width <= kWarpSize && (width & (width - 1)) == 0, site,
            "shuffle: width %d is not a power of two up to 32", width);
}

// Gives every lane of the mask the same word, made of all their words.
template <class Combine>
struct ReduceAll {
  Combine combine;
  uint32_t start;
  EMU_RT void operator()(Warp& warp, uint32_t mask) const {
    uint32_t result = start;
    bool first = true;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1, first = false) {
      result = combine(result, warp.in[__builtin_ctz(rest)][0], __builtin_ctz(rest), first);
    }
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) warp.out[__builtin_ctz(rest)][0] = result;
  }
};

// combine(accumulated, word, lane, is_first)
template <class Combine>
EMU_RT uint32_t reduce_words(uint32_t mask, uint32_t word, int kind, Combine combine, Site site) {
  return collect(mask, kind, &word, 1, site, ReduceAll<Combine>{combine, 0})[0];
}

struct BallotBits {
  EMU_RT uint32_t operator()(uint32_t bits, uint32_t word, int lane, bool) const { return bits | word << lane; }
};
EMU_RT uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  return reduce_words(mask, predicate, kVote, BallotBits{}, site);
}

template <class T, class Op>
struct Combine {
  Op op;
  EMU_RT uint32_t operator()(uint32_t accumulated, uint32_t word, int, bool is_first) const {
    return is_first ? word : static_cast<uint32_t>(op(static_cast<T>(accumulated), static_cast<T>(word)));
  }
};
template <class T, class Op>
EMU_RT T reduce(uint32_t mask, T value, Op op, Site site) {
  return static_cast<T>(reduce_words(mask, static_cast<uint32_t>(value), kReduce, Combine<T, Op>{op}, site));
}

}  // namespace emu
