// Barriers of some of a block's warps: mbarriers in shared memory, which copies arrive at too, and the named ones. A warp arrives and waits
// as one. What a warp did before it arrived is ordered before what those do that waited.
#pragma once
#include "instructions.h"

namespace emulated {

inline void join(Clock &clock, const Clock &other) {
    for (int w = 0; w < MAX_WARPS; w++) clock.seen[w] = std::max(clock.seen[w], other.seen[w]);
}
// What the warp did and knows. What it does from now on comes after.
inline Clock release(Warp &warp) {
    Clock clock = warp.clock;
    clock.seen[&warp - block->warps.data()] = warp.epoch++;
    return clock;
}
inline void acquire(Warp &warp, const Clock &clock) {
    join(warp.clock, clock);
    warp.fencing = 0;
}

// ---- mbarriers
void init_barrier(uint32_t address, int count) {
    Block &b = *block;
    check_place(b, address, 8);
    if (count < 1) fail("the mbarrier at byte %u is made for %d arrivals", address, count);
    if (b.check && b.reads.empty()) b.reads.assign(b.words.size() * b.warps.size(), 0);
    const bool made = b.mbarriers.count(address);
    if (made) fail("the mbarrier at byte %u is made twice", address);
    Mbarrier &barrier = b.mbarriers[address];
    barrier.count = count, barrier.maker = b.current->index / 32, barrier.made_in = b.epoch;
}
inline Mbarrier &mbarrier(uint32_t address, unsigned warp) {
    Block &b = *block;
    const auto found = b.mbarriers.find(address);
    if (found == b.mbarriers.end()) fail("there is no mbarrier at byte %u", address);
    Mbarrier &barrier = found->second;
    if (barrier.made_in == b.epoch && barrier.maker != warp) fail("the mbarrier at byte %u was made without a __syncthreads after", address);
    return barrier;
}
inline void add_arrivals(Mbarrier &barrier, uint32_t address, uint32_t arrivals, const Clock &clock) {
    barrier.arrived += arrivals;
    if (barrier.arrived > barrier.count) fail("the mbarrier at byte %u got more arrivals than the %u of a phase", address, barrier.count);
    join(barrier.arriving, clock);
    if (barrier.arrived < barrier.count) return;
    barrier.arrived = 0;
    barrier.phases++;
    join(barrier.ended, barrier.arriving);
}
inline uint32_t same_address(void *const lanes[32]) {
    for (int l = 1; l < 32; l++)
        if (*static_cast<uint32_t *>(lanes[l]) != *static_cast<uint32_t *>(lanes[0])) fail("lanes of a warp came to different barriers");
    return *static_cast<uint32_t *>(lanes[0]);
}

void arrive(uint32_t address) {
    collective(
        [](void *const lanes[32]) {
            Warp &warp = *block->active;
            const uint32_t address = same_address(lanes);
            Mbarrier &barrier = mbarrier(address, &warp - block->warps.data());
            add_arrivals(barrier, address, 1, release(warp));
        },
        &address);
}

// Lands the copies of an arrival, and arrives.
inline void fire(size_t which) {
    Block &b = *block;
    const Arrival arrival = b.arrivals[which];
    b.arrivals.erase(b.arrivals.begin() + which);
    const bool more = std::any_of(b.arrivals.begin(), b.arrivals.end(), [&](const Arrival &other) { return other.warp == arrival.warp; });
    for (int l = 0; l < 32; l++) {
        Thread &t = b.threads[arrival.warp * 32 + l];
        for (; t.landed < arrival.ends[l]; t.landed++) land(t.copies[t.landed]);
        if (more || t.landed != t.copies.size() || t.groups_done != t.groups.size()) continue;
        t.copies.clear();
        t.groups.clear();
        t.landed = t.groups_done = 0;
    }
    add_arrivals(mbarrier(arrival.address, arrival.warp), arrival.address, 32, arrival.clock);
}
// A warp's arrivals happen in order. Those of other warps may come before.
inline bool fire_one() {
    Block &b = *block;
    if (b.arrivals.empty()) return false;
    const unsigned warp = b.arrivals[b.draw() % b.arrivals.size()].warp;
    size_t i = 0;
    while (b.arrivals[i].warp != warp) i++;
    fire(i);
    return true;
}
void fire_all_of(unsigned warp) {
    Block &b = *block;
    for (size_t i = 0; i < b.arrivals.size();)
        if (b.arrivals[i].warp == warp) fire(i);
        else i++;
}

void arrive_with_copies(uint32_t address) {
    collective(
        [](void *const lanes[32]) {
            Block &b = *block;
            const unsigned warp = b.active - b.warps.data();
            Arrival arrival;
            arrival.address = same_address(lanes), arrival.warp = warp;
            mbarrier(arrival.address, warp);
            for (int l = 0; l < 32; l++) arrival.ends[l] = b.threads[warp * 32 + l].copies.size();
            arrival.clock = release(*b.active);
            b.arrivals.push_back(arrival);
            if (b.eager) fire_all_of(warp);
        },
        &address);
}

void wait_for_phase(uint32_t address, int parity) {
    struct Argument {
        uint32_t address;
        int parity;
    } mine{address, parity};
    collective(
        [](void *const lanes[32]) {
            Warp &warp = *block->active;
            const Argument &wanted = *static_cast<Argument *>(lanes[0]);
            same_address(lanes);
            for (int l = 1; l < 32; l++)
                if (static_cast<Argument *>(lanes[l])->parity != wanted.parity) fail("lanes of a warp wait for different phases");
            if (wanted.parity != 0 && wanted.parity != 1) fail("the parity of a phase is 0 or 1, not %d", wanted.parity);
            mbarrier(wanted.address, &warp - block->warps.data());
            warp.waits = Warp::ForPhase, warp.barrier = wanted.address, warp.phase = wanted.parity;
        },
        &mine);
}

// ---- Named barriers
struct NamedArgument {
    uint32_t id;
    int threads;
};
inline Named &come_to_named(void *const lanes[32]) {
    Block &b = *block;
    const auto &wanted = *static_cast<NamedArgument *>(lanes[0]);
    same_address(lanes);
    if (wanted.id < 1 || wanted.id > 15) fail("there is no named barrier %u", wanted.id);
    if (wanted.threads < 32 || wanted.threads % 32 || wanted.threads > int(b.warps.size() * 32)) fail("no barrier can have %d threads", wanted.threads);
    Named &named = b.named[wanted.id];
    const unsigned warp = b.active - b.warps.data();
    if (named.came && named.threads != wanted.threads) fail("named barrier %u has %d threads, not %d", wanted.id, named.threads, wanted.threads);
    if (named.came >> warp & 1) fail("the warp came to named barrier %u twice", wanted.id);
    named.threads = wanted.threads;
    named.came |= 1u << warp;
    join(named.arriving, release(*b.active));
    return named;
}
inline void end_named(Named &named) {
    if (__builtin_popcount(named.came) * 32 < named.threads) return;
    named.came = 0;
    named.phases++;
    join(named.ended, named.arriving);
}

void meet_at_named(int id, int threads) {
    NamedArgument mine{uint32_t(id), threads};
    collective(
        [](void *const lanes[32]) {
            Warp &warp = *block->active;
            Named &named = come_to_named(lanes);
            warp.waits = Warp::AtNamed, warp.barrier = static_cast<NamedArgument *>(lanes[0])->id, warp.phase = named.phases;
            end_named(named);
        },
        &mine);
}
void pass_named(int id, int threads) {
    NamedArgument mine{uint32_t(id), threads};
    collective([](void *const lanes[32]) { end_named(come_to_named(lanes)); }, &mine);
}

// ---- Waiting
// Lets a warp go on whose wait is over.
inline bool wait_is_over(Block &b, Warp &warp) {
    const Clock *ended = nullptr;
    if (warp.waits == Warp::ForPhase) {
        const Mbarrier &barrier = b.mbarriers[warp.barrier];
        if (barrier.phases % 2 != warp.phase) ended = &barrier.ended;
    } else if (warp.waits == Warp::AtNamed) {
        const Named &named = b.named[warp.barrier];
        if (named.phases != warp.phase) ended = &named.ended;
    }
    if (!ended) return false;
    acquire(warp, *ended);
    warp.waits = Warp::ForNothing;
    warp.runnable = ALL_LANES;
    return true;
}
// Nobody can go on any more.
[[noreturn]] inline void fail_waiting(const Block &b, const Warp &warp) {
    const int number = &warp - b.warps.data();
    if (warp.waits == Warp::ForPhase) fail("warp %d waits for ever for a phase of parity %u of the mbarrier at byte %u", number, warp.phase, warp.barrier);
    fail("warp %d waits for ever at named barrier %u", number, warp.barrier);
}

}  // namespace emulated
