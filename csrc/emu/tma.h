// TMA: copies of boxes between tensors in global memory and shared memory (cp.async.bulk.tensor).
//
// A load completes, by the policy, at once, at any synchronisation point, or when no thread can go on without it. A
// store reads shared memory at the latest in the wait for it.
#pragma once

#include "csrc/emu/cluster.h"
#include "csrc/emu/tensor_map.h"

namespace emu {

EMU_RT const TensorMap* check_tensor_map(const CUtensorMap* encoded, int rank, const char* operation, Site site) {
  EMU_CHECK(reinterpret_cast<uintptr_t>(encoded) % 64 == 0, site, "%s: the tensor map at %p is not 64-byte aligned",
            operation, static_cast<const void*>(encoded));
  const auto* map = reinterpret_cast<const TensorMap*>(encoded);
  EMU_CHECK(map->magic == kTensorMapMagic, site, "%s: no tensor map lies at %p", operation,
            static_cast<const void*>(encoded));
  EMU_CHECK(map->rank == rank, site, "%s: %d coordinates for a tensor of %d dimensions", operation, rank, map->rank);
  return map;
}

// A new copy in flight between the box at `at` and shared memory of `block`.
EMU_RT BulkCopy* add_bulk_copy(const TensorMap* map, const int* at, Block* block, uint32_t shared, Site site) {
  EMU_CHECK(machine.num_bulk_copies < kMaxBulkCopies, site, "more than %d copies by TMA in flight", kMaxBulkCopies);
  BulkCopy*& slot = machine.in_flight[machine.num_bulk_copies];
  if (slot == nullptr) slot = &machine.bulk_copies[machine.num_bulk_copies];
  BulkCopy* copy = slot;
  ++machine.num_bulk_copies;
  ++block->num_bulk_copies;
  copy_unseen(&copy->map, map, sizeof *map);
  for (int i = 0; i < 5; ++i) copy->at[i] = i < map->rank ? at[i] : 0;
  copy->block = block;
  copy->shared = shared;
  copy->bytes = num_box_rows(*map) * static_cast<uint32_t>(map->box[0]) * 2;
  copy->issuer = self();
  copy->site = site;
  copy->tsan_fiber = take_tma_fiber(site);
  return copy;
}

// Takes entry i from the list. What it holds stays until the next copy is issued.
EMU_RT BulkCopy* remove_bulk_copy(int i) {
  BulkCopy* copy = machine.in_flight[i];
  machine.in_flight[i] = machine.in_flight[--machine.num_bulk_copies];
  machine.in_flight[machine.num_bulk_copies] = copy;
  --copy->block->num_bulk_copies;
  return copy;
}

EMU_RT uint32_t box_bytes(const TensorMap* map) { return num_box_rows(*map) * static_cast<uint32_t>(map->box[0]) * 2; }

// Shared memory of a box, which must begin where the pattern of the swizzle does.
EMU_RT char* box_memory(Block* block, uint32_t address, const TensorMap* map, const char* operation, Site site) {
  const size_t alignment = map->swizzle == Swizzle::kNone ? 128 : 8 * swizzle_span(map->swizzle);
  char* data = shared_range(block, address, box_bytes(map), alignment, operation, site);
  for (uint32_t i = 0; i < box_bytes(map); i += kGranuleBytes) {
    if (copies_in_flight(block, data + i) != 0) fail_in_flight(block, operation, data + i, site);
  }
  return data;
}

EMU_RT void check_box_in_allocation([[maybe_unused]] const TensorMap* map, [[maybe_unused]] const int* at,
                                    [[maybe_unused]] const char* operation, [[maybe_unused]] Site site) {
#if EMU_ASAN
  for (uint32_t i = 0; i < num_box_rows(*map); ++i) {
    const BoxRow row = box_row(*map, at, i);
    const char* begin = row.data + row.begin * 2;
    const auto bytes = static_cast<size_t>(row.end - row.begin) * 2;
    if (bytes != 0 && __asan_region_is_poisoned(const_cast<char*>(begin), bytes) != nullptr) {
      fail(site, "%s: out of bounds: %zu bytes of global memory at %p; the tensor map does not fit the allocation",
           operation, bytes, static_cast<const void*>(begin));
    }
  }
#endif
}

EMU_RT void set_in_flight(Block* block, char* data, uint32_t bytes, uint8_t count) {
  for (uint32_t i = 0; i < bytes; i += kGranuleBytes) copies_in_flight(block, data + i) = count;
}

// ---- loads ----

EMU_RT void finish_load(int i) {
  const BulkCopy* copy = remove_bulk_copy(i);
  Block* block = copy->block;
  const TensorMap& map = copy->map;
  char* data = block->arena + copy->shared;
  void* caller = enter_fiber(copy->tsan_fiber);
  allow(data, copy->bytes);
  set_in_flight(block, data, copy->bytes, 0);
  hb_write(data, copy->bytes);
  const uint32_t row_bytes = static_cast<uint32_t>(map.box[0]) * 2;
  for (uint32_t r = 0; r < num_box_rows(map); ++r) {
    const BoxRow row = box_row(map, copy->at, r);
    alignas(16) char values[kMaxBoxSize * 2];
    for (uint32_t k = 0; k < row_bytes; k += 16) __builtin_memset(values + k, 0, 16);
    const auto bytes = static_cast<size_t>(row.end - row.begin) * 2;
    hb_read(row.data + row.begin * 2, bytes);
    copy_unseen(values + row.begin * 2, row.data + row.begin * 2, bytes);
    for (uint32_t k = 0; k < row_bytes; k += 16) {
      __builtin_memcpy(block->arena + swizzled(copy->shared + r * row_bytes + k, map.swizzle), values + k, 16);
    }
  }
  hb_release(&block->proxy_token);
  Mbarrier& barrier = find_mbarrier(block, copy->mbarrier, "TMA load", copy->site);
  update_mbarrier(block, barrier, 0, -static_cast<int>(copy->bytes), "TMA load", copy->site);
  leave_fiber(caller);
}

EMU_RT void load_to_block(Block* block, uint32_t dst, const TensorMap* map, uint32_t barrier, const int* at,
                          Site site) {
  const char* operation = "TMA load";
  char* data = box_memory(block, dst, map, operation, site);
  const Mbarrier& state = find_mbarrier(block, barrier, operation, site);
  EMU_CHECK(state.is_visible, site, "%s: the init of its mbarrier at %s:%d was not followed by fence.mbarrier_init",
            operation, base_name(state.site.file), state.site.line);
  // What ordinary stores wrote here must not arrive after the copy: seen as a read, since behind readers of the old
  // content no proxy fence is needed. They must have finished by now, not only when the copy is done.
  BulkCopy* copy = add_bulk_copy(map, at, block, dst, site);
  void* caller = enter_proxy(block, operation, site);
  hb_read(data, box_bytes(map));
  tell_fiber(copy->tsan_fiber);
  leave_fiber(caller);
  caller = enter_fiber(copy->tsan_fiber);
  hb_write(data, box_bytes(map));
  leave_fiber(caller);
  check_access(site);
  copy->is_store = false;
  copy->mbarrier = barrier;
  if (machine.config.async == AsyncPolicy::kEarly) return finish_load(machine.num_bulk_copies - 1);
  fill_with_nan(data, copy->bytes);
  set_in_flight(block, data, copy->bytes, 1);
  forbid(data, copy->bytes);
}

// cp.async.bulk.tensor.<rank>d.shared::cluster.global; cta_mask 0: to this block. Otherwise multicast: to the same
// place of each block in the mask, whose mbarrier at the same place counts the bytes.
EMU_RT void tma_load(uint32_t dst, const CUtensorMap* encoded, uint32_t barrier, int rank, const int* at,
                     uint32_t cta_mask, Site site) {
  const TensorMap* map = check_tensor_map(encoded, rank, "TMA load", site);
  check_box_in_allocation(map, at, "TMA load", site);
  if (cta_mask == 0) return load_to_block(self()->block, dst, map, barrier, at, site);
  for (int rank_in_cluster = 0; cta_mask >> rank_in_cluster != 0; ++rank_in_cluster) {
    if ((cta_mask >> rank_in_cluster & 1) == 0) continue;
    load_to_block(block_of_cluster(rank_in_cluster, "TMA load", site), dst, map, barrier, at, site);
  }
}

// ---- stores ----

// Reads shared memory, and writes the tensor: an overwritten source shows, a too early look at the result only as a
// race.
EMU_RT void finish_store(int i) {
  const BulkCopy* copy = remove_bulk_copy(i);
  Block* block = copy->block;
  const TensorMap& map = copy->map;
  const uint32_t row_bytes = static_cast<uint32_t>(map.box[0]) * 2;
  void* caller = enter_fiber(copy->tsan_fiber);  // knows of the proxy's read, when the copy was issued
  hb_release(&block->read_token);
  for (uint32_t r = 0; r < num_box_rows(map); ++r) {
    const BoxRow row = box_row(map, copy->at, r);
    alignas(16) char values[kMaxBoxSize * 2];
    for (uint32_t k = 0; k < row_bytes; k += 16) {
      __builtin_memcpy(values + k, block->arena + swizzled(copy->shared + r * row_bytes + k, map.swizzle), 16);
    }
    const auto bytes = static_cast<size_t>(row.end - row.begin) * 2;
    char* to = const_cast<char*>(row.data) + row.begin * 2;
    hb_write(to, bytes);
    copy_unseen(to, values + row.begin * 2, bytes);
  }
  hb_release(&block->written_token);
  hb_release(&machine.done_token);
  leave_fiber(caller);
}

// cp.async.bulk.tensor.<rank>d.global.shared::cta
EMU_RT void tma_store(const CUtensorMap* encoded, uint32_t src, int rank, const int* at, Site site) {
  const char* operation = "TMA store";
  const TensorMap* map = check_tensor_map(encoded, rank, operation, site);
  Block* block = self()->block;
  const char* data = box_memory(block, src, map, operation, site);
  check_box_in_allocation(map, at, operation, site);
  hb_read(data, box_bytes(map));
  BulkCopy* copy = add_bulk_copy(map, at, block, src, site);
  void* caller = enter_proxy(block, operation, site);
  hb_read(data, box_bytes(map));
  tell_fiber(copy->tsan_fiber);
  leave_fiber(caller);
  check_access(site);
  copy->is_store = true;
  copy->group = self()->num_store_groups;
  if (machine.config.async == AsyncPolicy::kEarly) finish_store(machine.num_bulk_copies - 1);
}

EMU_RT void tma_store_commit() { ++self()->num_store_groups; }

// cp.async.bulk.wait_group: until all but the `pending` last groups of this thread are done; .read: have read shared
// memory.
EMU_RT void tma_store_wait(int pending, bool read, Site) {
  CudaThread* thread = self();
  for (int i = machine.num_bulk_copies; i-- > 0;) {
    const BulkCopy* copy = machine.in_flight[i];
    if (copy->is_store && copy->issuer == thread && copy->group < thread->num_store_groups - pending) finish_store(i);
  }
  hb_acquire(&thread->block->read_token);
  if (!read) hb_acquire(&thread->block->written_token);
}

// ---- when they complete ----

EMU_RT void finish_bulk_copy(int i) {
  if (machine.in_flight[i]->is_store) {
    finish_store(i);
  } else {
    finish_load(i);
  }
}

// Any load, if one is in flight: a thread may wait for it.
EMU_RT bool finish_bulk_load() {
  const auto count = static_cast<unsigned>(machine.num_bulk_copies);
  const auto start = static_cast<unsigned>(random_number() % count);
  for (unsigned k = 0; k < count; ++k) {
    const int i = static_cast<int>((start + k) % count);
    if (machine.in_flight[i]->is_store) continue;
    finish_load(i);
    return true;
  }
  return false;
}

EMU_RT void finish_any_bulk_copy() {
  if (machine.num_bulk_copies == 0 || random_number() % 4 != 0) return;
  finish_bulk_copy(static_cast<int>(random_number() % static_cast<unsigned>(machine.num_bulk_copies)));
}

// The last thread of a block leaves: its shared memory goes to another one.
EMU_RT void check_no_bulk_copies(const Block* block) {
  if (block->num_bulk_copies == 0) return;
  for (int i = 0; i < machine.num_bulk_copies; ++i) {
    const BulkCopy* copy = machine.in_flight[i];
    if (copy->block != block) continue;
    fail(copy->site, "the block ends while a TMA %s of its shared memory is in flight, which nobody has waited for",
         copy->is_store ? "store" : "load");
  }
}

}  // namespace emu
