// What the emulator knows of a launch, and of the block, the warps and the threads that a worker runs.
#pragma once
#include <atomic>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"
#include "fibers.h"

// The C interface. emulator/library.rs has the same structs.
struct EmulatorCounters {
    uint64_t products, ldmatrix, bank_conflicts, copies, shuffles, barriers, switches, reserved;
};
struct EmulatorOptions {
    uint64_t seed;  // 0: the natural order
    int32_t eager, check;
    uint32_t threads;
    uint32_t reserved;
    EmulatorCounters *counters;  // or null
};
struct EmulatorRegion {
    uint64_t start, bytes;
};

namespace emulated {

// One instruction of a warp, for all its lanes.
using Collective = void (*)(void *const lanes[32]);
constexpr uint32_t ALL_LANES = 0xFFFFFFFF;
constexpr int MAX_WARPS = 32;

// Of each warp the last epoch whose accesses are ordered before.
struct Clock {
    uint32_t seen[MAX_WARPS] = {};
};

struct Copy {
    uint32_t to;
    uint8_t bytes[16];
};

struct Thread {
    Fiber fiber;
    uint16_t index = 0;
    uint32_t fences = 0;  // fence_async so far
    // Copies that haven't landed, from the oldest on, and how many of them each committed group ends after.
    std::vector<Copy> copies;
    std::vector<uint32_t> groups;
    uint32_t landed = 0, groups_done = 0;
};

// A wgmma that is under way.
struct Product {
    int kind, n;
    bool accumulate, transposed, a_in_registers;
    uint64_t a_descriptor, b_descriptor;
    uint32_t flight;
    uint32_t a[32][4];
};
// Registers that wgmmas under way own: what they will hold, and how many products are still to come.
struct Flight {
    float *registers[32];
    int n = 0;
    uint32_t pending = 0;
    std::vector<float> values;  // of lane after lane
};
struct Products {
    std::vector<Product> issued;
    std::vector<uint32_t> groups;
    uint32_t done = 0, groups_done = 0;
    std::vector<Flight> flights;
    uint64_t count = 0;
    bool begun = false;
};

struct Warp {
    uint32_t runnable = ALL_LANES, at_warp = 0, at_block = 0, finished = 0;
    Collective collective = nullptr;
    void *arguments[32];
    uint32_t epoch = 1;  // __syncwarp, __syncthreads and arrivals at other barriers so far
    Products products;
    Clock clock;           // what is ordered before what it does now
    Clock fenced;          // what was when all its lanes had last done fence_async
    uint32_t fencing = 0;  // lanes that did since the warp last waited
    // What it waits for, but for the other lanes and the block: the next phase after `phase`.
    enum { ForNothing, ForPhase, AtNamed } waits = ForNothing;
    uint32_t barrier = 0, phase = 0;
};

// Barriers. `phases` have ended; of the present one, `arriving` is what those knew who came.
struct Mbarrier {
    uint32_t count = 0, arrived = 0, phases = 0, maker = 0, made_in = 0;
    Clock arriving, ended;
};
struct Named {
    uint32_t came = 0, phases = 0;
    int threads = 0;
    Clock arriving, ended;
};
// One that is still to come at an mbarrier, when the copies of a warp's lanes have landed.
struct Arrival {
    uint32_t address, warp, ends[32];
    Clock clock;
};

// What is known of 4 bytes of shared memory. `writer` and `reader` are those since the last barrier of the block.
struct Word {
    uint32_t block_epoch, write_epoch, read_epoch, fences;
    uint16_t writer, reader, last_writer;
    uint16_t products;  // wgmmas under way that read it
    uint8_t writing, reading, written;  // masks of bytes; `written` at any time
    uint8_t copies;     // under way to it
};

// Memory that the kernels may touch, and which block stored each part of it (number + 1).
struct Region {
    uint64_t start, bytes;
    std::atomic<std::atomic<uint32_t> *> words{nullptr}, parts{nullptr};  // of stores of 4 bytes and more, and of smaller ones
};

struct Launch {
    const char *kernel;
    Entry entry;
    const void *problem;
    uint32_t grid, threads;
    uint64_t shared_bytes;
    EmulatorOptions options;
    std::vector<Region> regions;
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::string message;
    EmulatorCounters counters{};
    std::atomic<uint32_t> next{0};
};

struct Block {
    Launch *launch = nullptr;
    uint32_t index = 0;
    Stacks stacks;
    Fiber scheduler;
    jmp_buf fault;  // where the scheduler goes on when a launch has failed
    std::vector<unsigned> order;  // of the warps
    Thread *current = nullptr;  // null while the scheduler runs
    Warp *active = nullptr;     // whose instruction the scheduler does
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<uint8_t> shared_storage;
    uint8_t *shared = nullptr;
    std::vector<Word> words;
    std::vector<uint32_t> reads;  // of each word, the epoch in which each warp last read it; empty without mbarriers
    std::map<uint32_t, Mbarrier> mbarriers;
    Named named[16];
    std::vector<Arrival> arrivals;
    uint32_t shared_bytes = 0, epoch = 1;
    bool check = true, eager = false, any = false, last_any = false;
    Region *loaded = nullptr, *stored = nullptr;  // the regions of the last accesses
    uint64_t random = 1;
    EmulatorCounters counters{};

    uint64_t draw() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        return random;
    }
};
extern __thread Block *block;

inline Warp &warp_of(const Block &b) { return const_cast<Warp &>(b.warps[b.current->index / 32]); }

// Ends the launch. No exception, since one can't leave a fiber: nothing that needs a destructor may live in the calls between.
[[noreturn]] __attribute__((noinline, cold, format(printf, 1, 2))) inline void fail(const char *format, ...) {
    Block &b = *block;
    char what[400], message[600];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof(what), format, arguments);
    va_end(arguments);
    if (b.current)
        snprintf(message, sizeof(message), "%s, block %u, thread %u: %s", b.launch->kernel, b.index, b.current->index, what);
    else if (b.active)
        snprintf(message, sizeof(message), "%s, block %u, warp %zu: %s", b.launch->kernel, b.index, size_t(b.active - b.warps.data()), what);
    else
        snprintf(message, sizeof(message), "%s, block %u: %s", b.launch->kernel, b.index, what);
    {
        std::lock_guard<std::mutex> lock(b.launch->mutex);
        if (!b.launch->failed) b.launch->message = message;
        b.launch->failed = true;
    }
    // The scheduler never comes back to the fiber that failed.
    if (b.current) b.current->fiber.switch_to(b.scheduler);
    longjmp(b.fault, 1);
}

}  // namespace emulated
