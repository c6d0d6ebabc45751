// PAR's iterations on CUDA tensors: what par.cpp and labels.cpp call once their arguments are checked.
#pragma once

#include "stencil/propagate.h"

namespace afa {

// stencil_propagate_cuda for the ring of these neighbors: by the kernel that knows PAR's default dilations,
// if these are they, and by the general one for others.
Tensor par_iterations_cuda(const char* op, const Stencil& ring, const Tensor& weights, const Tensor& masks,
                           int64_t num_iter, const std::optional<Tensor>& class_mask,
                           const std::optional<Tensor>& extent = std::nullopt, bool zero_masked = true);

}  // namespace afa
