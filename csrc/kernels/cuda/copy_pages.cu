// Copies whole pages of K and V within the pools.
//
// A thread owns one word position inside a page, of one layer of one pool, and walks all copies in
// order: position w of a page only ever meets position w of other pages, so chained pairs such as
// (1, 2), (2, 3) act as they do one after the other, without a barrier.
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"

namespace skv::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Word>
__global__ void __launch_bounds__(kThreads)
    copy_pages_kernel(const __grid_constant__ CopyPagesParams params, int64_t blocks_per_page) {
  const int64_t page_words = params.page_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t word = blockIdx.x % blocks_per_page * kThreads + threadIdx.x;
  if (word >= page_words) return;
  const int64_t pool_layer = blockIdx.x / blocks_per_page;
  void* pool = pool_layer < params.num_layers ? params.k_pool : params.v_pool;
  const int64_t layer = pool_layer % params.num_layers;
  Word* words = static_cast<Word*>(pool) + layer * params.num_pages * page_words + word;
  for (int64_t i = 0; i < params.num_copies; ++i) {
    const int64_t from = params.page_copies[2 * i];
    const int64_t to = params.page_copies[2 * i + 1];
    words[to * page_words] = words[from * page_words];
  }
}

template <typename Word>
cudaError_t launch(const CopyPagesParams& params, cudaStream_t stream) {
  const int64_t page_words = params.page_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t blocks_per_page = ceil_div(page_words, kThreads);
  const int64_t num_blocks = 2 * params.num_layers * blocks_per_page;
  if (!fits_grid(num_blocks)) return cudaErrorInvalidValue;
  return launch_kernel(copy_pages_kernel<Word>, {num_blocks, kThreads}, stream, params,
                       blocks_per_page);
}

}  // namespace

cudaError_t copy_pages(const CopyPagesParams& params, cudaStream_t stream) {
  if (params.num_copies < 0 || params.num_layers < 0 || params.page_bytes < 0) {
    return cudaErrorInvalidValue;
  }
  if (params.num_copies == 0 || params.num_layers == 0 || params.page_bytes == 0) {
    return cudaSuccess;
  }
  const auto words_fit = [&](int64_t size) {
    return params.page_bytes % size == 0 &&
           is_aligned(params.k_pool, static_cast<uintptr_t>(size)) &&
           is_aligned(params.v_pool, static_cast<uintptr_t>(size));
  };
  if (words_fit(sizeof(uint4))) return launch<uint4>(params, stream);
  if (words_fit(sizeof(uint16_t))) return launch<uint16_t>(params, stream);
  return cudaErrorMisalignedAddress;
}

}  // namespace skv::cuda
