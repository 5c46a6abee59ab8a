// Schemas of all ops: the table of contents of the extension. Shapes are in persimmon_fast/ops.py.
#pragma once

#include <torch/library.h>

namespace persimmon_fast {

inline void define_ops(torch::Library& m) {
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps)"
      " -> (Tensor out, Tensor sum)");

  m.def(
      "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight,"
      " Tensor? k_bias, Tensor cos_sin, Tensor position_ids, float eps) -> (Tensor q, Tensor k)");
  m.def(
      "qk_norm_rope_(Tensor(a!) q, Tensor(b!) k, Tensor? q_weight, Tensor? q_bias,"
      " Tensor? k_weight, Tensor? k_bias, Tensor cos_sin, Tensor position_ids, float eps) -> ()");
  m.def(
      "qkv_norm_rope(Tensor x, Tensor weight, Tensor? bias, Tensor? q_weight, Tensor? q_bias,"
      " Tensor? k_weight, Tensor? k_bias, Tensor cos_sin, Tensor position_ids, float eps,"
      " int num_heads, Tensor? norm_weight=None, Tensor? norm_bias=None, float norm_eps=1e-5)"
      " -> (Tensor q, Tensor k, Tensor v)");
  m.def(
      "qkv_norm_rope_paged(Tensor x, Tensor weight, Tensor? bias, Tensor? q_weight,"
      " Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, Tensor cos_sin, Tensor position_ids,"
      " float eps, int num_heads, Tensor slot_mapping, Tensor(a!) k_cache, Tensor(b!) v_cache,"
      " Tensor? norm_weight=None, Tensor? norm_bias=None, float norm_eps=1e-5) -> Tensor q");

  m.def(
      "flash_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
      " Tensor? seqused_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, bool causal)"
      " -> (Tensor out, Tensor softmax_lse)");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table,"
      " Tensor cache_seqlens, Tensor cu_seqlens_q, SymInt max_seqlen_q, float softmax_scale)"
      " -> Tensor");

  m.def("linear_residual(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor");
  m.def(
      "squared_relu_mlp(Tensor x, Tensor up_weight, Tensor? up_bias, Tensor down_weight,"
      " Tensor? down_bias, Tensor? residual, Tensor? norm_weight=None, Tensor? norm_bias=None,"
      " float norm_eps=1e-5) -> Tensor");

  m.def(
      "lm_head_argmax(Tensor x, Tensor weight, int[]? vocab_ranges=None)"
      " -> (Tensor token_ids, Tensor logprobs)");
  m.def(
      "lm_head_sample(Tensor x, Tensor weight, Tensor temperature, Tensor top_k, Tensor top_p,"
      " Tensor min_p, Tensor seeds, Tensor offsets, Tensor? penalty_ids,"
      " Tensor? repetition_penalty, int[]? vocab_ranges=None)"
      " -> (Tensor token_ids, Tensor logprobs)");
  m.def("lm_head_logprobs(Tensor x, Tensor weight, Tensor token_ids, int[]? vocab_ranges=None) -> Tensor");
}

}  // namespace persimmon_fast
