// The op library persimmon_fast_emu: the ops of persimmon_fast with their CUDA kernels, executed on CPU tensors.
#include "csrc/cuda/dependent_launch.h"
#include "csrc/emu/launch.h"
#include "csrc/ops/schemas.h"

namespace {

void configure(const std::string& sched, const std::string& async, int64_t seed, int64_t resident) {
  emu::configure(sched, async, static_cast<uint64_t>(seed), emu::parse_resident(resident));
}

void set_architecture(int64_t architecture) { emu::set_architecture(architecture); }

c10::Dict<std::string, int64_t> stats() {
  const emu::Stats s = emu::stats();
  c10::Dict<std::string, int64_t> counts;
  const auto add = [&](const char* name, uint64_t count) { counts.insert(name, static_cast<int64_t>(count)); };
  add("launches", s.launches);
  add("blocks", s.blocks);
  add("switches", s.switches);
  add("warp_operations", s.warp_operations);
  add("mmas", s.mmas);
  add("wgmmas", s.wgmmas);
  add("ldmatrix_wavefronts", s.ldmatrix_wavefronts);
  add("ldmatrix_wavefronts_ideal", s.ldmatrix_wavefronts_ideal);
  add("stmatrix_wavefronts", s.stmatrix_wavefronts);
  add("stmatrix_wavefronts_ideal", s.stmatrix_wavefronts_ideal);
  return counts;
}

void set_dependent_launches(bool allowed) { persimmon_fast::cuda::dependent_launches() = allowed; }

}  // namespace

TORCH_LIBRARY(persimmon_fast_emu, m) {
  persimmon_fast::define_ops(m);
  // docs/emulator.md
  m.def("configure(str sched, str async_policy, int seed, int resident) -> ()", &configure);
  m.def("set_architecture(int architecture) -> ()", &set_architecture);
  m.def("set_dependent_launches(bool allowed) -> ()", &set_dependent_launches);
  m.def("stats() -> Dict(str, int)", &stats);  // since the library was loaded
}
