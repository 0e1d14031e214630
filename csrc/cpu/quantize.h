/* The 8-bit codes and the random bits of rounding that fastmoe/ops/quantize defines: blocks of 32 of a row, W of them
 * at a time. Where the last argument of a load or store is n, only the first n < W elements are touched, or all if
 * full. */
#pragma once
#include <utility>

#include "vec.h"

namespace {

constexpr int64_t kBlock = 32;
constexpr uint32_t kColumn = 0x9e3779b1u; /* what a column's number is multiplied by */

struct code8 {
    int8_t bits;
};
struct ucode8 {
    uint8_t bits;
};

/* The two words of a row. */
struct row_words {
    uint32_t k0, k1;
    row_words(uint64_t key, uint64_t row) {
        uint64_t z = key + (row + 1) * 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        z ^= z >> 31;
        k0 = uint32_t(z), k1 = uint32_t(z >> 32);
    }
};

/* kColumn * (first, first + 1, ...). */
inline vu column_words(int64_t first) {
    vu columns;
    for (int i = 0; i < W; ++i) columns[i] = (uint32_t(first) + uint32_t(i)) * kColumn;
    return columns;
}
inline vu random_bits(vu columns, row_words row) {
    vu x = columns ^ row.k0;
    x = (x ^ (x >> 16)) * 0x85ebca6bu + row.k1;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

inline float to_float(code8 x) { return x.bits; }
inline float to_float(ucode8 x) { return x.bits; }
inline vf load(const code8* p) {
#if defined(__AVX512F__)
    return bit_cast<vf>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bits<__m128i>(p))));
#elif defined(__AVX2__) && FM_VECTOR_BYTES == 32
    return bit_cast<vf>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))));
#else
    vf v;
    for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
    return v;
#endif
}
inline vf load(const ucode8* p) {
#if defined(__AVX512F__)
    return bit_cast<vf>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_bits<__m128i>(p))));
#elif defined(__AVX2__) && FM_VECTOR_BYTES == 32
    return bit_cast<vf>(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))));
#else
    vf v;
    for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
    return v;
#endif
}

/* The low 8 or 16 bits of every lane. */
inline void store_low(code8* p, vu x, int n) {
    for (int i = 0; i < n; ++i) p[i].bits = int8_t(x[i]);
}
inline void store_low(ucode8* p, vu x, int n) {
    for (int i = 0; i < n; ++i) p[i].bits = uint8_t(x[i]);
}
inline void store_low(bf16* p, vu x, int n) {
    for (int i = 0; i < n; ++i) p[i].bits = uint16_t(x[i]);
}
#if defined(__AVX512F__)
template <class S>
inline void store_low(S* p, vu x, full) {
    if constexpr (sizeof(S) == 1)
        _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(bit_cast<__m512i>(x)));
    else
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(bit_cast<__m512i>(x)));
}
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline vf load_part(const code8* p, int n, float = 0) {
    return bit_cast<vf>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(__mmask16((1u << n) - 1), p))));
}
inline vf load_part(const ucode8* p, int n, float = 0) {
    return bit_cast<vf>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(__mmask16((1u << n) - 1), p))));
}
#endif
#elif defined(__AVX2__) && FM_VECTOR_BYTES == 32
template <class S>
inline void store_low(S* p, vu x, full) {
    const int bytes = sizeof(S);
    const __m256i order = bytes == 1 ? _mm256_set1_epi32(0x0c080400)
                                     : _mm256_set_epi32(-1, -1, 0x0d0c0908, 0x05040100, -1, -1, 0x0d0c0908, 0x05040100);
    const __m256i narrow = _mm256_shuffle_epi8(bit_cast<__m256i>(x), order);
    const __m128i low = _mm256_castsi256_si128(narrow), high = _mm256_extracti128_si256(narrow, 1);
    if (bytes == 1)
        _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(low, high));
    else
        _mm_storeu_si128((__m128i*)p, _mm_unpacklo_epi64(low, high));
}
#else
template <class S>
inline void store_low(S* p, vu x, full) {
    store_low(p, x, W);
}
#endif

/* The same of the vectors of a whole block. */
template <class S>
inline void store_low_block(S* p, const vu* x) {
#if defined(__AVX2__) && FM_VECTOR_BYTES == 32
    const auto pack = [&](int i) {
        const __m256i a = bit_cast<__m256i>(x[i]), b = bit_cast<__m256i>(x[i + 1]);
        return __is_same(S, code8) ? _mm256_packs_epi32(a, b) : _mm256_packus_epi32(a, b); /* their quarters in turn */
    };
    if constexpr (sizeof(S) == 1) {
        const __m256i a = pack(0), b = pack(2), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i bytes = __is_same(S, code8) ? _mm256_packs_epi16(a, b) : _mm256_packus_epi16(a, b);
        _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(bytes, order));
    } else {
        for (int i = 0; i < kBlock / W; i += 2)
            _mm256_storeu_si256((__m256i*)(p + i * W), _mm256_permute4x64_epi64(pack(i), 0xd8));
    }
#else
    for (int i = 0; i < kBlock / W; ++i) store_low(p + i * W, x[i], full{});
#endif
}

/* To an integer, nearest. */
inline vi nearest(vf v) {
#if defined(__AVX512F__)
    return bit_cast<vi>(_mm512_cvtps_epi32(bit_cast<__m512>(v)));
#elif defined(__AVX2__) && FM_VECTOR_BYTES == 32
    return bit_cast<vi>(_mm256_cvtps_epi32(bit_cast<__m256>(v)));
#else
    return __builtin_convertvector(v < 0.f ? v - 0.5f : v + 0.5f, vi);
#endif
}
inline vf magnitude(vf v) { return bit_cast<vf>(bit_cast<vu>(v) & 0x7fffffffu); }
inline vf with_sign_of(vf v, vf of) { return bit_cast<vf>(bit_cast<vu>(v) | (bit_cast<vu>(of) & 0x80000000u)); }

/* 1 / v for v > 0: 2^-14 (AVX-512), 2^-22 (AVX2), else exact. */
inline vf reciprocal(vf v) {
#if defined(__AVX512F__)
    return bit_cast<vf>(_mm512_rcp14_ps(bit_cast<__m512>(v)));
#elif defined(__AVX2__) && FM_VECTOR_BYTES == 32
    const vf near = bit_cast<vf>(_mm256_rcp_ps(bit_cast<__m256>(v)));
    return near * (2.f - v * near);
#else
    return 1.f / v;
#endif
}

/* v up or down with the probability of its fraction; draws: 16 random bits. float: as it is. */
template <class N>
inline void store_rounded(bf16* p, vf v, vu draws, N n) {
    store_low(p, (bit_cast<vu>(v) + draws) >> 16, n);
}
template <class N>
inline void store_rounded(f16* p, vf v, vu draws, N n) {
    const vu smallest = vu{} + 0x38800000u, word = bit_cast<vu>(v); /* 2^-14: below it steps stay 2^-24 */
    const vu small = bit_cast<vu>((word & 0x7fffffffu) < smallest) & (smallest | (word & 0x80000000u));
    const vu truncated = (bit_cast<vu>(v + bit_cast<vf>(small)) + (draws >> 3)) & ~0x1fffu;
    store(p, bit_cast<vf>(truncated) - bit_cast<vf>(small), n);
}
template <class N>
inline void store_rounded(float* p, vf v, vu, N n) {
    store(p, v, n);
}

/* 2 W elements, those of even places and those of odd ones: no lane has to move. */
struct pair {
    vf even, odd;
};
inline pair load_pair(const bf16* p) {
    const vu both = load_bits<vu>(p);
    return {bit_cast<vf>(both << 16), bit_cast<vf>(both & 0xffff0000u)};
}
inline void store_pair(bf16* p, pair v, vu draws_even, vu draws_odd) {
    const vu both = ((bit_cast<vu>(v.even) + draws_even) >> 16) | ((bit_cast<vu>(v.odd) + draws_odd) & 0xffff0000u);
    memcpy(p, &both, sizeof(both));
}

/* A block's value is code * |code| * scale * unit: */
constexpr float kUnit = 1.f / (127 * 127), kRootUnit = 1.f / (255 * 255);

/* The largest of a block's magnitudes, as their bits (so that NaN is larger than all), as a scale: rounded up to
 * bfloat16, NaN where a value was not finite, 0 where all are below the normal numbers. */
inline vf to_scale(vu largest) {
    largest &= 0x7fffffffu; /* a NaN's sign */
    const vu rounded = (largest + 0xffffu) & 0xffff0000u;
    const vu nan = bit_cast<vu>(largest >= 0x7f800000u) & 0x7fc00000u;
    return bit_cast<vf>((rounded & bit_cast<vu>(largest >= 0x00800000u)) | nan);
}
/* What sqrt(|x|) is multiplied by to be coded; the last bits keep rounding up from passing the largest code. */
inline vf coder(vf scale) { return select(scale == 0.f, scale, (127 * 256) / sqrt(scale)); }
inline vf root_coder(vf scale) { return select(scale == 0.f, scale, (255 * 65536 - 4) / sqrt(scale)); }

/* Codes of x as the low bits of lanes, up or down with the probability of the fraction; draws: 32 random bits. */
inline vu to_codes(const code8*, vf x, vf coder, vu draws) {
    const vi code = nearest(with_sign_of(sqrt(magnitude(x)) * coder, x)) + bit_cast<vi>(draws & 0xffu);
    return bit_cast<vu>(code >> 8);
}
inline vu to_codes(const ucode8*, vf x, vf coder, vu draws) { /* at least 1 for x > 0 */
#if defined(__AVX512F__)
    const __m512 most = bit_cast<__m512>(sqrt(x) * coder);
    const __mmask16 some = _mm512_cmp_ps_mask(bit_cast<__m512>(x), _mm512_setzero_ps(), _CMP_GT_OQ);
    const vf code = bit_cast<vf>(_mm512_mask_max_ps(most, some, most, _mm512_set1_ps(65536.f)));
#else
    const vf code = max(sqrt(x) * coder, select(x > 0.f, splat(65536.f), splat(0.f)));
#endif
    return (bit_cast<vu>(nearest(code)) + (draws & 0xffffu)) >> 16;
}
template <class C, class N>
inline void store_codes(C* p, vf x, vf coder, vu draws, N n) {
    store_low(p, to_codes(p, x, coder, draws), n);
}

inline vu larger(vu a, vu b) { return a > b ? a : b; }

/* Groups of G lanes of a and b in turn: the larger of the lower and of the higher halves of what was 2 G lanes. */
template <int G, size_t... I>
inline vu larger_halves(vu a, vu b, std::index_sequence<I...>) {
    return larger(__builtin_shufflevector(a, b, (I / G % 2 * W + I / (2 * G) * (2 * G) + I % G)...),
                  __builtin_shufflevector(a, b, (I / G % 2 * W + I / (2 * G) * (2 * G) + I % G + G)...));
}
/* Lane i: the largest lane of rows[i], of W rows. */
template <int G = 1>
inline vu largest_lanes(const vu* rows) {
    if constexpr (G == W) {
        return rows[0];
    } else {
        vu halves[W / (2 * G)];
        for (int i = 0; i < W / (2 * G); ++i)
            halves[i] = larger_halves<G>(rows[2 * i], rows[2 * i + 1], std::make_index_sequence<W>{});
        return largest_lanes<2 * G>(halves);
    }
}
/* f(b, full{}) for each whole block of n elements, then f(b, rest) for the last rest < 32. */
template <class F>
inline void each_block(int64_t n, F f) {
    for (int64_t b = 0; b < n / kBlock; ++b) f(b, full{});
    if (n % kBlock) f(n / kBlock, n % kBlock);
}
/* f(i, full{} or rest) over the vectors of a block. */
template <class F>
inline void each_of_block(full, F f) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kBlock; i += W) f(i, full{});
}
template <class F>
inline void each_of_block(int64_t size, F f) {
    each_vector(size, f);
}

}  // namespace
