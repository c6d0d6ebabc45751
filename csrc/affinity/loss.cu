// affinity_loss and its gradient: means of 1 - A over pairs of the same class and of A over the other pairs.
//
// Threads: a block owns kLossBlock consecutive pairs, a thread vectors of 16 bytes of affinities with a
// stride of the block's width. add_losses_kernel is one block that adds all blocks' sums. In
// loss_backward_kernel a thread owns one vector. Reads: affinity and labels, each once; backward only labels
// and sums. Writes: partial [blocks, 4], then sums [3]; backward grad_affinity. Rejected: a counter that the
// last block resets, instead of the second launch. It needs an atomic and a zeroed word per stream, and saves
// at most 3 us. Sums are always accumulated in the same order.
#include "affinity/affinity.cuh"

namespace afa {
namespace {

template <typename T, int V>
__global__ void __launch_bounds__(kSumThreads) loss_kernel(const __grid_constant__ AffinityLossParams p) {
  using Sum = typename SumOf<T>::type;
  constexpr int kVectors = static_cast<int>(kLossBlock) / V / kSumThreads;  // of a thread
  __shared__ double shared[4][kSumThreads];
  const T* affinity = static_cast<const T*>(p.affinity);
  for (int64_t block = blockIdx.x; block * kLossBlock < p.count; block += gridDim.x) {
    const int64_t first = block * kLossBlock;
    Sum same = 0, different = 0;
    int same_count = 0, different_count = 0;
    auto add = [&](Sum a, uint8_t label) {
      // Products, not selections: a NaN propagates whatever its label is, as in the definition.
      const int is_same = label == 1 ? 1 : 0, is_different = label == 0 ? 1 : 0;
      same += (1 - a) * static_cast<Sum>(is_same);
      different += a * static_cast<Sum>(is_different);
      same_count += is_same;
      different_count += is_different;
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
    const double own[4] = {static_cast<double>(same), static_cast<double>(different),
                           static_cast<double>(same_count), static_cast<double>(different_count)};
    const double sum = block_sums<kSumThreads>(shared, own);
    if (threadIdx.x < 4) p.partial[4 * block + threadIdx.x] = sum;
  }
}

template <typename Sum>
__global__ void __launch_bounds__(kSumThreads)
    add_losses_kernel(const double* partial, int64_t blocks, Sum* out) {
  __shared__ double shared[4][kSumThreads], total[4];
  double own[4] = {};
  for (int64_t block = threadIdx.x; block < blocks; block += kSumThreads) {
    for (int n = 0; n < 4; ++n) own[n] += partial[4 * block + n];
  }
  const double sum = block_sums<kSumThreads>(shared, own);
  if (threadIdx.x < 4) total[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    const double same = 0.5 / (total[2] + 1), different = 0.5 / (total[3] + 1);
    out[0] = static_cast<Sum>(same * total[0] + different * total[1]);
    out[1] = static_cast<Sum>(same);
    out[2] = static_cast<Sum>(different);
  }
}

template <typename Sum, int V>
__global__ void __launch_bounds__(kThreads)
    loss_backward_kernel(const __grid_constant__ AffinityLossParams p) {
  const Sum grad = *static_cast<const Sum*>(p.grad);
  const Sum* sums = static_cast<const Sum*>(p.sums);
  const Sum same = -grad * sums[1], different = grad * sums[2];
  Sum* out = static_cast<Sum*>(p.grad_affinity);
  auto gradient = [&](uint8_t label) { return label == 1 ? same : (label == 0 ? different : Sum{0}); };
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
    AFA_LAUNCH((add_losses_kernel<Sum>), 1, kSumThreads, stream, p.partial, blocks,
               static_cast<Sum*>(p.sums));
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
