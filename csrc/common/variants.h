// Overrides of the rules in heuristics.h by the environment variable AFA_EXT_VARIANTS, such as
// "par_ring=stack2,walk_step=tiled128", or by afa_ext._C.force_variant, which is used by tests and by
// benchmarks/tune.py.
#pragma once

#include <atomic>
#include <cstdint>

namespace afa {

// The variants of one kernel. Define it at namespace scope in the .cpp file that fills the kernel's
// parameters.
class KernelVariants {
 public:
  template <int N>
  KernelVariants(const char* kernel, const char* const (&names)[N]) : KernelVariants(kernel, names, N) {}
  KernelVariants(const KernelVariants&) = delete;
  KernelVariants& operator=(const KernelVariants&) = delete;

  // The number of the variant to launch: the forced one or, by default, the rule's. Thread-safe. Throws if
  // AFA_EXT_VARIANTS has an unknown kernel or variant.
  int pick(int by_rule) const;
  template <typename Variant>
  Variant pick(Variant by_rule) const {
    return static_cast<Variant>(pick(static_cast<int>(by_rule)));
  }
  // -1 resets a forced variant.
  void force(int variant) const { forced_.store(variant, std::memory_order_relaxed); }
  int find(const char* variant) const;  // its number, or -1

  int64_t times_picked() const { return times_.load(std::memory_order_relaxed); }
  int last_picked() const { return last_.load(std::memory_order_relaxed); }  // -1: none so far

  const char* const kernel;
  const char* const* const names;
  const int count;
  const KernelVariants* const next;  // of all kernels' variants, or null

  static const KernelVariants* first();
  static const KernelVariants* of(const char* kernel);  // or null

 private:
  KernelVariants(const char* kernel, const char* const* names, int count);

  mutable std::atomic<int> forced_{-1}, last_{-1};
  mutable std::atomic<int64_t> times_{0};
};

}  // namespace afa
