#include "fastmoe/gating.h"

#include <omp.h>

#include "vec.h"

namespace {

constexpr float kInf = __builtin_inff();

/* z: the row's logits, padded with -inf to whole pairs of vectors. Returns false where one is NaN or +inf or all are
 * -inf. */
template <class S>
bool load_logits(const S* logits, int64_t E, float* z, float* max_logit) {
    vf top = splat(-kInf);
    vi good = top == top;
    each_vector(E, [&](int64_t e, auto n) {
        const vf v = load(logits + e, n, -kInf);
        store(z + e, v);
        top = max(v, top);
        good &= v < splat(kInf);
    });
    *max_logit = max(top);
    return min(good & 1) && *max_logit > -kInf;
}

/* The K largest of z, by K passes; each pass overwrites the one it found with NaN, which no comparison picks. */
void select_best(float* z, int64_t padded, int64_t K, int64_t* ids) {
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    for (int64_t k = 0; k < K; ++k) {
        vf top0 = splat(-kInf), top1 = top0;
        for (int64_t e = 0; e < padded; e += 2 * W) {
            top0 = max(load(z + e), top0);
            top1 = max(load(z + e + W), top1);
        }
        const vf best = splat(max(max(top0, top1)));
        vi first = lane * 0 + INT32_MAX, id = lane + int32_t(padded - W);
        for (int64_t e = padded - W; e >= 0; e -= W, id -= W)
            first = load(z + e) == best ? id : first; /* the lowest id stays */
        ids[k] = min(first);
        z[ids[k]] = __builtin_nanf("");
    }
}

void weigh(const float* probs, const int64_t* ids, int64_t K, bool renormalize, float* weights) {
    double total = 0;
    for (int64_t k = 0; k < K; ++k) total += weights[k] = probs[ids[k]];
    if (renormalize)
        for (int64_t k = 0; k < K; ++k) weights[k] = float(weights[k] / total);
}

template <class S>
fm_status topk_gate(fm_topk_gate_cpu_args* a) {
    const S* logits_TE = static_cast<const S*>(a->logits_TE);
    const int64_t E = a->E, K = a->K, padded = (E + 2 * W - 1) / (2 * W) * (2 * W);
    int64_t bad = INT64_MAX;
#pragma omp parallel num_threads(team(E * a->T, a->num_threads)) reduction(min : bad)
    {
        float* z = a->workspace + omp_get_thread_num() * fm_topk_gate_workspace(E, 1);
        float* e_z = z + padded;
        for (int64_t e = E; e < padded; ++e) z[e] = -kInf;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < a->T; ++t) {
            const S* logits = logits_TE + t * E;
            float* probs = a->probs_TE + t * E;
            float max_logit;
            if (!load_logits(logits, E, z, &max_logit)) {
                bad = t < bad ? t : bad;
                continue;
            }
            if (a->sigmoid) {
                each_vector(E, [&](int64_t e, auto n) { store(probs + e, sigmoid(load(z + e)), n); });
            } else {
                const float total = sum_vectors(padded, [&](int64_t e, auto) {
                    const vf p = exp(load(z + e) - max_logit);
                    store(e_z + e, p);
                    return p;
                });
                const float scale = 1 / total;
                each_vector(E, [&](int64_t e, auto n) { store(probs + e, load(e_z + e) * scale, n); });
            }
            select_best(z, padded, K, a->ids_TK + t * K);
            weigh(probs, a->ids_TK + t * K, K, a->renormalize, a->weights_TK + t * K);
        }
    }
    a->bad = bad;
    return bad == INT64_MAX ? FM_OK : FM_BAD_VALUE;
}

/* One token; returns false where an id is past E-1. Gradients of scores that sum to 1 may be taken relative to any
 * one's; where one score is near 1, relative to its own little cancels. */
bool backward_row(const fm_topk_gate_backward_cpu_args* a, int64_t t) {
    const int64_t E = a->E, K = a->K, *ids = a->ids_TK + t * K;
    const float *dweights = a->dweights_TK + t * K, *probs = a->probs_TE + t * E;
    float* g = a->dlogits_TE + t * E; /* the gradient of probs, then of the logits */
    memcpy(g, a->dprobs_TE + t * E, size_t(E) * sizeof(float));
    double total = 0, dot_k = 0;
    for (int64_t k = 0; k < K; ++k) {
        if (ids[k] >= E) return false;
        const double p = probs[ids[k] < 0 ? 0 : ids[k]];
        total += p;
        dot_k += p * dweights[k];
    }
    for (int64_t k = 0; k < K; ++k)
        g[ids[k] < 0 ? 0 : ids[k]] += a->renormalize ? float((dweights[k] - dot_k / total) / total) : dweights[k];
    if (a->sigmoid) {
        each_vector(E, [&](int64_t e, auto n) {
            const vf p = load(probs + e, n);
            store(g + e, load(g + e, n) * p * (1.f - p), n);
        });
        return true;
    }
    const int64_t best = ids[0] < 0 ? 0 : ids[0];
    const float base = probs[best] > 0.5f ? g[best] : 0;
    const float mean = sum_vectors(E, [&](int64_t e, auto n) { return (load(g + e, n) - base) * load(probs + e, n); });
    each_vector(E, [&](int64_t e, auto n) { store(g + e, load(probs + e, n) * (load(g + e, n) - base - mean), n); });
    return true;
}

}  // namespace

FM_KERNEL(fm_topk_gate_cpu) {
    a->bad = -1;
    if (a->K < 1 || a->K > a->E) return FM_BAD_VALUE;
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
