// The Python module afa_ext._C: build settings, the operators' names, and the variants of the CUDA kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "common/simd.h"
#include "common/variants.h"
#include "operators.h"

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

pybind11::list kernel_variants() {
  pybind11::list kernels;
  for (const auto* kernel = afa::KernelVariants::first(); kernel != nullptr; kernel = kernel->next) {
    const int last = kernel->last_picked();
    pybind11::dict entry;
    entry["kernel"] = kernel->kernel;
    entry["variants"] = std::vector<std::string>(kernel->names, kernel->names + kernel->count);
    entry["times_picked"] = kernel->times_picked();
    entry["last_picked"] = last < 0 ? pybind11::object(pybind11::none()) : pybind11::str(kernel->names[last]);
    kernels.append(entry);
  }
  return kernels;
}

const afa::KernelVariants& variants_of(const std::string& name) {
  if (const afa::KernelVariants* kernel = afa::KernelVariants::of(name.c_str())) return *kernel;
  throw pybind11::value_error("unknown kernel '" + name + "'");
}

int number_of(const afa::KernelVariants& kernel, const std::string& variant) {
  const int number = kernel.find(variant.c_str());
  if (number >= 0) return number;
  std::string known;
  for (int i = 0; i < kernel.count; ++i) known += (i > 0 ? ", " : "") + std::string(kernel.names[i]);
  throw pybind11::value_error("variant must be one of " + known + " for " + kernel.kernel + ", got '" +
                              variant + "'");
}

void force_variant(const std::string& name, const std::optional<std::string>& variant) {
  const afa::KernelVariants& kernel = variants_of(name);
  kernel.force(variant ? number_of(kernel, *variant) : -1);
}

std::string pick_variant(const std::string& name, const std::string& by_rule) {
  const afa::KernelVariants& kernel = variants_of(name);
  return kernel.names[kernel.pick(number_of(kernel, by_rule))];
}

}  // namespace

#define AFA_NAME(name, schema) names.push_back(#name);

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators of afa_ext, registered as torch.ops.afa_ext.*";
  m.def(
      "build_info", &build_info,
      "How this library was built: compiler, CUDA version and architectures (None without CUDA), the version "
      "of the torch headers, the compiled SIMD levels and the one in use.");
  m.def(
      "operators",
      [] {
        std::vector<std::string> names;
        AFA_OPERATORS(AFA_NAME)
        return names;
      },
      "The names of all registered operators.");
  using pybind11::arg;
  m.def(
      "kernel_variants", &kernel_variants,
      "All CUDA kernels that have several compiled variants: name, variants, how often a variant was picked "
      "in this process, and the last one picked (None if there is none).");
  m.def("force_variant", &force_variant, arg("kernel"), arg("variant"),
        "Launches this variant of a kernel at every call instead of the rule's choice; None: use the rule "
        "again.");
  m.def("pick_variant", &pick_variant, arg("kernel"), arg("by_rule"),
        "The variant that a launch uses if the rule chooses this one.");
}
