// The op library persimmon_fast. Kernels register themselves: csrc/ops, csrc/ops/cuda.
#include "csrc/ops/schemas.h"

TORCH_LIBRARY(persimmon_fast, m) { persimmon_fast::define_ops(m); }
