// LayerNorm over head_dim and rotary embedding of q and k. See qk_norm_rope.cpp.
#pragma once

#include "csrc/common/norm_rope_params.h"
#include "csrc/cpu/isa.h"

namespace persimmon_fast::cpu {

// Work items: (token, head) pairs, the head fastest.
PF_CPU_KERNEL(qk_norm_rope, QkNormRopeParams)

}  // namespace persimmon_fast::cpu
