// layer_norm, add_layer_norm on a CPU: threads.
#include "csrc/ops/layer_norm.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "csrc/cpu/layer_norm.h"
#include "csrc/ops/input_norm.h"

namespace persimmon_fast {
namespace {

// Rows per task: enough work (about 16K elements) to pay for waking a thread.
int64_t grain(int64_t hidden_size) { return std::max<int64_t>(1, 16384 / hidden_size); }

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

}  // namespace

at::Tensor normalised_cpu(const at::Tensor& x, const InputNorm& norm) {
  return norm.weight.has_value() ? layer_norm_cpu(x, *norm.weight, *norm.bias, norm.eps) : x;
}

TORCH_LIBRARY_IMPL(persimmon_fast, Meta, m) {
  m.impl("layer_norm", layer_norm_meta);
  m.impl("add_layer_norm", add_layer_norm_meta);
}

TORCH_LIBRARY_IMPL(persimmon_fast, CPU, m) {
  m.impl("layer_norm", layer_norm_cpu);
  m.impl("add_layer_norm", add_layer_norm_cpu);
}

}  // namespace persimmon_fast
