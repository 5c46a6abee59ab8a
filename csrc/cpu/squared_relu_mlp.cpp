// squared_relu_mlp: out[m] = residual[m] + b_d + sum_n relu(x[m] . U[n] + b_u[n])^2 * D[:, n]
//
// Up to 16 rows:
//   squared_relu_up    streams U (stream.h); the hidden activation stays in fp32, so relu^2 has fp32's range. Marks
//                      the neurons that are nonzero in any row: relu^2 leaves exact zeros, most neurons are not.
//   squared_relu_down  reads D's rows of the marked neurons only. A thread owns a range of columns of every marked row:
//                      no sum crosses threads, and the order of a sum is the order of the neurons. kGroup neurons are
//                      added to each sum between its load and its store; prefetch runs 2 KB ahead in each row (a
//                      whole group ahead passes L1: 0.90 in place of 0.92 of the read bandwidth without zeros):
//
//                        neuron  3   thread 0 ========| thread 1 ========    one group of
//                        neuron  8            ========|          ========    kGroup rows
//                        neuron 21            ========|          ========
//
//                      Rejected: columns in blocks whose sums stay in L1. Reading less than about 4 KB of a row at a
//                      time costs more than sums in L2 do (4 rows: 0.64 of the read bandwidth, 0.80 without blocks).
//                      A row's sums gain fma(w, 0, sum) = sum where only other rows are nonzero: its bits are those of
//                      the row alone (for finite w).
// More rows:
//   squared_relu_rows, scaled_bias_residual   elementwise passes between torch's products
// Traffic   U once, the marked part of D once
// Bound     memory
// Numerics  fp32 up to one rounding; NaN stays NaN. The passes for many rows round where torch's products do; in fp16 a
//           row whose relu^2 would pass 65504 is divided by a power of two, which the epilogue multiplies back: exact,
//           and finite for pre-activations below 4,000
// Source    So et al. 2021, Primer, arXiv:2109.08668 (squared ReLU). Skipping zero neurons: Liu et al. 2023, Deja Vu,
//           arXiv:2310.17157, which predicts them; here they are known exactly
#include "csrc/cpu/squared_relu_mlp.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "csrc/cpu/vec.h"

namespace persimmon_fast::cpu::PF_ISA {
namespace {

// Neurons that are added to a sum between its load and its store: their weights wait in registers.
#if defined(__AVX512F__)
constexpr int kGroup = 16;
#else
constexpr int kGroup = 8;
#endif
constexpr int64_t kPrefetchBytes = 2048;  // along each row of a group, then on into the next group
constexpr float kMaxFp16 = 65504.0f;

Vec squared_relu(Vec x) {
  const Vec positive = max(Vec::zero(), x);  // x where x is NaN
  return positive * positive;
}

// sums[m][c] += sum over R neurons of values[m][r] * rows[r][c], c < n. next: rows after these, to prefetch, or null.
template <typename T, int R>
void add_neurons(const T* const* rows, const T* const* next, const float* values, int64_t num_rows, int64_t n,
                 float* sums, int64_t sums_stride) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const auto add = [&](int64_t c, const auto& load_some, const auto& store_some) {
    Vec w[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) w[r] = load_some(rows[r] + c);
    for (int64_t m = 0; m < num_rows; ++m) {
      float* sum_at = sums + m * sums_stride + c;
      Vec sum = load_some(sum_at);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum = fma(w[r], Vec::set1(values[m * kGroup + r]), sum);
      store_some(sum_at, sum);
    }
  };
  const int64_t ahead = std::min<int64_t>(kPrefetchBytes / sizeof(T), n);
  int64_t c = 0;
  for (; c + kLine <= n; c += kLine) {
    if (next != nullptr) {
      const bool in_group = c + ahead < n;
      const T* const* prefetched = in_group ? rows : next;
      const int64_t at = in_group ? c + ahead : c + ahead - n;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) __builtin_prefetch(prefetched[r] + at);
    }
    for (int64_t u = 0; u < kLine; u += Vec::kWidth) {
      add(c + u, [](const auto* p) { return load(p); }, [](float* p, Vec value) { store(p, value); });
    }
  }
  for (; c < n; c += Vec::kWidth) {
    const int64_t rest = n - c;
    add(c, [&](const auto* p) { return load_part(p, rest); }, [&](float* p, Vec value) { store_part(p, value, rest); });
  }
}

// sums[m][c] = sum over the active neurons, for the columns [begin, begin + n).
template <typename T>
void add_active(const SquaredReluDownParams& p, int64_t begin, int64_t n) {
  const T* weight = static_cast<const T*>(p.weight) + begin;
  float* sums = p.sums + begin;
  const auto row = [&](int64_t i) { return weight + p.active[i] * p.neuron_stride; };
  float values[kMaxStreamRows * kGroup];
  const auto load_values = [&](int64_t i, int count) {
    for (int64_t m = 0; m < p.num_rows; ++m) {
      for (int r = 0; r < count; ++r) values[m * kGroup + r] = p.hidden[m * p.intermediate_size + p.active[i + r]];
    }
  };
  for (int64_t m = 0; m < p.num_rows; ++m) std::fill_n(sums + m * p.hidden_size, n, 0.0f);
  int64_t i = 0;
  for (; i + kGroup <= p.num_active; i += kGroup) {
    const T* rows[kGroup];
    const T* next[kGroup];
    for (int r = 0; r < kGroup; ++r) {
      rows[r] = row(i + r);
      next[r] = row(std::min(i + kGroup + r, p.num_active - 1));
    }
    load_values(i, kGroup);
    add_neurons<T, kGroup>(rows, next, values, p.num_rows, n, sums, p.hidden_size);
  }
  for (; i < p.num_active; ++i) {
    const T* last = row(i);
    load_values(i, 1);
    add_neurons<T, 1>(&last, nullptr, values, p.num_rows, n, sums, p.hidden_size);
  }
}

// out[c] = T(sums[c] * scale + bias[c] + residual[c]), c < n. sums may be out.
template <typename T, typename Source>
void finish_row(const Source* sums, float scale, const T* bias, const T* residual, T* out, int64_t n) {
  for (int64_t c = 0; c < n; c += Vec::kWidth) {
    Vec sum = load_part(sums + c, n - c) * Vec::set1(scale);
    if (bias != nullptr) sum = sum + load_part(bias + c, n - c);
    if (residual != nullptr) sum = sum + load_part(residual + c, n - c);
    store_part(out + c, sum, n - c);
  }
}

// The power of two by which a row of fp16 is divided, so that the square of its largest value fits.
float fp16_unscale(const fp16* row, int64_t n) {
  Vec largest = Vec::zero();
  for (int64_t c = 0; c < n; c += Vec::kWidth) largest = max(load_part(row + c, n - c), largest);  // skips NaN
  const float square = reduce_max(squared_relu(largest));
  if (!(square > kMaxFp16) || std::isinf(square)) return 1.0f;
  return std::exp2(std::ceil(std::log2(square / kMaxFp16)));
}

}  // namespace

void squared_relu_up(const SquaredReluUpParams& p, int64_t begin, int64_t end) {
  PF_ISA::stream_rows(p.product, begin, end);
  uint8_t* active = p.active;
  std::fill(active + begin, active + end, uint8_t{0});
  dispatch_dtype(p.product.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* bias = static_cast<const T*>(p.bias);
    for (int64_t m = 0; m < p.product.num_rows; ++m) {
      float* hidden = p.product.out + m * p.product.out_row_stride;
      for (int64_t n = begin; n < end; n += Vec::kWidth) {
        Vec z = load_part(hidden + n, end - n);
        if (bias != nullptr) z = z + load_part(bias + n, end - n);
        store_part(hidden + n, squared_relu(z), end - n);
      }
      for (int64_t n = begin; n < end; ++n) active[n] |= hidden[n] != 0.0f;  // NaN != 0
    }
  });
}

void squared_relu_down(const SquaredReluDownParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t column = begin * kDownColumns;
    const int64_t n = std::min(end * kDownColumns, p.hidden_size) - column;
    add_active<T>(p, column, n);
    const T* bias = p.bias != nullptr ? static_cast<const T*>(p.bias) + column : nullptr;
    for (int64_t m = 0; m < p.num_rows; ++m) {
      const T* residual =
          p.residual != nullptr ? static_cast<const T*>(p.residual) + m * p.residual_row_stride + column : nullptr;
      const int64_t offset = m * p.hidden_size + column;
      finish_row(p.sums + offset, 1.0f, bias, residual, static_cast<T*>(p.out) + offset, n);
    }
  });
}

void squared_relu_rows(const SquaredReluRowsParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t n = p.intermediate_size;
    for (int64_t m = begin; m < end; ++m) {
      T* row = static_cast<T*>(p.hidden) + m * n;
      float unscale = 1.0f;
      if constexpr (std::is_same_v<T, fp16>) unscale = fp16_unscale(row, n);
      p.unscale[m] = unscale;
      const Vec scale = Vec::set1(1.0f / unscale);
      for (int64_t c = 0; c < n; c += Vec::kWidth) {
        store_part(row + c, squared_relu(load_part(row + c, n - c)) * scale, n - c);
      }
    }
  });
}

void scaled_bias_residual(const ScaledBiasResidualParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t m = begin; m < end; ++m) {
      T* row = static_cast<T*>(p.out) + m * p.hidden_size;
      const T* residual =
          p.residual != nullptr ? static_cast<const T*>(p.residual) + m * p.residual_row_stride : nullptr;
      finish_row(row, p.unscale[m], static_cast<const T*>(p.bias), residual, row, p.hidden_size);
    }
  });
}

}  // namespace persimmon_fast::cpu::PF_ISA
