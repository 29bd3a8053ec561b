#include "csrc/kernels/cpu/verify_draft.h"

namespace skv::cpu {

namespace {

// A comparison is so cheap that a thread needs many sequences to pay.
constexpr int64_t kSequencesPerThread = 1024;

template <typename Id>
void verify_range(const VerifyDraftParams& params, int64_t begin, int64_t end) {
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    const int64_t start = params.draft_offsets[sequence];
    const int64_t length = params.draft_offsets[sequence + 1] - start;
    const Id* draft = static_cast<const Id*>(params.draft_ids) + start;
    const Id* target = static_cast<const Id*>(params.target_ids) + start + sequence;
    int64_t accepted = 0;
    while (accepted < length && draft[accepted] == target[accepted]) ++accepted;
    params.num_accepted[sequence] = static_cast<int32_t>(accepted);
    static_cast<Id*>(params.bonus_ids)[sequence] = target[accepted];
  }
}

}  // namespace

void verify_draft(const VerifyDraftParams& params, ParallelFor parallel_for) {
  auto verify = [&](int64_t begin, int64_t end) {
    if (params.ids_are_int64) {
      verify_range<int64_t>(params, begin, end);
    } else {
      verify_range<int32_t>(params, begin, end);
    }
  };
  parallel_for(params.num_sequences, kSequencesPerThread, verify);
}

}  // namespace skv::cpu
