// The instructions of a warp, but for wgmma.
#pragma once
#include <algorithm>

#include "shared.h"

namespace emulated {

// Gives way to the scheduler until all lanes have come to `what`, which is then done for all of them.
inline void collective(Collective what, void *argument) {
    Block &b = *block;
    Warp &warp = warp_of(b);
    const unsigned lane = b.current->index % 32;
    if (warp.at_warp && warp.collective != what) fail("lanes of a warp came to different instructions");
    warp.collective = what;
    warp.arguments[lane] = argument;
    warp.runnable &= ~(1u << lane);
    warp.at_warp |= 1u << lane;
    b.current->fiber.switch_to(b.scheduler);
}

inline void wait_for_block() {
    Block &b = *block;
    Warp &warp = warp_of(b);
    const unsigned lane = b.current->index % 32;
    warp.runnable &= ~(1u << lane);
    warp.at_block |= 1u << lane;
    b.current->fiber.switch_to(b.scheduler);
}

void sync_warp() {
    collective([](void *const *) { block->active->epoch++; }, nullptr);
}
void sync_block() { wait_for_block(); }
bool sync_block_or(bool value) {
    block->any |= value;
    wait_for_block();
    return block->last_any;
}

uint64_t shuffle(uint64_t value, unsigned from) {
    struct Argument {
        uint64_t value, result;
        unsigned from;
    } mine{value, 0, from};
    collective(
        [](void *const lanes[32]) {
            block->counters.shuffles++;
            for (int l = 0; l < 32; l++) {
                auto *a = static_cast<Argument *>(lanes[l]);
                a->result = static_cast<Argument *>(lanes[a->from])->value;
            }
        },
        &mine);
    return mine.result;
}

uint32_t ballot(bool value) {
    struct Argument {
        bool value;
        uint32_t result;
    } mine{value, 0};
    collective(
        [](void *const lanes[32]) {
            uint32_t bits = 0;
            for (int l = 0; l < 32; l++) bits |= uint32_t(static_cast<Argument *>(lanes[l])->value) << l;
            for (int l = 0; l < 32; l++) static_cast<Argument *>(lanes[l])->result = bits;
        },
        &mine);
    return mine.result;
}

// ---- ldmatrix
// Four 8 x 8 matrices of 16 bits. Lane l gives the address of row l % 8 of matrix l / 8, and gets two neighbours of row l / 4 of
// each, or of column l / 4 if transposed.
struct LoadMatrix {
    uint32_t *r;
    uint32_t address;
};

template <bool TRANSPOSED> void load_matrices(void *const lanes[32]) {
    Block &b = *block;
    b.counters.ldmatrix++;
    for (int m = 0; m < 4; m++) {
        uint16_t rows[8][8];
        unsigned banks = 0;
        for (int i = 0; i < 8; i++) {
            const uint32_t address = static_cast<LoadMatrix *>(lanes[8 * m + i])->address;
            banks |= 1u << (address / 16 % 8);
            memcpy(rows[i], b.shared + address, 16);
        }
        b.counters.bank_conflicts += 8 - __builtin_popcount(banks);
        for (int l = 0; l < 32; l++) {
            const int i = l / 4, j = 2 * (l % 4);
            const uint16_t low = TRANSPOSED ? rows[j][i] : rows[i][j], high = TRANSPOSED ? rows[j + 1][i] : rows[i][j + 1];
            static_cast<LoadMatrix *>(lanes[l])->r[m] = low | uint32_t(high) << 16;
        }
    }
}

void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, bool transposed) {
    Block &b = *block;
    // Other lanes get what is read for this one: their writes must be ordered before it too.
    touch(b, address, 16, false, lanes_of(b.current->index / 32));
    LoadMatrix mine{r, address};
    collective(transposed ? load_matrices<true> : load_matrices<false>, &mine);
}

// ---- mma
// c (16 x 8) += a (16 x 16) * b (16 x 8), or a (16 x 8) * b (8 x 8) of tf32. The products and their sum are exact but for the
// rounding of an f64; the sum with c is rounded toward zero, as tensor cores do.
struct Mma {
    float *c;
    const uint32_t *a;
    uint32_t b[2];
};

template <int KIND> inline float half_to_float(uint16_t x) { return KIND == 1 ? bf16_to_float(x) : f16_to_float(x); }

template <int DEPTH> inline void multiply(void *const lanes[32], const double (&a)[16][DEPTH], const double (&b)[DEPTH][8]) {
    block->counters.products++;
    double sums[16][8] = {};
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < DEPTH; k++)
            for (int n = 0; n < 8; n++) sums[m][n] += a[m][k] * b[k][n];
    for (int l = 0; l < 32; l++) {
        float *c = static_cast<Mma *>(lanes[l])->c;
        const int row = l / 4, column = 2 * (l % 4);
        for (int i = 0; i < 4; i++) c[i] = toward_zero(double(c[i]) + sums[row + 8 * (i / 2)][column + i % 2]);
    }
}

template <int KIND> void mma_of_halves(void *const lanes[32]) {
    uint16_t raw_a[16][16], raw_b[16][8];
    for (int l = 0; l < 32; l++) {
        const Mma &x = *static_cast<Mma *>(lanes[l]);
        const int g = l / 4, t = 2 * (l % 4);
        for (int i = 0; i < 4; i++) memcpy(&raw_a[g + 8 * (i & 1)][t + 8 * (i >> 1)], &x.a[i], 4);
        for (int i = 0; i < 2; i++) {
            raw_b[t + 8 * i][g] = x.b[i] & 0xFFFF;
            raw_b[t + 8 * i + 1][g] = x.b[i] >> 16;
        }
    }
    double a[16][16], b[16][8];
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++) a[m][k] = half_to_float<KIND>(raw_a[m][k]);
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 8; n++) b[k][n] = half_to_float<KIND>(raw_b[k][n]);
    multiply<16>(lanes, a, b);
}

inline double tf32_to_double(uint32_t x) { return float_of_bits(x & ~0x1FFFu); }

void mma_of_tf32(void *const lanes[32]) {
    double a[16][8], b[8][8];
    for (int l = 0; l < 32; l++) {
        const Mma &x = *static_cast<Mma *>(lanes[l]);
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; i++) a[g + 8 * (i & 1)][t + 4 * (i >> 1)] = tf32_to_double(x.a[i]);
        for (int i = 0; i < 2; i++) b[t + 4 * i][g] = tf32_to_double(x.b[i]);
    }
    multiply<8>(lanes, a, b);
}

void mma(int kind, float *c, const uint32_t *a, uint32_t b0, uint32_t b1) {
    Mma mine{c, a, {b0, b1}};
    collective(kind == 1 ? mma_of_halves<1> : kind == 2 ? mma_of_halves<2> : mma_of_tf32, &mine);
}

}  // namespace emulated
