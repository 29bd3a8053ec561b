// The state objects as Python holds them: a core object, its busy flag, and what it depends on.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "csrc/bindings/state/busy.h"
#include "csrc/core/ngram_index.h"
#include "csrc/core/page_pool.h"
#include "csrc/core/radix_tree.h"
#include "csrc/core/sequence_table.h"

namespace skv::bindings {

struct PoolObject {
  PoolObject(int64_t num_pages, int64_t page_size) : core(num_pages, page_size) {}

  PagePool core;  // its arrays never move, so destroying it is safe even where it is broken
  BusyFlag busy{"PagePool"};
};

// A SequenceTable or RadixTree. Its destructor gives pages back to the pool, unless one of the two
// stays half changed (busy.h): then the memory is left to the end of the process.
template <typename Core>
struct PoolUser {
  PoolUser(std::shared_ptr<PoolObject> owner, const char* name)
      : pool(std::move(owner)),
        owned(std::make_unique<Core>(pool->core)),
        core(*owned),
        busy(name) {}
  PoolUser(const PoolUser&) = delete;
  PoolUser& operator=(const PoolUser&) = delete;
  ~PoolUser() {
    pool->busy.wait_until_idle();
    if (busy.is_being_changed() || pool->busy.is_being_changed()) {
      static_cast<void>(owned.release());
    }
  }

  std::shared_ptr<PoolObject> pool;
  std::unique_ptr<Core> owned;
  Core& core;
  BusyFlag busy;
};

struct TableObject : PoolUser<SequenceTable> {
  explicit TableObject(std::shared_ptr<PoolObject> owner)
      : PoolUser(std::move(owner), "SequenceTable") {}
};

struct TreeObject : PoolUser<RadixTree> {
  explicit TreeObject(std::shared_ptr<PoolObject> owner)
      : PoolUser(std::move(owner), "RadixTree") {}
};

// Every call of an index keeps the GIL, so no fork finds it half changed.
struct IndexObject {
  IndexObject(int64_t min_n, int64_t max_n) : core(min_n, max_n) {}
  explicit IndexObject(NgramIndex index) : core(std::move(index)) {}

  NgramIndex core;
  BusyFlag busy{"NgramIndex"};
};

void bind_pages(pybind11::module_& module);    // PagePool, SequenceTable
void bind_indexes(pybind11::module_& module);  // RadixTree, NgramIndex
void bind_layers(pybind11::module_& module);   // LayerStack
void bind_info(pybind11::module_& module);     // build_info, cpu_isa

}  // namespace skv::bindings
