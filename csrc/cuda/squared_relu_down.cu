// squared_relu_down_kernel: out[m] = sum over active n of h[m, n]^2 D[n] + b_d (+ residual), m < 16; n is active if
// h[m, n] != 0 for any m. Rows of D of other neurons are not read.
//
// Blocks    a slice of 512 bytes of columns x a part of the list of active neurons, in ascending order; all parts are
//           equally long, as many as fill the GPU once. Every block makes its part of the list by itself, from the
//           masks that the first product left (16,384 neurons: 2 KB): no atomics, no kernel of its own
//
//               neuron    0 1 2 3 4 5 6 7 8 9 ..                     slice 0   slice 1  ..
//               active    . 1 . . 1 1 . . . 1 ..     1 4 5  part 0   block 0   block S
//               position    0     1 2       3 ..     9 ..   part 1   block 1   ..
//
// Pipeline  a part goes by segments of 256 neurons (fp32: 128): their indices are in shared memory two segments ahead,
//           their activations one. In a segment each warp takes steps of 16 neurons x 64 columns (fp32: 4 x 128); a
//           lane copies 4 x 16 bytes a step by cp.async into slots that it alone reads: no barrier but one a segment,
//           and that drains nothing. 3 to 4 steps are in flight: 48 to 64 KB per block, as long as the list lasts
// Product   mma.m16n8k16 for any number of rows: A = D^T, whose registers are made of two neurons' 16 bytes by byte
//           permutes, B = h^2 by ldmatrix; 16 permutes and 4 or 8 mma per 4 loads of 16 bytes. fp32: FMA
// End       warps are added up in shared memory, parts by the last block of a slice to arrive, in their order: the
//           same bits on every run. The first product sets its counters to zero: no state outlives the call
// Traffic   active rows of D once; partial sums 4 bytes x columns x rows x parts, written and read, in L2
// Bound     memory. It is the same kernel where all neurons are active: a piece of 512 bytes of a row is 4 lines, in a
//           gather too. Chosen by the list alone, so a recorded graph fits every density
// Resources ptxas -v, registers (8.0, 8.6, 8.9; 9.0a), no spills, no stack. 16-bit: 70 to 94; 71 to 94. fp32: 72 to
//           123; 71 to 121. Shared: 77 KB (up to 8 rows), 85 KB; fp32 up to 83 KB: one block per multiprocessor is
//           enough
// Numerics  fp32 sums. fp16: as squared_relu_mlp.cu, (h 2^-e)^2 with the row's e. bf16: h^2 is rounded once, by the
//           first product. Active neurons are multiplied for every row: 0 * inf is NaN there, and adds exactly nothing
//           else; but which neurons share an mma and a part follows from all rows, so a row's bits change with the
//           batch, within the contract
// Requires  D neuron-major; 16-byte aligned rows for cp.async, else elements are copied one by one
// Measured  not run on a GPU yet
// Source    Liu et al. 2023, Deja Vu, arXiv:2310.17157 (predicted zeros are skipped; here they are known); the last
//           block adds up as in NVIDIA's threadFenceReduction sample; written for this project
#include "csrc/cuda/squared_relu_down.h"

#include <type_traits>

#include "csrc/cuda/convert.cuh"
#include "csrc/cuda/dependent_launch.cuh"
#include "csrc/cuda/dispatch.h"
#include "csrc/cuda/ptx.cuh"
#include "csrc/cuda/squared_relu.cuh"
#include "csrc/cuda/squared_relu_list.cuh"

namespace persimmon_fast::cuda {
namespace {

constexpr int kThreads = kListThreads;
constexpr int kWarps = kListWarps;
constexpr int kLoads = 4;   // 16-byte loads of a lane in a step
constexpr int kStages = 4;  // of the ring

// How the warps of a block share a slice of columns and a part of the neurons.
//
// kNeurons x kColumns are what a warp multiplies in one step: each lane loads 16 bytes of kLoads rows of D.
template <typename scalar_t>
struct Tiling {
  static constexpr bool kTensorCores = !std::is_same_v<scalar_t, float>;
  static constexpr int kChunk = Chunk<scalar_t>::kSize;
  static constexpr int kNeurons = kTensorCores ? 16 : 4;
  static constexpr int kColumns = kLoads * kWarpSize * kChunk / kNeurons;
  static constexpr int kSliceColumns = static_cast<int>(DownShape::kSliceBytes / sizeof(scalar_t));
  static constexpr int kColumnWarps = kSliceColumns / kColumns;
  static constexpr int kNeuronWarps = kWarps / kColumnWarps;
  static constexpr int kSegment = kTensorCores ? 256 : 128;                      // neurons
  static constexpr int kStepsPerSegment = kSegment / (kNeurons * kNeuronWarps);  // of a warp
  // Rings by position, of the list (segment in use, next one, one being made; four for the mask) and of activations.
  static constexpr int kListRing = 4 * kSegment;
  static constexpr int kHiddenRing = 2 * kSegment;
  // Floats of a row of sums in shared memory: odd, so that a fragment's rows lie in different banks, or float4s.
  static constexpr int kSumStride = kTensorCores ? kSliceColumns + 1 : kSliceColumns;

  // Of load i: the neuron within the step (loads 2 k and 2 k + 1: neighbours), and the lane's first column within the
  // warp's.
  static DEV int neuron(int lane, int i) { return kTensorCores ? lane % 4 * 2 + i % 2 + i / 2 * 8 : i; }
  static DEV int column(int lane) { return (kTensorCores ? lane / 4 : lane) * kChunk; }
};

template <typename scalar_t, int kGroups>
struct Smem {
  using T = Tiling<scalar_t>;
  static constexpr int kRows = kGroups * T::kChunk;
  static constexpr int kRingChunks = kStages * kLoads * kThreads;
  static constexpr int kHiddenChunks = kGroups * T::kHiddenRing;
  static constexpr size_t kBytes = (kRingChunks + kHiddenChunks) * 16 + (T::kListRing + kThreads) * 4;
  static_assert(kBytes + 1024 <= kMaxSmemBytes, "a block must fit on sm_86, beside its static shared memory");
  static_assert(T::kNeuronWarps * kRows * T::kSumStride * 4 <= kRingChunks * 16, "the sums take the ring's place");
  static_assert(T::kStepsPerSegment >= kStages, "the activations of the next segment arrive during this one");
};

// Copies rows of D, each lane for itself alone: what a lane multiplies is what it has copied, so no barrier is needed.
template <typename scalar_t, bool kAligned>
struct WeightRing {
  using T = Tiling<scalar_t>;
  Chunk<scalar_t>* s_ring;        // [kStages, kLoads, kThreads]
  const int* s_list;              // [kListRing]
  const unsigned char* g_weight;  // at the lane's first column
  int row_bytes;
  int num_elements;  // of the lane's 16 bytes that lie inside the matrix
  int neuron_warp;
  int length;
  uint64_t policy;

  DEV Chunk<scalar_t>* slot(int step, int i) const {
    return s_ring + (step % kStages * kLoads + i) * kThreads + threadIdx.x;
  }
  // Position in the part of the first neuron of this warp's step.
  DEV int position(int step) const { return (step * T::kNeuronWarps + neuron_warp) * T::kNeurons; }

  // Commits one group, empty behind the last step.
  DEV void load(int step) const {
    const int first = position(step);
    if (first < length) {
      const int* s_neurons = s_list + first % T::kListRing;
      int neurons[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; i += 2) {
        const int2 pair = *reinterpret_cast<const int2*>(s_neurons + T::neuron(threadIdx.x % kWarpSize, i));
        neurons[i] = pair.x, neurons[i + 1] = pair.y;
      }
      if (kAligned && first + T::kNeurons <= length && num_elements == T::kChunk) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          ptx::cp_async16_once(ptx::smem_u32(slot(step, i)), row(neurons[i]), 16, policy);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) load_part(slot(step, i), neurons[i]);
      }
    }
    ptx::cp_async_commit();
  }

  DEV const scalar_t* row(int neuron) const {
    return reinterpret_cast<const scalar_t*>(g_weight + int64_t{neuron} * row_bytes);
  }

  // Zeros for what lies outside the matrix, and for neuron -1.
  DEV void load_part(Chunk<scalar_t>* s_chunk, int neuron) const {
    const scalar_t* g_row = row(max(neuron, 0));
    const int n = neuron >= 0 ? num_elements : 0;
    if constexpr (kAligned) {
      ptx::cp_async16_once(ptx::smem_u32(s_chunk), g_row, n * static_cast<int>(sizeof(scalar_t)), policy);
    } else {
      Chunk<scalar_t> copy = {};
#pragma unroll
      for (int c = 0; c < T::kChunk; ++c) {
        if (c < n) copy.values[c] = g_row[c];
      }
      *s_chunk = copy;
    }
  }
};

// A warp's sums over its neurons. 16-bit: mma with D^T as A, whose 16 rows are columns, and h^2 as B.
//
//   lane (g = lane / 4, t = lane % 4) holds columns 8g .. 8g + 7 of neurons 2t, 2t + 1, 2t + 8, 2t + 9; tile j of A is
//   made of columns 8g + 2j (rows g) and 8g + 2j + 1 (rows g + 8), so a register of A is one half of word j of two rows
template <typename scalar_t, int kGroups>
struct WarpSums {
  using T = Tiling<scalar_t>;
  float sums[kGroups][4][4] = {};
  uint32_t factors[kGroups];  // fp16: 2^-e of row lane / 4 of each group

  // s_hidden: [kGroups, kHiddenRing] chunks, at the step's first neuron.
  DEV void multiply(const Chunk<scalar_t>* const (&s_weight)[kLoads], const Chunk<scalar_t>* s_hidden) {
    uint4 w[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) w[i] = *reinterpret_cast<const uint4*>(s_weight[i]);
    uint32_t a[4][4];
    halves(w[0].x, w[1].x, w[2].x, w[3].x, a[0]);
    halves(w[0].y, w[1].y, w[2].y, w[3].y, a[1]);
    halves(w[0].z, w[1].z, w[2].z, w[3].z, a[2]);
    halves(w[0].w, w[1].w, w[2].w, w[3].w, a[3]);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint32_t b[2];
      ptx::ldmatrix_trans(b, ptx::smem_u32(s_hidden + group * T::kHiddenRing + threadIdx.x % 16));
      if constexpr (std::is_same_v<scalar_t, __half>) {
        b[0] = scaled_squares(b[0], factors[group]);
        b[1] = scaled_squares(b[1], factors[group]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) ptx::mma(sums[group][j], a[j], b, scalar_t{});
    }
  }

  // Of two neurons and the two 8 places further: low halves (rows g of A), high halves (rows g + 8).
  static DEV void halves(uint32_t w0, uint32_t w1, uint32_t w8, uint32_t w9, uint32_t (&a)[4]) {
    a[0] = __byte_perm(w0, w1, 0x5410);
    a[1] = __byte_perm(w0, w1, 0x7632);
    a[2] = __byte_perm(w8, w9, 0x5410);
    a[3] = __byte_perm(w8, w9, 0x7632);
  }

  // s_sums: [rows, kSumStride], at the lane's first column.
  DEV void store(float* s_sums) const {
    const int row = threadIdx.x % 4 * 2;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s_sums[(group * T::kChunk + row + i % 2) * T::kSumStride + j * 2 + i / 2] = sums[group][j][i];
        }
      }
    }
  }
};

// fp32: a lane has 4 columns of all rows.
template <int kGroups>
struct WarpSums<float, kGroups> {
  using T = Tiling<float>;
  float sums[kGroups * T::kChunk][T::kChunk] = {};

  DEV void multiply(const Chunk<float>* const (&s_weight)[kLoads], const Chunk<float>* s_hidden) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const Chunk<float> w = *s_weight[i];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const Chunk<float> h = s_hidden[group * T::kHiddenRing + i];
#pragma unroll
        for (int r = 0; r < T::kChunk; ++r) {
#pragma unroll
          for (int c = 0; c < T::kChunk; ++c) {
            float& sum = sums[group * T::kChunk + r][c];
            sum = fmaf(h.values[r], w.values[c], sum);
          }
        }
      }
    }
  }

  DEV void store(float* s_sums) const {
#pragma unroll
    for (int r = 0; r < kGroups * T::kChunk; ++r) {
      Chunk<float> row;
#pragma unroll
      for (int c = 0; c < T::kChunk; ++c) row.values[c] = sums[r][c];
      *reinterpret_cast<Chunk<float>*>(s_sums + r * T::kSumStride) = row;
    }
  }
};

// The largest value of each row, as fp16 bits: s_largest[warp, row] for the masks that the warp looks at.
template <int kRows>
DEV void find_largest(const uint16_t* largest, int num_masks, uint32_t* s_largest) {
  const int lane = threadIdx.x % kWarpSize;
  uint32_t most[kRows] = {};
  for (int i = threadIdx.x; i < num_masks; i += kThreads) {
#pragma unroll
    for (int group = 0; group < kRows / 8; ++group) {
      const auto values = *reinterpret_cast<const Chunk<__half>*>(largest + i * int64_t{kRows} + group * 8);
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        uint32_t& value = most[group * 8 + r];
        value = max(value, static_cast<uint32_t>(__half_as_ushort(values.values[r])));
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const uint32_t value = __reduce_max_sync(kFullMask, most[row]);
    if (lane == row) s_largest[threadIdx.x / kWarpSize * kRows + row] = value;
  }
}

// Of a row, after find_largest and a barrier.
template <int kRows>
DEV uint32_t row_largest(const uint32_t* s_largest, int row) {
  uint32_t value = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) value = max(value, s_largest[warp * kRows + row]);
  return value;
}

// The first n of 4 values at p, zeros for null.
template <typename scalar_t>
DEV void read4(const scalar_t* p, int n, float (&values)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = p != nullptr && i < n ? to_float(p[i]) : 0.0f;
}

// Adds the partial sums of a slice in the order of the parts; bias and residual, which are read at the same time; one
// rounding.
template <typename scalar_t>
DEV void finish_slice(const SquaredReluDownParams& p, const float* g_partial, int num_parts, int column0) {
  constexpr int kSliceColumns = Tiling<scalar_t>::kSliceColumns;
  const int size = static_cast<int>(p.num_rows) * kSliceColumns;
  const auto* bias = static_cast<const scalar_t*>(p.bias);
  const auto* residual = static_cast<const scalar_t*>(p.residual);
  for (int i = threadIdx.x * 4; i < size; i += kThreads * 4) {
    const int row = i / kSliceColumns;
    const int column = column0 + i % kSliceColumns;
    const int n = max(min(p.hidden_size - column, 4), 0);
    float r_bias[4], r_residual[4];
    read4(bias != nullptr ? bias + column : nullptr, n, r_bias);
    read4(residual != nullptr ? residual + row * p.residual_row_stride + column : nullptr, n, r_residual);
    float sums[4] = {};
#pragma unroll 8
    for (int part = 0; part < num_parts; ++part) {
      const float4 partial = *reinterpret_cast<const float4*>(g_partial + int64_t{part} * size + i);
      sums[0] += partial.x, sums[1] += partial.y, sums[2] += partial.z, sums[3] += partial.w;
    }
    scalar_t* out = static_cast<scalar_t*>(p.out) + int64_t{row} * p.hidden_size + column;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c < n) from_float((sums[c] + r_bias[c]) + r_residual[c], out[c]);
    }
  }
}

template <typename scalar_t, int kGroups, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) squared_relu_down_kernel(SquaredReluDownParams p) {
  using T = Tiling<scalar_t>;
  using S = Smem<scalar_t, kGroups>;
  SMEM_CARVER(smem);
  auto* s_ring = smem.take<Chunk<scalar_t>>(S::kRingChunks, 128);
  auto* s_hidden = smem.take<Chunk<scalar_t>>(S::kHiddenChunks, 128);
  int* s_list = smem.take<int>(T::kListRing);
  int* s_start = smem.take<int>(kThreads);
  STATIC_SMEM(int, s_warp, kWarps);
  STATIC_SMEM(uint32_t, s_largest, kWarps* S::kRows);
  STATIC_SMEM(int, s_is_last, 1);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int slice = static_cast<int>(blockIdx.x % p.shape.num_slices);
  const int part = static_cast<int>(blockIdx.x / p.shape.num_slices);
  const int column0 = slice * T::kSliceColumns;

  ptx::launch_dependents();
  ptx::wait_for_predecessors();  // every byte of D that is read depends on the list

  // ---- which neurons ----
  NeuronList list{};
  list.active = p.scratch.active;
  list.s_start = s_start;
  list.num_masks = ceil_div(p.intermediate_size, static_cast<int>(kNeuronsPerMask));
  list.masks_per_group = ceil_div(list.num_masks, kThreads);
  if constexpr (std::is_same_v<scalar_t, __half>) {
    find_largest<S::kRows>(p.scratch.largest, list.num_masks, s_largest);
  }
  const int total = count_active(list.active, list.num_masks, list.masks_per_group, s_start, s_warp);
  const int part_length = ceil_div(total, static_cast<int>(p.shape.num_parts));
  list.begin = part * part_length;
  list.length = max(min(total - list.begin, part_length), 0);
  __syncthreads();  // s_start, s_largest
  list.write<T::kSegment, T::kListRing>(s_list, 0);
  list.write<T::kSegment, T::kListRing>(s_list, T::kSegment);
  __syncthreads();

  // ---- their rows of D ----
  const auto load_hidden = [&](int segment) {
    const int first = segment * T::kSegment;
    const auto* g_hidden = static_cast<const Chunk<scalar_t>*>(p.scratch.hidden);
    if (first >= list.length) return;
    for (int i = first + threadIdx.x; i < first + T::kSegment; i += kThreads) {
      const int neuron = s_list[i % T::kListRing];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        ptx::cp_async16(ptx::smem_u32(s_hidden + group * T::kHiddenRing + i % T::kHiddenRing),
                        g_hidden + int64_t{max(neuron, 0)} * kGroups + group, neuron >= 0 ? 16 : 0);
      }
    }
  };
  WeightRing<scalar_t, kAligned> ring;
  const int slice_column = warp % T::kColumnWarps * T::kColumns + T::column(lane);
  ring.s_ring = s_ring;
  ring.s_list = s_list;
  ring.g_weight = static_cast<const unsigned char*>(p.weight) + (column0 + slice_column) * int64_t{sizeof(scalar_t)};
  ring.row_bytes = p.weight_row_bytes;
  ring.num_elements = max(min(p.hidden_size - column0 - slice_column, T::kChunk), 0);
  ring.neuron_warp = warp / T::kColumnWarps;
  ring.length = list.length;
  ring.policy = ptx::evict_first_policy();

  load_hidden(0);
  ptx::cp_async_commit();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) ring.load(step);
  WarpSums<scalar_t, kGroups> sums;
  if constexpr (std::is_same_v<scalar_t, __half>) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      sums.factors[group] = square_factor(row_largest<S::kRows>(s_largest, group * 8 + lane / 4));
    }
  }
#pragma unroll 1
  for (int segment = 0; segment * T::kSegment < list.length; ++segment) {
    // The segment's activations are here, of this thread; the next segment's go with its next group, behind which at
    // least kStages - 1 more are committed before this line comes again.
    ptx::cp_async_wait<kStages - 1>();
    __syncthreads();  // all have come so far: activations and the next segment's list are whole, the last one's free
    load_hidden(segment + 1);
    list.write<T::kSegment, T::kListRing>(s_list, (segment + 2) * T::kSegment);
#pragma unroll 1
    for (int i = 0; i < T::kStepsPerSegment; ++i) {
      const int step = segment * T::kStepsPerSegment + i;
      const int first = ring.position(step);
      if (first >= list.length) break;
      ring.load(step + kStages - 1);
      ptx::cp_async_wait<kStages - 1>();
      const Chunk<scalar_t>* s_weight[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) s_weight[k] = ring.slot(step, k);
      sums.multiply(s_weight, s_hidden + first % T::kHiddenRing);
    }
  }

  // ---- sums: of the warps, of the parts ----
  ptx::cp_async_wait<0>();
  __syncthreads();  // all copies have arrived and been read: sums replace the ring
  float* s_sums = reinterpret_cast<float*>(s_ring);
  sums.store(s_sums + ring.neuron_warp * S::kRows * T::kSumStride + slice_column);
  __syncthreads();
  const int num_sums = static_cast<int>(p.num_rows) * T::kSliceColumns;
  float* g_slice = p.scratch.partial + slice * p.shape.num_parts * num_sums;
  if (list.length > 0) {
    for (int i = threadIdx.x; i < num_sums; i += kThreads) {
      const int row = i / T::kSliceColumns;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < T::kNeuronWarps; ++w) {
        sum += s_sums[(w * S::kRows + row) * T::kSumStride + i % T::kSliceColumns];
      }
      if constexpr (std::is_same_v<scalar_t, __half>) sum *= square_unscale(row_largest<S::kRows>(s_largest, row));
      g_slice[int64_t{part} * num_sums + i] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // the block's partial sums, before its arrival
    s_is_last[0] = atomicAdd(p.scratch.arrived + slice, 1u) + 1 == p.shape.num_parts;
    __threadfence();  // the other blocks' partial sums, after theirs
  }
  __syncthreads();
  if (s_is_last[0] == 0) return;
  finish_slice<scalar_t>(p, g_slice, part_length > 0 ? ceil_div(total, part_length) : 0, column0);
}

template <typename scalar_t, int kGroups>
cudaError_t launch_groups(const SquaredReluDownParams& p, cudaStream_t stream) {
  constexpr size_t kBytes = Smem<scalar_t, kGroups>::kBytes;
  const auto num_blocks = static_cast<unsigned>(p.shape.num_slices * p.shape.num_parts);
  const bool aligned = is_aligned(p.weight) && p.weight_row_bytes % 16 == 0;
  return launch_dependent(
      "squared_relu_down",
      aligned ? squared_relu_down_kernel<scalar_t, kGroups, true> : squared_relu_down_kernel<scalar_t, kGroups, false>,
      num_blocks, kThreads, kBytes, stream, p);
}

}  // namespace

cudaError_t launch_squared_relu_down(const SquaredReluDownParams& params, cudaStream_t stream) {
  if (params.shape.num_slices * params.shape.num_parts > INT32_MAX) return kTooLarge;
  return dispatch_dtype(params.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    switch (params.shape.num_groups) {
      case 1:
        return launch_groups<scalar_t, 1>(params, stream);
      case 2:
        return launch_groups<scalar_t, 2>(params, stream);
      case 4:
        if constexpr (std::is_same_v<scalar_t, float>) return launch_groups<scalar_t, 4>(params, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace persimmon_fast::cuda
