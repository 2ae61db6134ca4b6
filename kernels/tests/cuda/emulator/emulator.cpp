// The emulator: compiled once, and linked into each library of kernels.
#include "scheduler.h"

#include <cstddef>
#include <map>
#include <memory>
#include <thread>

#include "global.h"

namespace emulated {

__thread Place place;
__thread Block *block;

struct Kernel {
    uint32_t threads;
    uint64_t problem_bytes;
    Entry entry;
};
static std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> table;
    return table;
}
Register::Register(const char *name, uint32_t threads, uint64_t problem_bytes, Entry entry) { kernels()[name] = {threads, problem_bytes, entry}; }

// Blocks that no launch uses now, with their stacks.
static std::mutex idle_mutex;
static std::vector<std::unique_ptr<Block>> idle;

static std::unique_ptr<Block> take_block() {
    std::lock_guard<std::mutex> lock(idle_mutex);
    if (idle.empty()) return std::make_unique<Block>();
    auto taken = std::move(idle.back());
    idle.pop_back();
    return taken;
}

static void add_counters(EmulatorCounters &sum, const EmulatorCounters &more) {
    sum.products += more.products;
    sum.ldmatrix += more.ldmatrix;
    sum.bank_conflicts += more.bank_conflicts;
    sum.copies += more.copies;
    sum.shuffles += more.shuffles;
    sum.barriers += more.barriers;
    sum.switches += more.switches;
}

// Runs blocks until none is left, or one fails. The seed draws which comes when.
static void work(Launch &launch) {
    auto mine = take_block();
    mine->counters = EmulatorCounters{};
    block = mine.get();
    const uint64_t grid = launch.grid, seed = launch.options.seed;
    const bool reversed = seed % 2;
    const uint64_t first = seed * 0x9E3779B97F4A7C15ull >> 33;
    if (!setjmp(mine->fault))
        for (uint64_t i; (i = launch.next++) < grid && !launch.failed;) {
            const uint64_t turned = (i + first % grid) % grid;
            run_block(*mine, launch, seed ? (reversed ? grid - 1 - turned : turned) : i);
        }
    block = nullptr;
    std::lock_guard<std::mutex> lock(idle_mutex);
    add_counters(launch.counters, mine->counters);
    idle.push_back(std::move(mine));
}

static std::string refusal(const Kernel *kernel, uint32_t threads, uint64_t problem_bytes) {
    if (!kernel) return "no such kernel";
    if (kernel->threads != threads) return "it has " + std::to_string(kernel->threads) + " threads, not " + std::to_string(threads);
    if (threads == 0 || threads % 32 || threads > 1024) return "a block can't have " + std::to_string(threads) + " threads";
    if (kernel->problem_bytes != problem_bytes)
        return "its problem has " + std::to_string(kernel->problem_bytes) + " bytes, not " + std::to_string(problem_bytes);
    return "";
}

// The regions in order; those that overlap become one.
static std::vector<EmulatorRegion> disjoint(const EmulatorRegion *regions, uint64_t count) {
    std::vector<EmulatorRegion> sorted(regions, regions + count), result;
    std::sort(sorted.begin(), sorted.end(), [](const EmulatorRegion &a, const EmulatorRegion &b) { return a.start < b.start; });
    for (const EmulatorRegion &region : sorted) {
        EmulatorRegion *last = result.empty() ? nullptr : &result.back();
        if (last && region.start < last->start + last->bytes)
            last->bytes = std::max(last->bytes, region.start + region.bytes - last->start);
        else if (region.bytes)
            result.push_back(region);
    }
    return result;
}

static void run(Launch &launch) {
    std::vector<std::thread> workers;
    const uint32_t count = std::min(launch.options.threads ? launch.options.threads : 1, launch.grid);
    for (uint32_t i = 1; i < count; i++) workers.emplace_back([&] { work(launch); });
    work(launch);
    for (std::thread &worker : workers) worker.join();
}

}  // namespace emulated

extern "C" __attribute__((visibility("default"))) int emulated_launch(const char *name, uint32_t grid, uint32_t threads, uint64_t shared_bytes,
                                                                      const void *problem, uint64_t problem_bytes, const EmulatorOptions *options,
                                                                      const EmulatorRegion *regions, uint64_t count, char *message,
                                                                      uint64_t message_bytes) {
    using namespace emulated;
    const auto found = kernels().find(name);
    const Kernel *kernel = found == kernels().end() ? nullptr : &found->second;
    std::string refused = refusal(kernel, threads, problem_bytes);
    if (!refused.empty()) {
        snprintf(message, message_bytes, "%s: %s", name, refused.c_str());
        return 1;
    }
    Launch launch;
    launch.kernel = name, launch.entry = kernel->entry;
    // Aligned as a struct is.
    std::vector<std::max_align_t> argument(problem_bytes / sizeof(std::max_align_t) + 1);
    memcpy(argument.data(), problem, problem_bytes);
    launch.problem = argument.data();
    launch.grid = grid, launch.threads = threads, launch.shared_bytes = shared_bytes;
    launch.options = *options;
    const std::vector<EmulatorRegion> separate = disjoint(regions, count);
    launch.regions = std::vector<Region>(separate.size());
    for (size_t i = 0; i < separate.size(); i++) launch.regions[i].start = separate[i].start, launch.regions[i].bytes = separate[i].bytes;
    run(launch);
    for (Region &region : launch.regions) free_tables(region);
    if (options->counters) *options->counters = launch.counters;
    if (launch.failed) snprintf(message, message_bytes, "%s", launch.message.c_str());
    return launch.failed;
}
