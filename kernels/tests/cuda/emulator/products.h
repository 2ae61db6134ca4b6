// wgmma: products of a group of four warps (64 rows), whose operands lie in shared memory. Each warp does its 16 rows by itself.
// A product is computed when it is waited for; until then its registers hold NaN and its operands must not be written.
#pragma once
#include "barriers.h"

namespace emulated {

constexpr uint32_t POISON = 0xFFFFDEAD;  // a NaN

// Where an operand lies, as its descriptor says.
struct Operand {
    uint32_t start, leading, stride;
    bool transposed;

    Operand(uint64_t descriptor, bool transposed) : transposed(transposed) {
        if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) fail("wgmma: the descriptor isn't of a 128-byte swizzle");
        start = (descriptor & 0x3FFF) << 4;
        leading = (descriptor >> 16 & 0x3FFF) << 4;
        stride = (descriptor >> 32 & 0x3FFF) << 4;
    }
    // The 16 bytes that hold eight neighbours: of columns k .. k + 8 of row `mn`, or if transposed of rows mn .. mn + 8 of column k.
    uint32_t chunk(int mn, int k) const {
        const uint32_t at = transposed ? start + mn % 64 * 2 + mn / 64 * leading + k % 8 * 128 + k / 8 * stride
                                       : start + k * 2 + mn % 8 * 128 + mn / 8 * stride;
        return at ^ ((at >> 7 & 7) << 4);
    }
    template <class F> void each_chunk(int first, int rows, F f) const {
        if (transposed) {
            for (int k = 0; k < 16; k++)
                for (int mn = first; mn < first + rows; mn += 8) f(mn, k, chunk(mn, k));
        } else {
            for (int mn = first; mn < first + rows; mn++)
                for (int k = 0; k < 16; k += 8) f(mn, k, chunk(mn, k));
        }
    }
};

enum class Moment { Issue, Finish };

// Checks the reads of an operand, and marks its words while the product is under way.
inline void check_operand(const Operand &operand, int first, int rows, Moment moment) {
    Block &b = *block;
    const unsigned warp = block->active - b.warps.data();
    operand.each_chunk(first, rows, [&](int, int, uint32_t address) {
        touch(b, address, 16, false, lanes_of(warp));
        if (!b.check) return;
        for (uint32_t i = address / 4; i < address / 4 + 4; i++) {
            Word &w = b.words[i];
            if (moment == Moment::Finish) {
                w.products--;
                continue;
            }
            // The reader may do it as well, after it has waited for the writer.
            const bool by_reader = w.writer == w.last_writer && w.writer / 32u != warp && w.write_epoch <= b.warps[warp].fenced.seen[w.writer / 32];
            if (b.threads[w.last_writer].fences == w.fences && !by_reader)
                fail("wgmma: byte %u of its operand was written by thread %u without a fence_async after", i * 4, w.last_writer);
            w.products++;
        }
    });
}

// to[k][n - first], for 16 columns k.
inline void read_operand(const Operand &operand, int kind, int first, int rows, double *to, int row_step, int column_step) {
    Block &b = *block;
    operand.each_chunk(first, rows, [&](int mn, int k, uint32_t address) {
        uint16_t raw[8];
        memcpy(raw, b.shared + address, 16);
        for (int i = 0; i < 8; i++) {
            const int row = mn - first + (operand.transposed ? i : 0), column = k + (operand.transposed ? 0 : i);
            to[row * row_step + column * column_step] = kind == 1 ? bf16_to_float(raw[i]) : f16_to_float(raw[i]);
        }
    });
}

inline int first_row() { return (block->active - block->warps.data()) % 4 * 16; }

inline void read_registers(const Product &p, double (&a)[16][16]) {
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
            const int row = l / 4 + 8 * (i & 1), column = 2 * (l % 4) + 8 * (i >> 1);
            const uint16_t low = p.a[l][i] & 0xFFFF, high = p.a[l][i] >> 16;
            a[row][column] = p.kind == 1 ? bf16_to_float(low) : f16_to_float(low);
            a[row][column + 1] = p.kind == 1 ? bf16_to_float(high) : f16_to_float(high);
        }
}

// values (of lane after lane, n / 2 each) = a * b, or that added to them.
inline void compute(const Product &p, float *values) {
    double a[16][16], b[16 * 256], sums[256];
    if (p.a_in_registers)
        read_registers(p, a);
    else
        read_operand(Operand(p.a_descriptor, false), p.kind, first_row(), 16, a[0], 16, 1);
    read_operand(Operand(p.b_descriptor, p.transposed), p.kind, 0, p.n, b, 1, p.n);
    for (int row = 0; row < 16; row++) {
        memset(sums, 0, sizeof(double) * p.n);
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < p.n; n++) sums[n] += a[row][k] * b[k * p.n + n];
        for (int n = 0; n < p.n; n++) {
            const int lane = row % 8 * 4 + n % 8 / 2, i = n / 8 * 4 + row / 8 * 2 + n % 2;
            float &value = values[lane * (p.n / 2) + i];
            value = toward_zero((p.accumulate ? double(value) : 0.0) + sums[n]);
        }
    }
    block->counters.products += p.n / 8;
}

struct Wgmma {
    Product product;
    float *d;
    const uint32_t *a;
};

// The registers of a product; they are taken from the lanes unless a product under way has them already.
inline uint32_t take_registers(Products &products, void *const lanes[32], int n) {
    uint32_t free = products.flights.size();
    for (uint32_t i = 0; i < products.flights.size(); i++) {
        Flight &flight = products.flights[i];
        if (!flight.pending) {
            free = i;
        } else if (flight.registers[0] == static_cast<Wgmma *>(lanes[0])->d) {
            if (flight.n != n) fail("wgmma: registers of a product under way are used with another shape");
            return i;
        }
    }
    if (free == products.flights.size()) products.flights.emplace_back();
    Flight &flight = products.flights[free];
    flight.n = n;
    flight.values.resize(32 * (n / 2));
    for (int l = 0; l < 32; l++) {
        flight.registers[l] = static_cast<Wgmma *>(lanes[l])->d;
        memcpy(&flight.values[l * (n / 2)], flight.registers[l], sizeof(float) * (n / 2));
        if (!block->eager)
            for (int i = 0; i < n / 2; i++) memcpy(&flight.registers[l][i], &POISON, 4);
    }
    return free;
}

// Ends a flight. Its registers must hold what they were left with.
inline void give_back_registers(Flight &flight) {
    const int count = flight.n / 2;
    for (int l = 0; l < 32; l++) {
        const float *values = &flight.values[l * count];
        for (int i = 0; i < count; i++)
            if (memcmp(&flight.registers[l][i], block->eager ? static_cast<const void *>(values + i) : &POISON, 4))
                fail("wgmma: lane %d wrote to a register of a product under way", l);
        memcpy(flight.registers[l], values, sizeof(float) * count);
    }
}

inline void check_operands(const Product &p, Moment moment) {
    if (!p.a_in_registers) check_operand(Operand(p.a_descriptor, false), first_row(), 16, moment);
    check_operand(Operand(p.b_descriptor, p.transposed), 0, p.n, moment);
}

inline void issue(void *const lanes[32]) {
    Products &products = block->active->products;
    Product p = static_cast<Wgmma *>(lanes[0])->product;
    if (!products.begun) fail("wgmma: no wgmma_begin before it");
    if (p.n % 8 || p.n < 8 || p.n > 256) fail("wgmma: no product has %d columns", p.n);
    for (int l = 0; l < 32; l++) {
        const Wgmma &lane = *static_cast<Wgmma *>(lanes[l]);
        const Product &other = lane.product;
        if (other.a_descriptor != p.a_descriptor || other.b_descriptor != p.b_descriptor || other.n != p.n || other.accumulate != p.accumulate)
            fail("wgmma: lane %d has other arguments", l);
        if (lane.a) memcpy(p.a[l], lane.a, 16);
    }
    check_operands(p, Moment::Issue);
    p.flight = take_registers(products, lanes, p.n);
    Flight &flight = products.flights[p.flight];
    flight.pending++;
    if (block->eager) {
        compute(p, flight.values.data());
        for (int l = 0; l < 32; l++) memcpy(flight.registers[l], &flight.values[l * (p.n / 2)], sizeof(float) * (p.n / 2));
    }
    products.issued.push_back(p);
    products.count++;
}

void wgmma(int kind, float *d, int n, bool accumulate, bool transposed, const uint32_t *a, uint64_t a_descriptor, uint64_t b_descriptor) {
    Wgmma mine;
    mine.product.kind = kind;
    mine.product.n = n;
    mine.product.accumulate = accumulate;
    mine.product.transposed = transposed;
    mine.product.a_in_registers = a != nullptr;
    mine.product.a_descriptor = a ? 0 : a_descriptor;
    mine.product.b_descriptor = b_descriptor;
    mine.d = d;
    mine.a = a;
    collective(issue, &mine);
}

void wgmma_begin() {
    collective([](void *const *) { block->active->products.begun = true; }, nullptr);
}

void wgmma_commit() {
    collective(
        [](void *const *) {
            Products &products = block->active->products;
            products.groups.push_back(products.issued.size());
            products.begun = false;
        },
        nullptr);
}

inline void finish(const Product &p) {
    Flight &flight = block->active->products.flights[p.flight];
    check_operands(p, Moment::Finish);
    if (!block->eager) compute(p, flight.values.data());
    if (--flight.pending == 0) give_back_registers(flight);
}

void wgmma_wait_for(int left) {
    collective(
        [](void *const lanes[32]) {
            Products &products = block->active->products;
            const size_t left = *static_cast<int *>(lanes[0]);
            while (products.groups.size() - products.groups_done > left) {
                const uint32_t end = products.groups[products.groups_done++];
                while (products.done < end) finish(products.issued[products.done++]);
            }
            if (products.groups_done == products.groups.size() && products.done == products.issued.size()) {
                products.groups.clear();
                products.issued.clear();
                products.groups_done = products.done = 0;
            }
        },
        &left);
}

}  // namespace emulated
