// LayerNorm over rows, optionally of a sum. See layer_norm.cpp.
#pragma once

#include "csrc/common/layer_norm_params.h"
#include "csrc/cpu/isa.h"

namespace persimmon_fast::cpu {

// Work items: rows; LayerNormParams::num_rows is not read.
PF_CPU_KERNEL(layer_norm, LayerNormParams)

}  // namespace persimmon_fast::cpu
