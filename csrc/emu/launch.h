// Runs a grid: its blocks one after another or some interleaved, each CUDA thread on a fiber of its own.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "csrc/emu/async_progress.h"
#include "csrc/emu/barriers.h"
#include "csrc/emu/cluster.h"
#include "csrc/emu/dependent_launch.h"
#include "csrc/emu/fault.h"
#include "csrc/emu/setmaxnreg.h"
#include "csrc/emu/warp.h"

namespace emu {

EMU_RT const Config& config() {  // the environment is read when it is first needed, so that errors reach the caller
  if (!machine.is_configured) machine.config = config_from_environment();
  machine.is_configured = true;
  return machine.config;
}

inline void configure(const std::string& sched, const std::string& async, uint64_t seed, int resident) {
  const std::lock_guard lock(machine.mutex);
  Config changed = config();
  changed.schedule = parse_schedule(sched);
  changed.async = parse_async(async);
  changed.seed = seed;
  changed.resident = parse_resident(resident);
  machine.config = changed;
}

inline void set_architecture(long long architecture) {
  const std::lock_guard lock(machine.mutex);
  config();
  machine.config.architecture = parse_architecture(architecture);
}

// Counts since the library was loaded.
inline Stats stats() {
  const std::lock_guard lock(machine.mutex);
  return machine.stats;
}

// ---- the life of a CUDA thread ----

EMU_RT void end_thread() {
  CudaThread* thread = self();
  Block* block = thread->block;
  Warp& warp = *thread->warp;
  check_sanitizer_reports(thread->site);
  warp.live &= ~(1u << thread->lane);
  for (int i = 0; i < warp.num_operations; ++i) {
    const WarpOperation& operation = warp.operations[i];
    EMU_CHECK(operation.arrived == 0 || (operation.mask >> thread->lane & 1) == 0, operation.site,
              "a lane has returned while others of mask 0x%08x wait for it in a warp operation", operation.mask);
  }
  check_wgmmas_are_waited_for(thread);
  note_progress();
  if (block->live == 1) {
    check_no_bulk_copies(block);
    check_register_changes(block);
  }
  --block->live;
  leave_cluster(thread);
  if (block->live > 0 && block->barriers[0].arrived >= block->live) complete_barrier(block->barriers[0]);
  hb_release(&block->order_token[block->num_started % 2]);
  hb_release(&machine.done_token);
  thread->done = true;  // not before the checks: who fails in one of them must start afresh
}

EMU_RT void run_thread() {
  on_fiber_entry();
  for (;;) {
    const CudaThread* thread = self();
    machine.current->started = true;
    hb_acquire(machine.grid.is_dependent ? machine.early_token : machine.start_token);
    hb_acquire(&thread->block->order_token[(thread->block->num_started - 1) % 2]);
    machine.grid.entry(machine.parameters);
    end_thread();
    resume(thread->block->live == 0 ? &machine.main : pick());
  }
}

// ---- blocks ----

inline Block* take_block(int num_threads) {
  Pool& pool = machine.pools[machine.pool];
  if (pool.blocks.empty()) pool.blocks.push_back(new Block);
  Block* block = pool.blocks.back();
  pool.blocks.pop_back();
  machine.resident.push_back(block);  // from here on finish_launch() gives back what it holds
  block->num_threads = 0;
  block->live = 0;
  block->checked = true;
  block->dynamic_bytes = machine.grid.dynamic_bytes;
  while (block->num_threads < num_threads) {
    if (pool.threads.empty()) {
      auto thread = std::make_unique<CudaThread>();
      create_fiber(thread->fiber, run_thread);
      pool.threads.push_back(thread.release());
    }
    block->threads[block->num_threads++] = pool.threads.back();
    pool.threads.pop_back();
  }
  return block;
}

// What a block of Hopper has besides.
EMU_RT void reset_sm90_state(Block* block, Cluster* cluster, int rank) {
  block->cluster = cluster;
  block->rank_in_cluster = rank;
  cluster->blocks[rank] = block;
  block->num_mbarriers = block->num_bulk_copies = 0;
  block->waiting_for_registers = WaitList{};
  block->free_registers = 0;
  reset_warpgroups(block);
}

EMU_RT void start_block(Block* block, uint3 index) {
  const uint3 dim = machine.grid.block_dim;
  const int num_threads = block->num_threads, num_registers = initial_registers(num_threads);
  ++machine.stats.blocks;
  block->index = index;
  block->live = num_threads;
  block->checked = false;
  ++block->num_started;
  clear_arena(block);
  for (Barrier& barrier : block->barriers) barrier.arrived = 0, barrier.waiting = WaitList{};
  for (int w = 0; w * kWarpSize < num_threads; ++w) {
    Warp& warp = block->warps[w];
    const int lanes = std::min(num_threads - w * kWarpSize, kWarpSize);
    warp.live = lanes == kWarpSize ? ~0u : (1u << lanes) - 1;
    for (int i = 0; i < warp.num_operations; ++i) {
      WarpOperation& operation = warp.operations[i];
      operation.mask = operation.arrived = operation.leaving = 0;
      operation.waiting = WaitList{};
    }
    warp.num_operations = 0;
  }
  for (int i = 0; i < num_threads; ++i) {
    CudaThread* thread = block->threads[i];
    const unsigned rank = static_cast<unsigned>(i);
    thread->block = block;
    thread->warp = &block->warps[i / kWarpSize];
    thread->rank = i;
    thread->lane = i % kWarpSize;
    thread->index = uint3{rank % dim.x, rank / dim.x % dim.y, rank / (dim.x * dim.y)};
    thread->started = thread->done = false;
    thread->fence = CudaThread::kNoFence;
    thread->num_copies = thread->num_groups = 0;
    thread->num_atomics = 0;
    thread->num_store_groups = 0;
    thread->has_arrived = false;
    thread->num_registers = num_registers;
    for (const void*& address : thread->atomics) address = nullptr;
    thread->site = Site{};
    thread->waits_in = "nothing";
    thread->priority = static_cast<uint32_t>(random_number() & 0xffff);
#if EMU_TSAN
    char name[80];
    std::snprintf(name, sizeof name, "block (%u,%u,%u) thread (%u,%u,%u)", index.x, index.y, index.z, thread->index.x,
                  thread->index.y, thread->index.z);
    __tsan_set_fiber_name(thread->fiber.tsan_fiber, name);
#endif
    make_ready(thread);
  }
}

// Consecutive blocks, from block number `first` of the grid on.
EMU_RT void start_cluster(Block** blocks, size_t first, dim3 grid) {
  Cluster* cluster = &blocks[0]->own_cluster;
  cluster->size = static_cast<int>(machine.grid.cluster_size);
  cluster->live_threads = cluster->size * blocks[0]->num_threads;
  cluster->barrier.arrived = 0;
  cluster->barrier.waiting = WaitList{};
  for (int rank = 0; rank < cluster->size; ++rank) {
    const size_t number = first + static_cast<size_t>(rank);
    reset_sm90_state(blocks[rank], cluster, rank);
    start_block(blocks[rank],
                uint3{static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                      static_cast<unsigned>(number / grid.x / grid.y)});
  }
}

// Checks the blocks of a cluster that have just ended. Whether all have.
EMU_RT bool has_ended(Block** blocks) {
  bool ended = true;
  for (unsigned rank = 0; rank < machine.grid.cluster_size; ++rank) {
    Block* block = blocks[rank];
    ended &= block->live == 0;
    if (block->live != 0 || block->checked) continue;
    block->checked = true;
    check_red_zones(block);
  }
  return ended;
}

// ---- the grid ----

// Nobody can run, and blocks are not done: which thread of each warp waits where.
[[noreturn]] __attribute__((cold)) inline void fail_deadlock() {
  std::string text;
  int shown = 0;
  for (const Block* block : machine.resident) {
    const CudaThread* last = nullptr;
    for (int i = 0; i < block->num_threads && shown < 8; ++i) {
      const CudaThread* thread = block->threads[i];
      if (thread->done || (last != nullptr && last->site.line == thread->site.line)) continue;
      last = thread;
      ++shown;
      char line[320];
      char state[100] = {};
      if (std::strcmp(thread->waits_in, kMbarrierWait) == 0) describe_mbarrier(state, sizeof state, thread);
      std::snprintf(line, sizeof line, "; block (%u,%u,%u) thread (%u,%u,%u) waits in %s%s at %s:%d", block->index.x,
                    block->index.y, block->index.z, thread->index.x, thread->index.y, thread->index.z, thread->waits_in,
                    state, thread->site.file != nullptr ? base_name(thread->site.file) : "?", thread->site.line);
      text += line;
    }
  }
  fail(Site{}, "deadlock%s", text.c_str());
}

inline void check_limits(dim3 grid, dim3 block, size_t dynamic_bytes) {
  const size_t num_threads = size_t{block.x} * block.y * block.z;
  EMU_CHECK(num_threads >= 1 && num_threads <= kMaxThreadsPerBlock && block.z <= 64, Site{},
            "a block of (%u,%u,%u) threads; 1 to 1024 are allowed, 64 of them in z", block.x, block.y, block.z);
  EMU_CHECK(grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535,
            Site{}, "a grid of (%u,%u,%u) blocks; at least 1 and at most (2147483647,65535,65535) are allowed", grid.x,
            grid.y, grid.z);
  EMU_CHECK(dynamic_bytes <= config().max_shared_bytes(), Site{},
            "%zu bytes of dynamic shared memory; a block may use %zu (sm_%s)", dynamic_bytes,
            config().max_shared_bytes(), config().architecture == 90 ? "90" : "86, sm_89");
}

inline void check_cluster(dim3 grid) {
  const unsigned size = machine.grid.cluster_size;
  if (!machine.grid.is_sm90) return;
  EMU_CHECK(config().architecture >= 90, Site{}, "a kernel for sm_90a, launched on sm_%d", config().architecture);
  EMU_CHECK(size >= 1 && size <= kMaxClusterBlocks, Site{}, "a cluster of %u blocks; 1 to %d are allowed", size,
            kMaxClusterBlocks);
  const size_t num_threads = size_t{size} * machine.grid.block_dim.x * machine.grid.block_dim.y;
  EMU_CHECK(num_threads * machine.grid.block_dim.z <= ReadyQueue::kCapacity, Site{},
            "a cluster has more threads than the emulator can run at a time, %u", ReadyQueue::kCapacity);
  EMU_CHECK(grid.x % size == 0, Site{}, "a grid of %u blocks in x is not whole clusters of %u", grid.x, size);
}

inline void run_blocks(dim3 grid, int num_threads) {
  const size_t num_blocks = size_t{grid.x} * grid.y * grid.z;
  const int resident = config().resident;
  const auto fitting = static_cast<size_t>(std::max(kMaxResidentThreads / num_threads, 1));
  const size_t cluster_size = machine.grid.cluster_size;
  size_t num_resident = std::min({num_blocks, fitting, resident > 0 ? static_cast<size_t>(resident) : fitting});
  num_resident = std::max(num_resident / cluster_size, size_t{1}) * cluster_size;
  while (machine.resident.size() < num_resident) take_block(num_threads);
  for (size_t next = 0;;) {
    bool is_busy = false;
    for (size_t i = 0; i < num_resident; i += cluster_size) {
      Block** blocks = &machine.resident[i];
      bool is_idle = has_ended(blocks);
      if (is_idle && next < num_blocks) {
        start_cluster(blocks, next, grid);
        next += cluster_size;
        is_idle = false;
      }
      is_busy |= !is_idle;
    }
    CudaThread* thread = pick();
    if (thread == &machine.main) {
      if (!is_busy) return;
      fail_deadlock();
    }
    resume(thread);
    if (machine.failed) return;
  }
}

// Gives threads and blocks back. Threads that a failure left in the middle of the kernel start afresh.
EMU_RT void finish_launch() {
  Pool& pool = machine.pools[machine.pool];
  machine.current = &machine.main;
  end_proxies();
  for (Block* block : machine.resident) {
    for (int i = 0; i < block->num_threads; ++i) {
      CudaThread* thread = block->threads[i];
      if (block->live > 0 && thread->started && !thread->done) {
#if EMU_TSAN
        // What it did lies before everything that follows, like the work of threads that ended.
        __tsan_switch_to_fiber(thread->fiber.tsan_fiber, __tsan_switch_to_fiber_no_sync);
        hb_release(&machine.done_token);
        hb_release(&block->order_token[block->num_started % 2]);
        __tsan_switch_to_fiber(machine.main.fiber.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
        reset_fiber(thread->fiber, run_thread);
      }
      pool.threads.push_back(thread);
    }
    block->live = 0;
    pool.blocks.push_back(block);
  }
  machine.resident.clear();
  machine.ready.clear();
  machine.yielded.clear();
  machine.num_bulk_copies = 0;
  hb_acquire(&machine.done_token);
}

// The stack of whoever called launch, for AddressSanitizer.
inline void describe_main_fiber() {
#if EMU_ASAN
  pthread_attr_t attributes;
  void* stack = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &machine.main.fiber.stack_bytes);
  pthread_attr_destroy(&attributes);
  machine.main.fiber.stack = static_cast<char*>(stack);
#endif
#if EMU_TSAN
  machine.main.fiber.tsan_fiber = __tsan_get_current_fiber();
#endif
}

inline void run_grid(const Grid& grid, const void* parameters, size_t parameter_bytes, dim3 grid_dim, dim3 block_dim) {
  const std::lock_guard lock(machine.mutex);
  machine.grid = grid;
  machine.grid.dim = uint3{grid_dim.x, grid_dim.y, grid_dim.z};
  machine.grid.block_dim = uint3{block_dim.x, block_dim.y, block_dim.z};
  machine.current = &machine.main;
  check_limits(grid_dim, block_dim, grid.dynamic_bytes);
  check_cluster(grid_dim);
  if (machine.parameters == nullptr) machine.parameters = map_memory(kMaxParameterBytes);
  EMU_CHECK(machine.parameters != nullptr, Site{}, "no memory for the arguments");
  copy_unseen(machine.parameters, parameters, parameter_bytes);
  ++machine.stats.launches;
  machine.failed = false;
  machine.idle_rounds = 0;
  machine.random_state = config().seed * 0x9e3779b97f4a7c15u + 88172645463325252u;
  if (machine.random_state == 0) machine.random_state = 1;
  describe_main_fiber();
  begin_ordering();
  open_reports();
  catch_faults();
  try {
    run_blocks(grid_dim, static_cast<int>(block_dim.x * block_dim.y * block_dim.z));
    if (!machine.failed) check_dependent_launch();
  } catch (const std::exception& error) {
    if (!machine.failed) std::snprintf(machine.error, sizeof machine.error, "%s", error.what());
    machine.failed = true;
  }
  restore_faults();
  finish_launch();
  close_reports();
  if (machine.failed) throw KernelError(machine.error);
}

// Copies the arguments, as CUDA does, to memory in which ThreadSanitizer sees no write.
template <class... Parameters, class... Arguments>
void launch_grid(Grid grid, void (*kernel)(Parameters...), dim3 grid_dim, dim3 block_dim,
                 const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  };
  static_assert((std::is_trivially_copyable_v<std::decay_t<Parameters>> && ...), "a GPU gets the bytes of an argument");
  static_assert(sizeof(Call) <= kMaxParameterBytes, "a kernel takes up to 4 KB of arguments");
  const Call call{kernel, {arguments...}};
  grid.entry = [](const void* parameters) {
    const Call& c = *static_cast<const Call*>(parameters);
    std::apply(c.kernel, c.arguments);
  };
  run_grid(grid, &call, sizeof call, grid_dim, block_dim);
}

// Runs the kernel and returns when all of it is done. Throws KernelError for every fault that is found.
template <class... Parameters, class... Arguments>
void launch_named(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes,
                  const Arguments&... arguments) {
  launch_grid(Grid{.name = name, .dynamic_bytes = dynamic_bytes}, kernel, grid, block, arguments...);
}

// The same by programmatic dependent launch: the kernel may begin before its predecessor has ended, and sees the
// predecessor's results after griddepcontrol.wait alone.
template <class... Parameters, class... Arguments>
void launch_dependent_named(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                            size_t dynamic_bytes, const Arguments&... arguments) {
  launch_grid(Grid{.name = name, .dynamic_bytes = dynamic_bytes, .is_dependent = true}, kernel, grid, block,
              arguments...);
}

// The same with clusters of `cluster_size` consecutive blocks, for kernels for sm_90a.
template <class... Parameters, class... Arguments>
void launch_cluster_named(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster_size,
                          size_t dynamic_bytes, const Arguments&... arguments) {
  launch_grid(Grid{.name = name, .dynamic_bytes = dynamic_bytes, .cluster_size = cluster_size, .is_sm90 = true}, kernel,
              grid, block, arguments...);
}

}  // namespace emu
