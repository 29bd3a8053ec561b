// Integer ids of the state objects. Plain aliases: they cross the Python border as arrays.
#pragma once

#include <cstdint>

namespace skv {

using PageId = int32_t;      // index of a page in the pool, 0 <= id < num_pages
using SlotId = int64_t;      // page * page_size + offset: one token position in the pool
using SequenceId = int64_t;  // never reused within the life of a SequenceTable
using TokenId = int32_t;     // 0 <= id < vocabulary

}  // namespace skv
