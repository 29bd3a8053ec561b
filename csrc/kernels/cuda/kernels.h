// Launchers of the CUDA kernels: plain parameters in, launch status out. No template, no torch.
// Those of paged attention are in attention.h.
//
// Contract, for all of them:
// - The call enqueues work on `stream` of the current device and returns; nothing synchronises,
//   nothing is allocated, so every launcher may be captured in a CUDA graph.
// - Zero rows is legal and launches nothing.
// - cudaErrorInvalidValue: a dtype, head_dim or size that is not built; cudaErrorMisalignedAddress:
//   a pool pointer that breaks the alignment below. Every other status is the launch's own.
// - Ids inside device arrays (slots, pages, positions) are trusted: checking them would need a
//   synchronisation. They are checked where the tables are built; a build with
//   SKV_DEVICE_ASSERTS checks them again in the kernels.
// - A row's result has the same bits whatever the other rows, the page numbers or the page_size.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>

#include "csrc/kernels/kv_params.h"
#include "csrc/kernels/params.h"
#include "csrc/kernels/token_params.h"

namespace skv::cuda {

// Head dims that paged_attention is built for. The error texts are made from this list.
using HeadDims = std::integer_sequence<int, 64, 96, 128, 256>;

// Pool base addresses must be multiples of this: keys and values are read 16 bytes at a time.
inline constexpr uintptr_t kPoolAlignment = 16;

// paged_attention counts positions in int32, with room to step past the last one.
inline constexpr int64_t kMaxPositions = int64_t{1} << 30;

// Sequences that one call of fill_rows may have.
inline constexpr int64_t kMaxSequences = 1024;

cudaError_t advance_sequences(const AdvanceSequencesParams& params, cudaStream_t stream);
cudaError_t append_kv(const AppendKvParams& params, cudaStream_t stream);
cudaError_t argmax(const ArgmaxParams& params, cudaStream_t stream);
cudaError_t copy_pages(const CopyPagesParams& params, cudaStream_t stream);
cudaError_t fill_rows(const FillRowsParams& params, cudaStream_t stream);
cudaError_t ngram_lookup(const NgramLookupParams& params, cudaStream_t stream);
cudaError_t rms_norm(const RmsNormParams& params, cudaStream_t stream);
cudaError_t rope_append_kv(const RopeAppendKvParams& params, cudaStream_t stream);
cudaError_t sample(const SampleParams& params, cudaStream_t stream);
cudaError_t silu_mul(const SiluMulParams& params, cudaStream_t stream);
cudaError_t verify_draft(const VerifyDraftParams& params, cudaStream_t stream);

}  // namespace skv::cuda
