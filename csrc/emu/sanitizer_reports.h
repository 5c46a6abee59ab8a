// Reports that a sanitizer writes while a kernel runs are collected here; the launch then fails with their gist.
#pragma once

#include <unistd.h>

#include "csrc/emu/error.h"

namespace emu {

#if EMU_TSAN

// ThreadSanitizer has no callback that a library could register. Its reports go to a file in memory that is mapped
// here, so that one load tells whether there is one.
struct ReportFile {
  static constexpr size_t kBytes = size_t{1} << 22;
  int fd = -1;
  char* text = nullptr;
};
EMU_STATE ReportFile report_file;

inline void open_reports() {
  ReportFile& file = report_file;
  if (file.fd < 0) {
    file.fd = memfd_create("emulator_reports", 0);
    if (file.fd < 0 || ftruncate(file.fd, ReportFile::kBytes) != 0) {
      throw std::runtime_error("emulator: no memory for the reports of ThreadSanitizer");
    }
    file.text = static_cast<char*>(mmap(nullptr, ReportFile::kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd, 0));
  }
  __sanitizer_set_report_fd(reinterpret_cast<void*>(static_cast<uintptr_t>(file.fd)));
}

inline void close_reports() {
  ReportFile& file = report_file;
  __sanitizer_set_report_fd(reinterpret_cast<void*>(uintptr_t{STDERR_FILENO}));
  const off_t length = lseek(file.fd, 0, SEEK_CUR);
  if (length <= 0) return;
  file.text[ReportFile::kBytes - 1] = '\0';
  std::fputs(file.text, stderr);
  std::memset(file.text, 0, static_cast<size_t>(length) < ReportFile::kBytes ? length : ReportFile::kBytes);
  lseek(file.fd, 0, SEEK_SET);
}

// Of the line of a stack frame, "    #0 function path/file.cu:12 (module+0x..)", the file's name and line.
__attribute__((cold, no_sanitize("thread"))) inline size_t append_frame(size_t length, const char* frame) {
  const char* end = std::strchr(frame, '\n');
  const char* module = end;
  while (module > frame && *module != '(') --module;
  const char* file = module;
  while (file > frame && *file != '/') --file;
  if (module - file < 2) return length;
  return append_error(length, " at %.*s", static_cast<int>(module - file - 2), file + 1);
}

// "data race: write of size 4 by block (0,0,0) thread 1 at a.cu:12, previous read of size 4 by ... at a.cu:10". access:
// of an instruction that accesses memory by the emulator alone; its caller's line is in no report.
__attribute__((cold, noinline, no_sanitize("thread"))) inline void fail_with_report(Site access) {
  static char gist[1024];
  size_t length = append_error(0, "data race:");
  int num_accesses = 0;
  for (const char* line = report_file.text; line != nullptr && *line != '\0' && num_accesses < 2;) {
    const char* next = std::strchr(line, '\n');
    const char* by = std::strstr(line, " by ");
    if (std::strncmp(line, "  ", 2) == 0 && line[2] >= 'A' && line[2] <= 'Z' && by != nullptr && next != nullptr &&
        by < next && std::strstr(line, " at 0x") < by) {
      const char* at = std::strstr(line, " at 0x");
      const char* name = std::strchr(by, '\'');  // TSan puts the thread's name in quotes, with its table of threads
      length =
          append_error(length, "%s %.*s", num_accesses++ != 0 ? "," : "", static_cast<int>(at - line - 2), line + 2);
      char thread[16] = {};
      if (std::sscanf(by, " by thread T%12[0-9]", thread) == 1) {
        char heading[32];
        std::snprintf(heading, sizeof heading, "\n  Thread T%s '", thread);
        name = std::strstr(by, heading);
        if (name != nullptr) name += std::strlen(heading) - 1;
      }
      const char* quote = name != nullptr ? std::strchr(name + 1, '\'') : nullptr;
      if (quote != nullptr) length = append_error(length, " by %.*s", static_cast<int>(quote - name - 1), name + 1);
      // The innermost frame outside the emulator is the kernel's.
      for (const char* frame = next + 1; std::strncmp(frame, "    #", 5) == 0;) {
        const char* frame_end = std::strchr(frame, '\n');
        const char* own = std::strstr(frame, "/csrc/emu/");
        const char* in_kernel = std::strstr(frame, ".cu");
        if (in_kernel != nullptr && in_kernel < frame_end && (own == nullptr || own > frame_end)) {
          length = append_frame(length, frame);
          break;
        }
        frame = frame_end + 1;
      }
    }
    line = next != nullptr ? next + 1 : nullptr;
  }
  std::memcpy(gist, machine.error, length < sizeof gist ? length + 1 : sizeof gist);
  gist[sizeof gist - 1] = '\0';
  fail(access, "%s (the full report is on stderr)", gist);
}

EMU_RT void check_access(Site access) {
  if (__builtin_expect(*static_cast<volatile char*>(report_file.text) != 0, 0)) fail_with_report(access);
}
EMU_RT void check_sanitizer_reports(Site) { check_access(Site{}); }

#elif EMU_ASAN

// The accesses of kernels are caught one by one (sanitizer_hooks.h). What remains are the library functions that
// AddressSanitizer intercepts; with halt_on_error=0 it reports and continues.
EMU_STATE char asan_report[512];

inline void keep_report(const char* text) {
  if (asan_report[0] == '\0') std::snprintf(asan_report, sizeof asan_report, "%.500s", text);
}
inline void open_reports() {
  asan_report[0] = '\0';
  __asan_set_error_report_callback(keep_report);
}
inline void close_reports() { __asan_set_error_report_callback(nullptr); }

EMU_RT void check_sanitizer_reports(Site site) {
  EMU_CHECK(asan_report[0] == '\0', site, "AddressSanitizer, before this point: %s", asan_report);
}
EMU_RT void check_access(Site) {}

#else

inline void open_reports() {}
inline void close_reports() {}
EMU_RT void check_sanitizer_reports(Site) {}
EMU_RT void check_access(Site) {}

#endif

}  // namespace emu
