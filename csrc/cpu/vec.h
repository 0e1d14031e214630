/* Float vectors of the instruction set at hand (GCC/Clang vector extensions), storage conversions, exp. */
#pragma once
#include <string.h>

#include "isa.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FM_VECTOR_BYTES 64
#elif !defined(FM_VECTOR_BYTES)
#if defined(__AVX__)
#define FM_VECTOR_BYTES 32
#else
#define FM_VECTOR_BYTES 16
#endif
#endif

namespace {

constexpr int W = FM_VECTOR_BYTES / 4; /* floats in a vector */
typedef float vf __attribute__((vector_size(FM_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(FM_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(FM_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(FM_VECTOR_BYTES / 2)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

template <class V>
inline V load_bits(const void* p) {
    V v;
    memcpy(&v, p, sizeof(V));
    return v;
}

inline vf splat(float x) { return x - vf{}; }

inline vf load(const float* p) { return load_bits<vf>(p); }
inline void store(float* p, vf v) { memcpy(p, &v, sizeof(v)); }

inline vf load(const bf16* p) { return bit_cast<vf>(__builtin_convertvector(load_bits<vh>(p), vu) << 16); }
inline void store(bf16* p, vf v) {
    vu u = bit_cast<vu>(v);
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vi nan = v != v;
    vh h = __builtin_convertvector((bit_cast<vu>(nan) & ((u >> 16) | 0x40u)) | (~bit_cast<vu>(nan) & rounded), vh);
    memcpy(p, &h, sizeof(h));
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) { return float(bit_cast<_Float16>(x.bits)); }
inline void from_float(float* p, float x) { *p = x; }
inline void from_float(bf16* p, float x) {
    uint32_t u = bit_cast<uint32_t>(x);
    p->bits = x != x ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void from_float(f16* p, float x) { p->bits = bit_cast<uint16_t>(_Float16(x)); }

inline vf load(const f16* p) {
#if defined(__AVX512F__)
    return bit_cast<vf>(_mm512_cvtph_ps(load_bits<__m256i>(p)));
#elif defined(__F16C__) && FM_VECTOR_BYTES == 32
    return bit_cast<vf>(_mm256_cvtph_ps(load_bits<__m128i>(p)));
#else
    vf v;
    for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
    return v;
#endif
}
inline void store(f16* p, vf v) {
#if defined(__AVX512F__)
    __m256i h = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    memcpy(p, &h, sizeof(h));
#elif defined(__F16C__) && FM_VECTOR_BYTES == 32
    __m128i h = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
    memcpy(p, &h, sizeof(h));
#else
    for (int i = 0; i < W; ++i) from_float(p + i, v[i]);
#endif
}

/* The first n < W elements; the rest read as `fill` and are not written. */
template <class S>
inline vf load_part(const S* p, int n, float fill = 0) {
    vf v = splat(fill);
    for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
    return v;
}
template <class S>
inline void store_part(S* p, vf v, int n) {
    for (int i = 0; i < n; ++i) from_float(p + i, v[i]);
}

/* Adds the lanes pairwise, in an order fixed by the vector width. */
inline float sum(vf v) {
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
}
inline float max(vf v) {
    float m = v[0];
    for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
    return m;
}
inline vf select(vi mask, vf yes, vf no) {
    return bit_cast<vf>((mask & bit_cast<vi>(yes)) | (~mask & bit_cast<vi>(no)));
}
inline vf min(vf a, vf b) { return select(a < b, a, b); }
inline vf max(vf a, vf b) { return select(a > b, a, b); }

/* e^x, 1 ulp over the floats whose result is normal; 0 below -87.3, inf above 88.7, NaN stays. */
inline vf exp(vf x) {
    vf clamped = select(x < splat(-88.f), splat(-88.f), select(x > splat(89.f), splat(89.f), x)); /* keeps NaN */
    vf n = clamped * 1.44269504088896341f + 12582912.f;
    vi k = bit_cast<vi>(n) << 23;
    n = n - 12582912.f;
    vf r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    vf y = bit_cast<vf>(bit_cast<vi>(p) + k);
    y = select(x > splat(88.722835f), splat(__builtin_inff()), y);
    return select(x < splat(-87.33654f), splat(0.f), select(x != x, x, y));
}
inline vf sigmoid(vf x) { return 1.f / (1.f + exp(-x)); }

/* Calls f with a typed null pointer of the storage type: with_dtype(code, [&](auto* s) { using S = ...; }). */
#define FM_WITH_DTYPE(code, S, ...)                                        \
    switch (code) {                                                        \
        case FM_F32: { using S = float; __VA_ARGS__ } break;               \
        case FM_BF16: { using S = bf16; __VA_ARGS__ } break;               \
        case FM_F16: { using S = f16; __VA_ARGS__ } break;                 \
        default: return FM_BAD_DTYPE;                                      \
    }

}  // namespace
