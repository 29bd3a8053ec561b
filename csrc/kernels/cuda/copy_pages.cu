// Copies whole pages of K and V within the pools, and the scales of int8 pools with them.
//
// A thread owns one word position inside a page, of one layer of one pool, and walks all copies in
// order: position w of a page only ever meets position w of other pages, so chained pairs such as
// (1, 2), (2, 3) act as they do one after the other, without a barrier.
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/element.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"

namespace skv::cuda {
namespace {

constexpr int kThreads = 256;

// Two arrays [num_layers, P, page_bytes]: the pools, or their scales.
struct PagePair {
  void* first;
  void* second;
  int64_t page_bytes;
};

template <typename Word>
__global__ void __launch_bounds__(kThreads)
    copy_pages_kernel(const __grid_constant__ CopyPagesParams params, PagePair pages,
                      int64_t blocks_per_page) {
  const int64_t page_words = pages.page_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t word = blockIdx.x % blocks_per_page * kThreads + threadIdx.x;
  if (word >= page_words) return;
  const int64_t array_layer = blockIdx.x / blocks_per_page;
  void* array = array_layer < params.num_layers ? pages.first : pages.second;
  const int64_t layer = array_layer % params.num_layers;
  Word* words = static_cast<Word*>(array) + layer * params.num_pages * page_words + word;
  for (int64_t i = 0; i < params.num_copies; ++i) {
    const int64_t from = params.page_copies[2 * i];
    const int64_t to = params.page_copies[2 * i + 1];
    SKV_DEVICE_ASSERT(from >= 0 && from < params.num_pages);
    SKV_DEVICE_ASSERT(to >= 0 && to < params.num_pages);
    words[to * page_words] = words[from * page_words];
  }
}

template <typename Word>
cudaError_t launch_words(const CopyPagesParams& params, const PagePair& pages,
                         cudaStream_t stream) {
  const int64_t page_words = pages.page_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t blocks_per_page = ceil_div(page_words, kThreads);
  const int64_t num_blocks = 2 * params.num_layers * blocks_per_page;
  if (!fits_grid(num_blocks)) return cudaErrorInvalidValue;
  return launch_kernel(copy_pages_kernel<Word>, LaunchShape{num_blocks, kThreads}, stream, params,
                       pages, blocks_per_page);
}

cudaError_t copy_pair(const CopyPagesParams& params, const PagePair& pages, cudaStream_t stream) {
  if (pages.page_bytes == 0) return cudaSuccess;
  if (pages.page_bytes % 16 == 0 && is_aligned(pages.first, 16) && is_aligned(pages.second, 16)) {
    return launch_words<uint4>(params, pages, stream);
  }
  return launch_words<uint8_t>(params, pages, stream);  // odd shapes only
}

}  // namespace

cudaError_t copy_pages(const CopyPagesParams& params, cudaStream_t stream) {
  if (params.num_copies < 0 || params.num_layers < 0 || params.page_bytes < 0 ||
      params.scale_bytes < 0) {
    return cudaErrorInvalidValue;
  }
  if (params.num_copies == 0 || params.num_layers == 0) return cudaSuccess;
  const cudaError_t status =
      copy_pair(params, {params.k_pool, params.v_pool, params.page_bytes}, stream);
  if (status != cudaSuccess) return status;
  return copy_pair(params, {params.k_scales, params.v_scales, params.scale_bytes}, stream);
}

}  // namespace skv::cuda
