// Ops without a backward refuse inputs that require gradients; without this, torch would drop the graph silently.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

namespace persimmon_fast {
namespace {

void refuse_backward(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  if (at::GradMode::is_enabled()) {
    const auto& arguments = op.schema().arguments();
    for (size_t i = 0; i < arguments.size(); ++i) {
      const c10::IValue& value = (*stack)[stack->size() - arguments.size() + i];
      TORCH_CHECK_NOT_IMPLEMENTED(!value.isTensor() || !value.toTensor().requires_grad(), op.schema().name(),
                                  ": argument ", arguments[i].name(),
                                  " requires a gradient, and this op has no backward. Use",
                                  " torch.no_grad(), or the same function of persimmon_fast.ops, which then runs the",
                                  " differentiable reference");
    }
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(persimmon_fast, Autograd, m) {
  for (const char* op : {"layer_norm", "add_layer_norm", "qk_norm_rope", "qk_norm_rope_", "qkv_norm_rope",
                         "qkv_norm_rope_paged", "flash_attention", "paged_attention", "linear_residual",
                         "squared_relu_mlp", "lm_head_argmax", "lm_head_sample", "lm_head_logprobs"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_backward>());
  }
}

}  // namespace persimmon_fast
