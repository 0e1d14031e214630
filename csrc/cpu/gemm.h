/* A packed, register-tiled matrix product of one block, C[m, n] = sum_k A[m, k] B[k, n], with the caller's packing and
 * epilogue.
 *
 * A is packed into panels of MR rows, B into panels of NR columns, zero-padded; the micro-kernel keeps an MR x NR tile
 * of C in registers. A packed lane is 32 bits wide: one float32 whatever the storage, or, where the CPU multiplies
 * pairs of bfloat16, two neighbours in k. One task owns one block of C and adds k in order, so results do not depend on
 * how many threads share the blocks.
 */
#pragma once
#include "vec.h"
#include "workspace.h"

namespace {

constexpr int MR = 6, NR = 2 * W;
constexpr int MC = fm_workspace::kRowsOfBlock, NC = fm_workspace::kColumnsOfBlock, KC = fm_workspace::kLanesOfBlock;
static_assert(MC % MR == 0 && NC % NR == 0, "whole panels");

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* What a packed lane holds, and the type in which rows between two products are kept. */
struct single {
    static constexpr int K = 1;
    typedef float Between;
};
struct pairs {
    static constexpr int K = 2;
    typedef bf16 Between;
};
template <class S>
struct lane_of {
    typedef single type;
};
#if defined(__AVX512BF16__)
template <>
struct lane_of<bf16> {
    typedef pairs type;
};
#endif
template <class S>
using Lane = typename lane_of<S>::type;

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

/* one: the lane of *p and, in a pair, *q. along: four lanes from a line, k runs along it. across: the lanes of four or
 * of W neighbouring columns, p and q being neighbours in k. */
template <class L>
struct Packer {
    template <class S>
    static float one(const S* p, const S*) {
        return to_float(*p);
    }
    template <class S>
    static v4 along(const S* p) {
        return load4(p);
    }
    template <class S>
    static v4 across(const S* p, const S*) {
        return load4(p);
    }
    template <class S>
    static vf across_all(const S* p, const S*) {
        return load(p);
    }
};
#if defined(__AVX512BF16__)
template <>
struct Packer<pairs> {
    template <class S>
    static uint32_t bits(const S* p) {
        bf16 b;
        from_float(&b, to_float(*p));
        return b.bits;
    }
    template <class S>
    static float one(const S* p, const S* q) {
        return bit_cast<float>(bits(p) | (q ? bits(q) << 16 : 0));
    }
    static v4 along(const bf16* p) { return load_bits<v4>(p); }
    static v4 along(const float* p) { return bit_cast<v4>(_mm256_cvtneps_pbh(_mm256_loadu_ps(p))); }
    static v4 across(const bf16* p, const bf16* q) {
        return bit_cast<v4>(_mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)),
                                               _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))));
    }
    static v4 across(const float* p, const float* q) {
        return bit_cast<v4>(_mm_unpacklo_epi16(bit_cast<__m128i>(_mm_cvtneps_pbh(_mm_loadu_ps(p))),
                                               bit_cast<__m128i>(_mm_cvtneps_pbh(_mm_loadu_ps(q)))));
    }
    static vf merge(__m256i p, __m256i q) {
        return bit_cast<vf>(_mm512_or_si512(_mm512_cvtepu16_epi32(p), _mm512_slli_epi32(_mm512_cvtepu16_epi32(q), 16)));
    }
    static vf across_all(const bf16* p, const bf16* q) { return merge(load_bits<__m256i>(p), load_bits<__m256i>(q)); }
    static vf across_all(const float* p, const float* q) {
        return merge(bit_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(p))),
                     bit_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(q))));
    }
};
#endif

/* A matrix of lines; line i begins at base + (index ? index[i] : i) * stride and is contiguous. */
template <class S>
struct Lines {
    const S* base;
    int64_t stride;
    const int32_t* index;
    const S* line(int64_t i) const { return base + int64_t(index ? index[i] : i) * stride; }
};

/* Panels whose P members are lines, k runs along them: out[panel][lane][member]. Writes up to 2 floats past the last
 * panel. */
template <int P, class L, class S>
void pack_lines(float* out, const Lines<S>& from, int64_t line0, int64_t lines, int64_t k0, int64_t k1) {
    const int64_t kc = k1 - k0, lanes = (kc + L::K - 1) / L::K;
    static const S zeros[(KC > fm_workspace::kHead ? KC : fm_workspace::kHead) * L::K] = {};
    for (int64_t l = 0; l < lines; l += P, out += P * lanes) {
        const S* src[(P + 3) / 4 * 4];
        for (int j = 0; j < (P + 3) / 4 * 4; ++j)
            src[j] = j < P && l + j < lines ? from.line(line0 + l + j) + k0 : zeros;
        int64_t k = 0;
        for (; (k + 4) * L::K <= kc; k += 4)
            for (int j = 0; j < P; j += 4) {
                const v4 a = Packer<L>::along(src[j] + k * L::K), b = Packer<L>::along(src[j + 1] + k * L::K),
                         c = Packer<L>::along(src[j + 2] + k * L::K), d = Packer<L>::along(src[j + 3] + k * L::K);
                const v4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), AB = __builtin_shufflevector(a, b, 2, 6, 3, 7);
                const v4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
                const v4 rows[4] = {
                    __builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
                    __builtin_shufflevector(AB, CD, 0, 1, 4, 5), __builtin_shufflevector(AB, CD, 2, 3, 6, 7)};
                for (int i = 0; i < 4; ++i)
                    memcpy(out + (k + i) * P + j, &rows[i], P - j < 4 ? (P - j) * sizeof(float) : sizeof(v4));
            }
        for (; k < lanes; ++k)
            for (int j = 0; j < P; ++j) {
                const S* p = src[j] + k * L::K;
                out[k * P + j] = Packer<L>::one(p, k * L::K + 1 < kc ? p + 1 : nullptr);
            }
    }
}

/* Panels whose P members are neighbours inside a line, k counts lines: out[panel][lane][member]. */
template <int P, class L, class S>
void pack_columns(float* out, const Lines<S>& from, int64_t column0, int64_t columns, int64_t k0, int64_t k1) {
    const int64_t kc = k1 - k0, lanes = (kc + L::K - 1) / L::K;
    static const S zeros[NC > MC ? NC : MC] = {};
    for (int64_t k = 0; k < lanes; ++k) {
        const S *p = from.line(k0 + k * L::K) + column0,
                *q = k * L::K + 1 < kc ? from.line(k0 + k * L::K + 1) + column0 : zeros;
        float* to = out + k * P;
        int64_t c = 0;
        if constexpr (P < W && P >= 4) /* a vector each: what it holds too much is written over by the lanes after it */
            for (; k * P + W <= lanes * P && c + W <= columns; c += P, to += P * lanes)
                store(to, Packer<L>::across_all(p + c, q + c));
        for (; c + P <= columns; c += P, to += P * lanes) {
            if constexpr (P % W == 0) {
                for (int j = 0; j < P; j += W) store(to + j, Packer<L>::across_all(p + c + j, q + c + j));
            } else {
                static_assert(P >= 4, "the last four may overlap those before");
                for (int j = 0; j < P; j = j + 4 < P && j + 8 > P ? P - 4 : j + 4) {
                    const v4 v = Packer<L>::across(p + c + j, q + c + j);
                    memcpy(to + j, &v, sizeof(v));
                }
            }
        }
        for (int j = 0; c < columns && j < P; ++j) to[j] = c + j < columns ? Packer<L>::one(p + c + j, q + c + j) : 0.f;
    }
}

/* A panel of A: lane k of row i. Packed, or read where the rows are, each row's lanes being contiguous. */
struct Packed {
    const float* a;
    const float* at(int64_t k, int i) const { return a + k * MR + i; }
};
template <int ROWS>
struct InPlace {
    const char* row[ROWS];
    const char* at(int64_t k, int i) const { return row[i] + k * int64_t(sizeof(float)); }
};
/* Rows `stride` bytes apart. */
template <int ROWS>
InPlace<ROWS> in_place(const void* rows, int64_t stride) {
    InPlace<ROWS> panel;
    for (int i = 0; i < ROWS; ++i) panel.row[i] = static_cast<const char*>(rows) + i * stride;
    return panel;
}
/* Rows that are neighbours in memory, the lanes of k `stride` floats apart. */
struct Transposed {
    const float* a;
    int64_t stride;
    const float* at(int64_t k, int i) const { return a + k * stride + i; }
};

template <class L>
inline vf multiply_add(vf sum, const void* a, vf b) {
#if defined(__AVX512BF16__)
    if constexpr (L::K == 2)
        return bit_cast<vf>(_mm512_dpbf16_ps(bit_cast<__m512>(sum),
                                             bit_cast<__m512bh>(_mm512_set1_epi32(load_bits<int32_t>(a))),
                                             bit_cast<__m512bh>(b)));
    else
#endif
        return sum + splat(load_bits<float>(a)) * b;
}

/* take(i, j, sum) gets vector j of row i of ROWS x V vectors of C, from a panel of A and as many columns of B, `stride`
 * apart from one lane of k to the next. */
template <class L, int ROWS, int V, class A, class B, class Take>
inline void tile(int64_t lanes, const A a, const B* b, int64_t stride, Take take) {
    vf acc[ROWS][V];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < V; ++j) acc[i][j] = splat(0);
    for (int64_t k = 0; k < lanes; ++k, b += stride) {
        vf columns[V];
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) columns[j] = load(b + j * W);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < V; ++j) acc[i][j] = multiply_add<L>(acc[i][j], a.at(k, i), columns[j]);
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < V; ++j) take(i, j, acc[i][j]);
}

/* A tile to its place in a block. Each block of k sums from zero, so that the error grows with K / KC. */
template <class L, int ROWS, int V = 2, class A, class B>
void micro_kernel(int64_t lanes, const A a, const B* b, int64_t stride, float* c, bool add) {
    tile<L, ROWS, V>(lanes, a, b, stride, [&](int i, int j, vf sum) {
        float* to = c + i * NC + j * W;
        store(to, add ? load(to) + sum : sum);
    });
}

/* The vectors of C beside each other that the registers hold for so few rows: the wider, the longer the pieces in which
 * B is read where it is. */
constexpr int wide(int rows) {
    const int sums = W == 16 ? 24 : 8;
    return rows * 8 <= sums ? 8 : rows * 4 <= sums ? 4 : 2;
}

/* f(count<n>) with n = rows, at most MR. */
template <int N>
struct count {
    static constexpr int value = N;
};
template <class F>
inline void with_rows(int64_t rows, F f) {
    switch (rows) {
        case 1:
            return f(count<1>{});
        case 2:
            return f(count<2>{});
        case 3:
            return f(count<3>{});
        case 4:
            return f(count<4>{});
        case 5:
            return f(count<5>{});
        default:
            return f(count<MR>{});
    }
}

/* Where one thread's memory begins: packed A (with room for one panel's overlapping store), packed B, C. */
struct Block {
    float *a, *b, *c;
    explicit Block(float* memory) : a(memory), b(a + int64_t(MC) * KC + 16), c(b + int64_t(KC) * NC + 16) {}
};
static_assert(int64_t(MC) * KC + 16 + int64_t(KC) * NC + 16 + int64_t(MC) * NC <= fm_workspace::kThreadFloats, "room");

/* One block: m <= MC rows, n <= NC columns. pack_a(out, k0, k1) and pack_b fill panels for k0..k1-1. Returns C,
 * row-major with row stride NC, in `memory` (kThreadFloats), zero from n to the end of n's panel. */
template <class L, class PackA, class PackB>
float* multiply(int64_t m, int64_t n, int64_t K, float* memory, PackA pack_a, PackB pack_b) {
    const Block block(memory);
    for (int64_t k0 = 0; k0 < K; k0 += KC * L::K) {
        const int64_t k1 = min64(K, k0 + KC * L::K), lanes = (k1 - k0 + L::K - 1) / L::K;
        pack_a(block.a, k0, k1);
        pack_b(block.b, k0, k1);
        for (int64_t j = 0; j < n; j += NR)
            for (int64_t i = 0; i < m; i += MR)
                with_rows(m - i, [&](auto rows) {
                    micro_kernel<L, rows.value>(lanes, Packed{block.a + i * lanes}, block.b + j * lanes, NR,
                                                block.c + i * NC + j, k0 > 0);
                });
    }
    return block.c;
}

/* B as it is stored: columns of the product are lines (k runs along them) or k counts lines. */
template <class S>
struct Weight {
    Lines<S> lines;
    bool k_along;
};
/* Columns n0 to n0+n of B, which go to columns `at` and on of C. */
struct Columns {
    int64_t n0, n, at;
};

constexpr int64_t kThin = 2 * MR; /* up to so many rows reading B once beats packing it */
constexpr int64_t kThinK = 2048;

/* C for a few rows, B read where it is. Columns of C past a part's end are garbage up to a panel's end. */
template <class SA, class SB>
float* multiply_thin(const Lines<SA>& a, int64_t r0, int64_t m, int64_t K, const Weight<SB>& b, const Columns* parts,
                     int num_parts, float* memory) {
    const Block block(memory);
    for (int64_t i = 0; i < m; i += MR)
        with_rows(m - i, [&](auto rows) {
            constexpr int ROWS = rows.value;
            float* c = block.c + i * NC;
            if (b.k_along) {
                for (int64_t k0 = 0; k0 < K; k0 += kThinK) { /* rows of A as floats, zero past kc */
                    const int64_t kc = min64(kThinK, K - k0), whole = kc / W * W;
                    float* x = block.a;
                    for (int j = 0; j < ROWS; ++j) {
                        const SA* from = a.line(r0 + i + j) + k0;
                        each_vector(kc, [&](int64_t k, auto n) { store(x + j * kThinK + k, load(from + k, n)); });
                    }
                    for (int part = 0; part < num_parts; ++part)
                        for (int64_t n = 0; n < parts[part].n; ++n) {
                            const SB* w = b.lines.line(parts[part].n0 + n) + k0;
                            vf acc[ROWS];
                            for (int j = 0; j < ROWS; ++j) acc[j] = splat(0);
                            for (int64_t k = 0; k < whole; k += W) {
                                const vf wk = load(w + k);
                                for (int j = 0; j < ROWS; ++j) acc[j] += load(x + j * kThinK + k) * wk;
                            }
                            if (whole < kc) {
                                const vf wk = load_part(w + whole, int(kc - whole));
                                for (int j = 0; j < ROWS; ++j) acc[j] += load(x + j * kThinK + whole) * wk;
                            }
                            float* to = c + parts[part].at + n;
                            for (int j = 0; j < ROWS; ++j) to[j * NC] = k0 ? to[j * NC] + sum(acc[j]) : sum(acc[j]);
                        }
                }
            } else {
                for (int64_t k0 = 0; k0 < K; k0 += KC) {
                    const int64_t k1 = min64(K, k0 + KC);
                    pack_lines<MR, single>(block.a, a, r0 + i, ROWS, k0, k1);
                    for (int part = 0; part < num_parts; ++part)
                        for (int64_t n = 0, step; n < parts[part].n; n += step) {
                            float* to = c + parts[part].at + n;
                            const SB* from = b.lines.line(k0) + parts[part].n0 + n;
                            step = n + wide(ROWS) * W <= parts[part].n ? wide(ROWS) * W : NR;
                            if (step > NR) {
                                micro_kernel<single, ROWS, wide(ROWS)>(k1 - k0, Packed{block.a}, from, b.lines.stride,
                                                                       to, k0 > 0);
                            } else if (n + NR <= parts[part].n) {
                                micro_kernel<single, ROWS>(k1 - k0, Packed{block.a}, from, b.lines.stride, to, k0 > 0);
                            } else {
                                pack_columns<NR, single>(block.b, b.lines, parts[part].n0 + n, parts[part].n - n, k0,
                                                         k1);
                                micro_kernel<single, ROWS>(k1 - k0, Packed{block.a}, block.b, NR, to, k0 > 0);
                            }
                        }
                }
            }
        });
    return block.c;
}

/* Lanes that need no packing: the storage is what a lane holds. */
template <class L, class S>
constexpr bool kIsLane = sizeof(S) * L::K == sizeof(float);

/* C [m, .] of rows r0.. of A (k runs along its lines) with parts of B. thin: m <= kThin, and so it is whatever the
 * thread count, since the two ways round differently. */
template <class L, class SA, class SB>
float* multiply(const Lines<SA>& a, int64_t r0, int64_t m, bool thin, int64_t K, const Weight<SB>& b,
                const Columns* parts, int num_parts, float* memory) {
    if (thin) return multiply_thin(a, r0, m, K, b, parts, num_parts, memory);
    const Block block(memory);
    const int64_t n = parts[num_parts - 1].at + parts[num_parts - 1].n;
    for (int64_t k0 = 0; k0 < K; k0 += KC * L::K) {
        const int64_t k1 = min64(K, k0 + KC * L::K), lanes = (k1 - k0 + L::K - 1) / L::K;
        const bool in_place = kIsLane<L, SA> && (k1 - k0) % L::K == 0;
        if (!in_place) pack_lines<MR, L>(block.a, a, r0, m, k0, k1);
        for (int part = 0; part < num_parts; ++part) {
            const Columns& p = parts[part];
            if (b.k_along)
                pack_lines<NR, L>(block.b + p.at * lanes, b.lines, p.n0, p.n, k0, k1);
            else
                pack_columns<NR, L>(block.b + p.at * lanes, b.lines, p.n0, p.n, k0, k1);
        }
        for (int64_t j = 0; j < n; j += NR)
            for (int64_t i = 0; i < m; i += MR)
                with_rows(m - i, [&](auto rows) {
                    const float* columns = block.b + j * lanes;
                    float* c = block.c + i * NC + j;
                    if (in_place) {
                        InPlace<rows.value> panel;
                        for (int r = 0; r < rows.value; ++r)
                            panel.row[r] = reinterpret_cast<const char*>(a.line(r0 + i + r) + k0);
                        micro_kernel<L, rows.value>(lanes, panel, columns, NR, c, k0 > 0);
                    } else {
                        micro_kernel<L, rows.value>(lanes, Packed{block.a + i * lanes}, columns, NR, c, k0 > 0);
                    }
                });
    }
    return block.c;
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
