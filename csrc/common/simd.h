// Selection of the instruction set for the performance-critical files. They are compiled once per level, in a
// namespace with the level's name, and AFA_SIMD_CALL selects one at run time.
#pragma once

namespace afa {

enum class SimdLevel { baseline, avx2, avx512 };

// The best compiled level that this processor supports, unless AFA_EXT_SIMD selects another one.
// Throws if AFA_EXT_SIMD is an unknown level, or one that this build or processor does not support.
SimdLevel simd_level();
const char* simd_name(SimdLevel level);
bool simd_compiled(SimdLevel level);

}  // namespace afa

#ifdef AFA_SIMD_X86
#define AFA_SIMD_DECLARE(...) \
  namespace baseline {        \
  __VA_ARGS__;                \
  }                           \
  namespace avx2 {            \
  __VA_ARGS__;                \
  }                           \
  namespace avx512 {          \
  __VA_ARGS__;                \
  }
#define AFA_SIMD_CALL(function, ...)     \
  do {                                   \
    switch (::afa::simd_level()) {       \
      case ::afa::SimdLevel::avx512:     \
        avx512::function(__VA_ARGS__);   \
        break;                           \
      case ::afa::SimdLevel::avx2:       \
        avx2::function(__VA_ARGS__);     \
        break;                           \
      default:                           \
        baseline::function(__VA_ARGS__); \
    }                                    \
  } while (0)
#else
#define AFA_SIMD_DECLARE(...) \
  namespace baseline {        \
  __VA_ARGS__;                \
  }
#define AFA_SIMD_CALL(function, ...) baseline::function(__VA_ARGS__)
#endif
