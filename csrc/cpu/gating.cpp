#include "fastmoe/gating.h"

#include <omp.h>

#include "vec.h"
#include "workspace.h"

namespace {

using fm_workspace::Gate;

constexpr float kInf = __builtin_inff(), kNaN = __builtin_nanf("");
constexpr double kTiny = 1e-20;  /* what a sum of weights has added before it divides */
constexpr int64_t kRanked = 128; /* candidates up to which each is compared with each */

inline vi lanes_from(int32_t first) {
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    return lane + first;
}

/* z: the row's logits. Returns false where one is NaN or +inf or all are -inf. */
template <class S>
bool load_logits(const S* logits, int64_t E, float* z, float* max_logit) {
    vf top = splat(-kInf);
    vi good = top == top;
    each_vector(E, [&](int64_t e, auto n) {
        const vf v = load(logits + e, n, -kInf);
        store(z + e, v, n);
        top = max(v, top);
        good &= v < splat(kInf);
    });
    *max_logit = max(top);
    return min(good & 1) && *max_logit > -kInf;
}

/* A value that at least K of the row's n do not fall below: the K-th largest among the maxima of kBuckets parts of it.
 * K <= kBuckets <= n. */
template <int kBuckets>
float lower_bound(const float* row, int64_t n, int64_t K) {
    constexpr int kVectors = kBuckets / W;
    vf top[kVectors];
    for (vf& t : top) t = splat(-kInf);
    int64_t i = 0;
    for (; i + kBuckets <= n; i += kBuckets)
        for (int v = 0; v < kVectors; ++v) top[v] = max(load(row + i + v * W), top[v]);
    each_vector(n - i, [&](int64_t j, auto rest) { top[j / W] = max(load(row + i + j, rest, -kInf), top[j / W]); });
    float maxima[kBuckets];
    memcpy(maxima, top, sizeof(top));
    vf least = splat(-kInf);
    for (const vf t : top) {
        vi above = {};
        for (const float other : maxima) above -= splat(other) > t;
        least = max(select(above < int32_t(K), -t, splat(-kInf)), least);
    }
    return -max(least);
}

/* Appends the values of a vector that are at least `least`, and their numbers from i on; writes whole vectors. */
inline int64_t append(vf v, float least, int32_t i, float* values, int32_t* numbers) {
#if defined(__AVX512F__)
    const __m512 x = bit_cast<__m512>(v);
    const __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(least), _CMP_GE_OQ);
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(kept, x));
    _mm512_storeu_si512(numbers, _mm512_maskz_compress_epi32(kept, bit_cast<__m512i>(lanes_from(i))));
    return __builtin_popcount(kept);
#else
    const vi kept = v >= splat(least);
    if (min(~kept & 1)) return 0;
    int64_t count = 0;
    for (int lane = 0; lane < W; ++lane) {
        values[count] = v[lane];
        numbers[count] = i + lane;
        count -= kept[lane];
    }
    return count;
#endif
}

/* order[0..K): the numbers of the best K of `count` <= kRanked candidates: each goes where its rank tells. */
void rank_each(const float* values, const int32_t* numbers, int64_t count, int64_t K, int32_t* order) {
    int32_t rank[kRanked], sorted[kRanked];
    for (int64_t i = 0; i < count; i += W) {
        const vf v = load(values + i);
        const vi place = lanes_from(int32_t(i));
        vi before = {};
        for (int64_t j = 0; j < count; ++j) {
            const vf other = splat(values[j]);
            before -= (other > v) | ((other == v) & (place > int32_t(j)));
        }
        memcpy(rank + i, &before, sizeof(before));
    }
    for (int64_t i = 0; i < count; ++i) sorted[rank[i]] = numbers[i];
    memcpy(order, sorted, size_t(K) * sizeof(int32_t));
}

/* A heap of candidates, the worst at its root. */
struct Heap {
    float* values;
    int32_t* numbers;
    bool worse(int64_t i, int64_t j) const {
        return values[i] < values[j] || (values[i] == values[j] && numbers[i] > numbers[j]);
    }
    void swap(int64_t i, int64_t j) {
        const float value = values[i];
        const int32_t number = numbers[i];
        values[i] = values[j], numbers[i] = numbers[j];
        values[j] = value, numbers[j] = number;
    }
    void sink(int64_t i, int64_t size) {
        for (int64_t child; (child = 2 * i + 1) < size; i = child) {
            if (child + 1 < size && worse(child + 1, child)) ++child;
            if (!worse(child, i)) return;
            swap(i, child);
        }
    }
    /* The best K of `count` candidates, which stand by number, to the front and into order. */
    void sort(int64_t count, int64_t K) {
        for (int64_t i = K / 2; i-- > 0;) sink(i, K);
        for (int64_t i = K; i < count; ++i)
            if (values[i] > values[0]) {
                swap(0, i);
                sink(0, K);
            }
        for (int64_t last = K - 1; last > 0; --last) {
            swap(0, last);
            sink(0, last);
        }
    }
};

/* order[0..K): where the K largest of n values stand, the largest first, the first among equals. */
void best(const float* row, int64_t n, int64_t K, const Gate& g, int32_t* order) {
    const float least = K <= 16 && n >= 32    ? lower_bound<16>(row, n, K)
                        : K <= 64 && n >= 128 ? lower_bound<64>(row, n, K)
                                              : -kInf;
    int64_t count = 0;
    each_vector(n, [&](int64_t i, auto rest) {
        count += append(load(row + i, rest, kNaN), least, int32_t(i), g.values + count, g.numbers + count);
    });
    if (count <= kRanked) {
        rank_each(g.values, g.numbers, count, K, order);
    } else {
        Heap{g.values, g.numbers}.sort(count, K);
        memcpy(order, g.numbers, size_t(K) * sizeof(int32_t));
    }
}

float best_score(const float* row, int64_t n) {
    vf top = splat(-kInf);
    each_vector(n, [&](int64_t i, auto rest) { top = max(load(row + i, rest, -kInf), top); });
    return max(top);
}

float best_two_scores(const float* row, int64_t n) {
    vf first = splat(-kInf), second = first;
    each_vector(n, [&](int64_t i, auto rest) {
        const vf v = load(row + i, rest, -kInf);
        second = max(min(v, first), second);
        first = max(v, first);
    });
    const float top = max(first);
    const vi lane = lanes_from(0);
    const int32_t at = min(first == splat(top) ? lane : lane * 0 + W);
    return top + max(select(lane == at, second, first));
}

/* ids[0..K): the experts of a token, the best by `rank` first, from its best groups by `score`. */
void choose(const fm_topk_gate_cpu_args* a, const float* rank, const float* score, const Gate& g, int64_t* ids) {
    const int64_t each = a->E / a->num_groups;
    if (a->top_groups == a->num_groups) {
        best(rank, a->E, a->K, g, g.order);
        for (int64_t k = 0; k < a->K; ++k) ids[k] = g.order[k];
        return;
    }
    for (int64_t i = 0; i < a->num_groups; ++i)
        g.group[i] = a->top2 ? best_two_scores(score + i * each, each) : best_score(score + i * each, each);
    best(g.group, a->num_groups, a->top_groups, g, g.order);
    for (int64_t i = 0; i < a->top_groups; ++i) g.group[g.order[i]] = kNaN; /* which none was */
    int64_t kept = 0;
    for (int64_t i = 0; i < a->num_groups; ++i)
        if (g.group[i] != g.group[i]) {
            memcpy(g.shortlist + kept * each, rank + i * each, size_t(each) * sizeof(float));
            g.first[kept++] = int32_t(i * each);
        }
    best(g.shortlist, kept * each, a->K, g, g.order);
    for (int64_t k = 0; k < a->K; ++k) {
        const int32_t at = g.order[k], of = at / int32_t(each);
        ids[k] = g.first[of] + (at - of * int32_t(each));
    }
}

/* One token; returns false where its logits are bad. */
template <class S>
bool gate_row(const fm_topk_gate_cpu_args* a, int64_t t, const Gate& g) {
    const int64_t E = a->E, K = a->K;
    float *probs = a->probs_TE + t * E, *weights = a->weights_TK + t * K, max_logit;
    int64_t* ids = a->ids_TK + t * K;
    if (!load_logits(static_cast<const S*>(a->logits_TE) + t * E, E, g.z, &max_logit)) return false;
    if (a->sigmoid) {
        each_vector(E, [&](int64_t e, auto n) { store(probs + e, sigmoid(load(g.z + e, n)), n); });
    } else {
        const float total = sum_vectors(E, [&](int64_t e, auto n) {
            const vf p = exp(load(g.z + e, n, -kInf) - max_logit);
            store(probs + e, p, n);
            return p;
        });
        const float inverse = 1 / total;
        each_vector(E, [&](int64_t e, auto n) { store(probs + e, load(probs + e, n) * inverse, n); });
    }
    const float* rank = g.z;
    if (a->bias_E) {
        rank = g.biased;
        each_vector(E, [&](int64_t e, auto n) { store(g.biased + e, load(probs + e, n) + load(a->bias_E + e, n), n); });
    }
    choose(a, rank, a->top2 && !a->bias_E ? probs : rank, g, ids);
    double total = 0;
    for (int64_t k = 0; k < K; ++k) {
        total += weights[k] = probs[ids[k]];
        ++g.count[ids[k]];
    }
    const double scale = a->renormalize ? a->scale / (total + kTiny) : a->scale;
    for (int64_t k = 0; k < K; ++k) weights[k] = float(weights[k] * scale);
    return true;
}

template <class S>
fm_status topk_gate(fm_topk_gate_cpu_args* a) {
    const int64_t E = a->E;
    int64_t bad = INT64_MAX;
#pragma omp parallel num_threads(team(E * a->T, a->num_threads)) reduction(min : bad)
    {
        const Gate g(a->workspace + omp_get_thread_num() * fm_topk_gate_workspace(E, 1), E);
        memset(g.count, 0, size_t(E) * sizeof(int64_t));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < a->T; ++t)
            if (!gate_row<S>(a, t, g)) bad = t < bad ? t : bad;
#pragma omp for schedule(static)
        for (int64_t e = 0; e < E; ++e) {
            int64_t load = 0;
            for (int thread = 0; thread < omp_get_num_threads(); ++thread)
                load += Gate(a->workspace + thread * fm_topk_gate_workspace(E, 1), E).count[e];
            a->load_E[e] = load;
        }
    }
    a->bad = bad;
    return bad == INT64_MAX ? FM_OK : FM_BAD_VALUE;
}

/* One token; returns false where an id is past E-1. Gradients of scores that sum to 1 may be taken relative to any
 * one's; where one score is near 1, relative to its own little cancels. */
bool backward_row(const fm_topk_gate_backward_cpu_args* a, int64_t t) {
    const int64_t E = a->E, K = a->K, *ids = a->ids_TK + t * K;
    const float *dweights = a->dweights_TK + t * K, *dprobs = a->dprobs_TE + t * E, *probs = a->probs_TE + t * E;
    float* dlogits = a->dlogits_TE + t * E;
    const auto id = [&](int64_t k) { return ids[k] < 0 ? 0 : ids[k]; };
    double total = 0, dot = 0; /* of the chosen scores: their sum, and that of their gradients' */
    float base = 0;
    for (int64_t k = 0; k < K; ++k) {
        if (ids[k] >= E) return false;
        const double p = probs[id(k)];
        total += p;
        dot += p * dweights[k];
        if (p > 0.5) base = dprobs[id(k)];
    }
    dot *= a->scale;
    const double inverse = a->renormalize ? 1 / (total + kTiny) : 1, shift = a->renormalize ? dot * inverse : 0;
    const auto dscore = [&](int64_t k) { return (dweights[k] * a->scale - shift) * inverse; };
    if (a->sigmoid) {
        each_vector(E, [&](int64_t e, auto n) {
            const vf p = load(probs + e, n);
            store(dlogits + e, load(dprobs + e, n) * (p * (1.f - p)), n);
        });
        for (int64_t k = 0; k < K; ++k) {
            const double p = probs[id(k)];
            dlogits[id(k)] += float(dscore(k) * (p * (1 - p)));
        }
        return true;
    }
    const float mean_dscore = float((dot - shift * total) * inverse);
    const float mean =
        sum_vectors(E, [&](int64_t e, auto n) { return (load(dprobs + e, n) - base) * load(probs + e, n); }) +
        mean_dscore;
    each_vector(
        E, [&](int64_t e, auto n) { store(dlogits + e, load(probs + e, n) * (load(dprobs + e, n) - base - mean), n); });
    for (int64_t k = 0; k < K; ++k) dlogits[id(k)] += float(dscore(k) * probs[id(k)]);
    return true;
}

}  // namespace

FM_KERNEL(fm_topk_gate_cpu) {
    a->bad = -1;
    if (a->num_groups < 1 || a->E % a->num_groups || a->top_groups < 1 || a->top_groups > a->num_groups)
        return FM_BAD_VALUE;
    const int64_t each = a->E / a->num_groups;
    if (a->K < 1 || a->K > each * a->top_groups || (a->top2 && a->num_groups > 1 && each < 2)) return FM_BAD_VALUE;
    a->bad = -2;
    for (int64_t e = 0; a->bias_E && e < a->E; ++e)
        if (!(__builtin_fabsf(a->bias_E[e]) < kInf)) return FM_BAD_VALUE;
    FM_WITH_DTYPE(a->dtype, S, return topk_gate<S>(a);)
    return FM_OK;
}

FM_KERNEL(fm_topk_gate_backward_cpu) {
    a->bad = -1;
    if (a->K < 1 || a->K > a->E) return FM_BAD_VALUE;
    int64_t bad = INT64_MAX;
#pragma omp parallel for num_threads(team(a->T * a->E, a->num_threads)) schedule(static) reduction(min : bad)
    for (int64_t t = 0; t < a->T; ++t)
        if (!backward_row(a, t)) bad = t < bad ? t : bad;
    a->bad = bad;
    return bad == INT64_MAX ? FM_OK : FM_BAD_VALUE;
}
