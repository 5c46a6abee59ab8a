// The emulated machine: CUDA threads, warps, blocks, the grid that runs, and the counters.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>
#undef __shared__
#define __shared__ _Pragma("GCC error \"shared memory only through SMEM_CARVER and STATIC_SMEM\"")

#include <mutex>
#include <vector>

#include "csrc/emu/fiber.h"

namespace emu {

constexpr int kWarpSize = 32;
constexpr int kMaxThreadsPerBlock = 1024;
constexpr int kMaxWarps = kMaxThreadsPerBlock / kWarpSize;
constexpr int kNumBarriers = 16;
// ThreadSanitizer keeps almost a megabyte per thread, and a dependent launch needs a second set of them.
constexpr int kMaxResidentThreads = EMU_TSAN ? 1024 : 4096;
constexpr int kMaxCopiesPerThread = 512;  // cp.async in flight
constexpr int kMaxSharedArrays = 64;
constexpr size_t kRedZoneBytes = 64;  // before and behind each shared array
constexpr size_t kArenaBytes = 384 * 1024;
constexpr size_t kMaxParameterBytes = 4096;
constexpr size_t kGranuleBytes = 16;  // in which copies in flight are counted
constexpr int kMaxMbarriers = 64;     // of a block
constexpr int kMaxBulkCopies = 256;   // of TMA, in flight in the grid
constexpr int kMaxClusterBlocks = 8;
constexpr int kMaxWarpgroups = kMaxThreadsPerBlock / 128;

struct Block;
struct Warp;
struct Machine;
struct Warpgroup;  // wgmma.h

struct AsyncCopy {
  char* dst;
  const char* src;
  uint32_t bytes, valid_bytes;
  int group;
  Site site;
};

struct CudaThread {
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  CudaThread* next = nullptr;  // in a WaitList
  uint3 index{};
  int rank = 0, lane = 0;
  bool started = false, done = false;
  const char* waits_in = "";
  Site site;  // of the last synchronisation
  uint32_t priority = 0;
  enum Fence { kNoFence, kBlockFence, kDeviceFence } fence = kNoFence;
  const void* atomics[4] = {};  // addresses of the last atomic operations: a fence after them acquires
  unsigned num_atomics = 0;
  int num_copies = 0, num_groups = 0;
  AsyncCopy copies[kMaxCopiesPerThread];
  uint32_t mbarrier = 0;     // that it waits for
  int num_store_groups = 0;  // of TMA
  int num_registers = 0;
  bool has_arrived = false;  // at the barrier of the cluster, and not waited there
  uint32_t cluster_generation = 0;
};

// Threads that wait for one event, in the order of arrival.
struct WaitList {
  CudaThread *head = nullptr, *tail = nullptr;

  EMU_RT void push(CudaThread* thread) {
    thread->next = nullptr;
    (tail != nullptr ? tail->next : head) = thread;
    tail = thread;
  }
  EMU_RT CudaThread* pop() {
    CudaThread* thread = head;
    head = thread->next;
    if (head == nullptr) tail = nullptr;
    return thread;
  }
};

// Runnable threads. Every operation is O(1) except finding a thread by a property.
struct ReadyQueue {
  static constexpr unsigned kCapacity = 2 * kMaxResidentThreads;
  CudaThread* items[kCapacity] = {};
  unsigned head = 0, count = 0;

  EMU_RT CudaThread*& at(unsigned i) { return items[(head + i) % kCapacity]; }
  EMU_RT void push(CudaThread* thread) { at(count++) = thread; }
  EMU_RT CudaThread* pop_back() { return at(--count); }
  EMU_RT CudaThread* pop(unsigned i) {  // the first takes its place: only fifo needs the order, and pops at 0
    CudaThread* thread = at(i);
    at(i) = at(0);
    head = (head + 1) % kCapacity;
    --count;
    return thread;
  }
  EMU_RT void clear() { head = count = 0; }
};

struct Barrier {
  int arrived = 0;
  uint32_t generation = 0;
  WaitList waiting;
  uint64_t token[2] = {};  // happens-before; two, as the next generation may begin before all have left this one
};

// What belongs to an mbarrier beside its 8 bytes of shared memory.
struct Mbarrier {
  uint32_t address = 0;
  bool is_visible = false;  // to TMA and the cluster: its init has been fenced
  const CudaThread* initialiser = nullptr;
  Site site;
  WaitList waiting;
  uint64_t token[2] = {};  // of even and odd phases
};

enum class Swizzle : int32_t { kNone, k32, k64, k128 };  // by bytes of the row that it permutes

// What the emulator keeps in a CUtensorMap. Sizes and strides in elements of 2 bytes.
struct TensorMap {
  uint64_t magic;
  const char* base;
  int32_t rank;
  Swizzle swizzle;
  int64_t size[5], stride[5];
  int32_t box[5];
};

// A copy by TMA in flight, to or from the shared memory of one block.
struct BulkCopy {
  TensorMap map;
  int32_t at[5];
  bool is_store;
  Block* block;
  uint32_t shared, bytes;
  uint32_t mbarrier;  // of a load
  CudaThread* issuer;
  int group;  // of a store
  Site site;
  void* tsan_fiber;
};

// Blocks that run at the same time and reach each other's shared memory.
struct Cluster {
  int size = 1, live_threads = 0;
  Block* blocks[kMaxClusterBlocks] = {};
  Barrier barrier;
};

// A warp operation in progress, identified by its mask.
struct WarpOperation {
  uint32_t mask = 0, arrived = 0, leaving = 0, generation = 0;
  int kind = 0;
  Site site;
  WaitList waiting;
  uint64_t token[2] = {};
};

struct Warp {
  uint32_t live = 0;
  int num_operations = 0;  // entries of `operations` that were ever used
  WarpOperation operations[kWarpSize];
  // What each lane brings to an operation and takes from it. The lane that arrives last computes all results, so one
  // buffer per lane is enough.
  alignas(64) uint32_t in[kWarpSize][16];
  alignas(64) uint32_t out[kWarpSize][4];
};

struct SharedArray {
  const void* key;
  char* data;
  size_t bytes;
  Site site;
};

// A block and what it runs on: its threads and its shared memory. Reused by later blocks.
struct Block {
  uint3 index{};
  int num_threads = 0, live = 0;
  bool checked = true;  // its red zones, after the last thread left
  CudaThread* threads[kMaxThreadsPerBlock] = {};
  Warp warps[kMaxWarps];
  Barrier barriers[kNumBarriers];
  char* arena = nullptr;
  size_t arena_used = 0, static_bytes = 0, dynamic_bytes = 0;
  SharedArray arrays[kMaxSharedArrays];
  int num_arrays = 0;
  // Orders a block behind the one whose place it takes; two, so that it does not order the threads of one block.
  unsigned num_started = 0;
  uint64_t order_token[2] = {};
  uint8_t copies_in_flight[kArenaBytes / kGranuleBytes];  // per granule of the arena
  Mbarrier mbarriers[kMaxMbarriers];
  int num_mbarriers = 0, num_bulk_copies = 0;
  Cluster own_cluster;  // used if this is its first block
  Cluster* cluster = &own_cluster;
  int rank_in_cluster = 0;
  Warpgroup* warpgroups[kMaxWarpgroups] = {};  // made when they first multiply
  int free_registers = 0;                      // that setmaxnreg may hand out
  WaitList waiting_for_registers;
  uint64_t proxy_token = 0;                    // what the asynchronous proxy may see of shared memory
  uint64_t read_token = 0, written_token = 0;  // stores by TMA: what was read here, and what has arrived
  void* proxy_fiber = nullptr;                 // of ThreadSanitizer: wgmma, and what TMA reads here
};

struct Grid {
  const char* name = "";
  uint3 dim{}, block_dim{};
  size_t dynamic_bytes = 0;
  unsigned cluster_size = 1;
  bool is_sm90 = false;
  void (*entry)(const void*) = nullptr;
  bool is_dependent = false;  // by programmatic dependent launch
  bool has_waited = false;    // any thread, in griddepcontrol.wait
};

struct Stats {
  uint64_t launches = 0, blocks = 0, switches = 0, warp_operations = 0, mmas = 0, wgmmas = 0;
  // Shared-memory wavefronts, and how many there would be without bank conflicts.
  uint64_t ldmatrix_wavefronts = 0, ldmatrix_wavefronts_ideal = 0;
  uint64_t stmatrix_wavefronts = 0, stmatrix_wavefronts_ideal = 0;
};

// Threads and blocks that wait for reuse.
struct Pool {
  std::vector<CudaThread*> threads;
  std::vector<Block*> blocks;
};

struct Machine {
  Config config;
  bool is_configured = false;
  Stats stats;
  Grid grid;
  ReadyQueue ready;
  ReadyQueue yielded;  // run again when nobody else can
  CudaThread main;     // the caller of launch
  CudaThread* current = nullptr;
  Warp* last_warp = nullptr;
  std::vector<Block*> resident;
  BulkCopy bulk_copies[kMaxBulkCopies];
  BulkCopy* in_flight[kMaxBulkCopies] = {};  // the first num_bulk_copies; the others are free
  int num_bulk_copies = 0;
  uint64_t random_state = 1;
  uint64_t idle_rounds = 0;  // rounds of spinning threads since something changed
  bool failed = false;
  char error[2048] = {};
  Pool pools[2];  // a dependent launch uses the other one than its predecessor
  int pool = 0;
  uint64_t done_token = 0;
  // Of this launch and of the last one that was no dependent launch.
  uint64_t *start_token = nullptr, *early_token = nullptr;
  char* parameters = nullptr;  // of the kernel, kMaxParameterBytes
  std::mutex mutex;            // one launch at a time
};

EMU_STATE Machine machine;

EMU_RT CudaThread* self() { return machine.current; }

EMU_RT int lane_index() { return machine.current->lane; }

// What kernels see as built-in variables. By value: the accesses are the emulator's, not the kernel's.
EMU_RT uint3 thread_index() { return machine.current->index; }
EMU_RT uint3 block_index() { return machine.current->block->index; }
EMU_RT uint3 block_dim() { return machine.grid.block_dim; }
EMU_RT uint3 grid_dim() { return machine.grid.dim; }

EMU_RT uint64_t random_number() {  // xorshift64
  uint64_t x = machine.random_state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return machine.random_state = x;
}

}  // namespace emu
