// PagePool and SequenceTable in Python: convert, forward, nothing else.
#include "csrc/bindings/state/array_args.h"
#include "csrc/bindings/state/docs.h"
#include "csrc/bindings/state/state_objects.h"
#include "csrc/core/assert.h"

namespace py = pybind11;

namespace skv::bindings {
namespace {

void bind_page_pool(py::module_& module) {
  py::class_<PoolObject, std::shared_ptr<PoolObject>>(module, "PagePool", doc("PagePool"))
      .def(py::init<int64_t, int64_t>(), py::arg("num_pages"), py::arg("page_size"),
           doc("PagePool.__init__"))
      .def(
          "allocate",
          [](PoolObject& self, int64_t n) -> std::optional<at::Tensor> {
            Entry entry(self.busy);
            const auto pages = self.core.allocate(n);
            if (!pages) return std::nullopt;
            return to_tensor(*pages);
          },
          py::arg("n"), doc("PagePool.allocate"))
      .def(
          "retain",
          [](PoolObject& self, py::handle pages) {
            const IntArray ids(pages, "PagePool.retain: pages");
            Entry entry(self.busy);
            self.core.retain(ids.int32());
          },
          py::arg("pages"), doc("PagePool.retain"))
      .def(
          "release",
          [](PoolObject& self, py::handle pages) {
            const IntArray ids(pages, "PagePool.release: pages");
            Entry entry(self.busy);
            self.core.release(ids.int32());
          },
          py::arg("pages"), doc("PagePool.release"))
      .def(
          "ref_count",
          [](PoolObject& self, PageId page) {
            Entry entry(self.busy);
            return self.core.ref_count(page);
          },
          py::arg("page"), doc("PagePool.ref_count"))
      .def(
          "num_free",
          [](PoolObject& self) {
            Entry entry(self.busy);
            return self.core.num_free();
          },
          doc("PagePool.num_free"))
      .def(
          "num_pages", [](PoolObject& self) { return self.core.num_pages(); },
          doc("PagePool.num_pages"))
      .def(
          "page_size", [](PoolObject& self) { return self.core.page_size(); },
          doc("PagePool.page_size"))
      .def(
          "check_integrity",
          [](PoolObject& self) {
            Entry entry(self.busy);
            return self.core.check_integrity();
          },
          doc("PagePool.check_integrity"));
}

// The arrays of one step, allocated before anything changes.
struct BatchTensors {
  BatchTensors(int64_t num_sequences, const BatchShape& shape)
      : page_table(empty_int_tensor<int32_t>({num_sequences, shape.max_pages})),
        seq_lens(empty_int_tensor<int32_t>({num_sequences})),
        query_offsets(empty_int_tensor<int32_t>({num_sequences + 1})),
        positions(empty_int_tensor<int32_t>({shape.num_rows})),
        slots(empty_int_tensor<int64_t>({shape.num_rows})) {}

  BatchArrays arrays() {
    return {page_table.mutable_data_ptr<int32_t>(), seq_lens.mutable_data_ptr<int32_t>(),
            query_offsets.mutable_data_ptr<int32_t>(), positions.mutable_data_ptr<int32_t>(),
            slots.mutable_data_ptr<int64_t>()};
  }

  at::Tensor page_table, seq_lens, query_offsets, positions, slots;
};

at::Tensor copies_to_tensor(const std::vector<PageCopy>& copies) {
  at::Tensor tensor = empty_int_tensor<int32_t>({static_cast<int64_t>(copies.size()), 2});
  int32_t* out = tensor.mutable_data_ptr<int32_t>();
  for (const PageCopy& copy : copies) {
    *out++ = copy.from;
    *out++ = copy.to;
  }
  return tensor;
}

py::tuple fill_batch(TableObject& self, py::handle sequence_ids, py::handle query_lens) {
  const IntArray ids(sequence_ids, "SequenceTable.fill_batch: sequence_ids");
  const IntArray lens(query_lens, "SequenceTable.fill_batch: query_lens");
  Entry entry(self.busy, self.pool->busy);
  const BatchShape shape = self.core.plan_batch(ids.int64(), lens.int32());
  BatchTensors out(ids.size(), shape);
  self.core.fill_batch(ids.int64(), lens.int32(), shape, out.arrays());
  return py::make_tuple(out.page_table, out.seq_lens, out.query_offsets, out.positions, out.slots);
}

std::optional<at::Tensor> reserve(TableObject& self, SequenceId seq, int64_t n) {
  Entry entry(self.busy, self.pool->busy);
  const auto copies = self.core.reserve(seq, n);
  if (!copies) return std::nullopt;
  return copies_to_tensor(*copies);
}

std::optional<at::Tensor> reserve_batch(TableObject& self, py::handle sequence_ids,
                                        py::handle num_tokens) {
  const IntArray ids(sequence_ids, "SequenceTable.reserve_batch: sequence_ids");
  const IntArray counts(num_tokens, "SequenceTable.reserve_batch: num_tokens");
  Entry entry(self.busy, self.pool->busy);
  const auto copies = self.core.reserve_batch(ids.int64(), counts.int64());
  if (!copies) return std::nullopt;
  return copies_to_tensor(*copies);
}

void commit_batch(TableObject& self, py::handle sequence_ids, py::handle num_tokens) {
  const IntArray ids(sequence_ids, "SequenceTable.commit_batch: sequence_ids");
  const IntArray counts(num_tokens, "SequenceTable.commit_batch: num_tokens");
  Entry entry(self.busy, self.pool->busy);
  self.core.commit_batch(ids.int64(), counts.int64());
}

// reserve_batch and fill_batch in one call.
std::optional<py::tuple> prepare_batch(TableObject& self, py::handle sequence_ids,
                                       py::handle query_lens) {
  const IntArray ids(sequence_ids, "SequenceTable.prepare_batch: sequence_ids");
  const IntArray lens(query_lens, "SequenceTable.prepare_batch: query_lens");
  const std::vector<int64_t> num_tokens(lens.int32().begin(), lens.int32().end());
  Entry entry(self.busy, self.pool->busy);
  const auto shape = self.core.plan_reserve(ids.int64(), lens.int32());
  if (!shape) return std::nullopt;
  BatchTensors out(ids.size(), *shape);
  const auto copies = self.core.reserve_batch(ids.int64(), num_tokens);
  SKV_ASSERT(copies, "reserve_batch found fewer free pages than plan_reserve");
  self.core.fill_batch(ids.int64(), lens.int32(), *shape, out.arrays());
  return py::make_tuple(copies_to_tensor(*copies), out.page_table, out.seq_lens, out.query_offsets,
                        out.positions, out.slots);
}

at::Tensor lengths(TableObject& self, py::handle sequence_ids) {
  const IntArray ids(sequence_ids, "SequenceTable.lengths: sequence_ids");
  Entry entry(self.busy);
  at::Tensor tensor = empty_int_tensor<int64_t>({ids.size()});
  int64_t* out = tensor.mutable_data_ptr<int64_t>();
  for (const SequenceId seq : ids.int64()) *out++ = self.core.length(seq);
  return tensor;
}

// A method of one sequence without other arguments.
template <auto method>
auto of_sequence() {
  return [](TableObject& self, SequenceId seq) {
    Entry entry(self.busy, self.pool->busy);
    return (self.core.*method)(seq);
  };
}

// The same with one integer.
template <auto method>
auto of_sequence_and_int() {
  return [](TableObject& self, SequenceId seq, int64_t value) {
    Entry entry(self.busy, self.pool->busy);
    return (self.core.*method)(seq, value);
  };
}

void bind_sequence_table(py::module_& module) {
  using Table = SequenceTable;
  const auto seq = py::arg("seq");
  py::class_<TableObject>(module, "SequenceTable", doc("SequenceTable"))
      .def(py::init<std::shared_ptr<PoolObject>>(), py::arg("pool").none(false),
           doc("SequenceTable.__init__"))
      .def(
          "create",
          [](TableObject& self) {
            Entry entry(self.busy);
            return self.core.create();
          },
          doc("SequenceTable.create"))
      .def(
          "adopt",
          [](TableObject& self, py::handle pages, int64_t num_tokens) {
            const IntArray ids(pages, "SequenceTable.adopt: pages");
            Entry entry(self.busy, self.pool->busy);
            return self.core.adopt(ids.int32(), num_tokens);
          },
          py::arg("pages"), py::arg("num_tokens"), doc("SequenceTable.adopt"))
      .def("reserve", &reserve, seq, py::arg("n"), doc("SequenceTable.reserve"))
      .def("pages_needed", of_sequence_and_int<&Table::pages_needed>(), seq, py::arg("n"),
           doc("SequenceTable.pages_needed"))
      .def("commit", of_sequence_and_int<&Table::commit>(), seq, py::arg("n"),
           doc("SequenceTable.commit"))
      .def("truncate", of_sequence_and_int<&Table::truncate>(), seq, py::arg("length"),
           doc("SequenceTable.truncate"))
      .def("fork", of_sequence<&Table::fork>(), seq, doc("SequenceTable.fork"))
      .def("release", of_sequence<&Table::release>(), seq, doc("SequenceTable.release"))
      .def(
          "replace_prefix",
          [](TableObject& self, SequenceId id, py::handle pages) {
            const IntArray ids(pages, "SequenceTable.replace_prefix: pages");
            Entry entry(self.busy, self.pool->busy);
            self.core.replace_prefix(id, ids.int32());
          },
          seq, py::arg("pages"), doc("SequenceTable.replace_prefix"))
      .def("length", of_sequence<&Table::length>(), seq, doc("SequenceTable.length"))
      .def("num_reserved", of_sequence<&Table::num_reserved>(), seq,
           doc("SequenceTable.num_reserved"))
      .def("num_pages", of_sequence<&Table::num_pages>(), seq, doc("SequenceTable.num_pages"))
      .def(
          "page_table",
          [](TableObject& self, SequenceId id) {
            Entry entry(self.busy);
            return to_tensor(self.core.page_table(id));
          },
          seq, doc("SequenceTable.page_table"))
      .def(
          "has",
          [](TableObject& self, SequenceId id) {
            Entry entry(self.busy);
            return self.core.has(id);
          },
          seq, doc("SequenceTable.has"))
      .def("lengths", &lengths, py::arg("sequence_ids"), doc("SequenceTable.lengths"))
      .def("reserve_batch", &reserve_batch, py::arg("sequence_ids"), py::arg("num_tokens"),
           doc("SequenceTable.reserve_batch"))
      .def("commit_batch", &commit_batch, py::arg("sequence_ids"), py::arg("num_tokens"),
           doc("SequenceTable.commit_batch"))
      .def("fill_batch", &fill_batch, py::arg("sequence_ids"), py::arg("query_lens"),
           doc("SequenceTable.fill_batch"))
      .def("prepare_batch", &prepare_batch, py::arg("sequence_ids"), py::arg("query_lens"),
           doc("SequenceTable.prepare_batch"))
      .def(
          "num_sequences",
          [](TableObject& self) {
            Entry entry(self.busy);
            return self.core.num_sequences();
          },
          doc("SequenceTable.num_sequences"))
      .def(
          "sequence_ids",
          [](TableObject& self) {
            Entry entry(self.busy);
            py::list ids;
            for (const SequenceId id : self.core.sequence_ids()) ids.append(id);
            return ids;
          },
          doc("SequenceTable.sequence_ids"))
      .def(
          "check_integrity",
          [](TableObject& self) {
            Entry entry(self.busy, self.pool->busy);
            return self.core.check_integrity();
          },
          doc("SequenceTable.check_integrity"));
}

}  // namespace

void bind_pages(py::module_& module) {
  py::options options;
  options.disable_function_signatures();  // docs.h has them
  bind_page_pool(module);
  bind_sequence_table(module);
}

}  // namespace skv::bindings
