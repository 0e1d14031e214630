#include "fastmoe/assignment.h"

#include "vec.h"
#include "workspace.h"

namespace {

using fm_workspace::Auction;

/* Scores become whole numbers from 0 to kLevels, so that prices are exact and every backend takes the same rounds. */
constexpr int32_t kLevels = 1 << 20, kNever = -(1 << 30);
constexpr int32_t kRaises[] = {1 << 18, 1 << 14, 1 << 10, 1 << 7, 1 << 4};

/* Least and largest score. Returns the first row that is not finite, or T. */
int64_t find_range(const fm_balanced_assignment_cpu_args* a, float* low, float* high) {
    int64_t bad = a->T;
    float least = __builtin_inff(), most = -least;
#pragma omp parallel for num_threads(team(a->T * a->E, a->num_threads)) reduction(min : bad, least) \
    reduction(max : most)
    for (int64_t t = 0; t < a->T; ++t) {
        vf low_E = splat(__builtin_inff()), high_E = -low_E, nan_E = splat(0);
        each_vector(a->E, [&](int64_t e, auto n) {
            const vf score = load(a->scores_TE + t * a->E + e, n, a->scores_TE[t * a->E]);
            low_E = min(score, low_E), high_E = max(score, high_E), nan_E += score - score;
        });
        const float row_low = -max(-low_E), row_high = max(high_E), nan = sum(nan_E);
        if (!(nan == 0)) bad = t < bad ? t : bad;
        least = row_low < least ? row_low : least, most = row_high > most ? row_high : most;
    }
    *low = least, *high = most;
    return bad;
}

void set_levels(const fm_balanced_assignment_cpu_args* a, const Auction& auction, float least, float most) {
    const double low = double(least) / 2, range = double(most) / 2 - low, width = range > 0 ? range : 1;
#pragma omp parallel for num_threads(team(a->T * a->E, a->num_threads)) schedule(static)
    for (int64_t t = 0; t < a->T; ++t) {
        const float* score = a->scores_TE + t * a->E;
        int32_t* level = auction.level_TE + t * auction.stride;
        for (int64_t e = 0; e < a->E; ++e)
            level[e] = int32_t(__builtin_rint((double(score[e]) / 2 - low) / width * kLevels));
        for (int64_t e = a->E; e < auction.stride; ++e) level[e] = kNever;
    }
}

/* A bid as one number: of equal ones that of the lower token is larger. */
inline int64_t offer(int32_t bid, int64_t token) { return int64_t(bid) << 32 | (0x7fffffff - token); }
inline int64_t token_of(int64_t offer) { return 0x7fffffff - (offer & 0x7fffffff); }
inline int32_t bid_of(int64_t offer) { return int32_t(offer >> 32); }

/* The expert of largest margin, level - price; of equal ones the lower. The bid makes the second best as good, and the
 * raise more. */
inline int64_t choose(const int32_t* level, const int32_t* price, int64_t stride, int32_t raise, int64_t token,
                      int32_t* expert) {
    vi id, best = vi{} + kNever * 2 + 1, second = best, at = vi{};
    for (int i = 0; i < W; ++i) id[i] = i;
    for (int64_t e = 0; e < stride; e += W, id += W) {
        const vi margin = load_bits<vi>(level + e) - load_bits<vi>(price + e), better = margin > best;
        const vi lesser = better ? best : margin;
        second = lesser > second ? lesser : second;
        best = better ? margin : best;
        at = better ? id : at;
    }
    const auto larger = [](auto a, auto b) { return a > b ? a : b; };
    const int32_t top = fold<W, int32_t>(best, larger), first = min(best == top ? at : vi{} + INT32_MAX);
    *expert = first;
    return offer(price[first] + (top - fold<W, int32_t>(at == first ? second : best, larger)) + raise, token);
}

/* heap[0] is the least of n. */
void sift_up(int64_t* heap, int64_t i, int64_t value) {
    for (; i && heap[(i - 1) / 2] > value; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = value;
}
void replace_least(int64_t* heap, int64_t n, int64_t value) {
    int64_t i = 0;
    for (int64_t child = 1; child < n; child = 2 * i + 1) {
        child += child + 1 < n && heap[child + 1] < heap[child];
        if (heap[child] >= value) break;
        heap[i] = heap[child], i = child;
    }
    heap[i] = value;
}

/* Every round, each waiting token bids at the prices of its beginning; an expert holds the highest bids, and its price
 * is the lowest of as many as it may hold. */
void hold_auction(const Auction& auction, int64_t T, int64_t E, int32_t raise, int num_threads) {
    const int64_t places = T / E;
    int64_t waiting = T;
    for (int64_t t = 0; t < T; ++t) auction.waiting_T[t] = int32_t(t);
    for (int64_t e = 0; e < E; ++e) auction.held_E[e] = 0;
    while (waiting) {
#pragma omp parallel for num_threads(team(waiting* auction.stride, num_threads)) schedule(static)
        for (int64_t i = 0; i < waiting; ++i) {
            const int64_t t = auction.waiting_T[i];
            auction.offer_T[i] = choose(auction.level_TE + t * auction.stride, auction.price_E, auction.stride, raise,
                                        t, auction.expert_T + i);
        }
        const int64_t offers = waiting;
        waiting = 0;
        for (int64_t i = 0; i < offers; ++i) {
            const int64_t e = auction.expert_T[i], value = auction.offer_T[i];
            int64_t* heap = auction.heap_T + e * places;
            if (auction.held_E[e] < places) {
                sift_up(heap, auction.held_E[e]++, value);
            } else {
                const int64_t out = value > heap[0] ? heap[0] : value;
                auction.waiting_T[waiting++] = int32_t(token_of(out));
                if (out == value) continue;
                replace_least(heap, places, value);
            }
            if (auction.held_E[e] == places) auction.price_E[e] = bid_of(heap[0]);
        }
    }
}

/* Of this rank, by choice: how many tokens worker w does not keep, and how many moved ones it gets. */
struct Grants {
    int64_t *kept_out_KW, *moved_KW;
};

void grant(const fm_swipe_cpu_args* a, int64_t* room_W, const Grants& to) {
    const int64_t W = a->W, K = a->K;
    const auto count = [&](int64_t s, int64_t w, int64_t j) { return a->counts_WWK[(s * W + w) * K + j]; };
    for (int64_t w = 0; w < W; ++w) {
        room_W[w] = 0;
        for (int64_t i = 0; i < W * K; ++i) room_W[w] += a->counts_WWK[w * W * K + i];
    }
    for (int64_t j = 0; j < K; ++j) {
        int64_t over = 0, over_before = 0, over_own = 0;
        for (int64_t w = 0; w < W; ++w) to.kept_out_KW[j * W + w] = to.moved_KW[j * W + w] = 0;
        for (int64_t s = 0; s < W; ++s) {
            int64_t over_here = 0;
            for (int64_t w = 0; w < W; ++w) {
                const int64_t asked = count(s, w, j), granted = asked < room_W[w] ? asked : room_W[w];
                room_W[w] -= granted;
                over_here += asked - granted;
                if (s == a->rank) to.kept_out_KW[j * W + w] = asked - granted;
            }
            if (s == a->rank) over_before = over, over_own = over_here;
            over += over_here;
        }
        for (int64_t w = 0; w < W; ++w) { /* the overflow of ranks 0, 1, ... fills workers 0, 1, ... */
            const int64_t filled = over < room_W[w] ? over : room_W[w],
                          others = over_before < filled ? over_before : filled;
            const int64_t own = over_own < filled - others ? over_own : filled - others;
            to.moved_KW[j * W + w] = own;
            room_W[w] -= filled, over -= filled, over_before -= others, over_own -= own;
        }
    }
}

template <class Id>
fm_status swipe(fm_swipe_cpu_args* a) {
    const int64_t W = a->W, K = a->K, E = W * a->experts_per_rank;
    const Id* ids_TK = static_cast<const Id*>(a->topk_ids_TK);
    int64_t *room_W = a->workspace, *left_KW = room_W + W, *target_K = left_KW + K * W, *worker_E = target_K + K;
    const Grants grants{worker_E + E, worker_E + E + K * W};
    a->bad = -1;
    for (int64_t i = 0; i < W * W * K; ++i)
        if (a->counts_WWK[i] < 0) return FM_BAD_VALUE;
    grant(a, room_W, grants);
    for (int64_t e = 0; e < E; ++e) worker_E[e] = e / a->experts_per_rank;
    for (int64_t j = 0; j < K; ++j) {
        target_K[j] = 0;
        for (int64_t w = 0; w < W; ++w) left_KW[j * W + w] = a->counts_WWK[(a->rank * W + w) * K + j];
    }
    for (int64_t t = 0; t < a->T; ++t)
        for (int64_t j = 0; j < K; ++j) {
            const int64_t e = ids_TK[t * K + j];
            if (e < -1 || e >= E) {
                a->bad = e;
                return FM_BAD_VALUE;
            }
            a->ids_TK[t * K + j] = e;
            if (e < 0) continue;
            const int64_t w = j * W + worker_E[e];
            if (left_KW[w]-- <= 0) return FM_BAD_VALUE;
            if (left_KW[w] >= grants.kept_out_KW[w]) continue;
            int64_t& target = target_K[j];
            while (grants.moved_KW[j * W + target] == 0) ++target;
            --grants.moved_KW[j * W + target];
            a->ids_TK[t * K + j] = target * a->experts_per_rank + j % a->experts_per_rank;
        }
    for (int64_t i = 0; i < K * W; ++i)
        if (left_KW[i]) return FM_BAD_VALUE;
    return FM_OK;
}

}  // namespace

FM_KERNEL(fm_balanced_assignment_cpu) {
    float low, high;
    a->bad = find_range(a, &low, &high);
    if (a->bad < a->T) return FM_BAD_VALUE;
    if (a->E == 1) { /* there is no second best */
        memset(a->ids_T, 0, size_t(a->T) * sizeof(int64_t));
        return FM_OK;
    }
    const Auction auction(a->workspace, a->T, a->E);
    set_levels(a, auction, low, high);
    for (int64_t e = 0; e < auction.stride; ++e) auction.price_E[e] = 0;
    for (int32_t raise : kRaises) hold_auction(auction, a->T, a->E, raise, a->num_threads);
    for (int64_t i = 0; i < a->T; ++i) a->ids_T[token_of(auction.heap_T[i])] = i / (a->T / a->E);
    return FM_OK;
}

FM_KERNEL(fm_swipe_cpu) { return a->ids_are_int64 ? swipe<int64_t>(a) : swipe<int32_t>(a); }
