/* Float vectors of the instruction set at hand (GCC/Clang vector extensions), storage conversions, exp. */
#pragma once
#include <string.h>

#include "isa.h"
#if defined(__AVX__)
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

inline vu widen(vh v) { /* GCC 12 makes five instructions of the conversion */
#if defined(__AVX512F__)
    return bit_cast<vu>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(v)));
#elif defined(__AVX2__) && FM_VECTOR_BYTES == 32
    return bit_cast<vu>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
#else
    return __builtin_convertvector(v, vu);
#endif
}
inline vf load(const bf16* p) { return bit_cast<vf>(widen(load_bits<vh>(p)) << 16); }
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
#if defined(__AVX512F__)
inline vf load_part(const float* p, int n, float fill = 0) {
    return bit_cast<vf>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << n) - 1), p));
}
inline void store_part(float* p, vf v, int n) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), bit_cast<__m512>(v));
}
#endif
#if defined(__AVX512BW__) && defined(__AVX512VL__)
template <class S>
inline vf load_half_part(const S* p, int n, float fill) {
    S padded[W];
    const __mmask16 lanes = __mmask16((1u << n) - 1);
    const __m256i bits = _mm256_maskz_loadu_epi16(lanes, p);
    memcpy(padded, &bits, sizeof(bits));
    return bit_cast<vf>(_mm512_mask_mov_ps(_mm512_set1_ps(fill), lanes, bit_cast<__m512>(load(padded))));
}
inline vf load_part(const bf16* p, int n, float fill = 0) { return load_half_part(p, n, fill); }
inline vf load_part(const f16* p, int n, float fill = 0) { return load_half_part(p, n, fill); }
inline void store_part(f16* p, vf v, int n) {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1),
                             _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#endif

/* n floats to memory that will not be read soon, past the caches where the addresses allow; the loads read whole
 * vectors. After the last row of a task: stream_end. */
inline void stream(float* p, vf v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, bit_cast<__m512>(v));
#elif defined(__AVX__) && FM_VECTOR_BYTES == 32
    _mm256_stream_ps(p, bit_cast<__m256>(v));
#else
    store(p, v);
#endif
}
template <class S>
inline void stream(S* p, vf v) {
    S rounded[W];
    store(rounded, v);
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), load_bits<__m256i>(rounded));
#elif defined(__AVX__) && FM_VECTOR_BYTES == 32
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), load_bits<__m128i>(rounded));
#else
    memcpy(p, rounded, sizeof(rounded));
#endif
}
template <class S>
inline void stream_row(const float* from, S* to, int64_t n) {
    int64_t i = 0;
    if (uintptr_t(to) % (W * sizeof(S)) == 0)
        for (; i + W <= n; i += W) stream(to + i, load(from + i));
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    if (i < n) store_part(to + i, load(from + i), int(n - i));
}
inline void stream_end() {
#if defined(__AVX__)
    _mm_sfence();
#endif
}

inline vf sqrt(vf v) {
#if defined(__AVX512F__)
    return bit_cast<vf>(_mm512_sqrt_ps(bit_cast<__m512>(v)));
#elif defined(__AVX__) && FM_VECTOR_BYTES == 32
    return bit_cast<vf>(_mm256_sqrt_ps(bit_cast<__m256>(v)));
#else
    for (int i = 0; i < W; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
#endif
}
inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
#if defined(__AVX512F__)
inline vf min(vf a, vf b) { return bit_cast<vf>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b))); }
inline vf max(vf a, vf b) { return bit_cast<vf>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b))); }
#elif defined(__AVX__) && FM_VECTOR_BYTES == 32
inline vf min(vf a, vf b) { return bit_cast<vf>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b))); }
inline vf max(vf a, vf b) { return bit_cast<vf>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b))); }
#else
inline vf min(vf a, vf b) { return a < b ? a : b; } /* b where either is NaN */
inline vf max(vf a, vf b) { return a > b ? a : b; }
#endif

/* f over the lanes by halves (lane i with lane i + N/2), in an order fixed by the vector width. */
template <class T, int N>
struct lanes {
    typedef T type __attribute__((vector_size(N * 4)));
};
template <int N, class T, class F>
inline T fold(typename lanes<T, N>::type v, F f) {
    if constexpr (N == 2) {
        return f(v[0], v[1]);
    } else {
        struct halves {
            typename lanes<T, N / 2>::type low, high;
        };
        const halves h = bit_cast<halves>(v);
        return fold<N / 2, T>(f(h.low, h.high), f);
    }
}
inline float sum(vf v) {
    return fold<W, float>(v, [](auto a, auto b) { return a + b; });
}
inline float max(vf v) {
    return fold<W, float>(v, [](auto a, auto b) { return a > b ? a : b; });
}
inline int32_t min(vi v) {
    return fold<W, int32_t>(v, [](auto a, auto b) { return a < b ? a : b; });
}

/* f(i, full{}) for each whole vector of n elements, then f(i, rest) for the last rest < W; load and store take either.
 */
struct full {};
template <class F>
inline void each_vector(int64_t n, F f) {
    int64_t i = 0;
    for (; i + W <= n; i += W) f(i, full{});
    if (i < n) f(i, int(n - i));
}
template <class S>
inline vf load(const S* p, full, float = 0) {
    return load(p);
}
template <class S>
inline vf load(const S* p, int n, float fill = 0) {
    return load_part(p, n, fill);
}
template <class S>
inline void store(S* p, vf v, full) {
    store(p, v);
}
template <class S>
inline void store(S* p, vf v, int n) {
    store_part(p, v, n);
}

/* The sum of f(i, full{} or rest) over n elements, in an order fixed by n and the vector width; unused lanes must be
 * zero. */
template <class F>
inline float sum_vectors(int64_t n, F f) {
    vf t0 = splat(0), t1 = t0, t2 = t0, t3 = t0;
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        t0 += f(i, full{});
        t1 += f(i + W, full{});
        t2 += f(i + 2 * W, full{});
        t3 += f(i + 3 * W, full{});
    }
    each_vector(n - i, [&](int64_t j, auto rest) { t0 += f(i + j, rest); });
    return sum((t0 + t1) + (t2 + t3));
}

/* e^x = p * 2^n with p near 1, for x in -88..89; n as the low bits of a float. */
inline vf exp_parts(vf x, vf* n) {
    *n = x * 1.44269504088896341f + 12582912.f;
    const vf whole = *n - 12582912.f;
    vf r = x - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * (r * r) + r + 1.f;
}
/* e^x, 1 ulp over the floats whose result is normal; 0 below -87.3, inf above 88.7, NaN stays. */
inline vf exp(vf x) {
    vf n;
    const vf p = exp_parts(max(splat(-88.f), min(splat(89.f), x)), &n);
    /* unsigned: lanes past a row's end hold anything */
    vf y = bit_cast<vf>(bit_cast<vu>(p) + (bit_cast<vu>(n) << 23));
    y = select(x > splat(88.722835f), splat(__builtin_inff()), y);
    return select(x < splat(-87.33654f), splat(0.f), select(x != x, x, y));
}
/* The same within -87..88; below and above as at these. */
inline vf exp_within(vf x) {
    vf n;
    const vf p = exp_parts(max(splat(-87.f), min(splat(88.f), x)), &n);
    return p * bit_cast<vf>((bit_cast<vu>(n) << 23) + 0x3f800000u);
}
/* 2^x for x below 127, 1 ulp; 0 below -126, so for -inf; NaN without a payload stays. The fit is Cephes' exp2f. */
inline vf exp2(vf x) {
    vf n = x + 12582912.f;
    const vu k = bit_cast<vu>(n) << 23;
    const vf r = x - (n - 12582912.f);
    vf p = splat(1.535336188319500e-4f);
    p = p * r + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    p = p * r + 1.f;
    return select(x < splat(-126.f), splat(0), bit_cast<vf>(bit_cast<vu>(p) + k));
}
inline vf sigmoid(vf x) { return select(x < splat(-88.f), splat(0.f), 1.f / (1.f + exp_within(-x))); }
inline vf tanh(vf x) { return 1.f - 2.f / (1.f + exp_within(2.f * x)); }

/* The error function, 4e-7 in absolute terms: x P(x^2) / Q(x^2) on [-4, 4], fitted by weighted least squares. */
inline vf erf(vf x) {
    const vf c = select(x > splat(4.f), splat(4.f), select(x < splat(-4.f), splat(-4.f), x)), u = c * c; /* keeps NaN */
    vf p = splat(1.91110221e-8f);
    p = p * u - 1.94231166e-6f;
    p = p * u + 1.47284867e-4f;
    p = p * u + 3.99049791e-3f;
    p = p * u + 5.15246391e-2f;
    p = p * u + 2.07123488e-1f;
    p = p * u + 1.12837911f;
    vf q = splat(1.02109532e-3f);
    q = q * u + 1.49579151e-2f;
    q = q * u + 1.17970005e-1f;
    q = q * u + 5.16889632e-1f;
    q = q * u + 1.f;
    const vf y = c * p / q;
    return select(y > splat(1.f), splat(1.f), select(y < splat(-1.f), splat(-1.f), y));
}

/* The OpenMP team for elementwise work: small work is not worth waking threads. */
inline int team(int64_t elements, int num_threads) { return elements < 8192 ? 1 : num_threads; }

/* Runs the statements with S the storage type of the code, or returns FM_BAD_DTYPE. */
#define FM_WITH_DTYPE(code, S, ...) \
    switch (code) {                 \
        case FM_F32: {              \
            using S = float;        \
            __VA_ARGS__             \
        } break;                    \
        case FM_BF16: {             \
            using S = bf16;         \
            __VA_ARGS__             \
        } break;                    \
        case FM_F16: {              \
            using S = f16;          \
            __VA_ARGS__             \
        } break;                    \
        default:                    \
            return FM_BAD_DTYPE;    \
    }

}  // namespace
