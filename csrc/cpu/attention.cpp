#include "fastmoe/attention.h"

#include <math.h>
#include <omp.h>
#include <sched.h>

#include "gemm.h"

namespace {

using namespace fm_workspace;

constexpr int kPanels = (kBlock + MR - 1) / MR;
constexpr float kLog2e = 1.44269504f;
static_assert(kHead == FM_ATTENTION_HEAD && kPanel % NR == 0 && kBlock % kPanel == 0, "whole panels");

inline int64_t clamp(int64_t x, int64_t most) { return x < 0 ? 0 : min64(x, most); }
inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* Queries q0 .. q0+m-1 by keys k0 .. k0+n-1. Products leave out the keys that a panel of MR queries sees nothing of: it
 * takes lo .. hi-1, whole panels of keys below and whole vectors above. */
struct Tile {
    const fm_attention& l;
    int64_t q0, m, k0, n;
    bool whole; /* nothing to mask and nothing left out */
    int64_t lo[kPanels], hi[kPanels];

    Tile(const fm_attention& l, int64_t q0, int64_t k0, int64_t n, bool full)
        : l(l), q0(q0), m(min64(kBlock, l.Sq - q0)), k0(k0), n(n), whole(full && n % W == 0) {
        for (int64_t p = 0; p * MR < m; ++p) {
            lo[p] = whole ? 0 : begin(p * MR) / NR * NR;
            hi[p] = whole ? n : up(end(min64(p * MR + MR, m) - 1), W);
            if (hi[p] < lo[p]) hi[p] = lo[p];
        }
    }
    /* The keys that row r sees, counted from k0. */
    int64_t begin(int64_t r) const { return clamp(q0 + r + l.low - k0, n); }
    int64_t end(int64_t r) const { return clamp(q0 + r + l.high + 1 - k0, n); }
    /* -inf for what row r does not see of its panel's keys. */
    void mask(int64_t r, float* scores) const {
        if (whole) return;
        const int32_t from = int32_t(begin(r)), to = int32_t(end(r));
        vi lane;
        for (int i = 0; i < W; ++i) lane[i] = i;
        for (int64_t c = lo[r / MR]; c < hi[r / MR]; c += W) {
            if (c >= from && c + W <= to) continue;
            const vi key = lane + int32_t(c);
            store(scores + c, select((key >= from) & (key < to), load(scores + c), splat(-__builtin_inff())));
        }
    }
    /* The queries, whole panels from the first on, that see any of the keys k .. k+MR-1. */
    void queries(int64_t k, int64_t* from, int64_t* to) const {
        int64_t p = 0, last = (m + MR - 1) / MR;
        const auto sees = [&](int64_t i) { return lo[i] < k + MR && hi[i] > k; };
        while (p < last && !sees(p)) ++p;
        while (last > p && !sees(last - 1)) --last;
        *from = p * MR, *to = min64(last * MR, m);
    }
};

inline void put(float* p, vf v) { store(p, v); }
inline void put(bf16* p, vf v) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh(bit_cast<__m512>(v));
    memcpy(p, &rounded, sizeof(rounded));
#else
    store(p, v);
#endif
}

template <class S>
Lines<S> rows_of(const fm_heads& x, int64_t b, int64_t n) {
    return {static_cast<const S*>(x.p) + b * x.B + n * x.N, x.S, nullptr};
}

/* m rows from row0 on as the left side of a product. */
template <class T, class S>
void stage(T* to, const Lines<S>& from, int64_t row0, int64_t m, int64_t H) {
    for (int64_t r = 0; r < m; ++r, to += row_of(H)) {
        const S* row = from.line(row0 + r);
        each_vector(H, [&](int64_t h, auto n) { store(to + h, load(row + h, n), n); });
        memset(static_cast<void*>(to + H), 0, size_t(padded(H) - H) * sizeof(T));
    }
}

/* n <= kBlock rows from row0 on as the right side of a product that sums over them: panels of the head, `panel` floats
 * apart; zero for the rest of the block. */
template <class L, class S>
void stage_across(float* to, int64_t panel, const Lines<S>& from, int64_t row0, int64_t n, int64_t H) {
    const int64_t lanes = (n + L::K - 1) / L::K;
    for (int64_t h = 0; h < H; h += NR, to += panel) {
        pack_columns<NR, L>(to, from, h, min64(NR, H - h), row0, row0 + n);
        memset(to + lanes * NR, 0, size_t((kBlock / L::K - lanes) * NR) * sizeof(float));
    }
}

/* out[r, k] = rows[r] . key k. rows: `stride` bytes apart. */
template <class L>
void scores(const Tile& t, const void* rows, int64_t stride, const float* keys, int64_t lanes, float* out,
            int64_t out_stride) {
    for (int64_t k = 0; k < t.n; k += NR, keys += lanes * NR)
        for (int64_t r = 0; r < t.m; r += MR) {
            if (k >= t.hi[r / MR] || k + NR <= t.lo[r / MR]) continue;
            with_rows(t.m - r, [&](auto rows_here) {
                constexpr int ROWS = rows_here.value;
                float* to = out + r * out_stride + k;
                tile<L, ROWS, 2>(lanes, in_place<ROWS>(static_cast<const char*>(rows) + r * stride, stride), keys, NR,
                                 [&](int i, int j, vf sum) { store(to + i * out_stride + j * W, sum); });
            });
        }
}

/* take(r, h, sum) with sum_k weights[r, k] values[k, h], k over the keys of row r's panel. */
template <class L, class Take>
void weigh(const Tile& t, const typename L::Between* weights, int64_t stride, const float* values, int64_t panel,
           int64_t H, Take take) {
    for (int64_t h = 0; h < H; h += NR, values += panel)
        for (int64_t r = 0; r < t.m; r += MR)
            with_rows(t.m - r, [&](auto rows_here) {
                constexpr int ROWS = rows_here.value;
                const int64_t lo = t.lo[r / MR], hi = t.hi[r / MR], bytes = sizeof(*weights);
                tile<L, ROWS, 2>((hi - lo) / L::K, in_place<ROWS>(weights + r * stride + lo, stride * bytes),
                                 values + lo / L::K * NR, NR,
                                 [&](int i, int j, vf sum) { take(r + i, h + j * W, sum); });
            });
}

/* Work for `threads` threads; f(item, the thread's number) for 0 .. items-1, each taken in order by whoever is free. */
template <class F>
void for_items(int64_t items, int threads, F f) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) f(item, omp_get_thread_num());
}

template <class S>
struct Attend {
    using L = Lane<S>;
    using T = typename L::Between;
    const fm_attention_cpu_args* a;
    const fm_attention& l;
    const AttentionForward ws;
    const int64_t H, lanes, keys; /* keys: padded */

    explicit Attend(const fm_attention_cpu_args* a)
        : a(a),
          l(a->layer),
          ws(a->workspace, a->layer, L::K),
          H(l.H),
          lanes((l.H + L::K - 1) / L::K),
          keys(blocks_of(l.Sk) * kBlock) {}

    float* values(int64_t head) const { return ws.v + head * (keys / L::K) * padded(H); }
    int64_t panel() const { return keys / L::K * NR; } /* of values */

    void pack(int64_t head, int64_t block) const {
        const int64_t b = head / l.M, m = head % l.M, k0 = block * kBlock, n = min64(kBlock, l.Sk - k0);
        pack_lines<NR, L>(ws.k + (head * keys + k0) * lanes, rows_of<S>(a->k, b, m), k0, n, 0, H);
        stage_across<L>(values(head) + k0 / L::K * NR, panel(), rows_of<S>(a->v, b, m), k0, n, H);
    }

    void attend(int64_t head, int64_t block, float* memory) const {
        const int64_t b = head / l.N, n = head % l.N, kv = b * l.M + n / (l.N / l.M), width = padded(H);
        const int64_t q0 = block * kBlock, m = min64(kBlock, l.Sq - q0), row = row_of(H);
        Cutter cut{memory};
        T* q = cut.take<T>(kBlock * row);
        float *y = cut.take(kBlock * width), *s = cut.take(kBlock * kTile), *total = cut.take(kBlock * W);
        alignas(64) float top[kBlock], next[kBlock], shift[kBlock], decay[kBlock];
        const float scale = l.scale * kLog2e;
        stage(q, rows_of<S>(a->q, b, n), q0, m, H);
        memset(y, 0, size_t(kBlock * width) * sizeof(float));
        memset(total, 0, size_t(kBlock * W) * sizeof(float));
        for (float& x : top) x = -__builtin_inff();
        memcpy(next, top, sizeof(top));
        for (int32_t e = l.q_first[block], end = l.q_first[block + 1]; e < end;) {
            const int64_t k0 = int64_t(l.q_entries[e] >> 1) * kBlock;
            int64_t width_k = kBlock;
            int full = l.q_entries[e++] & 1;
            for (; e < end && width_k < kTile && int64_t(l.q_entries[e] >> 1) * kBlock == k0 + width_k; ++e) {
                full &= l.q_entries[e] & 1;
                width_k += kBlock;
            }
            const Tile t(l, q0, k0, min64(width_k, l.Sk - k0), full);
            scores<L>(t, q, row * int64_t(sizeof(T)), ws.k + (kv * keys + k0) * lanes, lanes, s, kTile);
            for (int64_t r = 0; r < m; ++r) {
                const float* x = s + r * kTile;
                t.mask(r, s + r * kTile);
                vf most = splat(-__builtin_inff());
                for (int64_t c = t.lo[r / MR]; c < t.hi[r / MR]; c += W) most = max(load(x + c), most);
                const float here = max(most) * scale;
                next[r] = here > top[r] ? here : top[r];
            }
            for (int64_t r = 0; r < kBlock; r += W) {
                const vf now = load(next + r), base = select(now == splat(-__builtin_inff()), splat(0), now);
                store(shift + r, base);
                store(decay + r, exp2(load(top + r) - base));
                store(top + r, now);
            }
            for (int64_t r = 0; r < m; ++r) {
                float* x = s + r * kTile;
                vf sum = load(total + r * W) * decay[r];
                for (int64_t c = t.lo[r / MR]; c < t.hi[r / MR]; c += W) {
                    const vf p = exp2(load(x + c) * scale - shift[r]);
                    sum += p;
                    put(reinterpret_cast<T*>(x) + c, p);
                }
                store(total + r * W, sum);
            }
            weigh<L>(t, reinterpret_cast<const T*>(s), kTile * int64_t(sizeof(float) / sizeof(T)),
                     values(kv) + k0 / L::K * NR, panel(), H, [&](int64_t r, int64_t h, vf sum) {
                         float* to = y + r * width + h;
                         store(to, load(to) * decay[r] + sum);
                     });
        }
        for (int64_t r = 0; r < m; ++r) {
            const float all = sum(load(total + r * W)), part = all == 0 ? 0 : 1 / all;
            S* to = static_cast<S*>(a->out) + ((b * l.Sq + q0 + r) * l.N + n) * H;
            each_vector(H, [&](int64_t h, auto n) { store(to + h, load(y + r * width + h) * part, n); });
            a->lse_BNS[head * l.Sq + q0 + r] = all == 0 ? -__builtin_inff() : float(top[r] * M_LN2 + log(double(all)));
        }
    }

    void run() const {
        const int threads = team(l.B * l.N * l.Sq * (l.Sk * H / 64 + 1), l.num_threads);
        const int64_t heads = l.B * l.N, k_blocks = blocks_of(l.Sk);
        for_items(l.B * l.M * k_blocks, threads, [&](int64_t i, int) { pack(i / k_blocks, i % k_blocks); });
        for_items(heads * blocks_of(l.Sq), threads, [&](int64_t i, int thread) {
            attend(i % heads, l.q_order[i / heads], ws.threads + thread * ws.thread);
        });
    }
};

/* The right side of a product that sums over queries: lane k of the panel with column h. */
struct Right {
    const float* base;
    int64_t panel, lane;
    const float* at(int64_t k, int64_t h) const { return base + h / NR * panel + k * lane; }
};

/* One key block at a time gives its dk and dv and adds to dq of the queries that see it: S and dP are computed once. A
 * query block takes what key blocks give it in their order, whoever computes them: an item waits for its turn. Items
 * are begun in the order of the key blocks, so the one that is waited for runs. */
template <class S>
struct AttendBackward {
    using L = Lane<S>;
    using T = typename L::Between;
    const fm_attention_backward_cpu_args* a;
    const fm_attention& l;
    const AttentionBackward ws;
    const int64_t H, lanes, width, row, q_blocks;

    explicit AttendBackward(const fm_attention_backward_cpu_args* a)
        : a(a),
          l(a->layer),
          ws(a->workspace, a->layer, L::K),
          H(l.H),
          lanes((l.H + L::K - 1) / L::K),
          width(padded(l.H)),
          row(row_of(l.H)),
          q_blocks(blocks_of(l.Sq)) {}

    T* left(float* rows, int64_t block) const { return reinterpret_cast<T*>(rows) + block * kBlock * row; }
    Right right(float* rows, float* panels, int64_t block) const {
        if (L::K == 1) return {rows + block * kBlock * row, NR, row};
        return {panels + block * (kBlock / L::K) * width, kBlock / L::K * NR, NR};
    }
    S* dq(int64_t b, int64_t n, int64_t q) const { return static_cast<S*>(a->dq) + ((b * l.Sq + q) * l.N + n) * H; }

    void prepare(int64_t head, int64_t block) const {
        const int64_t b = head / l.N, n = head % l.N, q0 = block * kBlock, m = min64(kBlock, l.Sq - q0);
        const int64_t i = head * q_blocks + block;
        const Lines<S> q = rows_of<S>(a->q, b, n), dy = rows_of<S>(a->dout, b, n);
        const S* y = static_cast<const S*>(a->out) + ((b * l.Sq + q0) * l.N + n) * H;
        stage(left(ws.q, i), q, q0, m, H), stage(left(ws.dy, i), dy, q0, m, H);
        if constexpr (L::K > 1) {
            const Right to = right(ws.q, ws.q_panels, i), to_dy = right(ws.dy, ws.dy_panels, i);
            stage_across<L>(const_cast<float*>(to.base), to.panel, q, q0, m, H);
            stage_across<L>(const_cast<float*>(to_dy.base), to_dy.panel, dy, q0, m, H);
        }
        for (int64_t r = 0; r < m; ++r, y += l.N * H) {
            const S* line = dy.line(q0 + r);
            const int64_t at = head * l.Sq + q0 + r;
            const float lse = a->lse_BNS[at], dlse = a->dlse_BNS ? a->dlse_BNS[at] : 0;
            ws.delta[i * kBlock + r] =
                sum_vectors(H, [&](int64_t h, auto n) { return load(line + h, n) * load(y + h, n); }) - dlse;
            ws.lse[i * kBlock + r] = lse == -__builtin_inff() ? __builtin_inff() : lse; /* its weights: 0 */
            if (l.q_first[block] == l.q_first[block + 1]) memset(dq(b, n, q0 + r), 0, size_t(H) * sizeof(S));
        }
        ws.turn[i] = 0;
    }

    /* A thread's memory. In pairs, weights and their gradients are kept again as the products read them. */
    struct Room {
        float *k_left, *v_left, *k_right, *dk, *dv, *s, *ds, *p_pairs, *ds_pairs;
        T* ds_rows;
        Room(float* memory, int64_t width) {
            Cutter cut{memory};
            k_left = cut.take(kBlock * width), v_left = cut.take(kBlock * width), k_right = cut.take(kBlock * width);
            dk = cut.take(kBlock * width), dv = cut.take(kBlock * width);
            s = cut.take(kBlock * kBlock), ds = cut.take(kBlock * kBlock);
            p_pairs = cut.take(kBlock * kBlock / 2), ds_pairs = cut.take(kBlock * kBlock / 2);
            ds_rows = cut.take<T>(kBlock * kBlock);
            if (L::K == 1) p_pairs = s, ds_pairs = ds, ds_rows = reinterpret_cast<T*>(ds);
        }
    };

    /* s becomes the weights p, ds from dp the gradient p (dp - delta) of the scores; zero outside of a panel's keys. */
    void soften(const Tile& t, int64_t i, const Room& room) const {
        const float *lse = ws.lse + i * kBlock, *delta = ws.delta + i * kBlock;
        for (int64_t r = 0; r < t.m; r += L::K) {
            const bool two = L::K == 2 && r + 1 < t.m;
            t.mask(r, room.s + r * kBlock);
            if (two) t.mask(r + 1, room.s + (r + 1) * kBlock);
            for (int64_t c = 0; c < t.n; c += W) {
                const bool in = c >= t.lo[r / MR] && c < t.hi[r / MR];
                vf p[2] = {splat(0), splat(0)}, d[2] = {splat(0), splat(0)};
                for (int64_t j = 0; in && j < (two ? 2 : 1); ++j) {
                    p[j] = exp2((load(room.s + (r + j) * kBlock + c) * l.scale - lse[r + j]) * kLog2e);
                    d[j] = p[j] * (load(room.ds + (r + j) * kBlock + c) - delta[r + j]);
                }
                if constexpr (L::K == 1) {
                    store(room.s + r * kBlock + c, p[0]);
                    store(room.ds + r * kBlock + c, d[0]);
                } else {
                    T both[2][2][W];
                    for (int j = 0; j < 2; ++j) put(both[0][j], p[j]), put(both[1][j], d[j]);
                    store(room.p_pairs + r / 2 * kBlock + c, Packer<L>::across_all(both[0][0], both[0][1]));
                    store(room.ds_pairs + r / 2 * kBlock + c, Packer<L>::across_all(both[1][0], both[1][1]));
                    for (int j = 0; j < (two ? 2 : 1); ++j) put(room.ds_rows + (r + j) * kBlock + c, d[j]);
                }
            }
        }
    }

    /* to[k, h] += sum over the queries that see k of weights[query, k] rows[query, h]. */
    void gather(const Tile& t, const float* weights, const Right& rows, float* to) const {
        for (int64_t h = 0; h < H; h += NR)
            for (int64_t k = 0; k < t.n; k += MR) {
                int64_t from = 0, end = t.m;
                if (!t.whole) t.queries(k, &from, &end);
                from /= L::K, end = (end + L::K - 1) / L::K;
                if (from >= end) continue;
                with_rows(t.n - k, [&](auto rows_here) {
                    constexpr int ROWS = rows_here.value;
                    float* c = to + k * width + h;
                    tile<L, ROWS, 2>(end - from, Transposed{weights + from * kBlock + k, kBlock}, rows.at(from, h),
                                     rows.lane, [&](int i, int j, vf sum) {
                                         float* x = c + i * width + j * W;
                                         store(x, load(x) + sum);
                                     });
                });
            }
    }

    void wait(int64_t i, int32_t turn) const {
        for (int spins = 0; __atomic_load_n(ws.turn + i, __ATOMIC_ACQUIRE) != turn; ++spins)
            if (spins > 100) sched_yield();
    }

    void go(int64_t kv, int64_t block, float* memory) const {
        const int64_t b = kv / l.M, m = kv % l.M, k0 = block * kBlock, keys = min64(kBlock, l.Sk - k0),
                      each = l.N / l.M;
        const Room room(memory, width);
        const Lines<S> k = rows_of<S>(a->k, b, m);
        pack_lines<NR, L>(room.k_left, k, k0, keys, 0, H);
        pack_lines<NR, L>(room.v_left, rows_of<S>(a->v, b, m), k0, keys, 0, H);
        stage_across<L>(room.k_right, kBlock / L::K * NR, k, k0, keys, H);
        memset(room.dk, 0, size_t(kBlock * width) * sizeof(float));
        memset(room.dv, 0, size_t(kBlock * width) * sizeof(float));
        for (int64_t n = m * each; n < (m + 1) * each; ++n)
            for (int32_t e = l.k_first[block]; e < l.k_first[block + 1]; ++e) {
                const int64_t q_block = l.k_entries[e] >> 1, i = (b * l.N + n) * q_blocks + q_block;
                const Tile t(l, q_block * kBlock, k0, keys, l.k_entries[e] & 1);
                scores<L>(t, left(ws.q, i), row * int64_t(sizeof(T)), room.k_left, lanes, room.s, kBlock);
                scores<L>(t, left(ws.dy, i), row * int64_t(sizeof(T)), room.v_left, lanes, room.ds, kBlock);
                soften(t, i, room);
                gather(t, room.p_pairs, right(ws.dy, ws.dy_panels, i), room.dv);
                gather(t, room.ds_pairs, right(ws.q, ws.q_panels, i), room.dk);
                const int32_t turn = l.k_turn[e], turns = l.q_first[q_block + 1] - l.q_first[q_block];
                float* sums = ws.dq + i * kBlock * width;
                wait(i, turn);
                weigh<L>(t, room.ds_rows, kBlock, room.k_right, kBlock / L::K * NR, H,
                         [&](int64_t r, int64_t h, vf sum) {
                             float* to = sums + r * width + h;
                             store(to, turn ? load(to) + sum : sum);
                         });
                __atomic_store_n(ws.turn + i, turn + 1, __ATOMIC_RELEASE);
                for (int64_t r = 0; turn + 1 == turns && r < t.m; ++r)
                    write(sums + r * width, l.scale, dq(b, n, t.q0 + r));
            }
        for (int64_t r = 0; r < keys; ++r) {
            const int64_t at = ((b * l.Sk + k0 + r) * l.M + m) * H;
            write(room.dk + r * width, l.scale, static_cast<S*>(a->dk) + at);
            write(room.dv + r * width, 1, static_cast<S*>(a->dv) + at);
        }
    }
    void write(const float* from, float factor, S* to) const {
        each_vector(H, [&](int64_t h, auto n) { store(to + h, load(from + h) * factor, n); });
    }

    void run() const {
        const int threads = team(l.B * l.N * l.Sq * (l.Sk * H / 64 + 1), l.num_threads);
        const int64_t kv_heads = l.B * l.M, items = kv_heads * blocks_of(l.Sk);
        for_items(l.B * l.N * q_blocks, threads, [&](int64_t i, int) { prepare(i / q_blocks, i % q_blocks); });
        *ws.next = 0;
#pragma omp parallel num_threads(threads)
        for (int64_t i; (i = __atomic_fetch_add(ws.next, 1, __ATOMIC_RELAXED)) < items;)
            go(i % kv_heads, i / kv_heads, ws.threads + omp_get_thread_num() * ws.thread);
    }
};

/* A head turned by its angles, or against them. */
template <class S>
void turn(const S* from, const float* table, float direction, S* to, int64_t half) {
    each_vector(half, [&](int64_t h, auto n) {
        const vf l = load(from + h, n), r = load(from + half + h, n), c = load(table + h, n),
                 s = load(table + half + h, n) * direction;
        store(to + h, l * c - r * s, n);
        store(to + half + h, r * c + l * s, n);
    });
}

template <class S>
void rope(const fm_rope_cpu_args* a) {
    const int64_t H = a->H, rows = a->B * a->S, heads = a->N + 2 * a->M;
    const int64_t counts[] = {a->N, a->M, a->M};
    S* const to[] = {static_cast<S*>(a->q_BSNH), static_cast<S*>(a->k_BSMH), static_cast<S*>(a->v_BSMH)};
#pragma omp parallel for num_threads(team(rows * heads * H, a->num_threads)) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const S* from = static_cast<const S*>(a->qkv_BSAH) + row * heads * H;
        const float* table = a->table_SH + row % a->S * H;
        for (int i = 0; i < 3; ++i)
            for (int64_t n = 0; n < counts[i]; ++n, from += H) {
                S* head = to[i] + (row * counts[i] + n) * H;
                if (i < 2)
                    turn(from, table, 1, head, H / 2);
                else
                    memcpy(static_cast<void*>(head), from, size_t(H) * sizeof(S));
            }
    }
}

template <class S>
void rope_backward(const fm_rope_backward_cpu_args* a) {
    const int64_t H = a->H, rows = a->B * a->S, heads = a->N + 2 * a->M;
    const int64_t counts[] = {a->N, a->M, a->M};
    const fm_heads* const from[] = {&a->dq, &a->dk, &a->dv};
#pragma omp parallel for num_threads(team(rows * heads * H, a->num_threads)) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        S* to = static_cast<S*>(a->dqkv_BSAH) + row * heads * H;
        const float* table = a->table_SH + row % a->S * H;
        for (int i = 0; i < 3; ++i)
            for (int64_t n = 0; n < counts[i]; ++n, to += H) {
                const S* head = rows_of<S>(*from[i], row / a->S, n).line(row % a->S);
                if (i < 2)
                    turn(head, table, -1, to, H / 2);
                else
                    memcpy(static_cast<void*>(to), head, size_t(H) * sizeof(S));
            }
    }
}

}  // namespace

FM_KERNEL(fm_attention_cpu) {
    FM_WITH_DTYPE(a->layer.dtype, S, { Attend<S>(a).run(); })
    return FM_OK;
}

FM_KERNEL(fm_attention_backward_cpu) {
    FM_WITH_DTYPE(a->layer.dtype, S, { AttendBackward<S>(a).run(); })
    return FM_OK;
}

FM_KERNEL(fm_rope_cpu) {
    FM_WITH_DTYPE(a->dtype, S, { rope<S>(a); })
    return FM_OK;
}

FM_KERNEL(fm_rope_backward_cpu) {
    FM_WITH_DTYPE(a->dtype, S, { rope_backward<S>(a); })
    return FM_OK;
}
