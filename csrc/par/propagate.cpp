#include "par/propagate.h"

#include "common/device.h"
#include "common/variants.h"
#include "par/ring.h"

namespace afa {
namespace {

constexpr const char* kNames[] = {AFA_RING_VARIANTS(AFA_VARIANT_NAME)};
const KernelVariants kRing("par_ring", kNames);

// Whether the neighbors are those of PAR's default dilations.
bool is_default_ring(const Stencil& stencil) {
  static const Stencil ring = ring_stencil({1, 2, 4, 8, 12, 24});
  bool same = stencil.runs == ring.runs;
  for (int r = 0; same && r < ring.runs; ++r) {
    const Run &a = stencil.run[r], &b = ring.run[r];
    same = a.dy == b.dy && a.dx == b.dx && a.step == b.step && a.count == b.count;
  }
  return same;
}

// Whether launch_par_ring supports it.
bool fits_ring(const StencilParams& p, const RingCall& call) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  return p.kind != Kind::f64 && p.height * p.width < kLimit && p.classes < kLimit &&
         ring_tiles(call, 1) < kLimit;
}

void ring_steps(const char* op, StencilParams& p, const Tensor& source, const Tensor& out,
                [[maybe_unused]] const CudaScope& scope) {
  if (!is_default_ring(p.stencil)) {
    stencil_steps_cuda(op, p, source, out, scope);
    return;
  }
  const RingCall call{p.batch, p.classes, p.height, p.width, p.steps};
  const Gpu gpu = current_gpu();
  [[maybe_unused]] const RingVariant variant = kRing.pick(ring_variant(gpu, call));
  if (!fits_ring(p, call)) {  // like every variant, it falls back if its layout does not fit
    stencil_steps_cuda(op, p, source, out, scope);
    return;
  }
  const bool wide = p.kind == Kind::f32;
  p.in.data = source.mutable_data_ptr();
  p.out.data = out.mutable_data_ptr();
  p.in.wide = p.out.wide = wide;
  // The last step does not write one of the two: `out` itself serves as that one if it is float32.
  Tensor spare[2] = {out, out};
  for (int32_t i = 0; i < 2; ++i) {
    const bool needed = p.steps > i + 1 && !(wide && i == (p.steps - 1) % 2);
    if (needed) spare[i] = empty(source, {p.batch, p.classes, p.height, p.width}, ScalarType::Float);
    p.spare[i] = spare[i].mutable_data_ptr();
  }
  AFA_CUDA_LAUNCH(
      op, launch_par_ring(p, variant, ring_class_groups(gpu, call, ring_stack(variant)), scope.stream()));
}

}  // namespace

Tensor par_iterations_cuda(const char* op, const Stencil& ring, const Tensor& weights, const Tensor& masks,
                           int64_t num_iter, const std::optional<Tensor>& class_mask,
                           const std::optional<Tensor>& extent, bool zero_masked) {
  return stencil_propagate_cuda(op, ring, weights, masks, num_iter, class_mask, extent, zero_masked,
                                ring_steps);
}

}  // namespace afa
