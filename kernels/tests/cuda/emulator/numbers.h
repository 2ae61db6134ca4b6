// Numbers of 16 bits, without the instructions that only some processors have.
#pragma once
#include <cstdint>
#include <cstring>

namespace emulated {

inline float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float bf16_to_float(uint16_t x) { return float_of_bits(uint32_t(x) << 16); }
inline uint16_t float_to_bf16(float x) {
    const uint32_t bits = bits_of_float(x);
    return x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// The exponent is moved by a product, which is exact for subnormal numbers too.
inline float f16_to_float(uint16_t x) {
    const uint32_t magnitude = uint32_t(x & 0x7FFF) << 13, sign = uint32_t(x & 0x8000) << 16;
    const uint32_t finite = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
    return float_of_bits(sign | (magnitude >= 0x0F800000 ? magnitude | 0x7F800000 : finite));
}
inline uint16_t float_to_f16(float x) {
    const uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return 0x7FFF;
    if (magnitude >= 0x477FF000) return sign | 0x7C00;  // rounds to infinity
    if (magnitude < 0x38800000)                         // subnormal: the sum rounds at the last bit of an f16
        return sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3F000000);
    return sign | ((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13);
}

// The nearest f32 that isn't farther from zero.
inline float toward_zero(double x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    bits &= ~uint64_t(0x1FFFFFFF);
    memcpy(&x, &bits, 8);
    return float(x);
}

}  // namespace emulated
