// linear_residual: out[m, n] = residual[m, n] + bias[n] + sum_k x[m, k] * weight[n, k]      m < num_rows <= 16
//
// Work      stream_rows for the features of this thread, then one pass over its fp32 sums
// Traffic   weight once; the rest is small
// Bound     memory
// Numerics  fp32 sums, bias and residual added in fp32, one rounding
#include "csrc/cpu/linear_residual.h"

#include "csrc/cpu/vec.h"

namespace persimmon_fast::cpu::PF_ISA {

void linear_residual(const LinearResidualParams& p, int64_t begin, int64_t end) {
  PF_ISA::stream_rows(p.product, begin, end);
  dispatch_dtype(p.product.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t m = 0; m < p.product.num_rows; ++m) {
      const float* sums = p.product.out + m * p.product.out_row_stride;
      const T* bias = static_cast<const T*>(p.bias);
      const T* residual =
          p.residual != nullptr ? static_cast<const T*>(p.residual) + m * p.residual_row_stride : nullptr;
      T* out = static_cast<T*>(p.out) + m * p.out_row_stride;
      for (int64_t n = begin; n < end; n += Vec::kWidth) {
        Vec sum = load_part(sums + n, end - n);
        if (bias != nullptr) sum = sum + load_part(bias + n, end - n);
        if (residual != nullptr) sum = sum + load_part(residual + n, end - n);
        store_part(out + n, sum, end - n);
      }
    }
  });
}

}  // namespace persimmon_fast::cpu::PF_ISA
