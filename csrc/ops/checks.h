// What every op does before its kernel: argument checks with one wording, dtype tags, empty-output helpers.
//
// The checks read metadata only and work on symbolic sizes, so an op's `check_*` function serves the real
// kernels and the Meta (fake) implementation alike: torch.compile refuses what the kernel would refuse.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/SymInt.h>

#include <initializer_list>
#include <optional>

#include "csrc/common/types.h"

namespace persimmon_fast {

using OptionalTensor = std::optional<at::Tensor>;

// One expected size: a number, or -1 for any.
inline void check_shape(const char* op, const char* name, const at::Tensor& t,
                        std::initializer_list<c10::SymInt> expected, const char* layout) {
  bool equal = t.dim() == static_cast<int64_t>(expected.size());
  if (equal) {
    int64_t dim = 0;
    for (const c10::SymInt& size : expected) {
      const bool any = size.maybe_as_int() == -1;
      if (!any && t.sym_size(dim) != size) equal = false;
      ++dim;
    }
  }
  TORCH_CHECK_VALUE(equal, op, ": ", name, " must be ", layout, " = ",
                    c10::SymIntArrayRef(expected.begin(), expected.size()), ", got ", t.sym_sizes());
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& t, at::ScalarType expected) {
  TORCH_CHECK_TYPE(t.scalar_type() == expected, op, ": ", name, " must be ", expected, ", got ", t.scalar_type());
}

// x decides dtype and device of the op: float32, float16 or bfloat16.
inline void check_float(const char* op, const char* name, const at::Tensor& t) {
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op, ": ", name,
                   " must be float32, float16 or bfloat16, got ", type);
}

inline void check_same(const char* op, const char* name, const at::Tensor& t, const char* like_name,
                       const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.device() == like.device(), op, ": ", name, " must be on ", like.device(), " as ", like_name,
                    " is, got ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), op, ": ", name, " must be ", like.scalar_type(), " as ",
                   like_name, " is, got ", t.scalar_type());
}

inline void check_device(const char* op, const char* name, const at::Tensor& t, const char* like_name,
                         const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.device() == like.device(), op, ": ", name, " must be on ", like.device(), " as ", like_name,
                    " is, got ", t.device());
}

// Kernels read whole rows: the last dimension must be dense. Other strides are free.
inline void check_dense_rows(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.sym_size(-1) <= 1 || t.sym_stride(-1) == 1, op, ": ", name,
                    " must have a last dimension of stride 1 (call .contiguous()), got strides ", t.sym_strides());
}

inline DType dtype_tag(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

inline const void* data_or_null(const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

}  // namespace persimmon_fast
