// The Python module afa_ext._C: how it was built, the operators' names, and launch plans.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "common/plan.h"
#include "common/simd.h"
#include "operators.h"

namespace afa {
namespace {

const TunedKernel* find_kernel(const std::string& name) {
  const TunedKernel* kernel = first_tuned_kernel();
  while (kernel != nullptr && name != kernel->name) kernel = kernel->next;
  return kernel;
}

int find_variant(const TunedKernel& kernel, const std::string& name) {
  int i = kernel.count - 1;
  while (i >= 0 && name != kernel.variants[i]) --i;
  return i;
}

}  // namespace
}  // namespace afa

namespace {

pybind11::dict build_info() {
  pybind11::list compiled;
  for (auto level : {afa::SimdLevel::baseline, afa::SimdLevel::avx2, afa::SimdLevel::avx512}) {
    if (afa::simd_compiled(level)) compiled.append(afa::simd_name(level));
  }
  pybind11::dict info;
  info["compiler"] = AFA_BUILD_COMPILER;
  info["build_type"] = AFA_BUILD_TYPE;
  info["torch_headers"] = AFA_BUILD_TORCH;
#ifdef AFA_WITH_CUDA
  info["cuda"] = AFA_BUILD_CUDA;
  info["cuda_architectures"] = AFA_BUILD_CUDA_ARCHITECTURES;
#else
  info["cuda"] = pybind11::none();
  info["cuda_architectures"] = "";
#endif
  info["simd_levels"] = compiled;
  info["simd"] = afa::simd_name(afa::simd_level());
  return info;
}

// ---- launch plans ----

std::string quoted(const char* const* names, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) text += (i > 0 ? ", " : "") + std::string(names[i]);
  return text;
}

const afa::TunedKernel& kernel_of(const std::string& name) {
  if (const afa::TunedKernel* kernel = afa::find_kernel(name)) return *kernel;
  std::vector<const char*> names;
  for (const auto* kernel = afa::first_tuned_kernel(); kernel != nullptr; kernel = kernel->next) {
    names.push_back(kernel->name);
  }
  throw pybind11::value_error("kernel must be one of " +
                              quoted(names.data(), static_cast<int>(names.size())) + ", got '" + name + "'");
}

int kind_of(const std::string& dtype) {
  const char* names[afa::kKinds];
  for (int kind = 0; kind < afa::kKinds; ++kind) {
    names[kind] = afa::kind_name(static_cast<afa::Kind>(kind));
    if (dtype == names[kind]) return kind;
  }
  throw pybind11::value_error("dtype must be one of " + quoted(names, afa::kKinds) + ", got '" + dtype + "'");
}

int architecture_of(int arch) {
  if (arch >= 0) return arch;
  throw pybind11::value_error("arch must be a compute capability, 90 for 9.0, or 0, got " +
                              std::to_string(arch));
}

int64_t items_of(int64_t items) {
  if (items >= 0) return items;
  throw pybind11::value_error("items must be at least 0, got " + std::to_string(items));
}

pybind11::list size_classes() {
  pybind11::list limits;
  for (const int64_t limit : afa::kSizeClassLimits) limits.append(limit);
  limits.append(pybind11::none());
  return limits;
}

std::string launch_plan(const std::string& name, const std::string& dtype, int64_t items, int arch) {
  const afa::TunedKernel& kernel = kernel_of(name);
  const auto kind = static_cast<afa::Kind>(kind_of(dtype));
  return kernel.variants[afa::plan_for(kernel, kind, items_of(items), architecture_of(arch), nullptr)];
}

pybind11::list launch_plans(int arch) {
  const pybind11::list limits = size_classes();
  pybind11::list kernels;
  for (const auto* kernel = afa::first_tuned_kernel(); kernel != nullptr; kernel = kernel->next) {
    pybind11::list plans;
    for (int kind = 0; kind < afa::kKinds; ++kind) {
      for (int size = 0; size < afa::kSizeClasses; ++size) {
        const bool last = size + 1 == afa::kSizeClasses;
        const int64_t items = last ? 2 * afa::kSizeClassLimits[size - 1] : afa::kSizeClassLimits[size];
        bool is_default = false;
        const auto type = static_cast<afa::Kind>(kind);
        const int variant = afa::plan_for(*kernel, type, items, architecture_of(arch), &is_default);
        pybind11::dict plan;
        plan["dtype"] = afa::kind_name(type);
        plan["max_items"] = limits[size];
        plan["variant"] = kernel->variants[variant];
        plan["default"] = is_default;
        plans.append(plan);
      }
    }
    pybind11::dict entry;
    entry["kernel"] = kernel->name;
    entry["variants"] = std::vector<std::string>(kernel->variants, kernel->variants + kernel->count);
    entry["times_chosen"] = afa::times_chosen(*kernel);
    entry["last_items"] = afa::last_items(*kernel);
    entry["plans"] = plans;
    kernels.insert(0, entry);  // in the order they were declared
  }
  return kernels;
}

void set_launch_plan(const std::string& name, const std::optional<std::string>& variant,
                     const std::optional<std::string>& dtype, std::optional<int64_t> items,
                     std::optional<int> arch) {
  const afa::TunedKernel& kernel = kernel_of(name);
  const int number = variant ? afa::find_variant(kernel, *variant) : -1;
  if (variant && number < 0) {
    throw pybind11::value_error("variant must be one of " + quoted(kernel.variants, kernel.count) + " for " +
                                name + ", got '" + *variant + "'");
  }
  const int kind = dtype ? kind_of(*dtype) : afa::kAny;
  const int size = items ? afa::size_class(items_of(*items)) : afa::kAny;
  if (!afa::set_plan(kernel, kind, size, arch ? architecture_of(*arch) : afa::kAny, number)) {
    throw pybind11::value_error("there are plans for too many architectures");
  }
}

}  // namespace

#define AFA_NAME(name, schema) names.push_back(#name);

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators of afa_ext, registered as torch.ops.afa_ext.*";
  m.def(
      "build_info", &build_info,
      "How this library was built: compiler, CUDA version and architectures (None without CUDA), the version "
      "of the torch headers, the SIMD levels it holds and the one in use.");
  m.def(
      "operators",
      [] {
        std::vector<std::string> names;
        AFA_OPERATORS(AFA_NAME)
        return names;
      },
      "The names of all registered operators.");
  using pybind11::arg;
  m.def("size_classes", &size_classes,
        "The size classes of launch plans, each by the most work items it holds; None for the last.");
  m.def(
      "launch_plans", &launch_plans, arg("arch") = 0,
      "Every tuned CUDA kernel: its name, its variants, how often one was chosen and for how many items "
      "last, "
      "and the variant now chosen for each dtype and size class on a GPU of this architecture (90 for 9.0, 0 "
      "for an unknown one).");
  m.def("launch_plan", &launch_plan, arg("kernel"), arg("dtype"), arg("items"), arg("arch") = 0,
        "The variant now chosen for a call of so many work items.");
  m.def(
      "set_launch_plan", &set_launch_plan, arg("kernel"), arg("variant"), arg("dtype") = pybind11::none(),
      arg("items") = pybind11::none(), arg("arch") = pybind11::none(),
      "Chooses a variant for this dtype, the size class of so many items and this architecture, each None "
      "for all. What is set for arch=None goes before all else. variant=None takes back what was set for the "
      "same arch.");
  m.def("reset_launch_plans", &afa::reset_plans,
        "Takes back everything that was set, so that only the defaults are left.");
}
