// affinity_loss and its gradient: weighted means of A over pairs of different classes and of 1 - A over the
// others.
//
// Threads: a block owns kLossBlock consecutive pairs, a thread vectors of 16 bytes of affinities with a
// stride of the block's width. add_losses_kernel is one block that adds all blocks' sums. In
// loss_backward_kernel a thread owns one vector. Reads: affinity and labels, each once; backward only labels
// and sums. Writes: partial [blocks, 6], then sums [10]; backward grad_affinity. Rejected: a counter that the
// last block resets, instead of the second launch. It needs an atomic and a zeroed word per stream, and saves
// at most 3 us. Sums are always accumulated in the same order.
#include "affinity/affinity.cuh"

namespace afa {
namespace {

template <typename T, int V>
__global__ void __launch_bounds__(kSumThreads) loss_kernel(const __grid_constant__ AffinityLossParams p) {
  using Sum = typename SumOf<T>::type;
  constexpr int kVectors = static_cast<int>(kLossBlock) / V / kSumThreads;  // of a thread
  __shared__ double shared[2 * kPairGroups][kSumThreads];
  const T* affinity = static_cast<const T*>(p.affinity);
  for (int64_t block = blockIdx.x; block * kLossBlock < p.count; block += gridDim.x) {
    const int64_t first = block * kLossBlock;
    Sum error[kPairGroups] = {};
    int pairs[kPairGroups] = {};
    auto add = [&](Sum a, uint8_t label) {
#pragma unroll
      for (int g = 0; g < kPairGroups; ++g) {
        // Products, not selections: a NaN propagates whatever its label is, as in the definition.
        const int in_group = label == g ? 1 : 0;
        error[g] += (g == 0 ? a : 1 - a) * static_cast<Sum>(in_group);
        pairs[g] += in_group;
      }
    };
    if (first + kLossBlock <= p.count) {
      const int64_t own = first + static_cast<int64_t>(threadIdx.x) * V;
#pragma unroll 4
      for (int n = 0; n < kVectors; ++n) {
        const Vec<uint8_t, V> label = load<V>(p.labels + own + n * (kSumThreads * V));
        const Vec<T, V> value = load<V>(affinity + own + n * (kSumThreads * V));
#pragma unroll
        for (int e = 0; e < V; ++e) add(to_sum<Sum>(value.at[e]), label.at[e]);
      }
    } else {
      for (int64_t n = first + threadIdx.x; n < p.count; n += kSumThreads) {
        add(to_sum<Sum>(affinity[n]), p.labels[n]);
      }
    }
    double own[2 * kPairGroups];
#pragma unroll
    for (int g = 0; g < kPairGroups; ++g) {
      own[g] = static_cast<double>(error[g]);
      own[kPairGroups + g] = static_cast<double>(pairs[g]);
    }
    const double sum = block_sums<kSumThreads>(shared, own);
    if (threadIdx.x < 2 * kPairGroups) p.partial[2 * kPairGroups * block + threadIdx.x] = sum;
  }
}

template <typename Sum>
__global__ void __launch_bounds__(kSumThreads)
    add_losses_kernel(const __grid_constant__ AffinityLossParams p, int64_t blocks) {
  constexpr int kSums = 2 * kPairGroups;
  __shared__ double shared[kSums][kSumThreads], total[kSums];
  double own[kSums] = {};
  for (int64_t block = threadIdx.x; block < blocks; block += kSumThreads) {
    for (int n = 0; n < kSums; ++n) own[n] += p.partial[kSums * block + n];
  }
  const double sum = block_sums<kSumThreads>(shared, own);
  if (threadIdx.x < kSums) total[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) finish_loss(p, total, static_cast<Sum*>(p.sums));
}

template <typename Sum, int V>
__global__ void __launch_bounds__(kThreads)
    loss_backward_kernel(const __grid_constant__ AffinityLossParams p) {
  const Sum grad = *static_cast<const Sum*>(p.grad);
  const Sum* sums = static_cast<const Sum*>(p.sums);
  Sum* out = static_cast<Sum*>(p.grad_affinity);
  const Sum different = grad * sums[1], same = grad * sums[2], foreground = grad * sums[3];
  static_assert(kPairGroups == 3);
  // Not an array: the compiler would index it in local memory.
  auto gradient = [&](uint8_t label) {
    const Sum of_same = label == 1 ? same : foreground;
    return label == 0 ? different : label < 3 ? of_same : Sum{0};
  };
  for (int64_t n = first_item() * V; n < p.count; n += item_stride() * V) {
    if (n + V <= p.count) {
      const Vec<uint8_t, V> label = load<V>(p.labels + n);
      Vec<Sum, V> value;
#pragma unroll
      for (int e = 0; e < V; ++e) value.at[e] = gradient(label.at[e]);
      store(out + n, value);
    } else {
      for (int64_t e = n; e < p.count; ++e) out[e] = gradient(p.labels[e]);
    }
  }
}

}  // namespace

const char* launch_affinity_loss(const AffinityLossParams& p, void* stream) {
  const int64_t blocks = ceil_div(p.count, kLossBlock);
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
    using Sum = typename SumOf<T>::type;
    constexpr int V = kWide<T>;
    if (blocks > 0) {
      if (aligned(p.affinity) && aligned(p.labels, V)) {
        AFA_LAUNCH((loss_kernel<T, V>), block_grid(blocks), kSumThreads, stream, p);
      } else {
        AFA_LAUNCH((loss_kernel<T, 1>), block_grid(blocks), kSumThreads, stream, p);
      }
    }
    AFA_LAUNCH((add_losses_kernel<Sum>), 1, kSumThreads, stream, p, blocks);
  });
  return launch_error();
}

const char* launch_affinity_loss_backward(const AffinityLossParams& p, void* stream) {
  auto launch = [&](auto type) {
    using Sum = decltype(type);
    constexpr int V = kWide<Sum>;
    if (aligned(p.grad_affinity) && aligned(p.labels, V)) {
      AFA_LAUNCH((loss_backward_kernel<Sum, V>), grid_for(ceil_div(p.count, V), 1), kThreads, stream, p);
    } else {
      AFA_LAUNCH((loss_backward_kernel<Sum, 1>), grid_for(p.count, 1), kThreads, stream, p);
    }
  };
  p.kind == Kind::f64 ? launch(double{}) : launch(float{});
  return launch_error();
}

}  // namespace afa
