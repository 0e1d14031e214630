/* Philox-4x32-10 (Salmon et al., SC 2011), kCounters counters at a time. */
#pragma once
#include <immintrin.h>

#include "vec.h"

namespace {

constexpr int kCounters = W / 2;
/* Words: the low halves of the lanes. The high halves hold anything. */
typedef uint64_t vw __attribute__((vector_size(FM_VECTOR_BYTES)));
constexpr uint64_t kWord = 0xffffffff;

inline vw multiply(vw a, uint32_t b) {
#if defined(__AVX512F__)
    return bit_cast<vw>(_mm512_mul_epu32(bit_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__) && FM_VECTOR_BYTES == 32
    return bit_cast<vw>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif FM_VECTOR_BYTES == 16
    return bit_cast<vw>(_mm_mul_epu32(bit_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
    return (a & kWord) * uint64_t(b);
#endif
}

/* The four counter words become the four words that are drawn. */
inline void philox(vw (&c)[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        const vw p0 = multiply(c[0], 0xd2511f53u), p1 = multiply(c[2], 0xcd9e8d57u);
        c[0] = (p1 >> 32) ^ c[1] ^ uint64_t(k0), c[1] = p1;
        c[2] = (p0 >> 32) ^ c[3] ^ uint64_t(k1), c[3] = p0;
        k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
    }
}

/* Two words a lane as (word >> 8) * 2^-24. */
inline vw to_unit(vw low, vw high) {
    const vu words = bit_cast<vu>((low & kWord) | high << 32);
    return bit_cast<vw>(__builtin_convertvector(bit_cast<vi>(words >> 8), vf) * 0x1p-24f);
}

/* 2 W draws in [0, 1), by counter, then by word. */
inline void store_uniform(float* p, const vw (&c)[4]) {
    const vw a = to_unit(c[0], c[1]), b = to_unit(c[2], c[3]);
#if FM_VECTOR_BYTES == 64
    const vw low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    const vw high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif FM_VECTOR_BYTES == 32
    const vw low = __builtin_shufflevector(a, b, 0, 4, 1, 5), high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
    const vw low = __builtin_shufflevector(a, b, 0, 2), high = __builtin_shufflevector(a, b, 1, 3);
#endif
    store(p, bit_cast<vf>(low)), store(p + W, bit_cast<vf>(high));
}

}  // namespace
