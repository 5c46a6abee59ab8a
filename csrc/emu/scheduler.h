// Who runs next. Threads switch only in synchronising operations, so the schedule decides every interleaving.
#pragma once

#include "csrc/emu/error.h"
#include "csrc/emu/sanitizer_reports.h"

namespace emu {

// Threads that poll (ld_acquire) run again only when nobody else can. After that many rounds in which no thread ended,
// no barrier was completed and no polled value changed, the wait is called hopeless.
constexpr uint64_t kMaxIdleRounds = 100'000;

// async_progress.h
EMU_RT void async_random_progress();
EMU_RT bool finish_bulk_load();

EMU_RT void note_progress() { machine.idle_rounds = 0; }

EMU_RT void resume(CudaThread* to) {
  CudaThread* from = machine.current;
  if (from == to) return;
  machine.current = to;
  ++machine.stats.switches;
  switch_fiber(from->fiber, to->fiber);
}

EMU_RT unsigned choose(ReadyQueue& ready) {
  switch (machine.config.schedule) {
    case Schedule::kFifo:
    case Schedule::kReverse:
      break;
    case Schedule::kRandom:
      return static_cast<unsigned>(random_number() % ready.count);
    case Schedule::kWarp: {
      if (random_number() % 64 != 0) {  // now and then another warp
        for (unsigned i = ready.count; i-- > 0;) {
          if (ready.at(i)->warp == machine.last_warp) return i;
        }
      }
      return static_cast<unsigned>(random_number() % ready.count);
    }
    case Schedule::kPct: {
      unsigned best = 0;
      for (unsigned i = 1; i < ready.count; ++i) {
        if (ready.at(i)->priority > ready.at(best)->priority) best = i;
      }
      return best;
    }
  }
  return 0;
}

// The next thread to run, or main if there is none.
EMU_RT CudaThread* pick() {
  ReadyQueue& ready = machine.ready;
  while (ready.count == 0 && machine.num_bulk_copies != 0 && finish_bulk_load()) {  // the latest moment that is allowed
  }
  if (ready.count == 0) {
    if (machine.yielded.count == 0) return &machine.main;
    EMU_CHECK(++machine.idle_rounds < kMaxIdleRounds, machine.yielded.at(0)->site,
              "livelock: threads that poll a value which nobody changes: %u, resident blocks: %zu",
              machine.yielded.count, machine.resident.size());
    while (machine.yielded.count != 0) ready.push(machine.yielded.pop(0));
  }
  CudaThread* thread = machine.config.schedule == Schedule::kReverse ? ready.pop_back() : ready.pop(choose(ready));
  if (machine.config.schedule == Schedule::kPct && random_number() % 50 == 0) {
    thread->priority = static_cast<uint32_t>(random_number() & 0xffff);
  }
  machine.last_warp = thread->warp;
  return thread;
}

EMU_RT void reschedule() {
  check_sanitizer_reports(self()->site);
  if (machine.config.async == AsyncPolicy::kRandom) async_random_progress();
  resume(pick());
}

EMU_RT void make_ready(CudaThread* thread) { machine.ready.push(thread); }

EMU_RT void wake_all(WaitList& list) {
  while (list.head != nullptr) make_ready(list.pop());
}

EMU_RT void block_in(WaitList& list, const char* operation, Site site) {
  CudaThread* thread = self();
  thread->waits_in = operation;
  thread->site = site;
  list.push(thread);
  reschedule();
}

// Lets all others run first.
EMU_RT void yield(Site site) {
  self()->site = site;
  machine.yielded.push(self());
  reschedule();
}

// A point where others may run first: behind an atomic operation.
EMU_RT void preempt(Site site) {
  const Schedule schedule = machine.config.schedule;
  if (schedule == Schedule::kFifo || schedule == Schedule::kReverse) return yield(site);
  self()->site = site;
  make_ready(self());
  reschedule();
}

}  // namespace emu
