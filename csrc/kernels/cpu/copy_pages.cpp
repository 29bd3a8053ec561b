#include "csrc/kernels/cpu/copy_pages.h"

#include <cstring>

namespace skv::cpu {

namespace {

// Below this many copied bytes a second thread costs more than it saves.
constexpr int64_t kBytesPerThread = 1 << 18;

// pool: [num_layers, P, page_bytes] in bytes.
void copy_in_layer(const CopyPagesParams& params, void* pool, int64_t page_bytes, int64_t layer) {
  char* pages = static_cast<char*>(pool) + layer * params.num_pages * page_bytes;
  for (int64_t i = 0; i < params.num_copies; ++i) {
    const int64_t from = params.page_copies[2 * i];
    const int64_t to = params.page_copies[2 * i + 1];
    if (from == to) continue;
    std::memcpy(pages + to * page_bytes, pages + from * page_bytes,
                static_cast<size_t>(page_bytes));
  }
}

}  // namespace

void copy_pages(const CopyPagesParams& params, ParallelFor parallel_for) {
  // Layers do not touch each other, so they are the unit of work and the pairs of a layer keep
  // their order.
  const int64_t bytes_per_layer = 2 * params.num_copies * (params.page_bytes + params.scale_bytes);
  if (bytes_per_layer == 0) return;
  auto copy_layers = [&](int64_t begin, int64_t end) {
    for (int64_t layer = begin; layer < end; ++layer) {
      for (void* pool : {params.k_pool, params.v_pool}) {
        copy_in_layer(params, pool, params.page_bytes, layer);
      }
      if (params.scale_bytes == 0) continue;
      for (void* scales : {params.k_scales, params.v_scales}) {
        copy_in_layer(params, scales, params.scale_bytes, layer);
      }
    }
  };
  const int64_t grain = (kBytesPerThread + bytes_per_layer - 1) / bytes_per_layer;
  parallel_for(params.num_layers, grain, copy_layers);
}

}  // namespace skv::cpu
