"""Bytes that an op must move and floating-point operations that it must do: the one place where rates come from.

Bytes are what an ideal kernel reads and writes once: inputs, weights, outputs; nothing that could stay on the chip
(scores, logits, the MLP's hidden activation). Flops are those of the matrix products, a multiply-add counting two.
Sizes are in elements, `itemsize` in bytes per element, rates in 1e9 bytes or 1e12 flops per second.
"""

from __future__ import annotations

from dataclasses import dataclass

FP32_BYTES = 4
INT64_BYTES = 8


@dataclass(frozen=True)
class Counts:
    num_bytes: float
    flops: float = 0.0

    def limit_seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Least time on a machine with these rates: the roofline."""
        return max(self.num_bytes / bytes_per_second, self.flops / flops_per_second)

    def is_memory_bound(self, bytes_per_second: float, flops_per_second: float) -> bool:
        return self.num_bytes / bytes_per_second >= self.flops / flops_per_second


def layer_norm(rows: int, hidden_size: int, itemsize: int) -> Counts:
    """x in, result out, weight and bias."""
    return Counts((2 * rows + 2) * hidden_size * itemsize)


def add_layer_norm(rows: int, hidden_size: int, itemsize: int) -> Counts:
    """x and residual in, result and sum out, weight and bias."""
    return Counts((4 * rows + 2) * hidden_size * itemsize)


def qk_norm_rope(rows: int, num_heads: int, head_dim: int, rotary_dim: int, itemsize: int) -> Counts:
    """q and k in and out, four LayerNorm vectors; per row a position and its row of the rotary table."""
    values = 4 * rows * num_heads * head_dim + 4 * head_dim
    return Counts(values * itemsize + rows * (rotary_dim * FP32_BYTES + INT64_BYTES))


def qkv_norm_rope(rows: int, hidden_size: int, head_dim: int, rotary_dim: int, itemsize: int) -> Counts:
    """x, weight and bias in, q, k and v out, four LayerNorm vectors, positions and rotary rows."""
    out_features = 3 * hidden_size
    values = rows * hidden_size + out_features * (hidden_size + 1) + rows * out_features + 4 * head_dim
    num_bytes = values * itemsize + rows * (rotary_dim * FP32_BYTES + INT64_BYTES)
    return Counts(num_bytes, 2 * rows * hidden_size * out_features)


def qkv_norm_rope_paged(rows: int, hidden_size: int, head_dim: int, rotary_dim: int, itemsize: int) -> Counts:
    """As `qkv_norm_rope`, and the slot of every row."""
    inner = qkv_norm_rope(rows, hidden_size, head_dim, rotary_dim, itemsize)
    return Counts(inner.num_bytes + rows * INT64_BYTES, inner.flops)


def linear_residual(rows: int, in_features: int, out_features: int, itemsize: int) -> Counts:
    """x, weight, bias and residual in, result out."""
    values = rows * in_features + out_features * (in_features + 1) + 2 * rows * out_features
    return Counts(values * itemsize, 2 * rows * in_features * out_features)


def squared_relu_mlp(
    rows: int, hidden_size: int, intermediate_size: int, itemsize: int, active_fraction: float
) -> Counts:
    """x and residual in, result out, up-projection whole; of the down-projection the rows of the neurons that are
    nonzero in some row of x (`active_fraction` of them, 1 without zero skipping)."""
    up = intermediate_size * (hidden_size + 1)
    down = active_fraction * intermediate_size * hidden_size + hidden_size
    num_bytes = (up + down + 3 * rows * hidden_size) * itemsize
    return Counts(num_bytes, 2 * rows * hidden_size * intermediate_size * (1 + active_fraction))


def attended_pairs(seqlen_q: int, seqlen_k: int) -> int:
    """Query-key pairs under a causal mask aligned at the bottom right, seqlen_q <= seqlen_k."""
    return seqlen_q * (seqlen_k - seqlen_q) + seqlen_q * (seqlen_q + 1) // 2


def flash_attention(batch_size: int, seqlen: int, num_heads: int, head_dim: int, itemsize: int) -> Counts:
    """Causal self-attention: q, k, v in, result and log-sum-exp out; two products over the attended pairs."""
    rows = batch_size * seqlen
    num_bytes = 4 * rows * num_heads * head_dim * itemsize + rows * num_heads * FP32_BYTES
    return Counts(num_bytes, 4 * batch_size * num_heads * head_dim * attended_pairs(seqlen, seqlen))


def paged_attention(
    batch_size: int, seqlen_q: int, seqlen_k: int, num_heads: int, head_dim: int, itemsize: int
) -> Counts:
    """The cache's keys and values and the queries in, result out (page table and lengths are a few bytes)."""
    width = num_heads * head_dim
    num_bytes = 2 * batch_size * (seqlen_k + seqlen_q) * width * itemsize
    return Counts(num_bytes, 4 * batch_size * width * attended_pairs(seqlen_q, seqlen_k))


def lm_head(rows: int, hidden_size: int, vocab_size: int, itemsize: int) -> Counts:
    """Weight and x in, a token id and its log-probability out."""
    num_bytes = (vocab_size + rows) * hidden_size * itemsize + rows * (INT64_BYTES + FP32_BYTES)
    return Counts(num_bytes, 2 * rows * hidden_size * vocab_size)


def prompt_flops(num_tokens: int, num_layers: int, hidden_size: int, intermediate_size: int, vocab_size: int) -> float:
    """Products of the layers for every token, attention of the pairs, head for one token."""
    per_token = 2 * num_layers * (4 * hidden_size * hidden_size + 2 * hidden_size * intermediate_size)
    attention = 4 * num_layers * hidden_size * attended_pairs(num_tokens, num_tokens)
    return num_tokens * per_token + attention + 2 * hidden_size * vocab_size


def decode_step(
    num_parameters: int,
    embedding_parameters: int,
    down_parameters: int,
    skipped_fraction: float,
    cached_values: float,
    itemsize: int,
) -> Counts:
    """One token of one sequence: every weight but the embedding table, less the skipped share of the MLP's
    down-projections, and the keys and values in the cache."""
    read = num_parameters - embedding_parameters - skipped_fraction * down_parameters
    return Counts((read + cached_values) * itemsize, 2 * (read + cached_values))
