// Shared memory: bounds, alignment, races, reads of what nobody wrote, and what copies and wgmmas under way own.
#pragma once
#include "block.h"

namespace emulated {

// Who touched a word: a thread (its index), several lanes of a warp (LANES | warp), several warps, or nobody.
constexpr uint16_t LANES = 0x4000, SEVERAL_WARPS = 0x8000, NOBODY = 0xFFFF;

struct Who {
    uint16_t name, warp;
};
inline Who thread_of(const Block &b) { return {b.current->index, uint16_t(b.current->index / 32)}; }
inline Who lanes_of(unsigned warp) { return {uint16_t(LANES | warp), uint16_t(warp)}; }

inline bool in_warp(uint16_t name, unsigned warp) {
    return name < LANES ? name / 32u == warp : name < SEVERAL_WARPS && (name & ~LANES) == int(warp);
}
// Whether nothing orders an access of `me` after one of `name` in this epoch of its warp.
inline bool races(const Block &b, uint16_t name, uint32_t epoch, Who me, bool same_warp_epoch) {
    if (name == NOBODY) return false;
    if (!in_warp(name, me.warp)) return name >= SEVERAL_WARPS || b.warps[me.warp].clock.seen[name < LANES ? name / 32 : name & ~LANES] < epoch;
    return same_warp_epoch && !(name == me.name && name < LANES);
}
inline uint16_t join(uint16_t name, Who me, bool same_warp_epoch) {
    if (name == NOBODY || name == me.name) return me.name;
    if (!in_warp(name, me.warp)) return SEVERAL_WARPS;
    return same_warp_epoch ? uint16_t(LANES | me.warp) : me.name;
}
inline void new_epoch(Word &w, uint32_t epoch) {
    w.block_epoch = epoch;
    w.writer = w.reader = NOBODY;
    w.writing = w.reading = 0;
}

[[noreturn]] __attribute__((noinline, cold)) inline void fail_race(const char *what, uint32_t word, uint16_t other) {
    if (other < LANES) fail("shared memory at byte %u: a race with %s of thread %u", word * 4, what, other);
    if (other < SEVERAL_WARPS) fail("shared memory at byte %u: a race with %s of lanes of warp %u", word * 4, what, other & ~LANES);
    fail("shared memory at byte %u: a race with %s of several warps", word * 4, what);
}

inline void read_word(Block &b, uint32_t index, uint8_t mask, Who me, uint32_t warp_epoch) {
    Word &w = b.words[index];
    if (w.block_epoch != b.epoch) new_epoch(w, b.epoch);
    if (w.copies) fail("shared memory at byte %u: read before its copy was waited for", index * 4);
    if ((w.writing & mask) && races(b, w.writer, w.write_epoch, me, w.write_epoch == warp_epoch)) fail_race("a write", index, w.writer);
    if ((w.written & mask) != mask) fail("shared memory at byte %u: read before it was written", index * 4);
    w.reader = join(w.reader, me, w.read_epoch == warp_epoch);
    w.reading |= mask;
    w.read_epoch = warp_epoch;
    if (!b.reads.empty()) b.reads[index * b.warps.size() + me.warp] = warp_epoch;
}

// Whether nothing orders a write of `me` after the reads.
inline bool races_with_reads(const Block &b, const Word &w, uint32_t index, Who me, uint32_t warp_epoch) {
    if (w.reader < SEVERAL_WARPS || w.reader == NOBODY || b.reads.empty()) return races(b, w.reader, w.read_epoch, me, w.read_epoch == warp_epoch);
    for (unsigned other = 0; other < b.warps.size(); other++) {
        const uint32_t read = b.reads[index * b.warps.size() + other];
        if (other == me.warp ? read == warp_epoch : read > b.warps[me.warp].clock.seen[other]) return true;
    }
    return false;
}

inline void write_word(Block &b, uint32_t index, uint8_t mask, Who me, uint32_t warp_epoch) {
    Word &w = b.words[index];
    if (w.block_epoch != b.epoch) new_epoch(w, b.epoch);
    if (w.copies) fail("shared memory at byte %u: written while a copy to it is under way", index * 4);
    if (w.products) fail("shared memory at byte %u: written while a wgmma reads it", index * 4);
    if ((w.writing & mask) && races(b, w.writer, w.write_epoch, me, w.write_epoch == warp_epoch)) fail_race("a write", index, w.writer);
    if ((w.reading & mask) && races_with_reads(b, w, index, me, warp_epoch)) fail_race("a read", index, w.reader);
    w.writer = (w.writing & ~mask) ? join(w.writer, me, true) : me.name;
    w.writing |= mask;
    w.write_epoch = warp_epoch;
    w.written |= mask;
    w.last_writer = b.current->index;
    w.fences = b.current->fences;
}

inline void check_place(const Block &b, uint32_t address, uint32_t bytes) {
    if (address % bytes) fail("shared memory: an access of %u bytes at byte %u is unaligned", bytes, address);
    if (address >= b.shared_bytes || bytes > b.shared_bytes - address)
        fail("shared memory: an access of %u bytes at byte %u is out of bounds (%u)", bytes, address, b.shared_bytes);
}

// `bytes` is a power of two up to 16.
inline void touch(Block &b, uint32_t address, uint32_t bytes, bool write, Who me) {
    check_place(b, address, bytes);
    if (!b.check) return;
    const uint32_t warp_epoch = b.warps[me.warp].epoch, first = address / 4;
    const uint32_t words = bytes < 4 ? 1 : bytes / 4;
    const uint8_t mask = bytes < 4 ? ((1 << bytes) - 1) << (address % 4) : 15;
    for (uint32_t i = 0; i < words; i++) {
        if (write)
            write_word(b, first + i, mask, me, warp_epoch);
        else
            read_word(b, first + i, mask, me, warp_epoch);
    }
}

void *shared_memory(uint32_t address, uint32_t bytes, bool write) {
    Block &b = *block;
    touch(b, address, bytes, write, thread_of(b));
    return b.shared + address;
}

// ---- Asynchronous copies

void copy_async(uint32_t to, const void *from, bool there) {
    Block &b = *block;
    b.counters.copies++;
    touch(b, to, 16, true, thread_of(b));
    Copy copy{to, {}};
    if (there) {
        check_global(from, 16, false);
        memcpy(copy.bytes, from, 16);
    }
    if (b.check)
        for (int i = 0; i < 4; i++) b.words[to / 4 + i].copies = 1;
    // Until it is waited for, NaN.
    if (b.eager)
        memcpy(b.shared + to, copy.bytes, 16);
    else
        memset(b.shared + to, 0xFF, 16);
    b.current->copies.push_back(copy);
}

void commit_copies() {
    Thread &t = *block->current;
    t.groups.push_back(t.copies.size());
}

inline void land(const Copy &copy) {
    Block &b = *block;
    if (b.check)
        for (int i = 0; i < 4; i++) b.words[copy.to / 4 + i].copies = 0;
    memcpy(b.shared + copy.to, copy.bytes, 16);
}
void fire_all_of(unsigned warp);

void wait_for_copies(int left) {
    Block &b = *block;
    Thread &t = *b.current;
    fire_all_of(t.index / 32);
    while (t.groups.size() - t.groups_done > size_t(left)) {
        const uint32_t end = t.groups[t.groups_done++];
        for (; t.landed < end; t.landed++) {
            const Copy &copy = t.copies[t.landed];
            land(copy);
            touch(b, copy.to, 16, true, thread_of(b));
        }
    }
    if (t.groups_done == t.groups.size() && t.landed == t.copies.size()) {
        t.groups.clear();
        t.copies.clear();
        t.groups_done = t.landed = 0;
    }
}

void fence_async() {
    Warp &warp = warp_of(*block);
    block->current->fences++;
    warp.fencing |= 1u << block->current->index % 32;
    if (warp.fencing == ALL_LANES) warp.fenced = warp.clock;
}

}  // namespace emulated
