// qkv_norm_rope: [q | k | v][t, h] = x[t] W[h]^T + b[h], 3 * head_dim rows of W per head, then
//                q = rope(LayerNorm(q)), k = rope(LayerNorm(k)), v as it is; k and v to their cache slots
//
// Work      a thread owns whole heads: it streams their rows of W into fp32 scratch, and finishes them from there
// Traffic   W once; q, k, v written once, k and v where attention reads them: no projection in memory, no copy
// Bound     memory (W)
// Numerics  product, bias, statistics and rotary in fp32, one rounding. qkv_epilogue starts from a projection that
//           torch rounded to the dtype
// Layout    W packs [num_heads, 3, head_dim] rows: one head is one contiguous range
#include "csrc/cpu/qkv_norm_rope.h"

#include "csrc/cpu/norm_rope.h"

namespace persimmon_fast::cpu::PF_ISA {
namespace {

// qkv: the 3 * head_dim values of one head, fp32 sums or a projection in T; bias null: none.
template <typename T, typename Source>
void finish_head(const QkvNormRopeParams& p, int64_t token, int64_t h, const Source* qkv, const T* bias) {
  const int64_t head_dim = p.head.head_dim;
  alignas(64) float head[kMaxHeadDim];
  const auto load_head = [&](int64_t part) {
    for (int64_t c = 0; c < head_dim; c += Vec::kWidth) {
      Vec value = load_part(qkv + part * head_dim + c, head_dim - c);
      if (bias != nullptr) value = value + load_part(bias + part * head_dim + c, head_dim - c);
      store_part(head + c, value, head_dim - c);
    }
  };
  load_head(0);
  norm_rope_head(head, p.head, p.head.q_norm, token, h,
                 static_cast<T*>(p.out.q) + (token * p.head.num_heads + h) * head_dim);
  const int64_t slot = p.out.slot_mapping != nullptr ? p.out.slot_mapping[token] : token;
  if (slot < 0) return;
  const int64_t page = slot / p.out.page_size;
  const int64_t cache_row = (page * p.head.num_heads + h) * p.out.page_size + slot % p.out.page_size;
  load_head(1);
  norm_rope_head(head, p.head, p.head.k_norm, token, h, static_cast<T*>(p.out.k) + cache_row * head_dim);
  load_head(2);
  T* v = static_cast<T*>(p.out.v) + cache_row * head_dim;
  for (int64_t c = 0; c < head_dim; c += Vec::kWidth) {
    store_part(v + c, load_part(head + c, head_dim - c), head_dim - c);
  }
}

}  // namespace

void qkv_norm_rope(const QkvNormRopeParams& p, int64_t begin, int64_t end) {
  const int64_t rows = 3 * p.head.head_dim;
  PF_ISA::stream_rows(p.product, begin * rows, end * rows);
  dispatch_dtype(p.head.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t token = 0; token < p.product.num_rows; ++token) {
      for (int64_t h = begin; h < end; ++h) {
        const T* bias = p.bias != nullptr ? static_cast<const T*>(p.bias) + h * rows : nullptr;
        finish_head<T>(p, token, h, p.product.out + token * p.product.out_row_stride + h * rows, bias);
      }
    }
  });
}

void qkv_epilogue(const QkvNormRopeParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.head.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t i = begin; i < end; ++i) {
      finish_head<T>(p, i / p.head.num_heads, i % p.head.num_heads,
                     static_cast<const T*>(p.projection) + i * 3 * p.head.head_dim, static_cast<const T*>(nullptr));
    }
  });
}

}  // namespace persimmon_fast::cpu::PF_ISA
