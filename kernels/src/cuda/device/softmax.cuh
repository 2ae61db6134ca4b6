// The online softmax over tiles of keys. Source: Milakov, Gimelshein, "Online normalizer calculation for softmax" (2018).
#pragma once
#include "engine.cuh"

constexpr int KEYS = OTHERS, NUMBERS = KEYS / 2;  // NUMBERS: scores of a lane, for each of its row tiles

// The online softmax of the lane's rows: `largest` so far, and the lane's part of the sum. PLAIN: scores are plain products, and `largest`
// is in units of ln 2.
struct Softmax {
    float largest[TILES][2], sum[TILES][2];

    // A sink is one more term of the sum, which one of a row's four lanes has.
    DEVICE explicit Softmax(float sink = -INFINITY) {
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) largest[m][half] = sink, sum[m][half] = sink != -INFINITY && threadIdx.x % 4 == 0 ? 1.0f : 0.0f;
    }
    // Makes weights of scores. `shrink` becomes what the context so far has to be multiplied by.
    template <bool MASKED> DEVICE void update(float (&s)[TILES][NUMBERS], float (&shrink)[TILES][2], float scale_log2) {
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = -INFINITY;
#pragma unroll
                for (int j = 0; j < KEYS / 8; j++) most = fmaxf(most, fmaxf(s[m][4 * j + 2 * half], s[m][4 * j + 2 * half + 1]));
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
                if (PLAIN) most *= scale_log2;
                most = fmaxf(most, largest[m][half]);
                // So far no key is visible: any number serves, since all scores are minus infinity.
                const float base = MASKED && most == -INFINITY ? 0.0f : most;
                shrink[m][half] = exp2_fast(PLAIN ? largest[m][half] - base : (largest[m][half] - base) * LOG2E);
                largest[m][half] = most;
                // Summed from zero: a sum that is long errs less in parts.
                float part = 0;
#pragma unroll
                for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                    for (int e = 4 * j + 2 * half; e < 4 * j + 2 * half + 2; e++) {
                        s[m][e] = exp2_fast(PLAIN ? s[m][e] * scale_log2 - base : (s[m][e] - base) * LOG2E);
                        part += s[m][e];
                    }
                sum[m][half] = sum[m][half] * shrink[m][half] + part;
            }
    }
};

// The context so far, times a factor for each row.
template <int M> DEVICE void multiply_rows(float (&o)[TILES][M], const float (&factors)[TILES][2]) {
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < M; i++) o[m][i] *= factors[m][i / 2 % 2];
}
