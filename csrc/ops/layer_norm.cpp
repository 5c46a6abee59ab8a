// layer_norm, add_layer_norm: checks, allocation, threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "csrc/cpu/layer_norm.h"
#include "csrc/ops/checks.h"

#ifdef PF_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "csrc/cuda/layer_norm.h"
#endif

namespace persimmon_fast {
namespace {

void check_layer_norm(const char* op, const at::Tensor& x, const at::Tensor* residual, const at::Tensor& weight,
                      const at::Tensor& bias) {
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x must be [num_rows, hidden_size], got ", x.sym_sizes());
  const c10::SymInt hidden_size = x.sym_size(1);
  TORCH_CHECK_VALUE(hidden_size > 0, op, ": x must have hidden_size > 0, got ", x.sym_sizes());
  check_dense_rows(op, "x", x);
  if (residual != nullptr) {
    check_same(op, "residual", *residual, "x", x);
    check_shape(op, "residual", *residual, {x.sym_size(0), hidden_size}, "[num_rows, hidden_size]");
    check_dense_rows(op, "residual", *residual);
  }
  check_same(op, "weight", weight, "x", x);
  check_shape(op, "weight", weight, {hidden_size}, "[hidden_size]");
  check_dense_rows(op, "weight", weight);
  check_same(op, "bias", bias, "x", x);
  check_shape(op, "bias", bias, {hidden_size}, "[hidden_size]");
  check_dense_rows(op, "bias", bias);
}

at::Tensor empty_like_rows(const at::Tensor& x) {
  return at::empty_symint({x.sym_size(0), x.sym_size(1)}, x.options());
}

LayerNormParams layer_norm_params(const at::Tensor& x, const at::Tensor* residual, const at::Tensor& weight,
                                  const at::Tensor& bias, double eps, const at::Tensor& out, const at::Tensor* sum) {
  LayerNormParams p{};
  p.x = x.const_data_ptr();
  p.residual = residual != nullptr ? residual->const_data_ptr() : nullptr;
  p.weight = weight.const_data_ptr();
  p.bias = bias.const_data_ptr();
  p.sum = sum != nullptr ? sum->mutable_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  p.num_rows = x.size(0);
  p.hidden_size = x.size(1);
  p.x_row_stride = x.stride(0);
  p.residual_row_stride = residual != nullptr ? residual->stride(0) : 0;
  p.eps = static_cast<float>(eps);
  p.dtype = dtype_tag(x);
  return p;
}

// Rows per task: enough work (about 16K elements) to pay for waking a thread.
int64_t grain(int64_t hidden_size) { return std::max<int64_t>(1, 16384 / hidden_size); }

at::Tensor layer_norm_meta(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double) {
  check_layer_norm("layer_norm", x, nullptr, weight, bias);
  return empty_like_rows(x);
}

std::tuple<at::Tensor, at::Tensor> add_layer_norm_meta(const at::Tensor& x, const at::Tensor& residual,
                                                       const at::Tensor& weight, const at::Tensor& bias, double) {
  check_layer_norm("add_layer_norm", x, &residual, weight, bias);
  return {empty_like_rows(x), empty_like_rows(x)};
}

void run_cpu(const LayerNormParams& p) {
  at::parallel_for(0, p.num_rows, grain(p.hidden_size),
                   [&](int64_t begin, int64_t end) { cpu::layer_norm(p, begin, end); });
}

at::Tensor layer_norm_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  at::Tensor out = layer_norm_meta(x, weight, bias, eps);
  run_cpu(layer_norm_params(x, nullptr, weight, bias, eps, out, nullptr));
  return out;
}

std::tuple<at::Tensor, at::Tensor> add_layer_norm_cpu(const at::Tensor& x, const at::Tensor& residual,
                                                      const at::Tensor& weight, const at::Tensor& bias, double eps) {
  auto [out, sum] = add_layer_norm_meta(x, residual, weight, bias, eps);
  run_cpu(layer_norm_params(x, &residual, weight, bias, eps, out, &sum));
  return {out, sum};
}

#ifdef PF_WITH_CUDA

void run_cuda(const LayerNormParams& p) {
  C10_CUDA_CHECK(cuda::launch_layer_norm(p, c10::cuda::getCurrentCUDAStream()));
}

at::Tensor layer_norm_cuda(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor out = layer_norm_meta(x, weight, bias, eps);
  run_cuda(layer_norm_params(x, nullptr, weight, bias, eps, out, nullptr));
  return out;
}

std::tuple<at::Tensor, at::Tensor> add_layer_norm_cuda(const at::Tensor& x, const at::Tensor& residual,
                                                       const at::Tensor& weight, const at::Tensor& bias, double eps) {
  const c10::cuda::CUDAGuard guard(x.device());
  auto [out, sum] = add_layer_norm_meta(x, residual, weight, bias, eps);
  run_cuda(layer_norm_params(x, &residual, weight, bias, eps, out, &sum));
  return {out, sum};
}

#endif

}  // namespace

TORCH_LIBRARY_IMPL(persimmon_fast, Meta, m) {
  m.impl("layer_norm", layer_norm_meta);
  m.impl("add_layer_norm", add_layer_norm_meta);
}

TORCH_LIBRARY_IMPL(persimmon_fast, CPU, m) {
  m.impl("layer_norm", layer_norm_cpu);
  m.impl("add_layer_norm", add_layer_norm_cpu);
}

#ifdef PF_WITH_CUDA
TORCH_LIBRARY_IMPL(persimmon_fast, CUDA, m) {
  m.impl("layer_norm", layer_norm_cuda);
  m.impl("add_layer_norm", add_layer_norm_cuda);
}
#endif

}  // namespace persimmon_fast
