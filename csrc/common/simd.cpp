#include "common/simd.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace afa {
namespace {

bool processor_has(SimdLevel level) {
#ifdef AFA_SIMD_X86
  __builtin_cpu_init();
  if (level == SimdLevel::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == SimdLevel::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
  }
#endif
  return level == SimdLevel::baseline;
}

SimdLevel choose() {
  constexpr SimdLevel best_first[] = {SimdLevel::avx512, SimdLevel::avx2, SimdLevel::baseline};
  const char* wanted = std::getenv("AFA_EXT_SIMD");
  for (SimdLevel level : best_first) {
    const bool usable = simd_compiled(level) && processor_has(level);
    if (wanted == nullptr || *wanted == '\0') {
      if (usable) return level;
    } else if (std::string(wanted) == simd_name(level)) {
      if (usable) return level;
      throw std::runtime_error(std::string("AFA_EXT_SIMD=") + wanted + ": " +
                               (simd_compiled(level) ? "this processor lacks these instructions"
                                                     : "this build does not contain that level") +
                               "; unset it or choose baseline");
    }
  }
  throw std::runtime_error(std::string("AFA_EXT_SIMD must be baseline, avx2 or avx512, got '") + wanted +
                           "'");
}

}  // namespace

bool simd_compiled(SimdLevel level) {
#ifdef AFA_SIMD_X86
  (void)level;
  return true;
#else
  return level == SimdLevel::baseline;
#endif
}

const char* simd_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::avx512:
      return "avx512";
    case SimdLevel::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

SimdLevel simd_level() {
  static const SimdLevel level = choose();
  return level;
}

}  // namespace afa
