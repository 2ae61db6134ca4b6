// Runs the threads of a block, warp by warp and lane by lane, in an order that the seed draws.
#pragma once
#include <algorithm>

#include "products.h"

namespace emulated {

// What every fiber runs.
inline void enter() {
    block->launch->entry(block->launch->problem);
    Block &b = *block;
    Warp &warp = warp_of(b);
    const uint32_t lane = 1u << b.current->index % 32;
    warp.runnable &= ~lane;
    warp.finished |= lane;
    b.current->fiber.switch_to(b.scheduler);
    abort();
}

inline void prepare(Block &b, Launch &launch, uint32_t index) {
    b.launch = &launch;
    b.index = index;
    b.check = launch.options.check;
    b.eager = launch.options.eager;
    b.random = (launch.options.seed + 1) * 0x9E3779B97F4A7C15ull ^ (index + 1) * 0xD1B54A32D192ED03ull;
    b.loaded = b.stored = nullptr;
    b.epoch = 1;
    b.any = b.last_any = false;
    b.current = nullptr;
    b.active = nullptr;
    place.block = {index, 0, 0};
    place.block_size = {launch.threads, 1, 1};
    place.grid = {launch.grid, 1, 1};

    b.shared_bytes = launch.shared_bytes;
    b.shared_storage.assign(launch.shared_bytes + 16, 0xFF);  // NaN
    b.shared = b.shared_storage.data() + (-reinterpret_cast<uintptr_t>(b.shared_storage.data()) & 15);
    b.words.assign(b.check ? (launch.shared_bytes + 3) / 4 : 0, Word{});
    b.reads.clear();
    b.mbarriers.clear();
    b.arrivals.clear();
    for (Named &named : b.named) named = Named{};

    b.stacks.reserve(launch.threads);
    b.threads.resize(launch.threads);
    for (uint32_t t = 0; t < launch.threads; t++) {
        Thread &thread = b.threads[t];
        thread.index = t;
        thread.fences = thread.landed = thread.groups_done = 0;
        thread.copies.clear();
        thread.groups.clear();
        thread.fiber.prepare(b.stacks.stack(t), b.stacks.height(t), enter);
    }
    b.warps.clear();
    b.warps.resize(launch.threads / 32);
}

// Lets each lane that can go on run until it waits.
inline void run_lanes(Block &b, unsigned w, bool shuffled) {
    Warp &warp = b.warps[w];
    Thread *threads = &b.threads[w * 32];
    const uint64_t order = shuffled ? b.draw() : 2;
    const unsigned first = order >> 8 & 31, step = (order & 31) | 1;
    const unsigned stride = shuffled ? step : 1;
    for (unsigned i = 0; i < 32; i++) {
        const unsigned lane = (first + i * stride) & 31;
        if (!(warp.runnable >> lane & 1)) continue;
        b.current = &threads[lane];
        place.thread = {w * 32 + lane, 0, 0};
        b.counters.switches++;
        b.scheduler.switch_to(threads[lane].fiber);
        b.current = nullptr;
        // The fiber that failed is the one that still could go on.
        if (warp.runnable >> lane & 1) longjmp(b.fault, 1);
    }
}

// A warp runs on until it waits for the block, or by chance gives way to the others.
inline void run_warp(Block &b, unsigned w, bool shuffled) {
    Warp &warp = b.warps[w];
    wait_is_over(b, warp);
    while (warp.runnable) {
        run_lanes(b, w, shuffled);
        if (!warp.at_warp) return;
        b.active = &warp;
        if (warp.at_warp != ALL_LANES)
            fail("lanes %08x came to an instruction, but lanes %08x wait at __syncthreads and lanes %08x have ended", warp.at_warp, warp.at_block,
                 warp.finished);
        warp.at_warp = 0;
        warp.collective(warp.arguments);
        b.active = nullptr;
        if (warp.waits != Warp::ForNothing) {
            if (!wait_is_over(b, warp)) return;
        } else {
            warp.runnable = ALL_LANES;
        }
        if (shuffled && b.draw() % 4 == 0) return;
    }
}

inline void pass_barrier(Block &b) {
    b.epoch++;
    b.counters.barriers++;
    b.last_any = b.any;
    b.any = false;
    Clock all;
    for (size_t w = 0; w < b.warps.size(); w++) all.seen[w] = b.warps[w].epoch;
    for (Warp &warp : b.warps) {
        acquire(warp, all);
        warp.runnable = ALL_LANES;
        warp.at_block = 0;
        warp.epoch++;
    }
}

inline void check_end(Block &b) {
    for (int id = 0; id < 16; id++)
        if (b.named[id].came) fail("the block ended while named barrier %d waits for more threads", id);
    for (const Thread &thread : b.threads) {
        if (b.check && b.stacks.overflowed(thread.index)) {
            b.stacks.release();
            fail("the stack of thread %u overflowed", thread.index);
        }
        if (thread.landed != thread.copies.size()) fail("thread %u ended before its asynchronous copies were waited for", thread.index);
    }
    for (size_t w = 0; w < b.warps.size(); w++) {
        const Products &products = b.warps[w].products;
        if (products.done != products.issued.size()) fail("warp %zu ended before its wgmmas were waited for", w);
        if (products.count && (b.warps.size() % 4 || products.count != b.warps[w / 4 * 4].products.count))
            fail("wgmma: warp %zu had others than the first warp of its group", w);
    }
}

inline void run_block(Block &b, Launch &launch, uint32_t index) {
    prepare(b, launch, index);
    const bool shuffled = launch.options.seed != 0;
    const unsigned warps = b.warps.size();
    std::vector<unsigned> &order = b.order;
    order.resize(warps);
    for (unsigned w = 0; w < warps; w++) order[w] = w;
    for (;;) {
        for (unsigned i = warps; shuffled && i > 1; i--) std::swap(order[i - 1], order[b.draw() % i]);
        for (unsigned w : order) run_warp(b, w, shuffled);
        if (launch.failed) return;
        unsigned waiting = 0, finished = 0, running = 0;
        for (const Warp &warp : b.warps) {
            waiting += __builtin_popcount(warp.at_block);
            finished += __builtin_popcount(warp.finished);
            running += __builtin_popcount(warp.runnable);
        }
        if (running || std::any_of(b.warps.begin(), b.warps.end(), [&](Warp &warp) { return wait_is_over(b, warp); })) {
            // Copies may land at any time.
            if (shuffled && b.draw() % 4 == 0) fire_one();
            continue;
        }
        if (fire_one()) continue;
        for (const Warp &warp : b.warps)
            if (warp.waits != Warp::ForNothing) fail_waiting(b, warp);
        if (!waiting) break;
        if (finished) fail("%u threads ended while %u wait at __syncthreads", finished, waiting);
        pass_barrier(b);
    }
    check_end(b);
}

}  // namespace emulated
