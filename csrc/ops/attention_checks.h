// Checks that flash_attention and paged_attention share, on every device.
#pragma once

#include "csrc/cpu/attention.h"
#include "csrc/ops/checks.h"

namespace persimmon_fast {

inline void check_heads(const char* op, const at::Tensor& q) {
  check_float(op, "q", q);
  TORCH_CHECK_VALUE(q.dim() == 3, op, ": q must be [total_q, num_heads, head_dim], got ", q.sym_sizes());
  const c10::SymInt head_dim = q.sym_size(2);
  TORCH_CHECK_VALUE(head_dim > 0 && head_dim % 8 == 0 && head_dim <= cpu::kAttentionMaxHeadDim, op,
                    ": head_dim must be a multiple of 8 up to ", cpu::kAttentionMaxHeadDim, ", got ", head_dim);
  check_dense_rows(op, "q", q);
}

// An int32 tensor of lengths, starts or page ids on the device of q.
inline void check_index(const char* op, const char* name, const at::Tensor& t, const at::Tensor& q,
                        std::initializer_list<c10::SymInt> shape, const char* layout) {
  check_device(op, name, t, "q", q);
  check_dtype(op, name, t, at::kInt);
  check_shape(op, name, t, shape, layout);
  check_dense_rows(op, name, t);
}

}  // namespace persimmon_fast
