/* A packed, register-tiled matrix product of one block, C[m, n] = sum_k A[m, k] B[k, n], with the caller's packing and
 * epilogue.
 *
 * A is packed into panels of MR rows, B into panels of NR columns, both float32 whatever the storage, zero-padded; the
 * micro-kernel keeps an MR x NR tile of C in registers. One task owns one block of C and adds k in order, so results do
 * not depend on how many threads share the blocks.
 */
#pragma once
#include "vec.h"
#include "workspace.h"

namespace {

constexpr int MR = 6, NR = 2 * W;
constexpr int MC = 192, NC = 192, KC = 192; /* the packed block of A, of B and the block of C share a 512 KiB L2 */
static_assert(MC % MR == 0 && NC % NR == 0, "whole panels");

/* Floats one thread needs: packed A (with room for one panel's overlapping store), packed B, C. */
constexpr int64_t kBlockFloats = int64_t(MC) * KC + 16 + int64_t(KC) * NC + 16 + int64_t(MC) * NC;
static_assert(kBlockFloats <= fm_workspace::kThreadFloats, "workspace.h sizes a thread's memory");

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

typedef float v4 __attribute__((vector_size(16)));

inline v4 load4(const float* p) { return load_bits<v4>(p); }
inline v4 load4(const bf16* p) {
    typedef uint16_t h4 __attribute__((vector_size(8)));
    typedef uint32_t u4 __attribute__((vector_size(16)));
    return bit_cast<v4>(__builtin_convertvector(load_bits<h4>(p), u4) << 16);
}
inline v4 load4(const f16* p) {
#if defined(__F16C__)
    return bit_cast<v4>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    return v4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
#endif
}

/* A matrix of lines; line i begins at base + (index ? index[i] : i) * stride and is contiguous. */
template <class S>
struct Lines {
    const S* base;
    int64_t stride;
    const int32_t* index;
    const S* line(int64_t i) const { return base + int64_t(index ? index[i] : i) * stride; }
};

/* Panels whose P members are lines, k runs along them: out[panel][k][member]. Writes up to 2 floats past the last
 * panel. */
template <int P, class S>
void pack_lines(float* out, const Lines<S>& from, int64_t line0, int64_t lines, int64_t k0, int64_t k1) {
    const int64_t kc = k1 - k0;
    static const S zeros[KC] = {};
    for (int64_t l = 0; l < lines; l += P, out += P * kc) {
        const S* src[(P + 3) / 4 * 4];
        for (int j = 0; j < (P + 3) / 4 * 4; ++j)
            src[j] = j < P && l + j < lines ? from.line(line0 + l + j) + k0 : zeros;
        int64_t k = 0;
        for (; k + 4 <= kc; k += 4)
            for (int j = 0; j < P; j += 4) {
                const v4 a = load4(src[j] + k), b = load4(src[j + 1] + k), c = load4(src[j + 2] + k),
                         d = load4(src[j + 3] + k);
                const v4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), AB = __builtin_shufflevector(a, b, 2, 6, 3, 7);
                const v4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
                const v4 rows[4] = {
                    __builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
                    __builtin_shufflevector(AB, CD, 0, 1, 4, 5), __builtin_shufflevector(AB, CD, 2, 3, 6, 7)};
                for (int i = 0; i < 4; ++i)
                    memcpy(out + (k + i) * P + j, &rows[i], P - j < 4 ? (P - j) * sizeof(float) : sizeof(v4));
            }
        for (; k < kc; ++k)
            for (int j = 0; j < P; ++j) out[k * P + j] = to_float(src[j][k]);
    }
}

/* Panels whose P members are neighbours inside a line, k counts lines: out[panel][k][member]. */
template <int P, class S>
void pack_columns(float* out, const Lines<S>& from, int64_t column0, int64_t columns, int64_t k0, int64_t k1) {
    const int64_t kc = k1 - k0;
    for (int64_t k = 0; k < kc; ++k) {
        const S* src = from.line(k0 + k) + column0;
        float* to = out + k * P;
        int64_t c = 0;
        for (; c + P <= columns; c += P, to += P * kc) {
            int j = 0;
            for (; j + 4 <= P; j += 4) {
                const v4 v = load4(src + c + j);
                memcpy(to + j, &v, sizeof(v));
            }
            for (; j < P; ++j) to[j] = to_float(src[c + j]);
        }
        for (int j = 0; c < columns && j < P; ++j) to[j] = c + j < columns ? to_float(src[c + j]) : 0.f;
    }
}

inline void micro_kernel(int64_t kc, const float* a, const float* b, float* c, int64_t ldc, bool add) {
    vf acc[MR][2];
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < 2; ++j) acc[i][j] = splat(0); /* each k block sums from zero: the error grows with K / KC */
    for (int64_t k = 0; k < kc; ++k, a += MR, b += NR) {
        const vf b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 6
        for (int i = 0; i < MR; ++i) {
            const vf ai = splat(a[i]);
            acc[i][0] += ai * b0;
            acc[i][1] += ai * b1;
        }
    }
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < 2; ++j) store(c + i * ldc + j * W, add ? load(c + i * ldc + j * W) + acc[i][j] : acc[i][j]);
}

/* One block: m <= MC rows, n <= NC columns (a multiple of NR after padding). pack_a(out, k0, k1) and pack_b fill panels
 * for k0..k1-1. Returns C, row-major with row stride NC, in `memory` (kBlockFloats). */
template <class PackA, class PackB>
const float* multiply(int64_t m, int64_t n, int64_t K, float* memory, PackA pack_a, PackB pack_b) {
    float *a = memory, *b = a + int64_t(MC) * KC + 16, *c = b + int64_t(KC) * NC + 16;
    for (int64_t k0 = 0; k0 < K; k0 += KC) {
        const int64_t k1 = K - k0 < KC ? K : k0 + KC, kc = k1 - k0;
        pack_a(a, k0, k1);
        pack_b(b, k0, k1);
        for (int64_t j = 0; j < n; j += NR)
            for (int64_t i = 0; i < m; i += MR) micro_kernel(kc, a + i * kc, b + j * kc, c + i * NC + j, NC, k0 > 0);
    }
    return c;
}

/* Rows of each piece when m rows are cut into equal pieces of at most MC, a multiple of MR. */
inline int64_t piece(int64_t m) {
    const int64_t pieces = (m + MC - 1) / MC, each = (m + pieces - 1) / pieces;
    return (each + MR - 1) / MR * MR;
}

/* n floats of a row of C, which is padded to whole vectors, to storage. */
template <class S>
void copy_row(const float* from, S* to, int64_t n) {
    each_vector(n, [&](int64_t i, auto rest) { store(to + i, load(from + i), rest); });
}

}  // namespace
