// The Python module stateful_kv._C: the state objects of csrc/core, and LayerStack. The library of
// the ops is loaded with it, which registers them with torch.
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <deque>
#include <exception>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/bindings/state/docs.h"
#include "csrc/bindings/state/state_objects.h"
#include "csrc/core/assert.h"
#include "csrc/core/references.h"

namespace py = pybind11;

namespace skv::bindings {
namespace {

// The Python classes of our exceptions, handed over at import so that C++ imports nothing from
// Python. Owned for the life of the process: a static py::object would be destroyed after Python.
struct ErrorClass {
  const char* name;
  PyObject* value;
};
ErrorClass invariant_error{"InvariantError", nullptr};
ErrorClass state_busy_error{"StateBusyError", nullptr};

// Sets the classes that `types` names; all are checked before one is set.
void set_error_types(const py::dict& types) {
  const std::array<ErrorClass*, 2> known{&invariant_error, &state_busy_error};
  for (const ErrorClass* error : known) {
    if (types.contains(error->name) && !PyExceptionClass_Check(types[error->name].ptr())) {
      throw py::type_error(std::string("_set_error_types: ") + error->name +
                           ": expected an exception class");
    }
  }
  for (ErrorClass* error : known) {
    if (!types.contains(error->name)) continue;
    const py::object value = types[error->name];
    PyObject* const old = std::exchange(error->value, value.inc_ref().ptr());
    Py_XDECREF(old);
  }
}

void set_error(const ErrorClass& error, const char* message) {
  PyErr_SetString(error.value != nullptr ? error.value : PyExc_RuntimeError, message);
}

// std::invalid_argument -> ValueError and std::out_of_range -> IndexError are pybind11's own.
void translate_exception(std::exception_ptr exception) {
  try {
    if (exception) std::rethrow_exception(exception);
  } catch (const InvariantError& error) {
    set_error(invariant_error, error.what());
  } catch (const StateBusyError& error) {
    set_error(state_busy_error, error.what());
  }
}

void require_pool(const char* what, const PoolObject& pool, const PoolObject& got) {
  if (&pool != &got) {
    throw std::invalid_argument(std::string("check_references: ") + what +
                                ": expected pages of the given pool");
  }
}

std::optional<std::string> check_references_of(PoolObject& pool, TableObject* table,
                                               const py::list& trees) {
  if (table != nullptr) require_pool("table", pool, *table->pool);
  std::vector<TreeObject*> objects;
  std::vector<const RadixTree*> cores;
  for (const py::handle tree : trees) {
    auto* const object = tree.cast<TreeObject*>();
    if (object == nullptr)
      throw py::type_error("check_references: trees: expected trees, got None");
    require_pool("trees", pool, *object->pool);
    if (std::find(objects.begin(), objects.end(), object) != objects.end()) {
      throw std::invalid_argument("check_references: trees: a tree stands twice in the list");
    }
    objects.push_back(object);
    cores.push_back(&object->core);
  }
  Entry entry(pool.busy);
  std::optional<Entry> table_entry;
  if (table != nullptr) table_entry.emplace(table->busy);
  std::deque<Entry> tree_entries;
  for (TreeObject* object : objects) tree_entries.emplace_back(object->busy);
  return check_references(pool.core, table != nullptr ? &table->core : nullptr, cores);
}

}  // namespace
}  // namespace skv::bindings

PYBIND11_MODULE(_C, module) {
  using namespace skv::bindings;
  py::register_local_exception_translator(&translate_exception);
  BusyFlag::watch_forks();
  bind_pages(module);
  bind_indexes(module);
  bind_layers(module);
  bind_info(module);
  py::options options;
  options.disable_function_signatures();  // docs.h has them
  module.def("check_references", &check_references_of, py::arg("pool"), py::arg("table"),
             py::arg("trees"), doc("check_references"));
  module.def("_set_error_types", &set_error_types, py::arg("types"));
}
