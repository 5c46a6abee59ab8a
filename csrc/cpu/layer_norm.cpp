// layer_norm: out[t, c] = (s[t, c] - mean_t) / sqrt(var_t + eps) * weight[c] + bias[c],  s = x (+ residual)
//
// Work      one row at a time; the row stays in L1 between its three passes (mean, variance, output)
// Traffic   x (and residual) read once, out (and sum) written once
// Bound     memory for many rows, latency for one
// Numerics  fp32 two-pass statistics with a corrected mean: no cancellation for rows whose mean is far from zero. The
//           sum is rounded to the dtype before it is normalised: out is LayerNorm of the tensor returned as sum
// Source    Ba et al. 2016, Layer Normalization, arXiv:1607.06450
#include "csrc/cpu/layer_norm.h"

#include <algorithm>
#include <cmath>

#include "csrc/cpu/vec.h"

namespace persimmon_fast::cpu::PF_ISA {
namespace {

template <typename T>
void add_rows(const T* a, const T* b, T* sum, int64_t n) {
  int64_t c = 0;
  for (; c + Vec::kWidth <= n; c += Vec::kWidth) store(sum + c, load(a + c) + load(b + c));
  if (c < n) store_n(sum + c, load_n(a + c, n - c) + load_n(b + c, n - c), n - c);
}

template <typename T>
void normalise_row(const T* x, const T* weight, const T* bias, T* out, int64_t n, float eps) {
  Vec sum = Vec::zero();
  int64_t c = 0;
  for (; c + Vec::kWidth <= n; c += Vec::kWidth) sum = sum + load(x + c);
  if (c < n) sum = sum + load_n(x + c, n - c);
  const float rough_mean = reduce_add(sum) / n;

  // Deviations from the rounded mean: their own mean, its rounding error, is taken off
  // below; their squares give the variance.
  Vec deviations = Vec::zero();
  Vec squares = Vec::zero();
  for (c = 0; c + Vec::kWidth <= n; c += Vec::kWidth) {
    const Vec d = load(x + c) - Vec::set1(rough_mean);
    deviations = deviations + d;
    squares = fma(d, d, squares);
  }
  float deviation = reduce_add(deviations);
  float square = reduce_add(squares);
  for (; c < n; ++c) {
    const float d = static_cast<float>(x[c]) - rough_mean;
    deviation += d;
    square += d * d;
  }
  const float correction = deviation / n;
  const float variance = std::max(square / n - correction * correction, 0.0f);  // in this order NaN stays NaN
  // variance - variance: 0, or NaN where the squares overflowed, which 1 / inf would hide
  const float rstd = 1.0f / std::sqrt(variance + (variance - variance) + eps);

  const auto affine = [&](Vec value, Vec w, Vec b) {
    return fma((value - Vec::set1(rough_mean) - Vec::set1(correction)) * Vec::set1(rstd), w, b);
  };
  for (c = 0; c + Vec::kWidth <= n; c += Vec::kWidth) {
    store(out + c, affine(load(x + c), load(weight + c), load(bias + c)));
  }
  if (c < n) {
    const int tail = static_cast<int>(n - c);
    store_n(out + c, affine(load_n(x + c, tail), load_n(weight + c, tail), load_n(bias + c, tail)), tail);
  }
}

}  // namespace

void layer_norm(const LayerNormParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
      if (p.residual != nullptr) {
        T* sum = static_cast<T*>(p.sum) + row * p.hidden_size;
        add_rows(x, static_cast<const T*>(p.residual) + row * p.residual_row_stride, sum, p.hidden_size);
        x = sum;
      }
      normalise_row(x, static_cast<const T*>(p.weight), static_cast<const T*>(p.bias),
                    static_cast<T*>(p.out) + row * p.hidden_size, p.hidden_size, p.eps);
    }
  });
}

}  // namespace persimmon_fast::cpu::PF_ISA
