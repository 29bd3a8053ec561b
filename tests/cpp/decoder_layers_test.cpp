// The layer executor: its workspace, the order of its kernels, and equal bits however they run.
// That its bits are those of the composed ops is tested in Python, where the ops are.
#include "csrc/kernels/cpu/decoder_layers.h"

#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "tests/cpp/kernel_testing.h"

namespace skv {
namespace {

using DecoderLayers = KernelTest;

constexpr int64_t kHidden = 48;
constexpr int64_t kInner = 32;
constexpr int64_t kHeads = 4;
constexpr int64_t kKvHeads = 2;
constexpr int64_t kHeadDim = 16;
constexpr int64_t kLayers = 2;
constexpr int64_t kVocab = 40;
constexpr KvLayout kLayout{3, kKvHeads, 8, kHeadDim};

constexpr auto kRunKernel = [](const char*, FunctionRef<void()> kernel) { kernel(); };

// Weights of a small model, each in memory of exactly its size.
class SmallModel {
 public:
  explicit SmallModel(bool has_head_norms) {
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      layers_.push_back({
          .attn_norm = floats(kHidden),
          .qkv = linear(kHidden, (kHeads + 2 * kKvHeads) * kHeadDim),
          .q_norm = has_head_norms ? floats(kHeadDim) : nullptr,
          .k_norm = has_head_norms ? floats(kHeadDim) : nullptr,
          .o = linear(kHeads * kHeadDim, kHidden),
          .ffn_norm = floats(kHidden),
          .gate_up = linear(kHidden, 2 * kInner),
          .down = linear(kInner, kHidden),
      });
    }
    model_ = {
        .layers = layers_.data(),
        .cos_sin = floats(64 * kHeadDim),
        .num_layers = kLayers,
        .hidden_size = kHidden,
        .inner_size = kInner,
        .num_heads = kHeads,
        .num_kv_heads = kKvHeads,
        .head_dim = kHeadDim,
        .norm_epsilon = 1e-5F,
        .scale = 0.25F,
        .sliding_window = 0,
    };
    head_ = {.norm = floats(kHidden), .linear = linear(kHidden, kVocab)};
  }

  const cpu::DecoderModel& model() const { return model_; }
  const cpu::DecoderHead& head() const { return head_; }

 private:
  const float* floats(int64_t count) {
    memory_.emplace_back(random_floats(count, ++seed_, 0.2F));
    return memory_.back().data();
  }

  cpu::PackedLinear linear(int64_t in_features, int64_t out_features) {
    const int64_t panels = (out_features + kPanelColumns - 1) / kPanelColumns;
    return {
        .weight = floats(panels * in_features * kPanelColumns),
        .scales = nullptr,
        .minimums = nullptr,
        .bias = nullptr,
        .format = WeightFormat::kFloat32,
        .in_features = in_features,
        .out_features = out_features,
    };
  }

  uint32_t seed_ = 0;
  std::vector<ExactArray<float>> memory_;
  std::vector<cpu::DecoderLayer> layers_;
  cpu::DecoderModel model_{};
  cpu::DecoderHead head_{};
};

// Two sequences, five rows, of which three are wanted.
struct SmallBatch {
  ExactArray<int32_t> positions{std::vector<int32_t>{8, 9, 10, 0, 1}};
  ExactArray<int64_t> slots{std::vector<int64_t>{8, 9, 10, 16, -1}};
  ExactArray<int32_t> page_table{std::vector<int32_t>{0, 1, 2, 2}};
  ExactArray<int32_t> seq_lens{std::vector<int32_t>{11, 1}};
  ExactArray<int32_t> query_offsets{std::vector<int32_t>{0, 3, 4}};
  ExactArray<int64_t> logit_rows{std::vector<int64_t>{4, 0, 3}};

  cpu::DecoderBatch view() {
    return {
        .positions = positions.data(),
        .slots = slots.data(),
        .page_table = page_table.data(),
        .seq_lens = seq_lens.data(),
        .query_offsets = query_offsets.data(),
        .logit_rows = logit_rows.data(),
        .num_rows = 5,
        .num_logit_rows = 3,
        .num_sequences = 2,
        .max_pages = 2,
        .page_table_row_stride = 2,
    };
  }
};

struct Result {
  std::vector<float> logits;
  std::vector<int64_t> ids;
  std::vector<float> values;
  std::vector<float> pools;

  bool operator==(const Result&) const = default;
};

constexpr int64_t kTop = 3;

Result run(const SmallModel& small, cpu::DecoderWorkspace& workspace, ParallelFor parallel_for,
           cpu::RunKernel run_kernel = kRunKernel) {
  const int64_t pool_size = kLayers * kLayout.num_pages * kLayout.page_elements();
  ExactArray<float> pools(random_floats(2 * pool_size, 77));
  const cpu::DecoderPools pool_view{pools.data(), pools.data() + pool_size, nullptr, nullptr,
                                    kLayout,      DType::kFloat32};
  SmallBatch batch;
  const cpu::DecoderBatch view = batch.view();
  EXPECT_TRUE(workspace.prepare(small.model(), view.num_rows, view.num_logit_rows, kTop));
  const cpu::DecoderMemory& memory = workspace.memory();
  const ExactArray<float> x(random_floats(view.num_rows * kHidden, 78));
  ExactArray<float> hidden(view.num_logit_rows * kHidden);
  const cpu::Runner runner{parallel_for, run_kernel};
  cpu::decoder_layers(small.model(), view, pool_view, x.data(), hidden.data(), memory, runner);
  Result result{std::vector<float>(3 * kVocab),
                std::vector<int64_t>(3 * kTop),
                std::vector<float>(3 * kTop),
                {}};
  cpu::decoder_logits(small.model(), small.head(), hidden.data(), 3, result.logits.data(), memory,
                      runner);
  cpu::decoder_top_k(small.model(), small.head(), hidden.data(), 3, kTop, result.ids.data(),
                     result.values.data(), memory, runner);
  result.pools.assign(pools.data(), pools.data() + 2 * pool_size);
  return result;
}

TEST_F(DecoderLayers, BitsDoNotDependOnThreads) {
  for (const bool has_head_norms : {false, true}) {
    const SmallModel small(has_head_norms);
    cpu::DecoderWorkspace workspace;
    const Result serial = run(small, workspace, kSerial);
    EXPECT_EQ(run(small, workspace, kBackwards), serial);
    EXPECT_EQ(run(small, workspace, kThreePoolThreads), serial);
    for (int64_t row = 0; row < 3; ++row) {
      for (int64_t i = 0; i < kTop; ++i) {
        const auto at = static_cast<size_t>(row * kTop + i);
        const auto logit = static_cast<size_t>(row * kVocab + serial.ids[at]);
        EXPECT_EQ(serial.values[at], serial.logits[logit]);
      }
    }
  }
}

TEST_F(DecoderLayers, ShowsEveryKernelOnce) {
  for (const bool has_head_norms : {false, true}) {
    std::vector<std::string> names;
    const auto record = [&](const char* op, FunctionRef<void()> kernel) {
      names.emplace_back(op);
      kernel();
    };
    cpu::DecoderWorkspace workspace;
    run(SmallModel(has_head_norms), workspace, kSerial, record);
    std::vector<std::string> expected;
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      expected.emplace_back("stateful_kv::quantized_linear");
      if (has_head_norms) expected.insert(expected.end(), 2, "stateful_kv::rms_norm");
      expected.emplace_back("stateful_kv::rope_append_kv");
      expected.emplace_back("stateful_kv::paged_attention");
      expected.insert(expected.end(), 3, "stateful_kv::quantized_linear");
    }
    expected.emplace_back("stateful_kv::quantized_linear");
    expected.emplace_back("stateful_kv::linear_top_k");
    EXPECT_EQ(names, expected);
  }
}

TEST_F(DecoderLayers, WorkspaceIsKept) {
  const SmallModel small(true);
  cpu::DecoderWorkspace workspace;
  EXPECT_EQ(workspace.num_bytes(), 0U);
  ASSERT_TRUE(workspace.prepare(small.model(), 0, 0, 0));
  ASSERT_TRUE(workspace.prepare(small.model(), 20, 3, 0));
  const size_t size = workspace.num_bytes();
  const float* const first = workspace.memory().hidden;
  for (const int64_t num_rows : {1, 19, 20, 0, 20}) {
    ASSERT_TRUE(workspace.prepare(small.model(), num_rows, num_rows / 7, 0));
    EXPECT_EQ(workspace.memory().hidden, first);
    EXPECT_EQ(workspace.num_bytes(), size);
    for (const float* part : {workspace.memory().qkv, workspace.memory().gated}) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(part) % 64, 0U);
    }
  }
  ASSERT_TRUE(workspace.prepare(small.model(), 21, 3, 2));
  EXPECT_GT(workspace.num_bytes(), size);
  // The whole of it can be written.
  std::memset(workspace.memory().hidden, 1, workspace.num_bytes());
}

TEST_F(DecoderLayers, WorkspaceRefusesWhatCannotBe) {
  const SmallModel small(false);
  cpu::DecoderWorkspace workspace;
  for (const int64_t num_rows : {int64_t{1} << 58, std::numeric_limits<int64_t>::max()}) {
    EXPECT_FALSE(workspace.prepare(small.model(), num_rows, 1, 0));
    EXPECT_TRUE(workspace.prepare(small.model(), 4, 1, 1));
  }
}

}  // namespace
}  // namespace skv
