// Programmatic dependent launch: griddepcontrol.wait and .launch_dependents.
//
// Kernels run one after another here, so the predecessor's results are in memory from the start. Under ThreadSanitizer
// they are nevertheless unordered before the wait: a dependent kernel runs on other fibers than its predecessor and
// begins with what was known when the last ordinary launch began. An access before the wait to memory that a kernel
// since then wrote, or a write to what it read, is reported as a race. The other builds check only that somebody waits.
// Memory that the host writes between the two launches must not be read before the wait either.
#pragma once

#include "csrc/emu/error.h"

namespace emu {

// Before the threads of a grid start.
EMU_RT void begin_ordering() {
  // A new address each time: a token keeps all that was ever released to it.
  delete machine.start_token;
  machine.start_token = new uint64_t;
  hb_release(machine.start_token);
  if (machine.grid.is_dependent && machine.early_token != nullptr) {
    machine.pool = 1 - machine.pool;
    return;
  }
  delete machine.early_token;
  machine.early_token = new uint64_t;
  hb_release(machine.early_token);
}

// griddepcontrol.wait: until the preceding grids are done and their results visible.
EMU_RT void griddepcontrol_wait() {
  machine.grid.has_waited = true;
  hb_acquire(machine.start_token);
}

// griddepcontrol.launch_dependents: the dependent grid may start. Its threads see nothing before their own wait, so
// where this stands changes no result.
EMU_RT void griddepcontrol_launch_dependents() {}

EMU_RT void check_dependent_launch() {
  EMU_CHECK(!machine.grid.is_dependent || machine.grid.has_waited, Site{},
            "launched as a dependent of the preceding kernel, but no thread executes griddepcontrol.wait: the kernel "
            "after this one could start before the preceding kernel is done");
}

}  // namespace emu
