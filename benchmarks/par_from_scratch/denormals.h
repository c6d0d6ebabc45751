// During its lifetime, this thread replaces denormal numbers by 0 (x86 only).
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() { _mm_setcsr(saved_ | 0x8040); }  // flush results to zero, read denormals as zero
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_ = _mm_getcsr();
#else
  FlushDenormals() {}
#endif
};
