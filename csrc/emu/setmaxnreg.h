// setmaxnreg: registers move between the warpgroups of a block.
#pragma once

#include "csrc/emu/warp.h"
#include "csrc/emu/wgmma.h"

namespace emu {

constexpr int kRegistersPerMultiprocessor = 65536;

// Registers of each thread when a block starts: as many as fit, with which a compiler that is told the number of
// threads gives a kernel.
EMU_RT int initial_registers(int num_threads) {
  const int fitting = kRegistersPerMultiprocessor / num_threads / 8 * 8;
  return fitting < 248 ? fitting : 248;
}

// setmaxnreg.{inc,dec}.sync.aligned: by all warps of a warpgroup. An increase waits until the registers are free.
EMU_RT void setmaxnreg(int wanted, bool increase, Site site) {
  const char* operation = increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
  CudaThread* thread = self();
  Block* block = thread->block;
  Warpgroup& warpgroup = own_warpgroup(operation, site);
  EMU_CHECK(wanted >= 24 && wanted <= 256 && wanted % 8 == 0, site,
            "%s: %d registers; multiples of 8 from 24 to 256 are allowed", operation, wanted);
  EMU_CHECK(increase ? wanted >= thread->num_registers : wanted <= thread->num_registers, site,
            "%s: from %d registers to %d", operation, thread->num_registers, wanted);
  collect(~0u, kSetmaxnreg, nullptr, 0, site, Nothing{});
  const int change = (wanted - thread->num_registers) * kWarpSize;
  if (thread->lane == 0) {
    const int call = warpgroup.num_register_changes[thread->rank / kWarpSize % 4]++;
    EMU_CHECK(call < kMaxRegisterChanges, site, "more than %d setmaxnreg of a warp", kMaxRegisterChanges);
    int num_warps = 0;  // that have come this far
    for (int count : warpgroup.num_register_changes) num_warps += count > call;
    if (num_warps == 1) warpgroup.registers_wanted[call] = wanted;
    EMU_CHECK(warpgroup.registers_wanted[call] == wanted, site,
              "%s: %d registers, but another warp of the warpgroup wants %d", operation, wanted,
              warpgroup.registers_wanted[call]);
    while (block->free_registers < change) {
      block_in(block->waiting_for_registers, "setmaxnreg.inc (others must give up registers)", site);
    }
    block->free_registers -= change;
    if (change < 0) wake_all(block->waiting_for_registers);
  }
  thread->num_registers = wanted;
  collect(~0u, kSetmaxnreg, nullptr, 0, site, Nothing{});
}

// A block ends: the warps of each warpgroup have changed their registers equally often.
EMU_RT void check_register_changes(const Block* block) {
  for (const Warpgroup* warpgroup : block->warpgroups) {
    if (warpgroup == nullptr) continue;
    const int* changes = warpgroup->num_register_changes;
    EMU_CHECK(changes[0] == changes[1] && changes[0] == changes[2] && changes[0] == changes[3], Site{},
              "setmaxnreg was executed by some warps of a warpgroup only (%d, %d, %d and %d times)", changes[0],
              changes[1], changes[2], changes[3]);
  }
}

}  // namespace emu
