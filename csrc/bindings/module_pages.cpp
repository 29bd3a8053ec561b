// PagePool and SequenceTable in Python: convert, forward, nothing else.
#include "csrc/bindings/array_args.h"
#include "csrc/bindings/state_objects.h"

namespace py = pybind11;

namespace skv::bindings {
namespace {

void bind_page_pool(py::module_& module) {
  py::class_<PoolObject, std::shared_ptr<PoolObject>>(module, "PagePool")
      .def(py::init<int64_t, int64_t>(), py::arg("num_pages"), py::arg("page_size"))
      .def(
          "allocate",
          [](PoolObject& self, int64_t n) -> std::optional<at::Tensor> {
            Entry entry(self.busy);
            const auto pages = self.core.allocate(n);
            if (!pages) return std::nullopt;
            return to_tensor(*pages);
          },
          py::arg("n"))
      .def(
          "retain",
          [](PoolObject& self, py::handle pages) {
            const IntArray ids(pages, "PagePool.retain: pages");
            Entry entry(self.busy);
            self.core.retain(ids.int32());
          },
          py::arg("pages"))
      .def(
          "release",
          [](PoolObject& self, py::handle pages) {
            const IntArray ids(pages, "PagePool.release: pages");
            Entry entry(self.busy);
            self.core.release(ids.int32());
          },
          py::arg("pages"))
      .def(
          "ref_count",
          [](PoolObject& self, PageId page) {
            Entry entry(self.busy);
            return self.core.ref_count(page);
          },
          py::arg("page"))
      .def("num_free",
           [](PoolObject& self) {
             Entry entry(self.busy);
             return self.core.num_free();
           })
      .def("num_pages", [](PoolObject& self) { return self.core.num_pages(); })
      .def("page_size", [](PoolObject& self) { return self.core.page_size(); })
      .def("check_integrity", [](PoolObject& self) {
        Entry entry(self.busy);
        return self.core.check_integrity();
      });
}

py::tuple fill_batch(TableObject& self, py::handle sequence_ids, py::handle query_lens) {
  const IntArray ids(sequence_ids, "SequenceTable.fill_batch: sequence_ids");
  const IntArray lens(query_lens, "SequenceTable.fill_batch: query_lens");
  Entry entry(self.busy, self.pool->busy);
  const BatchShape shape = self.core.plan_batch(ids.int64(), lens.int32());
  at::Tensor page_table = empty_int_tensor<int32_t>({ids.size(), shape.max_pages});
  at::Tensor seq_lens = empty_int_tensor<int32_t>({ids.size()});
  at::Tensor query_offsets = empty_int_tensor<int32_t>({ids.size() + 1});
  at::Tensor positions = empty_int_tensor<int32_t>({shape.num_rows});
  at::Tensor slots = empty_int_tensor<int64_t>({shape.num_rows});
  self.core.fill_batch(
      ids.int64(), lens.int32(), shape,
      {page_table.mutable_data_ptr<int32_t>(), seq_lens.mutable_data_ptr<int32_t>(),
       query_offsets.mutable_data_ptr<int32_t>(), positions.mutable_data_ptr<int32_t>(),
       slots.mutable_data_ptr<int64_t>()});
  return py::make_tuple(page_table, seq_lens, query_offsets, positions, slots);
}

std::optional<at::Tensor> append(TableObject& self, SequenceId seq, int64_t n) {
  Entry entry(self.busy, self.pool->busy);
  const auto copies = self.core.append(seq, n);
  if (!copies) return std::nullopt;
  at::Tensor tensor = empty_int_tensor<int32_t>({static_cast<int64_t>(copies->size()), 2});
  int32_t* out = tensor.mutable_data_ptr<int32_t>();
  for (const PageCopy& copy : *copies) {
    *out++ = copy.from;
    *out++ = copy.to;
  }
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
  py::class_<TableObject>(module, "SequenceTable")
      .def(py::init<std::shared_ptr<PoolObject>>(), py::arg("pool").none(false))
      .def("create",
           [](TableObject& self) {
             Entry entry(self.busy);
             return self.core.create();
           })
      .def(
          "adopt",
          [](TableObject& self, py::handle pages, int64_t num_tokens) {
            const IntArray ids(pages, "SequenceTable.adopt: pages");
            Entry entry(self.busy, self.pool->busy);
            return self.core.adopt(ids.int32(), num_tokens);
          },
          py::arg("pages"), py::arg("num_tokens"))
      .def("append", &append, seq, py::arg("n"))
      .def("pages_needed", of_sequence_and_int<&Table::pages_needed>(), seq, py::arg("n"))
      .def("commit", of_sequence_and_int<&Table::commit>(), seq, py::arg("n"))
      .def("truncate", of_sequence_and_int<&Table::truncate>(), seq, py::arg("length"))
      .def("fork", of_sequence<&Table::fork>(), seq)
      .def("release", of_sequence<&Table::release>(), seq)
      .def(
          "replace_prefix",
          [](TableObject& self, SequenceId id, py::handle pages) {
            const IntArray ids(pages, "SequenceTable.replace_prefix: pages");
            Entry entry(self.busy, self.pool->busy);
            self.core.replace_prefix(id, ids.int32());
          },
          seq, py::arg("pages"))
      .def("length", of_sequence<&Table::length>(), seq)
      .def("num_reserved", of_sequence<&Table::num_reserved>(), seq)
      .def("num_pages", of_sequence<&Table::num_pages>(), seq)
      .def(
          "page_table",
          [](TableObject& self, SequenceId id) {
            Entry entry(self.busy);
            return to_tensor(self.core.page_table(id));
          },
          seq)
      .def("fill_batch", &fill_batch, py::arg("sequence_ids"), py::arg("query_lens"))
      .def("num_sequences",
           [](TableObject& self) {
             Entry entry(self.busy);
             return self.core.num_sequences();
           })
      .def("sequence_ids",
           [](TableObject& self) {
             Entry entry(self.busy);
             py::list ids;
             for (const SequenceId id : self.core.sequence_ids()) ids.append(id);
             return ids;
           })
      .def("check_integrity", [](TableObject& self) {
        Entry entry(self.busy, self.pool->busy);
        return self.core.check_integrity();
      });
}

}  // namespace

void bind_pages(py::module_& module) {
  bind_page_pool(module);
  bind_sequence_table(module);
}

}  // namespace skv::bindings
