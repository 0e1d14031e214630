#include "fastmoe/norm.h"

#include "vec.h"

namespace {

template <class S, class Weight>
void rms_norm(const fm_rms_norm_cpu_args* a) {
    const Weight* weight = static_cast<const Weight*>(a->weight_D);
    const int64_t D = a->D;
#pragma omp parallel for num_threads(team(a->T* D, a->num_threads)) schedule(static)
    for (int64_t t = 0; t < a->T; ++t) {
        const S* x = static_cast<const S*>(a->x_TD) + t * D;
        S* y = static_cast<S*>(a->y_TD) + t * D;
        const float squares = sum_vectors(D, [&](int64_t d, auto n) {
            const vf v = load(x + d, n);
            return v * v;
        });
        const float rstd = 1 / __builtin_sqrtf(squares / float(D) + a->eps);
        a->rstd_T[t] = rstd;
        each_vector(D, [&](int64_t d, auto n) { store(y + d, load(x + d, n) * rstd * load(weight + d, n), n); });
    }
}

constexpr int64_t kGroup = 8; /* tokens whose parts of dweight are added in registers */

/* dx of `tokens` <= kGroup tokens from `begin`; adds their part to dweight. */
template <class S, class Weight>
void backward_group(const fm_rms_norm_backward_cpu_args* a, int64_t begin, int64_t tokens, float* dweight) {
    const Weight* weight = static_cast<const Weight*>(a->weight_D);
    const int64_t D = a->D;
    const S *x = static_cast<const S*>(a->x_TD) + begin * D, *dy = static_cast<const S*>(a->dy_TD) + begin * D;
    S* dx = static_cast<S*>(a->dx_TD) + begin * D;
    const float* rstd = a->rstd_T + begin;
    float mean[kGroup];
    for (int64_t t = 0; t < tokens; ++t)
        mean[t] =
            sum_vectors(D,
                        [&](int64_t d, auto n) {
                            return load(dy + t * D + d, n) * load(weight + d, n) * (load(x + t * D + d, n) * rstd[t]);
                        }) /
            float(D);
    each_vector(D, [&](int64_t d, auto n) {
        const vf w = load(weight + d, n);
        vf part = splat(0);
        for (int64_t t = 0; t < tokens; ++t) {
            const vf g = load(dy + t * D + d, n), unit = load(x + t * D + d, n) * rstd[t];
            part += g * unit;
            store(dx + t * D + d, (g * w - unit * mean[t]) * rstd[t], n);
        }
        store(dweight + d, load(dweight + d, n) + part, n);
    });
}

template <class S, class Weight>
void rms_norm_backward(const fm_rms_norm_backward_cpu_args* a) {
    const int64_t T = a->T, D = a->D, tiles = fm_rms_norm_backward_workspace(T, 1);
    const int64_t tokens = tiles ? (T + tiles - 1) / tiles : 0;
    const int num_threads = team(T * D, a->num_threads);
    Weight* dweight = static_cast<Weight*>(a->dweight_D);
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t i = 0; i < tiles; ++i) {
        float* tile = a->workspace + i * D;
        memset(tile, 0, size_t(D) * sizeof(float));
        const int64_t end = (i + 1) * tokens < T ? (i + 1) * tokens : T;
        for (int64_t t = i * tokens; t < end; t += kGroup)
            backward_group<S, Weight>(a, t, end - t < kGroup ? end - t : kGroup, tile);
    }
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t block = 0; block < D; block += 256)
        each_vector(D - block < 256 ? D - block : 256, [&](int64_t d, auto n) {
            vf total = splat(0), lost = total; /* Kahan: `lost` is what rounding took from total */
            for (int64_t i = 0; i < tiles; ++i) {
                const vf part = load(a->workspace + i * D + block + d, n) + lost, next = total + part;
                lost = part - (next - total);
                total = next;
            }
            store(dweight + block + d, total, n);
        });
}

}  // namespace

FM_KERNEL(fm_rms_norm_cpu) {
    FM_WITH_DTYPE(a->dtype, S, {
        if (a->weight_dtype == FM_F32)
            rms_norm<S, float>(a);
        else if (a->weight_dtype == a->dtype)
            rms_norm<S, S>(a);
        else
            return FM_BAD_DTYPE;
    })
    return FM_OK;
}

FM_KERNEL(fm_rms_norm_backward_cpu) {
    FM_WITH_DTYPE(a->dtype, S, {
        if (a->weight_dtype == FM_F32)
            rms_norm_backward<S, float>(a);
        else if (a->weight_dtype == a->dtype)
            rms_norm_backward<S, S>(a);
        else
            return FM_BAD_DTYPE;
    })
    return FM_OK;
}
