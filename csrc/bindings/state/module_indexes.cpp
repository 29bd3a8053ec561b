// RadixTree and NgramIndex in Python: convert, forward, nothing else.
#include <deque>
#include <vector>

#include "csrc/bindings/state/array_args.h"
#include "csrc/bindings/state/docs.h"
#include "csrc/bindings/state/state_objects.h"
#include "csrc/core/propose_drafts.h"

namespace py = pybind11;

namespace skv::bindings {
namespace {

// From here on a call is long enough (some 2 us a match, 20 us an insert) to free the GIL.
constexpr int64_t kLongTokens = 16384;
constexpr int64_t kLongEviction = 1024;

struct MatchObject {
  NodeHandle node;
  int64_t num_tokens;
  at::Tensor pages;
};

struct InsertObject {
  int64_t num_matched;
  at::Tensor pages;
};

MatchObject match(TreeObject& self, RootKey root_key, py::handle tokens) {
  const IntArray ids(tokens, "RadixTree.match: tokens", IntArray::Reading::kInPlace);
  Entry entry(self.busy, Access::kRead);
  const Match found =
      run_work(ids.size() >= kLongTokens, [&] { return self.core.match(root_key, ids.tokens()); });
  return {found.node, found.num_tokens, to_tensor(found.pages)};
}

void touch(TreeObject& self, const MatchObject& match) {
  Entry entry(self.busy);
  self.core.touch(match.node);
}

InsertObject insert(TreeObject& self, RootKey root_key, py::handle tokens, py::handle pages) {
  const IntArray ids(tokens, "RadixTree.insert: tokens");
  const IntArray page_ids(pages, "RadixTree.insert: pages");
  const std::span<const PageId> page_span = page_ids.int32();
  Entry entry(self.busy, self.pool->busy);
  const InsertResult result = run_work(ids.size() >= kLongTokens, [&] {
    return self.core.insert(root_key, ids.tokens(), page_span);
  });
  return {result.num_matched, to_tensor(result.pages)};
}

int64_t evict(TreeObject& self, int64_t num_pages) {
  Entry entry(self.busy, self.pool->busy);
  const bool is_long = num_pages >= kLongEviction || self.core.num_nodes() >= kLongEviction;
  return run_work(is_long, [&] { return self.core.evict(num_pages); });
}

// A method that looks at the tree and perhaps at the pool.
template <auto method>
auto of_tree() {
  return [](TreeObject& self) {
    Entry entry(self.busy, self.pool->busy);
    return (self.core.*method)();
  };
}

void bind_radix_tree(py::module_& module) {
  py::class_<MatchObject>(module, "Match", doc("Match"))
      .def_readonly("num_tokens", &MatchObject::num_tokens, doc("Match.num_tokens"))
      .def_readonly("pages", &MatchObject::pages, doc("Match.pages"));
  py::class_<InsertObject>(module, "InsertResult", doc("InsertResult"))
      .def_readonly("num_matched", &InsertObject::num_matched, doc("InsertResult.num_matched"))
      .def_readonly("pages", &InsertObject::pages, doc("InsertResult.pages"));
  py::class_<TreeObject>(module, "RadixTree", doc("RadixTree"))
      .def(py::init<std::shared_ptr<PoolObject>>(), py::arg("pool").none(false),
           doc("RadixTree.__init__"))
      .def("match", &match, py::arg("root_key"), py::arg("tokens"), doc("RadixTree.match"))
      .def("touch", &touch, py::arg("match"), doc("RadixTree.touch"))
      .def("insert", &insert, py::arg("root_key"), py::arg("tokens"), py::arg("pages"),
           doc("RadixTree.insert"))
      .def(
          "pin",
          [](TreeObject& self, RootKey root_key, py::handle tokens) {
            const IntArray ids(tokens, "RadixTree.pin: tokens", IntArray::Reading::kInPlace);
            Entry entry(self.busy, self.pool->busy);
            return self.core.pin(root_key, ids.tokens());
          },
          py::arg("root_key"), py::arg("tokens"), doc("RadixTree.pin"))
      .def(
          "pinned_length",
          [](TreeObject& self, PinId pin) {
            Entry entry(self.busy);
            return self.core.pinned_length(pin);
          },
          py::arg("pin"), doc("RadixTree.pinned_length"))
      .def(
          "unpin",
          [](TreeObject& self, PinId pin) {
            Entry entry(self.busy);
            self.core.unpin(pin);
          },
          py::arg("pin"), doc("RadixTree.unpin"))
      .def("evict", &evict, py::arg("num_pages"), doc("RadixTree.evict"))
      .def(
          "evict_all", [](TreeObject& self) { return evict(self, self.pool->core.num_pages()); },
          doc("RadixTree.evict_all"))
      .def("num_evictable_pages", of_tree<&RadixTree::num_evictable_pages>(),
           doc("RadixTree.num_evictable_pages"))
      .def(
          "num_blocked_pages",
          [](TreeObject& self, py::handle kept) {
            const IntArray ids(kept, "RadixTree.num_blocked_pages: kept");
            const std::span<const PageId> page_ids = ids.int32();
            Entry entry(self.busy, self.pool->busy);
            return self.core.num_blocked_pages(page_ids);
          },
          py::arg("kept"), doc("RadixTree.num_blocked_pages"))
      .def("num_pinned_pages", of_tree<&RadixTree::num_pinned_pages>(),
           doc("RadixTree.num_pinned_pages"))
      .def("num_tree_pages", of_tree<&RadixTree::num_tree_pages>(), doc("RadixTree.num_tree_pages"))
      .def("num_nodes", of_tree<&RadixTree::num_nodes>(), doc("RadixTree.num_nodes"))
      .def("check_integrity", of_tree<&RadixTree::check_integrity>(),
           doc("RadixTree.check_integrity"));
}

py::tuple propose_drafts_of(py::handle index_list, py::handle token_list, py::handle max_tokens) {
  // Tuples of our own: the caller's lists may change while arrays are read.
  const py::tuple index_objects(py::reinterpret_borrow<py::object>(index_list));
  const py::tuple token_objects(py::reinterpret_borrow<py::object>(token_list));
  std::vector<IndexObject*> indexes;
  std::vector<NgramIndex*> cores;
  for (const py::handle object : index_objects) {
    indexes.push_back(&object.cast<IndexObject&>());
    cores.push_back(&indexes.back()->core);
  }
  std::deque<IntArray> arrays;
  std::vector<TokenSpan> tokens;
  for (const py::handle object : token_objects) {
    tokens.push_back(arrays.emplace_back(object, "propose_drafts: tokens").tokens());
  }
  const IntArray limits(max_tokens, "propose_drafts: max_tokens");
  require_distinct(cores);  // else the second entry of the same index would call it busy
  std::deque<Entry> entries;
  for (IndexObject* index : indexes) entries.emplace_back(index->busy);
  const DraftBatch drafts = propose_drafts(cores, tokens, limits.int64());
  return py::make_tuple(to_tensor(drafts.tokens), to_tensor(drafts.lens),
                        to_tensor(drafts.match_lens));
}

void bind_ngram_index(py::module_& module) {
  py::class_<IndexObject>(module, "NgramIndex", doc("NgramIndex"))
      .def(py::init<int64_t, int64_t>(), py::arg("min_n") = 2, py::arg("max_n") = 8,
           doc("NgramIndex.__init__"))
      .def(
          "append",
          [](IndexObject& self, py::handle tokens) {
            const IntArray ids(tokens, "NgramIndex.append: tokens");
            Entry entry(self.busy);
            self.core.append(ids.tokens());
          },
          py::arg("tokens"), doc("NgramIndex.append"))
      .def(
          "truncate",
          [](IndexObject& self, int64_t length) {
            Entry entry(self.busy);
            self.core.truncate(length);
          },
          py::arg("length"), doc("NgramIndex.truncate"))
      .def(
          "size",
          [](IndexObject& self) {
            Entry entry(self.busy);
            return self.core.size();
          },
          doc("NgramIndex.size"))
      .def(
          "propose",
          [](IndexObject& self, int64_t max_tokens) {
            Entry entry(self.busy);
            const Draft draft = self.core.propose(max_tokens);
            return py::make_tuple(to_tensor(draft.tokens), draft.match_len);
          },
          py::arg("max_tokens"), doc("NgramIndex.propose"))
      .def(
          "fork",
          [](IndexObject& self) {
            Entry entry(self.busy);
            return std::make_unique<IndexObject>(self.core.fork());
          },
          doc("NgramIndex.fork"))
      .def(
          "check_integrity",
          [](IndexObject& self) {
            Entry entry(self.busy);
            return self.core.check_integrity();
          },
          doc("NgramIndex.check_integrity"));
  module.def("propose_drafts", &propose_drafts_of, py::arg("indexes"), py::arg("tokens"),
             py::arg("max_tokens"), doc("propose_drafts"));
}

}  // namespace

void bind_indexes(py::module_& module) {
  py::options options;
  options.disable_function_signatures();  // docs.h has them
  bind_radix_tree(module);
  bind_ngram_index(module);
}

}  // namespace skv::bindings
