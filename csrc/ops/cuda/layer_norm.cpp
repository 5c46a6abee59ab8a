// layer_norm, add_layer_norm on CUDA: launches.
#include "csrc/ops/layer_norm.h"

#include "csrc/cuda/layer_norm.h"
#include "csrc/ops/cuda/device.h"
#include "csrc/ops/cuda/streamed_input.h"

namespace persimmon_fast {
namespace {

void run_cuda(const LayerNormParams& p) { check_launch("layer_norm", cuda::launch_layer_norm(p, current_stream())); }

at::Tensor layer_norm_cuda(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  const DeviceGuard guard(x.device());
  at::Tensor out = layer_norm_meta(x, weight, bias, eps);
  run_cuda(layer_norm_params(x, nullptr, weight, bias, eps, out, nullptr));
  return out;
}

std::tuple<at::Tensor, at::Tensor> add_layer_norm_cuda(const at::Tensor& x, const at::Tensor& residual,
                                                       const at::Tensor& weight, const at::Tensor& bias, double eps) {
  const DeviceGuard guard(x.device());
  auto [out, sum] = add_layer_norm_meta(x, residual, weight, bias, eps);
  run_cuda(layer_norm_params(x, &residual, weight, bias, eps, out, &sum));
  return {out, sum};
}

}  // namespace

at::Tensor normalised_cuda(const at::Tensor& x, const InputNorm& norm) {
  return norm.weight.has_value() ? layer_norm_cuda(x, *norm.weight, *norm.bias, norm.eps) : x;
}

PF_CUDA_LIBRARY_IMPL(m) {
  m.impl("layer_norm", layer_norm_cuda);
  m.impl("add_layer_norm", add_layer_norm_cuda);
}

}  // namespace persimmon_fast
