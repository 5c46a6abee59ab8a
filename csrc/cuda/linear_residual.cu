// linear_residual: out[m, n] = (sum_k x[m, k] * weight[n, k] + bias[n]) + residual[m, n]
//
// Tile      gemm.cuh, on sm_90a gemm_sm90.cuh; up to 16 rows stream.cuh, in units of 16 weight rows. The epilogue reads
//           the residual and writes the output in rows of 16-byte pieces
// Traffic   x, weight, residual, out: once each from HBM as far as L2 holds what tiles share
// Bound     tensor cores from about 150 rows on; below, the weight
// Resources ptxas -v, registers per thread (sm_80; sm_90a), no spills on 8.0, 8.6, 8.9, 9.0a. 16-bit: large tile 242;
//           246, 64 KB shared, 2 blocks per multiprocessor (8.6, 8.9: 1); small 116; 120, 32 KB, 4 (3); small
//           unaligned 96; 95. fp32: 77; 71, 16 KB. Streamed: docs/kernels/stream.md
// Numerics  fp32 sums, bias and residual added in fp32, one rounding. NaN and inf stay in their row and column
// Measured  on no GPU yet
// Source    gemm.cuh
#include "csrc/cuda/linear_residual.h"

#include "csrc/cuda/dispatch.h"
#include "csrc/cuda/stream.cuh"

namespace persimmon_fast::cuda {
namespace {

template <typename scalar_t>
cudaError_t launch_typed(const LinearResidualParams& p, cudaStream_t stream) {
  const GemmOperands operands{p.x,           p.weight,       p.num_rows,         p.out_features,
                              p.in_features, p.x_row_stride, p.weight_row_stride};
  const auto epilogue = bias_residual<scalar_t>(p.bias, p.residual, p.residual_row_stride, p.out, p.out_features);
  // Units of 16 rows: enough of them for every multiprocessor. At 4,096 output features 256.
  return launch_product<scalar_t, 16>("linear_residual", operands, StreamNorm{}, epilogue, p.num_multiprocessors,
                                      stream);
}

}  // namespace

cudaError_t launch_linear_residual(const LinearResidualParams& params, cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto scalar) { return launch_typed<decltype(scalar)>(params, stream); });
}

}  // namespace persimmon_fast::cuda
