// persimmon_fast._C: importing it loads the op library; its functions report what was built.
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "build_info.h"
#include "csrc/cpu/isa.h"
#include "csrc/cuda/dependent_launch.h"
#include "csrc/ops/read_memory.h"

PYBIND11_MODULE(_C, m) {
  using namespace persimmon_fast::cpu;
  m.doc() = "Op library of persimmon_fast. Ops live in torch.ops.persimmon_fast.";

  m.def("cpu_isa", [] { return isa_name(active_isa()); });
  m.def("best_cpu_isa", [] { return isa_name(best_isa()); });
  m.def("set_cpu_isa", [](const std::string& name) { set_isa(parse_isa(name.c_str())); });

  // Returns what was set before; of this thread.
  m.def("set_dependent_launches",
        [](bool allowed) { return std::exchange(persimmon_fast::cuda::dependent_launches(), allowed); });

  m.def("read_memory", &persimmon_fast::read_memory, pybind11::call_guard<pybind11::gil_scoped_release>());

  m.attr("build_summary") = PF_SUMMARY;      // one line: version, instruction sets, CUDA, compiler, torch
  m.attr("cpu_summary") = PF_CPU_SUMMARY;    // instruction sets that were compiled
  m.attr("cuda_summary") = PF_CUDA_SUMMARY;  // architectures, or why there are none
  m.attr("torch_version") = PF_TORCH_VERSION;
  m.attr("compiler") = PF_COMPILER;
  m.attr("cuda_archs") = PF_CUDA_ARCHS;  // "" when built without CUDA kernels
  m.attr("cuda_version") = PF_CUDA_VERSION;
}
