// Launch plans: which of a CUDA kernel's compiled variants is launched, by element type, size class and GPU
// architecture. README.md, "Variants and launch plans", says how a kernel gets them.
// No standard-library template: included by files compiled once per SIMD level.
#pragma once

#include "common/geometry.h"

// A kernel lists its variants once, X(name, ...) each; these make an enumeration and an array of names of
// it.
#define AFA_VARIANT_NUMBER(name, ...) name,
#define AFA_VARIANT_NAME(name, ...) #name,

namespace afa {

constexpr int kKinds = 4;
// A size class holds the calls of at most so many work items; the last one, all larger.
constexpr int64_t kSizeClassLimits[] = {int64_t{1} << 14, int64_t{1} << 17, int64_t{1} << 20,
                                        int64_t{1} << 23};
constexpr int kSizeClasses = sizeof(kSizeClassLimits) / sizeof(int64_t) + 1;
constexpr int kAny = -1;  // for set_plan: every type, size class or architecture

struct PlanTables;

// The variants of one kernel, and the rule that chooses where no table does. Lives as long as the process:
// declare it at namespace scope, in the .cpp file that fills the kernel's parameters.
class TunedKernel {
 public:
  using Rule = int (*)(Kind kind, int64_t items);

  template <int N>
  TunedKernel(const char* name, const char* const (&variants)[N], Rule rule)
      : TunedKernel(name, variants, N, rule) {}
  TunedKernel(const TunedKernel&) = delete;
  TunedKernel& operator=(const TunedKernel&) = delete;

  const char* const name;
  const char* const* const variants;
  const int count;
  const Rule rule;
  PlanTables* const tables;
  const TunedKernel* const next;

 private:
  TunedKernel(const char* name, const char* const* variants, int count, Rule rule);
};

// The number of the variant to launch on the current device. `items` is what the kernel computes, such as
// B * C * H * W outputs: the same formula at every call. From any thread; plans are read without a lock.
int choose(const TunedKernel& kernel, Kind kind, int64_t items);

// ---- what the Python module shows and sets ----

const TunedKernel* first_tuned_kernel();
int size_class(int64_t items);
const char* kind_name(Kind kind);
// What choose returns on a GPU of this architecture (90 for 9.0; 0 for an unknown one): what was set for any
// architecture, else for it, else for the nearest older one, else the rule's choice. is_default, if not
// null: whether it is the rule's.
int plan_for(const TunedKernel& kernel, Kind kind, int64_t items, int architecture, bool* is_default);
// variant -1 takes back what was set. False if there are too many architectures.
bool set_plan(const TunedKernel& kernel, int kind, int size_class, int architecture, int variant);
void reset_plans();
// How often choose was called, and for how many items the last time.
int64_t times_chosen(const TunedKernel& kernel);
int64_t last_items(const TunedKernel& kernel);

}  // namespace afa
