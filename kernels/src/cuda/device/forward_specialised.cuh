// The plain forward kernel with its warps specialised: one warp group copies keys and values, and the others, with 64 queries each, compute.
// So no two groups have to wait for each other's softmax, and the tensor cores work for one while the other computes weights. forward.cu
// includes this in place of its own kernel; the results have the same bits.
//
// Source: Shah et al., "FlashAttention-3" (NeurIPS 2024), section 3.
#pragma once

// THREADS are those that compute, 2 groups. A block has GROUP threads more.
constexpr int GROUP = 128, GROUPS = 2;
// The registers of an SM, 65,536, for all threads of the block.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(PLAIN && IS_ASYNC && STAGES == 2 && THREADS == GROUPS * GROUP, "what the specialised kernel is for");
// Named barriers: each group's for its turn. The groups that compute begin their products in turn, so that their softmaxes don't coincide.
constexpr int FIRST_OF_TURNS = 1;

// Which tile is meant, of those that go through the stages.
struct Position {
    int stage = 0, parity = 0;
    DEVICE Position next(int stages) const { return stages == 1 ? Position{0, parity ^ 1} : Position{stage ^ 1, parity ^ stage}; }
};

// The stages of tiles: `full` when a copy is there, and `empty` when the products with it are computed.
template <class T, int COUNT> struct Handover {
    uint32_t tiles, barriers;
    static constexpr int BYTES = COUNT * T::BYTES, BARRIER_BYTES = COUNT * 16;

    DEVICE void init() const {
        for (int stage = 0; stage < COUNT; stage++) init_barrier(full(stage), GROUP), init_barrier(empty(stage), WARPS);
    }
    DEVICE uint32_t full(int stage) const { return barriers + stage * 16; }
    DEVICE uint32_t empty(int stage) const { return barriers + stage * 16 + 8; }
    DEVICE T tile(Position at) const { return {tiles + at.stage * T::BYTES}; }
    // Of the group that copies. At first the stages are empty without an arrival.
    DEVICE void wait_until_empty(Position at) const { wait_for_phase(empty(at.stage), at.parity ^ 1); }
    DEVICE void copied(Position at) const { arrive_with_copies(full(at.stage)); }
    // Of those that compute.
    DEVICE void wait_until_full(Position at) const { wait_for_phase(full(at.stage), at.parity); }
    DEVICE void used(Position at) const { arrive(empty(at.stage)); }
};

// A group has a tile of queries of its own.
using OwnQueries = Tile<64, HEAD_DIM>;
static_assert(GROUPS * OwnQueries::BYTES == Queries::BYTES, "the queries of all groups");

struct Handovers {
    Handover<Queries, 1> queries;
    Handover<Keys, STAGES> keys;
    Handover<Values, STAGES> values;

    DEVICE explicit Handovers(uint32_t shared) {
        queries.tiles = shared, keys.tiles = queries.tiles + queries.BYTES, values.tiles = keys.tiles + keys.BYTES;
        queries.barriers = values.tiles + values.BYTES;
        keys.barriers = queries.barriers + queries.BARRIER_BYTES, values.barriers = keys.barriers + keys.BARRIER_BYTES;
    }
    DEVICE OwnQueries own_queries(int group) const { return {queries.tiles + group * OwnQueries::BYTES}; }
};

// The queries of a block of the grid that has one for each: a block of threads may do several, one after the other, so that the first
// copies for the next one are made while the last products and stores of this one are.
struct Work {
    Place place;
    Scores scores;
    Range range;
    int first, last;  // tiles of keys

    DEVICE Work(const Problem &p, int block)
        : place(block, p.q_len, ROWS, p.heads, true), scores(p, place.batch, place.head), range(scores.limits.keys_of(place.first, ROWS)) {
        first = range.begin / KEYS, last = range.begin < range.end ? (range.end - 1) / KEYS : first - 1;
    }
    DEVICE bool is_empty() const { return last < first; }
    static DEVICE uint32_t count(const Problem &p) { return (p.q_len + ROWS - 1) / ROWS * p.heads * p.batch; }
};

// What the group that copies does. K of a tile comes before V of the tile before, as they are used.
DEVICE void produce(const Problem &p, const Handovers &to) {
    Position at, of_queries;
    for (uint32_t block = blockIdx.x; block < Work::count(p); block += gridDim.x) {
        const Work work(p, block);
        if (work.is_empty()) continue;
        const int batch = work.place.batch, kv_head = work.place.head / (p.heads / p.kv_heads);
        const Source<HEAD_DIM, GROUP> q(p.q, batch, work.place.head, p.head_dim), k(p.k, batch, kv_head, p.head_dim);
        const Source<VALUE_DIM, GROUP> v(p.v, batch, kv_head, p.value_dim);
        to.queries.wait_until_empty(of_queries);
        for (int group = 0; group < GROUPS; group++) q.template copy<false>(to.own_queries(group), work.place.first + group * 64, p.q_len);
        to.queries.copied(of_queries);
        of_queries = of_queries.next(1);
        auto copy_keys = [&](Position where, int tile) {
            to.keys.wait_until_empty(where);
            if (tile == work.last) k.template copy<false>(to.keys.tile(where), tile * KEYS, p.kv_len);
            else k.template copy<true>(to.keys.tile(where), tile * KEYS, p.kv_len);
            to.keys.copied(where);
        };
        auto copy_values = [&](Position where, int tile) {
            to.values.wait_until_empty(where);
            if (tile == work.last) v.template copy<false>(to.values.tile(where), tile * KEYS, p.kv_len);
            else v.template copy<true>(to.values.tile(where), tile * KEYS, p.kv_len);
            to.values.copied(where);
        };
        copy_keys(at, work.last);
        for (int tile = work.last; tile >= work.first; tile--) {
            if (tile > work.first) copy_keys(at.next(STAGES), tile - 1);
            copy_values(at, tile);
            at = at.next(STAGES);
        }
    }
    // Nobody ends with copies under way.
    commit_copies();
    wait_for_copies<0>();
}

// What a group that computes does for one block of queries: the weights of a tile while wgmma computes the context of the tile before, as in
// forward.cu. `at` is the position of the first tile, and becomes that behind the last.
DEVICE void consume(const Problem &p, const Work &work, const Handovers &from, int group, Position &at, Position of_queries, float (&o)[TILES][VALUE_DIM / 2],
                    Softmax &softmax) {
    const int first_query = work.place.first + int(threadIdx.x / 32) * WARP_ROWS, first = work.first;
    const float scale_log2 = p.scale * LOG2E;
    const OwnQueries queries = from.own_queries(group);
    uint32_t weights[TILES][KEYS / 16][4];
    auto weigh = [&](auto masked, float (&s)[TILES][NUMBERS], float (&shrink)[TILES][2], int key) {
        constexpr bool MASKED = decltype(masked)::value;
        if (MASKED) modify(work.scores, s, first_query, key);
        softmax.update<MASKED>(s, shrink, scale_log2);
    };
    {
        float s[TILES][NUMBERS], shrink[TILES][2];
        from.queries.wait_until_full(of_queries);
        from.keys.wait_until_full(at);
        publish_to_wgmma();  // copies write as other stores do, and wgmma reads in a way of its own
        dot(s, queries, 0, from.keys.tile(at));
        wait_for_products<0>();
        done(s);
        from.keys.used(at);
        weigh(Yes{}, s, shrink, work.last * KEYS);
        as_operand<KEYS>(weights, s);
    }
    // Before a step, the tile `at` has weights, and `next` is the tile whose scores the step computes.
    int next = work.last - 1;
    auto step = [&](auto masked) {
        const Position before = at;
        at = at.next(STAGES);
        from.keys.wait_until_full(at);
        from.values.wait_until_full(before);
        publish_to_wgmma();
        meet_at_named(FIRST_OF_TURNS + group, THREADS);
        float s[TILES][NUMBERS], shrink[TILES][2];
        dot(s, queries, 0, from.keys.tile(at));
        accumulate<KEYS, VALUE_DIM>(o, weights, from.values.tile(before));
        pass_named(FIRST_OF_TURNS + (group + 1) % GROUPS, THREADS);
        wait_for_products<1>();
        done(s);
        from.keys.used(at);
        weigh(masked, s, shrink, next * KEYS);
        compute_before(softmax.sum[0][0] + softmax.sum[0][1]);  // so that the weights are not computed behind the wait
        wait_for_products<0>();
        done(o);
        from.values.used(before);
        multiply_rows(o, shrink);
        as_operand<KEYS>(weights, s);
        next--;
    };
    for (;;) {
        while (next >= first && next * KEYS >= work.range.full_begin && (next + 1) * KEYS <= work.range.full_end) step(No{});
        if (next < first) break;
        step(Yes{});
    }
    from.queries.used(of_queries);
    from.values.wait_until_full(at);
    publish_to_wgmma();
    accumulate<KEYS, VALUE_DIM>(o, weights, from.values.tile(at));
    wait_for_products<0>();
    done(o);
    from.values.used(at);
    at = at.next(STAGES);
}

// The grid has a block of threads for each ROWS queries of a head, or fewer.
KERNEL(attention_forward, THREADS + GROUP) {
    SHARED_MEMORY(shared);
    const Handovers handovers(shared);
    const uint32_t blocks = Work::count(p), own = blockIdx.x;
    if (threadIdx.x == 0) {
        handovers.queries.init();
        handovers.keys.init();
        handovers.values.init();
    }
    // Whoever finds that the careful pass is needed writes 1 over it.
    for (int64_t block = own + int64_t(threadIdx.x) * gridDim.x; block < blocks; block += int64_t(blockDim.x) * gridDim.x) store_global(p.careful + block, uint8_t(0));
    __syncthreads();
    const int group = __shfl_sync(ALL_LANES, int(threadIdx.x / GROUP), 0);  // so that the compiler knows that a warp has one
    if (group == GROUPS) {
        give_registers_back<PRODUCER_REGISTERS>();
        produce(p, handovers);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        if (group == 1) pass_named(FIRST_OF_TURNS, THREADS);
        Position at, of_queries;
        for (uint32_t block = own; block < blocks; block += gridDim.x) {
            const Work work(p, block);
            float o[TILES][VALUE_DIM / 2] = {};
            Softmax softmax;
            if (!work.is_empty()) {
                consume(p, work, handovers, group, at, of_queries, o, softmax);
                of_queries = of_queries.next(1);
            }
            const int first_query = work.place.first + int(threadIdx.x / 32) * WARP_ROWS;
            if (store(p, work.place, first_query, o, softmax)) store_global(p.careful + block, uint8_t(1));
        }
        // The last pass of all.
        if (group == 0) meet_at_named(FIRST_OF_TURNS, THREADS);
    }
}
