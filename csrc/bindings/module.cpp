// The Python module stateful_kv._C: the state objects of csrc/core. The ops of library.cpp are
// registered with torch when this library is loaded.
#include <torch/csrc/utils/pybind.h>

#include <exception>
#include <vector>

#include "csrc/bindings/layers/layer_stack.h"
#include "csrc/bindings/state_objects.h"
#include "csrc/core/assert.h"
#include "csrc/core/references.h"

namespace py = pybind11;

namespace skv::bindings {
namespace {

// The Python class for InvariantError, handed over at import so that C++ imports nothing from
// Python. Owned for the life of the process: a static py::object would be destroyed after Python.
PyObject* invariant_error_class = nullptr;

void set_error_types(const py::dict& types) {
  const py::object error_class = types["InvariantError"];
  if (!PyExceptionClass_Check(error_class.ptr())) {
    throw py::type_error("_set_error_types: InvariantError: expected an exception class");
  }
  PyObject* const old = invariant_error_class;
  invariant_error_class = error_class.inc_ref().ptr();
  Py_XDECREF(old);
}

// std::invalid_argument -> ValueError and std::out_of_range -> IndexError are pybind11's own.
void translate_exception(std::exception_ptr exception) {
  try {
    if (exception) std::rethrow_exception(exception);
  } catch (const InvariantError& error) {
    PyErr_SetString(invariant_error_class != nullptr ? invariant_error_class : PyExc_RuntimeError,
                    error.what());
  }
}

std::optional<std::string> check_references_of(PoolObject& pool, TableObject* table,
                                               const py::list& trees) {
  Entry entry(pool.busy);
  std::vector<const RadixTree*> cores;
  for (const py::handle tree : trees) cores.push_back(&tree.cast<TreeObject&>().core);
  return check_references(pool.core, table != nullptr ? &table->core : nullptr, cores);
}

}  // namespace
}  // namespace skv::bindings

PYBIND11_MODULE(_C, module) {
  using namespace skv::bindings;
  py::register_local_exception_translator(&translate_exception);
  bind_pages(module);
  bind_indexes(module);
  bind_layers(module);
  bind_info(module);
  module.def("check_references", &check_references_of, py::arg("pool"), py::arg("table"),
             py::arg("trees"));
  module.def("_set_error_types", &set_error_types, py::arg("types"));
}
