// stream_rows: out[m, n] = sum_k x[m, k] * weight[n, k]      m < num_rows <= 16, n in [begin, end), fp32 sums
//
// Access    Memory reaches its full bandwidth when a core reads several sequential streams that lie far apart. So the
//           rows [begin, end) are cut into 8 runs, one after the other in memory, and walked side by side; every run
//           is contiguous, and lines are prefetched 2 KB ahead (over the end of a row into the next one):
//
//             begin    row 0, row 1, row 2, ...           stream 0 ->
//             + len    row len, row len + 1, ...          stream 1 ->
//             + 7 len  row 7 len, ...                     stream 7 ->      step i works on row i of every stream
//
// Tile      k is cut into chunks so that the chunk of x (16 KB) stays in L1. In a chunk, rows_at_once(M) streams times
//           a block of M <= kMaxRowBlock rows of x are accumulated in registers: each weight is loaded and widened once
//           per block, each x once per rows_at_once streams. Between chunks the sums rest in a small buffer.
//           Rejected: one stream x 16 rows of x, every FMA with a memory operand: 3.3e9 FMA/s from L1, where 4 streams
//           x 6 rows reach 4.1e9 (AVX-512, bf16).
//           bf16 on a processor with AMX: the same streams through the tile unit, see stream_amx.h
// Layout    packed x is [in_features / width][num_rows][width], width = Vec::kWidth, zero beyond in_features: the
//           inner loop reads it front to back through one pointer.
// Traffic   weights once; x from L2 once per 8 weight rows
// Measured  share of the bandwidth of a read-only loop in the same run, bf16 16384 x 4096, one thread, best of 9:
//             rows of x        1     2     4     8     16
//             AVX-512        0.97  0.97  0.90  0.66  0.42
//             AMX            0.96  0.95  0.91  0.87  0.84
//             torch          0.68  0.67  0.67  0.68  0.61   (F.linear: oneDNN, AMX)
//           one core of a Sapphire-Rapids-class Xeon at 16 GB/s, torch 2.13.0+cpu, 2026-11; CPU time, on a busy machine
// Numerics  one fp32 accumulator vector per (m, n), in the order of k, whatever M and the split into tasks are
#include "csrc/cpu/stream.h"

#include <algorithm>
#include <utility>

#include "csrc/cpu/vec.h"
#if defined(__AVX512BF16__)
#include "csrc/cpu/stream_amx.h"
#endif

namespace persimmon_fast::cpu::PF_ISA {
namespace {

constexpr int kStreams = 8;
constexpr int64_t kPrefetchBytes = 2048;
constexpr int64_t kChunkFloats = 4096;  // of packed x: 16 KB
constexpr int64_t kLineBytes = 64;

// Registers for accumulators, the others hold weights and x; rows of x in one pass over a chunk.
#if defined(__AVX512F__)
constexpr int kAccumulators = 24;
constexpr int kMaxRowBlock = 6;
#elif defined(__AVX2__)
constexpr int kAccumulators = 12;
constexpr int kMaxRowBlock = 6;
#else
constexpr int kAccumulators = 6;
constexpr int kMaxRowBlock = 3;
#endif

constexpr int rows_at_once(int num_x) {
  int rows = kStreams;
  while (rows > 1 && rows * num_x > kAccumulators) rows /= 2;
  return rows;
}

// The current row of each stream, and the buffer of sums: [kStreams][kMaxStreamRows].
template <typename T>
struct Step {
  const T* rows[kStreams];
  int num_valid;  // streams that still have a row
  Vec sums[kStreams * kMaxStreamRows];
};

// sums[s][m] += x[m] . rows[s] over columns [k, k + n), for M rows of x from `first_x` and every valid stream.
// `x` is the packed chunk, x_step floats from one vector of columns to the next.
template <typename T, int M>
void multiply_chunk(Step<T>& step, int64_t k, int64_t n, const float* x, int64_t x_step, int first_x) {
  constexpr int kRows = rows_at_once(M);
  constexpr int kWidth = Vec::kWidth;
  constexpr int kLine = kLineBytes / sizeof(T);
  static_assert(kLine % kWidth == 0, "a cache line holds whole vectors");
  for (int s0 = 0; s0 < step.num_valid; s0 += kRows) {
    Vec acc[kRows][M];
    const T* w[kRows];
    for (int r = 0; r < kRows; ++r) {
      w[r] = step.rows[s0 + r] + k;
      for (int m = 0; m < M; ++m) acc[r][m] = step.sums[(s0 + r) * kMaxStreamRows + first_x + m];
    }
    const auto multiply = [&](const Vec(&weights)[kRows], const float* xs) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vec value = load(xs + m * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[r][m] = fma(weights[r], value, acc[r][m]);
      }
    };
    const float* xs = x;
    int64_t c = 0;
    for (; c + kLine <= n; c += kLine) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(reinterpret_cast<const char*>(w[r] + c) + kPrefetchBytes);
#pragma GCC unroll 8
      for (int u = 0; u < kLine; u += kWidth) {
        Vec weights[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) weights[r] = load(w[r] + c + u);
        multiply(weights, xs);
        xs += x_step;
      }
    }
    for (; c < n; c += kWidth) {
      const int count = static_cast<int>(std::min<int64_t>(kWidth, n - c));
      Vec weights[kRows];
      for (int r = 0; r < kRows; ++r) weights[r] = load_n(w[r] + c, count);
      multiply(weights, xs);
      xs += x_step;
    }
    for (int r = 0; r < kRows; ++r) {
      for (int m = 0; m < M; ++m) step.sums[(s0 + r) * kMaxStreamRows + first_x + m] = acc[r][m];
    }
  }
}

template <typename T>
using MultiplyChunk = void (*)(Step<T>&, int64_t, int64_t, const float*, int64_t, int);

template <typename T, int... kRowBlocks>
MultiplyChunk<T> multiply_chunk_for(int num_x, std::integer_sequence<int, kRowBlocks...>) {
  static constexpr MultiplyChunk<T> kTable[] = {multiply_chunk<T, kRowBlocks + 1>...};
  return kTable[num_x - 1];
}

template <typename T>
void stream_typed(const StreamParams& p, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(p.weight);
  const int num_x = static_cast<int>(p.num_rows);
  const int64_t count = end - begin;
  const int64_t len = (count + kStreams - 1) / kStreams;
  const int64_t line = kLineBytes / static_cast<int64_t>(sizeof(T));
  const int64_t chunk = std::max(line, kChunkFloats / num_x / line * line);
  Step<T> step;
  for (int64_t i = 0; i < len; ++i) {
    step.num_valid = static_cast<int>((count - i + len - 1) / len);
    for (int s = 0; s < kStreams; ++s) {
      // A stream without a row repeats another one's: it is read, as part of a tile, and not stored.
      const int64_t row = s < step.num_valid ? begin + s * len + i : begin + i;
      step.rows[s] = weight + row * p.weight_row_stride;
    }
    std::fill(step.sums, step.sums + kStreams * kMaxStreamRows, Vec::zero());
    for (int64_t k = 0; k < p.in_features; k += chunk) {
      const int64_t n = std::min(chunk, p.in_features - k);
      for (int m = 0, block; m < num_x; m += block) {
        const int blocks_left = (num_x - m + kMaxRowBlock - 1) / kMaxRowBlock;
        block = (num_x - m + blocks_left - 1) / blocks_left;  // blocks of like size
        multiply_chunk_for<T>(block, std::make_integer_sequence<int, kMaxRowBlock>{})(
            step, k, n, p.packed + k * num_x + m * Vec::kWidth, static_cast<int64_t>(num_x) * Vec::kWidth, m);
      }
    }
    for (int s = 0; s < step.num_valid; ++s) {
      float* out = p.out + begin + s * len + i;
      for (int m = 0; m < num_x; ++m) out[m * p.out_row_stride] = reduce_add(step.sums[s * kMaxStreamRows + m]);
    }
  }
}

}  // namespace

void pack_activations(const PackParams& p, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
  if (active_isa() == Isa::kAmx && p.dtype == DType::kBFloat16) {
    return amx::pack(p, begin * kPackBlock, end * kPackBlock);
  }
#endif
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t last = std::min(end * kPackBlock, p.in_features);
    for (int64_t m = 0; m < p.num_rows; ++m) {
      const T* x = static_cast<const T*>(p.x) + m * p.x_row_stride;
      float* packed = p.packed + m * Vec::kWidth;
      int64_t k = begin * kPackBlock;
      for (; k + Vec::kWidth <= last; k += Vec::kWidth) store(packed + k * p.num_rows, load(x + k));
      if (k < last) store(packed + k * p.num_rows, load_n(x + k, static_cast<int>(last - k)));
    }
  });
}

void stream_rows(const StreamParams& p, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
  if (active_isa() == Isa::kAmx && p.dtype == DType::kBFloat16 && !p.x_is_fp32) return amx::stream_rows(p, begin, end);
#endif
  dispatch_dtype(p.dtype, [&](auto tag) { stream_typed<decltype(tag)>(p, begin, end); });
}

}  // namespace persimmon_fast::cpu::PF_ISA
