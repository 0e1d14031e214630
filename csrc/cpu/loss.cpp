#include "fastmoe/loss.h"

#include <math.h>
#include <omp.h>

#include "gemm.h"

namespace {

using namespace fm_workspace;

/* logits [m, V] of tokens t0.. in place to their gradient, (softmax - onehot) or 0; returns nothing, fills loss[0..m).
 */
void softmax_rows(float* logits, const int64_t* targets, int64_t m, int64_t V, int64_t ignore_index, float* loss) {
    for (int64_t i = 0; i < m; ++i, logits += V) {
        if (targets[i] == ignore_index) {
            memset(logits, 0, size_t(V) * sizeof(float));
            loss[i] = 0;
            continue;
        }
        vf top = splat(-__builtin_inff());
        each_vector(V, [&](int64_t v, auto n) { top = max(load(logits + v, n, -__builtin_inff()), top); });
        const float peak = max(top), target = logits[targets[i]];
        const float z = sum_vectors(V, [&](int64_t v, auto n) {
            const vf p = exp(load(logits + v, n, -__builtin_inff()) - peak);
            store(logits + v, p, n);
            return p;
        });
        loss[i] = logf(z) + (peak - target);
        each_vector(V, [&](int64_t v, auto n) { store(logits + v, load(logits + v, n) * (1 / z), n); });
        logits[targets[i]] -= 1.f;
    }
}

template <class S>
void run_loss(const fm_linear_cross_entropy_cpu_args* a) {
    using L = Lane<S>;
    const Loss ws(a->workspace, a->T, a->V, a->num_threads);
    const int64_t T = a->T, D = a->D, V = a->V;
    const Lines<S> x{static_cast<const S*>(a->x_TD), D, nullptr},
        weight{static_cast<const S*>(a->weight_VD), D, nullptr};
    for (int64_t c0 = 0; c0 < T; c0 += ws.chunk) {
        const int64_t c1 = min64(c0 + ws.chunk, T), blocks = (c1 - c0 + kRows - 1) / kRows;
#pragma omp parallel for num_threads(a->num_threads) schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; ++block) {
            float* memory = ws.threads + omp_get_thread_num() * aligned(kThreadFloats);
            const int64_t t0 = c0 + block * kRows, m = min64(kRows, c1 - t0);
            float* logits = ws.dlogits + (t0 - c0) * V;
            for (int64_t v0 = 0; v0 < V; v0 += NC) {
                const int64_t n = min64(NC, V - v0);
                const float* c = multiply<L>(
                    m, n, D, memory,
                    [&](float* out, int64_t k0, int64_t k1) { pack_lines<MR, L>(out, x, t0, m, k0, k1); },
                    [&](float* out, int64_t k0, int64_t k1) { pack_lines<NR, L>(out, weight, v0, n, k0, k1); });
                for (int64_t i = 0; i < m; ++i) copy_row(c + i * NC, logits + i * V + v0, n);
            }
            softmax_rows(logits, a->targets_T + t0, m, V, a->ignore_index, ws.loss_T + t0);
            const Lines<float> dlogits{logits, V, nullptr};
            for (int64_t d0 = 0; a->dx_TD && d0 < D; d0 += NC) {
                const int64_t n = min64(NC, D - d0);
                const float* c = multiply<L>(
                    m, n, V, memory,
                    [&](float* out, int64_t k0, int64_t k1) { pack_lines<MR, L>(out, dlogits, 0, m, k0, k1); },
                    [&](float* out, int64_t k0, int64_t k1) { pack_columns<NR, L>(out, weight, d0, n, k0, k1); });
                for (int64_t i = 0; i < m; ++i) copy_row(c + i * NC, a->dx_TD + (t0 + i) * D + d0, n);
            }
        }
        if (!a->dweight_VD) continue;
        const Lines<float> dlogits{ws.dlogits, V, nullptr};
        const int64_t each = piece(V), v_blocks = (V + each - 1) / each, d_blocks = (D + NC - 1) / NC;
#pragma omp parallel for num_threads(a->num_threads) schedule(dynamic, 1)
        for (int64_t task = 0; task < v_blocks * d_blocks; ++task) {
            const int64_t v0 = task / d_blocks * each, m = min64(each, V - v0), d0 = task % d_blocks * NC,
                          n = min64(NC, D - d0);
            const float* c = multiply<L>(
                m, n, c1 - c0, ws.threads + omp_get_thread_num() * aligned(kThreadFloats),
                [&](float* out, int64_t k0, int64_t k1) { pack_columns<MR, L>(out, dlogits, v0, m, k0, k1); },
                [&](float* out, int64_t k0, int64_t k1) { pack_columns<NR, L>(out, x, d0, n, c0 + k0, c0 + k1); });
            for (int64_t i = 0; i < m; ++i) {
                float* to = a->dweight_VD + (v0 + i) * D + d0;
                if (c0 == 0)
                    copy_row(c + i * NC, to, n);
                else
                    for (int64_t d = 0; d < n; ++d) to[d] += c[i * NC + d];
            }
        }
    }
    double total = 0;
    for (int64_t t = 0; t < T; ++t) total += ws.loss_T[t];
    *a->loss = float(total);
}

}  // namespace

FM_KERNEL(fm_linear_cross_entropy_cpu) {
    for (int64_t t = 0; t < a->T; ++t)
        if (a->targets_T[t] != a->ignore_index && (a->targets_T[t] < 0 || a->targets_T[t] >= a->V)) {
            a->bad = a->targets_T[t];
            return FM_BAD_VALUE;
        }
    if (a->T == 0 && a->dweight_VD) memset(a->dweight_VD, 0, size_t(a->V * a->D) * sizeof(float));
    FM_WITH_DTYPE(a->dtype, S, { run_loss<S>(a); })
    return FM_OK;
}
