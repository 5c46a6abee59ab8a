// Asynchronous operations that happen now and then, by AsyncPolicy::kRandom.
#pragma once

#include "csrc/emu/async_copy.h"
#include "csrc/emu/tma.h"
#include "csrc/emu/wgmma.h"

namespace emu {

EMU_RT void async_random_progress() {
  if (self() == &machine.main) return;
  finish_any_copy();
  finish_any_bulk_copy();
  execute_any_wgmma();
}

}  // namespace emu
