#include "csrc/kernels/cpu/copy_pages.h"

#include <cstring>

namespace skv::cpu {

namespace {

// Below this many copied bytes a second thread costs more than it saves.
constexpr int64_t kBytesPerThread = 1 << 18;

}  // namespace

void copy_pages(const CopyPagesParams& params, ParallelFor parallel_for) {
  // Layers do not touch each other, so they are the unit of work and the pairs of a layer keep
  // their order.
  const int64_t bytes_per_layer = 2 * params.num_copies * params.page_bytes;
  if (bytes_per_layer == 0) return;
  auto copy_layers = [&](int64_t begin, int64_t end) {
    for (int64_t layer = begin; layer < end; ++layer) {
      const int64_t layer_start = layer * params.num_pages * params.page_bytes;
      for (void* pool : {params.k_pool, params.v_pool}) {
        char* pages = static_cast<char*>(pool) + layer_start;
        for (int64_t i = 0; i < params.num_copies; ++i) {
          const int64_t from = params.page_copies[2 * i];
          const int64_t to = params.page_copies[2 * i + 1];
          if (from == to) continue;
          std::memcpy(pages + to * params.page_bytes, pages + from * params.page_bytes,
                      static_cast<size_t>(params.page_bytes));
        }
      }
    }
  };
  const int64_t grain = (kBytesPerThread + bytes_per_layer - 1) / bytes_per_layer;
  parallel_for(params.num_layers, grain, copy_layers);
}

}  // namespace skv::cpu
