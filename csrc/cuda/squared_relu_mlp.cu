// squared_relu_mlp: out[m] = (sum_n h[m, n]^2 D[:, n] + b_d) + residual[m],  h[m, n] = relu(x[m] . U[n] + b_u[n])
//
// Up to 16 rows, D neuron-major: the first product is streamed (stream.cuh) and leaves h and masks of active neurons;
// the second, squared_relu_down.cu, reads their rows of D alone. Registers of the first: 108; 112, fp32 91; 128. Else:
//
// Tile      two products of gemm.cuh, on sm_90a of gemm_sm90.cuh. The first writes h, unsquared, in the dtype of x; the
//           second squares its A operand in registers, between ldmatrix and mma. D in either memory order: neuron-major
//           is the N-major B of gemm.cuh
// Traffic   U and D once per group of 16 row tiles, h written once and read once; no pass over h of its own
// Bound     tensor cores from about 150 rows on; below, the bytes of U and D
// Issue     the squares are 16 (bf16) or 32 (fp16) two-element products per warp and step of 16 k of the large tile.
//           The 32 mma of a step take a scheduler's tensor core 256 cycles on sm_80, as many issue slots; the loop then
//           has 92 to 103 (bf16) or about 115 (fp16) instructions per step in place of 76: they fit
// Resources ptxas -v, registers per thread (sm_80; sm_90a), no spills on 8.0, 8.6, 8.9, 9.0a. Up: large tile 242; 246,
//           small 96; 96, unaligned 112; 116. Down, the most of both dtypes and orders: large 244; 244, small 104; 108,
//           unaligned 126; 128. fp32: 91; 75. Shared memory and blocks as linear_residual.cu
// Numerics  fp32 sums; h is rounded to the dtype, its square again, as plain torch does; bias, residual and scale in
//           fp32, one rounding. fp16: h^2 passes 65504 above h = 255.9 and loses bits below 2^-7, so the second product
//           works on h 2^-e, exact, with 128 <= max(h) 2^-e < 256 in each row (e within -15 .. 8), and multiplies its
//           sums by 2^2e, exact: no overflow for any finite h, and the row's largest squares keep all bits, however
//           small. max(h) comes from the first product by an atomic maximum, which no order changes. NaN stays NaN, inf
//           inf; -0.0 is zero. Zeros are multiplied: an inf in D meets them as NaN
// Measured  on no GPU yet
// Source    So et al. 2021, Primer, arXiv:2109.08668 (squared ReLU); kernel written for this project
#include "csrc/cuda/squared_relu_mlp.h"

#include <algorithm>
#include <type_traits>

#include "csrc/cuda/squared_relu.cuh"
#include "csrc/cuda/squared_relu_down.h"
#include "csrc/cuda/stream.cuh"

namespace persimmon_fast::cuda {
namespace {

DEV float relu_of(float z) { return z <= 0.0f ? 0.0f : z; }  // NaN stays

// What orders fp16 numbers that are not negative, as integers: NaN > inf > finite.
DEV uint32_t order_bits(__half x) { return __half_as_ushort(x) & 0x7fff; }

// out = relu(product + bias), in fp32 its square; fp16: also the maximum of each row.
template <typename scalar_t>
struct ReluEpilogue {
  const scalar_t* bias;
  scalar_t* out;      // rows out_row_stride elements apart
  uint32_t* row_max;  // fp16
  int64_t out_row_stride;
  bool vectorised;

  bool finishes_on_sm90() const { return vectorised; }

  template <typename Tile>
  DEV void operator()(const Tile& tile) const {
    tile.for_pieces([&](int row, int col, const float (&values)[kPiece], int n) {
      const int64_t row_idx = tile.row0 + row;
      const int64_t col_idx = tile.col0 + col;
      float r_bias[kPiece] = {};
      if (bias != nullptr) read_piece(bias + col_idx, n, vectorised, r_bias);
      float relu[kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        relu[i] = relu_of(values[i] + r_bias[i]);
        if constexpr (std::is_same_v<scalar_t, float>) relu[i] *= relu[i];
      }
      write_piece(out + row_idx * out_row_stride + col_idx, n, vectorised, relu);
      if constexpr (std::is_same_v<scalar_t, __half>) {
        uint32_t largest = 0;  // of what was stored
#pragma unroll
        for (int i = 0; i < kPiece; ++i) largest = max(largest, order_bits(__float2half_rn(relu[i])));
        largest = reduce_lanes<Tile::kLanesPerRow>(largest, [](uint32_t a, uint32_t b) { return max(a, b); });
        if (n > 0 && col == 0) atomicMax(row_max + row_idx, largest);
      }
    });
  }
};

template <typename scalar_t, int kCols>
DEV void finish(const ReluEpilogue<scalar_t>& epilogue, const WarpTile<kCols>& tile) {
  using Tile = WarpTile<kCols>;
  const scalar_t* g_bias = epilogue.bias != nullptr ? epilogue.bias + tile.col0 + tile.first_column() : nullptr;
  uint32_t largest[2] = {};  // of this lane's columns, per row
#pragma unroll
  for (int index = 0; index < Tile::kSlabs; ++index) {
    if (index * kSlabCols >= tile.cols) break;
#pragma unroll
    for (int j = index * Tile::kSlabBlocks; j < (index + 1) * Tile::kSlabBlocks; ++j) {
      const bool exists = j * 8 < tile.cols;
      const float2 bias = load_pair(g_bias + j * 8, exists && g_bias != nullptr);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& value = tile.acc[4 * j + i];
        value = relu_of(value + (i % 2 == 0 ? bias.x : bias.y));
        if constexpr (std::is_same_v<scalar_t, __half>) {
          if (exists) largest[i / 2] = max(largest[i / 2], order_bits(__float2half_rn(value)));
        }
      }
    }
    tile.template store_slab<scalar_t>(index, epilogue.out, epilogue.out_row_stride);
  }
  if constexpr (std::is_same_v<scalar_t, __half>) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t most = reduce_lanes<4>(largest[h], [](uint32_t a, uint32_t b) { return max(a, b); });
      const int row = h * 8 + tile.lane / 4;
      if (tile.lane % 4 == 0 && row < tile.rows) atomicMax(epilogue.row_max + tile.row0 + row, most);
    }
  }
}

// The same for up to kMaxSkipRows rows, in the layout of DownScratch: rows of a neuron together, and which neurons are
// active. A lane has one column of all rows, so that a warp's vote is a mask.
template <typename scalar_t>
struct ActiveEpilogue {
  const scalar_t* bias;
  DownScratch scratch;
  int num_groups;
  int num_slices;  // of the second product

  template <typename Tile>
  DEV void operator()(const Tile& tile) const {
    constexpr int kChunk = Chunk<scalar_t>::kSize;
    constexpr bool kIsHalf = std::is_same_v<scalar_t, __half>;
    static_assert(Tile::kCols % kNeuronsPerMask == 0);
    if (tile.col0 == 0) {  // one block, and the next kernel on the stream needs them
      for (int i = threadIdx.x; i < num_slices; i += Tile::kThreads) scratch.arrived[i] = 0;
    }
    const int lane = threadIdx.x % kWarpSize;
    for (int first = threadIdx.x / kWarpSize * kWarpSize; first < Tile::kCols; first += Tile::kThreads) {
      if (first >= tile.cols) break;
      const int col = first + lane;
      const int64_t neuron = tile.col0 + col;
      const int64_t mask_idx = (tile.col0 + first) / kNeuronsPerMask;
      const bool exists = col < tile.cols;
      const float b = exists && bias != nullptr ? to_float(bias[neuron]) : 0.0f;
      bool is_active = false;
      for (int group = 0; group < num_groups; ++group) {
        Chunk<scalar_t> chunk;
        uint32_t largest = 0;  // of row `lane` of the group
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const int row = group * kChunk + i;
          // Behind the last neuron stand products with zeros: NaN where x has an inf or a NaN.
          const float z = exists && row < tile.rows ? tile.at(row, col) + b : 0.0f;
          const float relu = relu_of(z);
          from_float(kIsHalf ? relu : relu * relu, chunk.values[i]);
          is_active |= to_float(chunk.values[i]) != 0.0f;  // NaN too
          if constexpr (kIsHalf) {
            const uint32_t most = __reduce_max_sync(kFullMask, order_bits(chunk.values[i]));
            if (lane == i) largest = most;
          }
        }
        if (exists) {
          store_chunk<true>(static_cast<scalar_t*>(scratch.hidden) + (neuron * num_groups + group) * kChunk, chunk,
                            kChunk);
        }
        if (kIsHalf && lane < kChunk) {
          scratch.largest[(mask_idx * num_groups + group) * kChunk + lane] = static_cast<uint16_t>(largest);
        }
      }
      const uint32_t mask = __ballot_sync(kFullMask, is_active);
      if (lane == 0) scratch.active[mask_idx] = mask;
    }
  }
};

// A transform (gemm_common.cuh): squares, in fp16 after a division by 2^e of the row.
template <typename scalar_t>
struct Square;

template <>
struct Square<__nv_bfloat16> {
  DEV uint32_t factor(int64_t) const { return 0; }
  DEV void apply(uint32_t (&a)[4], uint32_t, uint32_t) const {
#pragma unroll
    for (uint32_t& pair : a) {
      const __nv_bfloat162 values = *reinterpret_cast<const __nv_bfloat162*>(&pair);
      const __nv_bfloat162 squares = __hmul2(values, values);
      pair = *reinterpret_cast<const uint32_t*>(&squares);
    }
  }
};

template <>
struct Square<__half> {
  const uint32_t* row_max;

  DEV uint32_t factor(int64_t row) const { return square_factor(row_max[row]); }
  DEV void apply(uint32_t (&a)[4], uint32_t low, uint32_t high) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = scaled_squares(a[i], i % 2 == 0 ? low : high);
  }
};

// 2^2e of the row.
struct RowUnscale {
  const uint32_t* row_max;
  DEV float operator()(int64_t row) const { return square_unscale(row_max[row]); }
};

GemmOperands up_operands(const SquaredReluMlpParams& p) {
  return {p.x, p.up_weight, p.num_rows, p.intermediate_size, p.hidden_size, p.x_row_stride, p.up_row_stride};
}

// Reads the rows of D of active neurons only.
template <typename scalar_t>
cudaError_t launch_skipping(const SquaredReluMlpParams& p, cudaStream_t stream) {
  SquaredReluDownParams down{};
  down.shape = down_shape(p.dtype, p.num_rows, p.hidden_size, p.num_multiprocessors);
  cut_down_scratch(static_cast<char*>(p.skip_scratch), down.shape, p.dtype, p.num_rows, p.intermediate_size,
                   down.scratch);
  down.weight = p.down_weight;
  down.bias = p.down_bias;
  down.residual = p.residual;
  down.out = p.out;
  down.residual_row_stride = p.residual_row_stride;
  down.num_rows = static_cast<int>(p.num_rows);
  down.hidden_size = static_cast<int>(p.hidden_size);
  down.intermediate_size = static_cast<int>(p.intermediate_size);
  down.weight_row_bytes = static_cast<int>(p.down_row_stride * dtype_bytes(p.dtype));
  down.dtype = p.dtype;
  const ActiveEpilogue<scalar_t> epilogue{static_cast<const scalar_t*>(p.up_bias), down.scratch,
                                          static_cast<int>(down.shape.num_groups),
                                          static_cast<int>(down.shape.num_slices)};
  // Units of one mask: enough of them for every multiprocessor. At 16,384 neurons 512.
  static_assert(kUpUnit == kNeuronsPerMask);
  const cudaError_t error = launch_stream<scalar_t, kUpUnit>("squared_relu_mlp up", up_operands(p), p.norm, epilogue,
                                                             p.num_multiprocessors, stream);
  return error != cudaSuccess ? error : launch_squared_relu_down(down, stream);
}

template <typename scalar_t>
cudaError_t launch_up(const SquaredReluMlpParams& p, cudaStream_t stream) {
  ReluEpilogue<scalar_t> epilogue{};
  epilogue.bias = static_cast<const scalar_t*>(p.up_bias);
  epilogue.out = static_cast<scalar_t*>(p.hidden);
  epilogue.row_max = p.row_max;
  epilogue.out_row_stride = p.intermediate_size;
  epilogue.vectorised = is_aligned(p.up_bias) && pieces_aligned(epilogue.out, p.intermediate_size);
  return launch_gemm<scalar_t, BOrder::kKMajor>("squared_relu_mlp up", up_operands(p), epilogue, p.num_multiprocessors,
                                                stream);
}

template <typename scalar_t, BOrder kBOrder, typename RowScale, typename Transform>
cudaError_t launch_down(const SquaredReluMlpParams& p, cudaStream_t stream, const RowScale& scale,
                        const Transform& transform) {
  const GemmOperands operands{
      p.hidden, p.down_weight, p.num_rows, p.hidden_size, p.intermediate_size, p.intermediate_size, p.down_row_stride};
  const auto epilogue =
      bias_residual<scalar_t>(p.down_bias, p.residual, p.residual_row_stride, p.out, p.hidden_size, scale);
  return launch_gemm<scalar_t, kBOrder>("squared_relu_mlp down", operands, epilogue, p.num_multiprocessors, stream,
                                        transform);
}

template <typename scalar_t, typename RowScale, typename Transform>
cudaError_t launch_both(const SquaredReluMlpParams& p, cudaStream_t stream, const RowScale& scale,
                        const Transform& transform) {
  if (p.skip_scratch != nullptr) return launch_skipping<scalar_t>(p, stream);
  const cudaError_t error = launch_up<scalar_t>(p, stream);
  if (error != cudaSuccess) return error;
  return p.down_is_neuron_major ? launch_down<scalar_t, BOrder::kNMajor>(p, stream, scale, transform)
                                : launch_down<scalar_t, BOrder::kKMajor>(p, stream, scale, transform);
}

}  // namespace

int64_t skip_scratch_bytes(const SquaredReluMlpParams& p) {
  if (!p.down_is_neuron_major || p.num_rows > kMaxSkipRows) return 0;
  if (std::max({p.hidden_size, p.intermediate_size, p.down_row_stride * dtype_bytes(p.dtype)}) > kMaxDownSize) return 0;
  DownScratch scratch;
  return cut_down_scratch(nullptr, down_shape(p.dtype, p.num_rows, p.hidden_size, p.num_multiprocessors), p.dtype,
                          p.num_rows, p.intermediate_size, scratch);
}

cudaError_t launch_squared_relu_mlp(const SquaredReluMlpParams& params, cudaStream_t stream) {
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_both<float>(params, stream, UnitScale{}, Unchanged{});
    case DType::kFloat16:
      return launch_both<__half>(params, stream, RowUnscale{params.row_max}, Square<__half>{params.row_max});
    case DType::kBFloat16:
      return launch_both<__nv_bfloat16>(params, stream, UnitScale{}, Square<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace persimmon_fast::cuda
