// squared_relu_mlp on a CPU: scratch, threads, and torch's products for many rows.
#include "csrc/ops/squared_relu_mlp.h"

#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "csrc/cpu/linear_residual.h"
#include "csrc/cpu/squared_relu_mlp.h"
#include "csrc/ops/stream.h"

namespace persimmon_fast {
namespace {

// The indices of the nonzero entries, ascending.
int64_t list_active(const uint8_t* active, int64_t n, int32_t* list) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    list[count] = static_cast<int32_t>(i);
    count += active[i];
  }
  return count;
}

// hidden [num_rows, intermediate_size] fp32 times the rows of D that `active` marks.
void down_neuron_major(const MlpArgs& a, const at::Tensor& hidden, const at::Tensor& active, const at::Tensor& out) {
  const at::Tensor sums = fp32_scratch(out.numel());
  const at::Tensor list = at::empty({hidden.size(1)}, at::TensorOptions().dtype(at::kInt));
  cpu::SquaredReluDownParams p{};
  p.hidden = hidden.const_data_ptr<float>();
  p.num_active = list_active(active.const_data_ptr<uint8_t>(), hidden.size(1), list.mutable_data_ptr<int32_t>());
  p.active = list.const_data_ptr<int32_t>();
  p.weight = a.down_weight.const_data_ptr();
  p.bias = data_or_null(a.down_bias);
  p.residual = data_or_null(a.residual);
  p.sums = sums.mutable_data_ptr<float>();
  p.out = out.mutable_data_ptr();
  p.num_rows = a.x.size(0);
  p.intermediate_size = hidden.size(1);
  p.hidden_size = out.size(1);
  p.neuron_stride = a.down_weight.stride(1);
  p.residual_row_stride = row_stride_or_zero(a.residual);
  p.dtype = dtype_tag(out);
  const int64_t blocks = (p.hidden_size + cpu::kDownColumns - 1) / cpu::kDownColumns;
  const int64_t grain = cpu::stream_grain(p.num_active * cpu::kDownColumns);
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) { cpu::squared_relu_down(p, begin, end); });
}

void down_row_major(const MlpArgs& a, const at::Tensor& hidden, const at::Tensor& out) {
  const at::Tensor packed = pack_activations(hidden);
  const at::Tensor sums = fp32_scratch(out.numel());
  cpu::LinearResidualParams p{};
  p.product = stream_params(packed, a.x.size(0), a.down_weight, sums);
  p.product.x_is_fp32 = true;
  p.bias = data_or_null(a.down_bias);
  p.residual = data_or_null(a.residual);
  p.out = out.mutable_data_ptr();
  p.residual_row_stride = row_stride_or_zero(a.residual);
  p.out_row_stride = out.stride(0);
  at::parallel_for(0, out.size(1), cpu::stream_grain(hidden.size(1)),
                   [&](int64_t begin, int64_t end) { cpu::linear_residual(p, begin, end); });
}

void run_few_rows(const MlpArgs& a, const at::Tensor& out) {
  const int64_t num_rows = a.x.size(0);
  const int64_t intermediate_size = a.up_weight.size(0);
  const at::Tensor packed = pack_activations(normalised_cpu(a.x, a.norm));
  const at::Tensor hidden = fp32_scratch(num_rows * intermediate_size).view({num_rows, intermediate_size});
  const at::Tensor active = at::empty({intermediate_size}, at::TensorOptions().dtype(at::kByte));
  cpu::SquaredReluUpParams p{};
  p.product = stream_params(packed, num_rows, a.up_weight, hidden);
  p.bias = data_or_null(a.up_bias);
  p.active = active.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, intermediate_size, cpu::stream_grain(a.x.size(1)),
                   [&](int64_t begin, int64_t end) { cpu::squared_relu_up(p, begin, end); });
  if (is_neuron_major(a.down_weight)) {
    down_neuron_major(a, hidden, active, out);
  } else {
    down_row_major(a, hidden, out);
  }
}

at::Tensor run_many_rows(const MlpArgs& a) {
  const int64_t num_rows = a.x.size(0);
  const at::Tensor hidden = at::linear(normalised_cpu(a.x, a.norm), a.up_weight, a.up_bias).contiguous();
  const at::Tensor unscale = fp32_scratch(num_rows);
  const auto grain = [](int64_t row_size) { return std::max<int64_t>(1, 16384 / row_size); };
  cpu::SquaredReluRowsParams p{};
  p.hidden = hidden.mutable_data_ptr();
  p.unscale = unscale.mutable_data_ptr<float>();
  p.intermediate_size = hidden.size(1);
  p.dtype = dtype_tag(hidden);
  at::parallel_for(0, num_rows, grain(hidden.size(1)),
                   [&](int64_t begin, int64_t end) { cpu::squared_relu_rows(p, begin, end); });
  at::Tensor out = at::linear(hidden, a.down_weight).contiguous();
  cpu::ScaledBiasResidualParams q{};
  q.out = out.mutable_data_ptr();
  q.unscale = p.unscale;
  q.bias = data_or_null(a.down_bias);
  q.residual = data_or_null(a.residual);
  q.hidden_size = out.size(1);
  q.residual_row_stride = row_stride_or_zero(a.residual);
  q.dtype = p.dtype;
  at::parallel_for(0, num_rows, grain(out.size(1)),
                   [&](int64_t begin, int64_t end) { cpu::scaled_bias_residual(q, begin, end); });
  return out;
}

at::Tensor squared_relu_mlp_cpu(const at::Tensor& x, const at::Tensor& up_weight, const OptionalTensor& up_bias,
                                const at::Tensor& down_weight, const OptionalTensor& down_bias,
                                const OptionalTensor& residual, const OptionalTensor& norm_weight,
                                const OptionalTensor& norm_bias, double norm_eps) {
  const MlpArgs a{x, up_weight, up_bias, down_weight, down_bias, residual, {norm_weight, norm_bias, norm_eps}};
  if (x.dim() == 2 && x.size(0) > cpu::kMaxStreamRows) {
    check_mlp(a);
    return run_many_rows(a);
  }
  at::Tensor out =
      squared_relu_mlp_meta(x, up_weight, up_bias, down_weight, down_bias, residual, norm_weight, norm_bias, norm_eps);
  if (out.numel() > 0) run_few_rows(a, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(persimmon_fast, Meta, m) { m.impl("squared_relu_mlp", squared_relu_mlp_meta); }

TORCH_LIBRARY_IMPL(persimmon_fast, CPU, m) { m.impl("squared_relu_mlp", squared_relu_mlp_cpu); }

}  // namespace persimmon_fast
