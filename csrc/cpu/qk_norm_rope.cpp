// qk_norm_rope: out[t, h] = rope(LayerNorm(x[t, h]), position_ids[t]) for x = q and x = k
//
// Work      one head at a time, in fp32 in L1; all reads of a head come before its writes, so out may be x
// Traffic   q and k read once, written once; a row of cos_sin serves all heads of a token
// Bound     memory for many tokens, latency of two reductions per head for few
// Numerics  fp32 throughout, one rounding
// Source    Su et al. 2021, RoFormer, arXiv:2104.09864 (rotary embedding, half-split pairs as in GPT-NeoX);
//           Ba et al. 2016, Layer Normalization, arXiv:1607.06450
#include "csrc/cpu/qk_norm_rope.h"

#include "csrc/cpu/norm_rope.h"

namespace persimmon_fast::cpu::PF_ISA {
namespace {

template <typename T>
void load_head(const T* x, float* head, int64_t head_dim) {
  for (int64_t c = 0; c < head_dim; c += Vec::kWidth) {
    store_part(head + c, load_part(x + c, head_dim - c), head_dim - c);
  }
}

}  // namespace

void qk_norm_rope(const QkNormRopeParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.head.dtype, [&](auto tag) {
    using T = decltype(tag);
    alignas(64) float head[kMaxHeadDim];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i / p.head.num_heads;
      const int64_t h = i % p.head.num_heads;
      load_head(static_cast<const T*>(p.q) + token * p.q_token_stride + h * p.q_head_stride, head, p.head.head_dim);
      norm_rope_head(head, p.head, p.head.q_norm, token, h,
                     static_cast<T*>(p.q_out) + token * p.q_out_token_stride + h * p.q_out_head_stride);
      load_head(static_cast<const T*>(p.k) + token * p.k_token_stride + h * p.k_head_stride, head, p.head.head_dim);
      norm_rope_head(head, p.head, p.head.k_norm, token, h,
                     static_cast<T*>(p.k_out) + token * p.k_out_token_stride + h * p.k_out_head_stride);
    }
  });
}

}  // namespace persimmon_fast::cpu::PF_ISA
