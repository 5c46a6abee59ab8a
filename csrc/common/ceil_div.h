// How many parts of a size a whole needs.
#pragma once

namespace persimmon_fast {

template <typename T>
constexpr T ceil_div(T whole, T part) {
  return (whole + part - 1) / part;
}

}  // namespace persimmon_fast
