// wgmma: d += a b by the 128 threads of a warpgroup, asynchronously. PTX ISA, "Asynchronous warpgroup level matrix
// instructions".
//
// The registers of d are NaN from the instruction to the wait for it. Operands are read late: in the wait, or by the
// policy at once or at any synchronisation point; also a in registers, which must live until then.
#pragma once

#include "csrc/emu/async_proxy.h"
#include "csrc/emu/wgmma_operands.h"

namespace emu {

constexpr int kWarpgroupThreads = 128;
constexpr int kMaxWgmmas = 64;  // of a warpgroup in flight
constexpr int kMaxAccumulators = 8;

// The registers d of a warpgroup while instructions that add to them are in flight.
struct Accumulator {
  int num_columns = 0;
  int num_threads = 0;                       // whose registers it holds
  float* registers[kWarpgroupThreads] = {};  // where each thread's are, null: it holds none
  uint64_t last_use[kWarpgroupThreads] = {};
  float sums[64][kMaxWgmmaColumns];
};

struct Wgmma {
  uint64_t a, b;  // descriptors
  bool a_in_registers, trans_b, accumulate, is_bf16;
  int num_columns, num_threads;  // that have issued it
  Accumulator* d;
  Site site;
  const uint32_t* a_registers[kWarpgroupThreads];
  uint64_t token;  // it has read its operands
};

struct WarpgroupThread {
  uint64_t issued = 0, waited = 0;
  int num_groups = 0;
  int group[kMaxWgmmas] = {};
  bool has_fenced = false;  // since its registers were last its own
};

struct Warpgroup {
  uint64_t created = 0, executed = 0;
  Wgmma operations[kMaxWgmmas];
  WarpgroupThread threads[kWarpgroupThreads];
  Accumulator* accumulators[kMaxAccumulators] = {};
  WaitList waiting;
  int registers_wanted[kMaxRegisterChanges] = {};  // by the calls of setmaxnreg, one after the other
  int num_register_changes[kWarpgroupThreads / kWarpSize] = {};
};

EMU_RT Warpgroup& own_warpgroup(const char* operation, Site site) {
  Block* block = self()->block;
  Warpgroup*& warpgroup = block->warpgroups[self()->rank / kWarpgroupThreads];
  if (warpgroup != nullptr) return *warpgroup;
  EMU_CHECK(block->num_threads % kWarpgroupThreads == 0, site, "%s: %d threads are not whole warpgroups", operation,
            block->num_threads);
  warpgroup = reinterpret_cast<Warpgroup*>(map_memory(sizeof(Warpgroup)));  // zero is the initial state
  EMU_CHECK(warpgroup != nullptr, site, "no memory for the state of another warpgroup");
  return *warpgroup;
}

EMU_RT Wgmma& operation_at(Warpgroup& warpgroup, uint64_t number) { return warpgroup.operations[number % kMaxWgmmas]; }

// Row and column of register i of a thread: d[4 j + 2 h + e] is row 16 w + 8 h + g, column 8 j + 2 q + e.
EMU_RT float& sum_of_register(Accumulator& d, int thread, int i) {
  const int lane = thread % kWarpSize;
  return d.sums[thread / kWarpSize * 16 + (i / 2 % 2) * 8 + lane / 4][i / 4 * 8 + lane % 4 * 2 + i % 2];
}

// ---- execution ----

// The next operation, which all threads have issued.
EMU_RT void execute_wgmma(Warpgroup& warpgroup) {
  Wgmma& operation = operation_at(warpgroup, warpgroup.executed);
  Block* block = self()->block;
  WgmmaOperands& operands = wgmma_operands;
  const int columns = operation.num_columns;
  if (operation.a_in_registers) {
    for (int t = 0; t < kWarpgroupThreads; ++t) {
      for (int i = 0; i < 4; ++i) {  // as of mma.m16n8k16
        const int row = t / kWarpSize * 16 + i % 2 * 8 + t % kWarpSize / 4, k = i / 2 * 8 + t % 4 * 2;
        for (int half = 0; half < 2; ++half) {
          operands.a[row][k + half] = operation.is_bf16 ? float_of_16_bits<true>(operation.a_registers[t][i], half)
                                                        : float_of_16_bits<false>(operation.a_registers[t][i], half);
        }
      }
    }
  } else {
    decode_a(block, operation.a, operation.is_bf16, operation.site);
  }
  decode_b(block, operation.b, operation.trans_b, columns, operation.is_bf16, operation.site);
  if (!operation.accumulate) {
    for (auto& row : operation.d->sums) {
      for (int n = 0; n < columns; ++n) row[n] = 0.0f;
    }
  }
  multiply_operands(operation.d->sums, columns);
  ++warpgroup.executed;
  ++machine.stats.wgmmas;
}

EMU_RT bool can_execute(Warpgroup& warpgroup) {
  return warpgroup.executed < warpgroup.created &&
         operation_at(warpgroup, warpgroup.executed).num_threads == kWarpgroupThreads;
}

// Now and then, if an operation of this thread's warpgroup is in flight.
EMU_RT void execute_any_wgmma() {
  Warpgroup* warpgroup = self()->block->warpgroups[self()->rank / kWarpgroupThreads];
  if (warpgroup != nullptr && can_execute(*warpgroup) && random_number() % 4 == 0) execute_wgmma(*warpgroup);
}

// ---- issue ----

// Reads as ThreadSanitizer sees them, and the checks of the addresses.
EMU_RT void touch_operands(const Wgmma& operation) {
  Block* block = self()->block;
  if (!operation.a_in_registers) touch_operand(block, operation.a, false, 64, operation.site);
  touch_operand(block, operation.b, operation.trans_b, operation.num_columns, operation.site);
}

EMU_RT Accumulator* find_accumulator(Warpgroup& warpgroup, int thread, const float* d, int columns, Site site) {
  Accumulator** unused = nullptr;
  for (Accumulator*& accumulator : warpgroup.accumulators) {
    if (accumulator == nullptr || accumulator->num_threads == 0) {
      if (unused == nullptr) unused = &accumulator;
    } else if (accumulator->registers[thread] == d) {
      return accumulator;
    }
  }
  EMU_CHECK(unused != nullptr, site, "wgmma: more than %d accumulators of a warpgroup in flight", kMaxAccumulators);
  if (*unused == nullptr) *unused = reinterpret_cast<Accumulator*>(map_memory(sizeof(Accumulator)));
  EMU_CHECK(*unused != nullptr, site, "no memory for the sums of a warpgroup");
  (*unused)->num_columns = columns;
  return *unused;
}

// Takes the registers of d over, until the thread waits.
EMU_RT void give_registers(Accumulator& accumulator, int thread, float* d, bool accumulate) {
  accumulator.registers[thread] = d;
  ++accumulator.num_threads;
  const int num_registers = accumulator.num_columns / 2;
  for (int i = 0; i < num_registers; ++i) {
    if (accumulate) sum_of_register(accumulator, thread, i) = d[i];
    d[i] = __builtin_bit_cast(float, 0xffffffffu);
  }
}

// a: the thread's registers, or null: descriptor a_descriptor. The first thread of a warpgroup makes the operation, the
// others join; with the last one it may execute.
EMU_RT void wgmma(float* d, int num_registers, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor,
                  bool trans_b, bool accumulate, bool is_bf16, Site site) {
  Warpgroup& warpgroup = own_warpgroup("wgmma", site);
  const int thread = self()->rank % kWarpgroupThreads, columns = num_registers * 2;
  WarpgroupThread& own = warpgroup.threads[thread];
  const uint64_t number = own.issued++;
  EMU_CHECK(number - own.waited < kMaxWgmmas, site, "more than %d wgmma of a warpgroup in flight", kMaxWgmmas);
  Wgmma& operation = operation_at(warpgroup, number);
  if (number == warpgroup.created) {
    ++warpgroup.created;
    operation.a = a_descriptor, operation.b = b_descriptor;
    operation.a_in_registers = a != nullptr, operation.trans_b = trans_b;
    operation.accumulate = accumulate, operation.is_bf16 = is_bf16;
    operation.num_columns = columns, operation.num_threads = 0;
    operation.site = site;
    operation.d = find_accumulator(warpgroup, thread, d, columns, site);
  }
  EMU_CHECK(operation.site.line == site.line && operation.a == a_descriptor && operation.b == b_descriptor &&
                operation.a_in_registers == (a != nullptr) && operation.trans_b == trans_b &&
                operation.accumulate == accumulate && operation.num_columns == columns,
            site, "wgmma differs between the threads of a warpgroup: another one issues that at %s:%d",
            base_name(operation.site.file), operation.site.line);
  Accumulator& accumulator = *operation.d;
  const bool is_chained = accumulator.registers[thread] == d;
  EMU_CHECK(own.has_fenced || (is_chained && a == nullptr), site,
            "wgmma without a wgmma.fence after its registers were last touched");
  EMU_CHECK(accumulator.num_columns == columns && (is_chained || accumulator.registers[thread] == nullptr), site,
            "wgmma: its accumulators are not those of the operation in flight that it continues");
  if (!is_chained) give_registers(accumulator, thread, d, accumulate);
  accumulator.last_use[thread] = number;
  operation.a_registers[thread] = a;
  own.group[number % kMaxWgmmas] = own.num_groups;
  if (EMU_TSAN && thread % kWarpSize == 0) {  // each warp must know that the operands are there
    touch_operands(operation);
    check_access(site);
    hb_release(&operation.token);  // that one thread has waited is enough to overwrite them
  }
  if (++operation.num_threads < kWarpgroupThreads) return;
  if (!EMU_TSAN) touch_operands(operation);
  void* caller = enter_proxy(self()->block, "wgmma", site);
  if (EMU_TSAN) touch_operands(operation);
  hb_release(&operation.token);
  leave_fiber(caller);
  check_access(site);
  if (machine.config.async == AsyncPolicy::kEarly) {
    while (can_execute(warpgroup)) execute_wgmma(warpgroup);
  }
  wake_all(warpgroup.waiting);
}

// ---- order ----

EMU_RT WarpgroupThread& own_wgmma_state(const char* operation, Site site) {
  return own_warpgroup(operation, site).threads[self()->rank % kWarpgroupThreads];
}
EMU_RT void wgmma_fence(Site site) { own_wgmma_state("wgmma.fence", site).has_fenced = true; }
EMU_RT void wgmma_commit(Site site) { ++own_wgmma_state("wgmma.commit_group", site).num_groups; }

// Until at most the `pending` groups that the thread committed last are in flight; its registers are its own again.
EMU_RT void wgmma_wait(int pending, Site site) {
  Warpgroup& warpgroup = own_warpgroup("wgmma.wait_group", site);
  const int thread = self()->rank % kWarpgroupThreads;
  WarpgroupThread& own = warpgroup.threads[thread];
  for (; own.waited < own.issued; ++own.waited) {
    if (own.group[own.waited % kMaxWgmmas] >= own.num_groups - pending) break;
    while (warpgroup.executed <= own.waited) {
      if (can_execute(warpgroup)) {
        execute_wgmma(warpgroup);
      } else {
        block_in(warpgroup.waiting, "wgmma.wait_group (other threads of the warpgroup have not issued the wgmma)",
                 site);
      }
    }
    hb_acquire(&operation_at(warpgroup, own.waited).token);
  }
  own.has_fenced = false;
  for (Accumulator* accumulator : warpgroup.accumulators) {
    if (accumulator == nullptr || accumulator->num_threads == 0) continue;
    float* d = accumulator->registers[thread];
    if (d == nullptr || accumulator->last_use[thread] >= own.waited) continue;
    for (int i = 0; i < accumulator->num_columns / 2; ++i) d[i] = sum_of_register(*accumulator, thread, i);
    accumulator->registers[thread] = nullptr;
    --accumulator->num_threads;
  }
}

EMU_RT void check_wgmmas_are_waited_for(const CudaThread* thread) {
  const Warpgroup* warpgroup = thread->block->warpgroups[thread->rank / kWarpgroupThreads];
  if (warpgroup == nullptr) return;
  const WarpgroupThread& own = warpgroup->threads[thread->rank % kWarpgroupThreads];
  EMU_CHECK(own.waited == own.issued, warpgroup->operations[own.waited % kMaxWgmmas].site,
            "a thread has returned and not waited for its wgmma");
}

// For a new block on these threads.
EMU_RT void reset_warpgroups(Block* block) {
  for (Warpgroup* warpgroup : block->warpgroups) {
    if (warpgroup == nullptr) continue;
    warpgroup->created = warpgroup->executed = 0;
    warpgroup->waiting = WaitList{};
    for (WarpgroupThread& thread : warpgroup->threads) {
      thread.issued = thread.waited = 0;
      thread.num_groups = 0;
      thread.has_fenced = false;
    }
    for (Accumulator* accumulator : warpgroup->accumulators) {
      if (accumulator == nullptr) continue;
      accumulator->num_threads = 0;
      for (float*& registers : accumulator->registers) registers = nullptr;
    }
    for (int& changes : warpgroup->num_register_changes) changes = 0;
  }
}

}  // namespace emu
