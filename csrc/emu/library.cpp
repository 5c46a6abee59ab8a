// The op library persimmon_fast_emu: the ops of persimmon_fast with their CUDA kernels, executed on CPU tensors.
#include "csrc/ops/schemas.h"

TORCH_LIBRARY(persimmon_fast_emu, m) { persimmon_fast::define_ops(m); }
