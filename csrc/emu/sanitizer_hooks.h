// Accesses that AddressSanitizer or UndefinedBehaviorSanitizer object to end the kernel with a message of ours.
//
// These are the functions that instrumented code calls when a check fails. Defined here with hidden visibility, they
// take the place of the sanitizer's own within this library: the launch throws before the bad access is made, and the
// process goes on. Needs -fsanitize-recover=address,undefined (the default for the latter).
#pragma once

#include "csrc/emu/shared_memory.h"

#if EMU_ASAN

namespace emu {

// Where the instruction is, "file.cu:12": of the functions inlined there, the innermost one of a kernel source.
__attribute__((cold, no_sanitize("address"))) inline void describe_instruction(char* text, size_t size, void* pc) {
  char frames[2048] = {};  // "path:line\0path:line\0\0", innermost first
  __sanitizer_symbolize_pc(pc, "%s:%l", frames, sizeof frames - 1);
  const char* chosen = frames;
  for (const char* frame = frames; *frame != '\0'; frame += std::strlen(frame) + 1) {
    if (std::strstr(frame, ".cu") == nullptr) continue;
    chosen = frame;
    break;
  }
  std::snprintf(text, size, "%s", base_name(chosen));
}

__attribute__((cold, noinline, no_sanitize("address"))) inline void fail_access(const void* address, size_t bytes,
                                                                                bool is_write, void* pc) {
  const char* verb = is_write ? "write" : "read";
  char at[200], what[256];
  describe_instruction(at, sizeof at, pc);
  CudaThread* thread = machine.current;
  const char* data = static_cast<const char*>(address);
  if (thread == nullptr || thread == &machine.main) {  // not in a kernel: AddressSanitizer ends the process
    void* frame = __builtin_frame_address(0);
    __asan_report_error(pc, frame, frame, const_cast<void*>(address), is_write, bytes);
    return;
  }
  Block* block = thread->block;
  if (is_shared(block, data)) {
    if (copies_in_flight(block, data) != 0) {
      std::snprintf(what, sizeof what, "%s of %zu bytes at %s", verb, bytes, at);
      fail_in_flight(block, what, data, Site{});
    }
    describe_shared(what, sizeof what, block, data);
    fail(Site{}, "out of bounds: %s of %zu bytes, %s; at %s", verb, bytes, what, at);
  }
  char name[64] = {};
  void* region = nullptr;
  size_t region_bytes = 0;
  const char* kind = __asan_locate_address(const_cast<void*>(address), name, sizeof name, &region, &region_bytes);
  const char* begin = static_cast<const char*>(region);
  const auto distance = static_cast<size_t>(data < begin ? begin - data : data - begin - region_bytes);
  if (std::strcmp(kind, "heap") == 0 && begin != nullptr && (data < begin || data >= begin + region_bytes)) {
    std::snprintf(what, sizeof what, "%zu bytes %s an allocation of %zu bytes", distance,
                  data < begin ? "before the start of" : "behind the end of", region_bytes);
  } else {
    std::snprintf(what, sizeof what, "%p is not (or no longer) accessible %s memory", address, kind);
  }
  fail(Site{}, "out of bounds: %s of %zu bytes, %s; at %s", verb, bytes, what, at);
}

}  // namespace emu

#define EMU_HOOK extern "C" __attribute__((weak, visibility("hidden"), no_sanitize("address", "undefined"))) void
#define EMU_ACCESS_HOOKS(bytes)                                                                     \
  EMU_HOOK __asan_report_load##bytes##_noabort(void* address) {                                     \
    ::emu::fail_access(address, bytes, false, static_cast<char*>(__builtin_return_address(0)) - 1); \
  }                                                                                                 \
  EMU_HOOK __asan_report_store##bytes##_noabort(void* address) {                                    \
    ::emu::fail_access(address, bytes, true, static_cast<char*>(__builtin_return_address(0)) - 1);  \
  }
EMU_ACCESS_HOOKS(1)
EMU_ACCESS_HOOKS(2)
EMU_ACCESS_HOOKS(4)
EMU_ACCESS_HOOKS(8)
EMU_ACCESS_HOOKS(16)
#undef EMU_ACCESS_HOOKS
EMU_HOOK __asan_report_load_n_noabort(void* address, unsigned long bytes) {
  ::emu::fail_access(address, bytes, false, static_cast<char*>(__builtin_return_address(0)) - 1);
}
EMU_HOOK __asan_report_store_n_noabort(void* address, unsigned long bytes) {
  ::emu::fail_access(address, bytes, true, static_cast<char*>(__builtin_return_address(0)) - 1);
}

namespace emu {

// Every handler's first argument points to a struct that begins with the source location.
struct UbsanLocation {
  const char* file;
  uint32_t line, column;
};
struct UbsanTypeMismatch {
  UbsanLocation location;
  struct Type {
    uint16_t kind, info;
    char name[1];
  }* type;
  unsigned char log_alignment, check_kind;
};

__attribute__((cold, no_sanitize("undefined"))) inline void fail_undefined(const void* data, const char* what) {
  const auto* location = static_cast<const UbsanLocation*>(data);
  const Site site{location->file, static_cast<int>(location->line)};
  if (machine.current != nullptr && machine.current != &machine.main) fail(site, "undefined behaviour: %s", what);
  std::fprintf(stderr, "%s:%d: undefined behaviour: %s\n", site.file, site.line, what);
}

}  // namespace emu

EMU_HOOK __ubsan_handle_type_mismatch_v1(void* data, void* address) {
  const auto* mismatch = static_cast<const ::emu::UbsanTypeMismatch*>(data);
  const size_t alignment = size_t{1} << mismatch->log_alignment;
  char what[256];
  if (address == nullptr) {
    std::snprintf(what, sizeof what, "null pointer to %s is used", mismatch->type->name);
  } else if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    std::snprintf(what, sizeof what, "misaligned: %p is not %zu-byte aligned, as %s must be", address, alignment,
                  mismatch->type->name);
  } else {
    std::snprintf(what, sizeof what, "%p has not enough space for %s", address, mismatch->type->name);
  }
  ::emu::fail_undefined(data, what);
}
#define EMU_UNDEFINED_HOOK(name, what, ...) \
  EMU_HOOK __ubsan_handle_##name(void* data, ##__VA_ARGS__) { ::emu::fail_undefined(data, what); }
EMU_UNDEFINED_HOOK(add_overflow, "signed integer overflow in an addition", void*, void*)
EMU_UNDEFINED_HOOK(sub_overflow, "signed integer overflow in a subtraction", void*, void*)
EMU_UNDEFINED_HOOK(mul_overflow, "signed integer overflow in a multiplication", void*, void*)
EMU_UNDEFINED_HOOK(negate_overflow, "signed integer overflow in a negation", void*)
EMU_UNDEFINED_HOOK(divrem_overflow, "division by zero, or its result overflows", void*, void*)
EMU_UNDEFINED_HOOK(shift_out_of_bounds, "shift by a negative number of bits, or by too many", void*, void*)
EMU_UNDEFINED_HOOK(out_of_bounds, "index out of the bounds of an array", void*)
EMU_UNDEFINED_HOOK(load_invalid_value, "a bool or enum holds none of its values", void*)
EMU_UNDEFINED_HOOK(pointer_overflow, "pointer arithmetic with a null pointer, or beyond the address space", void*,
                   void*)
#undef EMU_UNDEFINED_HOOK
#undef EMU_HOOK

#endif
