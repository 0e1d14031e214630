#include "fastmoe/permutation.h"

#include <omp.h>

#include "vec.h"

namespace {

typedef int32_t vi4 __attribute__((vector_size(16)));

/* Counters of E experts and the dropped slots, in whole cache lines: two threads' share none. */
inline int64_t counters(int64_t E) { return (E + 16) / 16 * 16; }

/* A thread counts, then writes, one chunk of the slots; the result does not depend on how many there are. Every chunk
 * costs a pass over its counters, so many experts mean few chunks. */
constexpr int64_t kChunks = 16, kLanes = 4;

int64_t chunks_for(int64_t slots, int64_t E, int64_t threads) {
    const int64_t most = slots / (E + 8192), chunks = threads < kChunks ? threads : kChunks;
    return most < 1 ? 1 : chunks < most ? chunks : most;
}

inline int64_t int_at(const void* p, int is_int64, int64_t i) {
    return is_int64 ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
}

/* Counts a chunk's slots by id + 1: slot s in row s % 4 of counters, so as not to wait for its neighbours' (stride 0:
 * in one row). Returns the first slot whose id is outside -1..E-1, or -1. */
template <class Id>
int64_t count_slots(const Id* ids, int64_t begin, int64_t end, int64_t E, int64_t stride, int32_t* count) {
    const auto at = [&](int64_t s) { return uint64_t(int64_t(ids[s])) + 1; };
    const uint64_t most = uint64_t(E);
    int64_t s = begin;
    for (; s + 4 <= end; s += 4) {
        const uint64_t i0 = at(s), i1 = at(s + 1), i2 = at(s + 2), i3 = at(s + 3);
        if (i0 > most || i1 > most || i2 > most || i3 > most) break;
        ++count[i0], ++count[stride + i1], ++count[2 * stride + i2], ++count[3 * stride + i3];
    }
    for (; s < end; ++s) {
        if (at(s) > most) return s;
        ++count[at(s)];
    }
    return -1;
}

/* row[id + 1]: where the chunk's next slot of this id goes; from row `used` on the dropped ones, whose src is cleared
 * later. */
template <class Id>
void place_slots(const Id* ids, int64_t begin, int64_t end, int32_t used, int32_t* row, int32_t* src, int32_t* dst) {
    int64_t s = begin;
    for (; s + 4 <= end; s += 4) {
        const vi4 r = {row[ids[s] + 1]++, row[ids[s + 1] + 1]++, row[ids[s + 2] + 1]++, row[ids[s + 3] + 1]++};
        for (int i = 0; i < 4; ++i) src[r[i]] = int32_t(s + i);
        const vi4 to = r | (r >= used);
        memcpy(dst + s, &to, sizeof(to)); /* one store instead of four: these are what takes the time */
    }
    for (; s < end; ++s) {
        const int32_t r = row[ids[s] + 1]++;
        src[r] = int32_t(s);
        dst[s] = r < used ? r : -1;
    }
}

template <class Id>
fm_status sort_slots(fm_build_routing_cpu_args* a, const Id* ids) {
    const int64_t slots = a->T * a->K, E = a->E, chunks = chunks_for(slots, E, a->num_threads);
    const int64_t width = counters(E), lanes = chunks * kLanes <= kChunks && slots >= 16 * E * chunks ? kLanes : 1;
    int32_t* counts = a->workspace;                 /* [chunks, lanes, width], of which lane 0 holds the sum */
    int32_t* rows = a->workspace + kChunks * width; /* [chunks, width] where the next slot of a chunk goes */
    int64_t bad_slot[kChunks];
#pragma omp parallel num_threads(chunks)
    {
        const int64_t first = omp_get_thread_num(), step = omp_get_num_threads();
        for (int64_t c = first; c < chunks; c += step) {
            int32_t* count = counts + c * lanes * width;
            memset(count, 0, size_t(lanes * width) * sizeof(int32_t));
            bad_slot[c] =
                count_slots(ids, c * slots / chunks, (c + 1) * slots / chunks, E, lanes > 1 ? width : 0, count);
            for (int64_t lane = 1; lane < lanes; ++lane)
                for (int64_t i = 0; i <= E; ++i) count[i] += count[lane * width + i];
        }
#pragma omp barrier
        for (int64_t c = first; c < chunks; c += step) {
            bool good = true;
            for (int64_t other = 0; other < chunks; ++other) good &= bad_slot[other] < 0;
            if (!good) continue;
            int32_t* row = rows + c * width;
            int32_t next = 0, used = 0;
            for (int64_t e = 0; e <= E; ++e) { /* then the dropped ones, which are counted first */
                const int64_t at = e < E ? e + 1 : 0;
                used = next;
                if (c == 0) a->offsets[e] = next;
                for (int64_t other = 0; other < chunks; ++other) {
                    if (other == c) row[at] = next;
                    next += counts[other * lanes * width + at];
                }
            }
            place_slots(ids, c * slots / chunks, (c + 1) * slots / chunks, used, row, a->src_row_R, a->dst_row_TK);
        }
    }
    for (int64_t c = 0; c < chunks; ++c)
        if (bad_slot[c] >= 0) {
            a->bad = int64_t(ids[bad_slot[c]]);
            return FM_BAD_VALUE;
        }
    for (int64_t r = a->offsets[E]; r < slots; ++r) a->src_row_R[r] = -1;
    return FM_OK;
}

/* Keeps the first `capacity` slots of an expert in order of (k, t); a kept slot's dst_row becomes 0, a dropped one's
 * -1. */
template <class Id>
fm_status sort_slots_capped(fm_build_routing_cpu_args* a, const Id* ids) {
    const int64_t T = a->T, K = a->K, E = a->E;
    int32_t* row = a->workspace;
    memset(row, 0, size_t(E) * sizeof(int32_t));
    for (int64_t k = 0; k < K; ++k)
        for (int64_t t = 0; t < T; ++t) {
            const int64_t e = ids[t * K + k];
            if (e < -1 || e >= E) {
                a->bad = e;
                return FM_BAD_VALUE;
            }
            const bool kept = e >= 0 && row[e] < a->capacity;
            a->dst_row_TK[t * K + k] = kept ? 0 : -1;
            if (kept) ++row[e];
        }
    int32_t next = 0;
    for (int64_t e = 0; e < E; ++e) {
        const int32_t count = row[e];
        row[e] = a->offsets[e] = next;
        next += count;
    }
    a->offsets[E] = next;
    for (int64_t s = 0; s < T * K; ++s)
        if (a->dst_row_TK[s] == 0) {
            const int32_t r = row[ids[s]]++;
            a->dst_row_TK[s] = r;
            a->src_row_R[r] = int32_t(s);
        }
    for (int64_t r = next; r < T * K; ++r) a->src_row_R[r] = -1;
    return FM_OK;
}

template <class S, class Weight>
void unpermute(const fm_unpermute_cpu_args* a) {
    const S* y = static_cast<const S*>(a->y_RD);
    const Weight* weights = static_cast<const Weight*>(a->weights_TK);
    S* out = static_cast<S*>(a->out_TD);
    const int64_t K = a->K, D = a->D;
#pragma omp parallel for num_threads(a->num_threads) schedule(static)
    for (int64_t t = 0; t < a->T; ++t) {
        const int32_t* dst = a->dst_row_TK + t * K;
        each_vector(D, [&](int64_t d, auto n) {
            vf total = splat(0);
            for (int64_t k = 0; k < K; ++k) {
                if (dst[k] < 0) continue;
                const vf v = load(y + int64_t(dst[k]) * D + d, n);
                total += weights ? v * to_float(weights[t * K + k]) : v;
            }
            store(out + t * D + d, total, n);
        });
    }
}

template <class S, class Weight>
void unpermute_backward(const fm_unpermute_backward_cpu_args* a) {
    const S* dout = static_cast<const S*>(a->dout_TD);
    const S* y = static_cast<const S*>(a->y_RD);
    const Weight* weights = static_cast<const Weight*>(a->weights_TK);
    S* dy = static_cast<S*>(a->dy_RD);
    Weight* dweights = static_cast<Weight*>(a->dweights_TK);
    const int64_t K = a->K, D = a->D;
#pragma omp parallel for num_threads(a->num_threads) schedule(static)
    for (int64_t s = 0; s < a->T * K; ++s) {
        const int32_t r = a->dst_row_TK[s];
        if (r < 0) {
            from_float(dweights + s, 0);
            continue;
        }
        const S *from = dout + s / K * D, *row = y + int64_t(r) * D;
        S* to = dy + int64_t(r) * D;
        const float w = to_float(weights[s]);
        const float dot = sum_vectors(D, [&](int64_t d, auto n) {
            const vf g = load(from + d, n);
            store(to + d, g * w, n);
            return g * load(row + d, n);
        });
        from_float(dweights + s, dot);
    }
#pragma omp parallel for num_threads(a->num_threads) schedule(static)
    for (int64_t r = 0; r < a->R; ++r)
        if (a->src_row_R[r] < 0) memset(dy + r * D, 0, size_t(D) * sizeof(S));
}

}  // namespace

FM_KERNEL(fm_build_routing_cpu) {
    if (a->capacity >= 0)
        return a->ids_are_int64 ? sort_slots_capped(a, static_cast<const int64_t*>(a->topk_ids_TK))
                                : sort_slots_capped(a, static_cast<const int32_t*>(a->topk_ids_TK));
    return a->ids_are_int64 ? sort_slots(a, static_cast<const int64_t*>(a->topk_ids_TK))
                            : sort_slots(a, static_cast<const int32_t*>(a->topk_ids_TK));
}

FM_KERNEL(fm_build_routing_from_experts_cpu) {
    a->bad = -1;
    int64_t previous = 0;
    for (int64_t e = 0; e <= a->E; ++e) {
        const int64_t offset = int_at(a->offsets_in, a->offsets_are_int64, e);
        if (offset < previous || offset > a->R || (e == 0 && offset) || (e == a->E && offset != a->R))
            return FM_BAD_VALUE;
        a->offsets[e] = int32_t(previous = offset);
    }
    for (int64_t i = 0; i < a->T * a->E; ++i) a->dst_row_TE[i] = -1;
    for (int64_t e = 0; e < a->E; ++e) {
        int64_t last = -1;
        for (int64_t r = a->offsets[e]; r < a->offsets[e + 1]; ++r) {
            const int64_t t = int_at(a->token_R, a->tokens_are_int64, r);
            if (t <= last || t >= a->T) {
                a->bad = r;
                return FM_BAD_VALUE;
            }
            last = t;
            a->src_row_R[r] = int32_t(t * a->E + e);
            a->dst_row_TE[t * a->E + e] = int32_t(r);
        }
    }
    return FM_OK;
}

FM_KERNEL(fm_permute_cpu) {
    const char* x = static_cast<const char*>(a->x_TD);
    char* y = static_cast<char*>(a->y_RD);
    const int64_t bytes = a->D * a->element_bytes;
#pragma omp parallel for num_threads(a->num_threads) schedule(static)
    for (int64_t r = 0; r < a->R; ++r) {
        const int64_t s = a->src_row_R[r];
        if (s < 0)
            memset(y + r * bytes, 0, size_t(bytes));
        else
            memcpy(y + r * bytes, x + s / a->K * bytes, size_t(bytes));
    }
    return FM_OK;
}

FM_KERNEL(fm_unpermute_cpu) {
    FM_WITH_DTYPE(a->dtype, S, {
        if (a->weight_dtype == FM_F32)
            unpermute<S, float>(a);
        else if (a->weight_dtype == a->dtype)
            unpermute<S, S>(a);
        else
            return FM_BAD_DTYPE;
    })
    return FM_OK;
}

FM_KERNEL(fm_unpermute_backward_cpu) {
    FM_WITH_DTYPE(a->dtype, S, {
        if (a->weight_dtype == FM_F32)
            unpermute_backward<S, float>(a);
        else if (a->weight_dtype == a->dtype)
            unpermute_backward<S, S>(a);
        else
            return FM_BAD_DTYPE;
    })
    return FM_OK;
}
