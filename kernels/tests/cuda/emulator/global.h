// Global memory: bounds, alignment, and races between blocks.
#pragma once
#include <algorithm>

#include "block.h"

namespace emulated {

inline bool holds(const Region *r, uint64_t address, uint32_t bytes) {
    return r && address >= r->start && address - r->start < r->bytes && bytes <= r->bytes - (address - r->start);
}

__attribute__((noinline)) inline Region *find_region(Block &b, uint64_t address, uint32_t bytes, bool write) {
    auto &regions = b.launch->regions;
    auto after = std::upper_bound(regions.begin(), regions.end(), address, [](uint64_t a, const Region &r) { return a < r.start; });
    Region *found = after == regions.begin() ? nullptr : &*(after - 1);
    if (holds(found, address, bytes)) return found;
    const char *what = write ? "a store" : "a load";
    if (found && address - found->start < found->bytes + 65536)
        fail("global memory: %s of %u bytes at byte %llu of an allocation of %llu bytes is out of bounds", what, bytes,
             (unsigned long long)(address - found->start), (unsigned long long)found->bytes);
    fail("global memory: %s of %u bytes at address %llx is out of bounds", what, bytes, (unsigned long long)address);
}

// The table of who stored what, made when it is first needed.
inline std::atomic<uint32_t> *table(std::atomic<std::atomic<uint32_t> *> &table, uint64_t entries) {
    std::atomic<uint32_t> *made = table.load(std::memory_order_acquire);
    if (made) return made;
    auto *mine = static_cast<std::atomic<uint32_t> *>(calloc(entries, sizeof(uint32_t)));
    if (!mine) fail("global memory: no memory to track the stores");
    if (table.compare_exchange_strong(made, mine)) return mine;
    free(mine);
    return made;
}
inline void free_tables(Region &r) {
    free(r.words.load());
    free(r.parts.load());
}

inline void check_entries(Block &b, std::atomic<uint32_t> *entries, uint64_t first, uint64_t count, uint64_t unit, bool write) {
    const uint32_t me = b.index + 1;
    for (uint64_t i = first; i < first + count; i++) {
        const uint32_t other = entries[i].load(std::memory_order_relaxed);
        if (other && other != me)
            fail("global memory: byte %llu of an allocation is %s here and stored by block %u: a race of blocks", (unsigned long long)(i * unit),
                 write ? "stored" : "loaded", other - 1);
        if (write) entries[i].store(me, std::memory_order_relaxed);
    }
}

void check_global(const void *pointer, uint32_t bytes, bool write) {
    Block &b = *block;
    const uint64_t address = reinterpret_cast<uint64_t>(pointer);
    if (address % bytes) fail("global memory: %s of %u bytes at address %llx is unaligned", write ? "a store" : "a load", bytes, (unsigned long long)address);
    Region *&last = write ? b.stored : b.loaded;
    if (!holds(last, address, bytes)) last = find_region(b, address, bytes, write);
    if (!b.check) return;
    Region &r = *last;
    const uint64_t at = address - r.start;
    if (write) {
        if (bytes >= 4)
            check_entries(b, table(r.words, r.bytes / 4 + 1), at / 4, bytes / 4, 4, true);
        else
            check_entries(b, table(r.parts, r.bytes), at, bytes, 1, true);
        return;
    }
    if (auto *words = r.words.load(std::memory_order_acquire)) check_entries(b, words, at / 4, (at + bytes + 3) / 4 - at / 4, 4, false);
    if (auto *parts = r.parts.load(std::memory_order_acquire)) check_entries(b, parts, at, bytes, 1, false);
}

}  // namespace emulated
