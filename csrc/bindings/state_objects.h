// The state objects as Python holds them: a core object, its busy flag, and what it depends on.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "csrc/bindings/busy.h"
#include "csrc/core/ngram_index.h"
#include "csrc/core/page_pool.h"
#include "csrc/core/radix_tree.h"
#include "csrc/core/sequence_table.h"

namespace skv::bindings {

struct PoolObject {
  PoolObject(int64_t num_pages, int64_t page_size) : core(num_pages, page_size) {}

  PagePool core;
  BusyFlag busy{"PagePool"};
};

struct TableObject {
  explicit TableObject(std::shared_ptr<PoolObject> owner)
      : pool(std::move(owner)), core(pool->core) {}
  ~TableObject() { pool->busy.wait_until_idle(); }

  std::shared_ptr<PoolObject> pool;
  SequenceTable core;
  BusyFlag busy{"SequenceTable"};
};

struct TreeObject {
  explicit TreeObject(std::shared_ptr<PoolObject> owner)
      : pool(std::move(owner)), core(pool->core) {}
  ~TreeObject() { pool->busy.wait_until_idle(); }

  std::shared_ptr<PoolObject> pool;
  RadixTree core;
  BusyFlag busy{"RadixTree"};
};

struct IndexObject {
  IndexObject(int64_t min_n, int64_t max_n) : core(min_n, max_n) {}
  explicit IndexObject(NgramIndex index) : core(std::move(index)) {}

  NgramIndex core;
  BusyFlag busy{"NgramIndex"};
};

void bind_pages(pybind11::module_& module);    // PagePool, SequenceTable
void bind_indexes(pybind11::module_& module);  // RadixTree, NgramIndex
void bind_info(pybind11::module_& module);     // build_info, cpu_isa

}  // namespace skv::bindings
