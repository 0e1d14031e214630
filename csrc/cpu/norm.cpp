#include "fastmoe/norm.h"

#include <type_traits>

#include "vec.h"

namespace {

template <class S, class Weight, bool CENTER>
void normalize(const fm_normalize_cpu_args* a) {
    const Weight *weight = static_cast<const Weight*>(a->weight_D), *bias = static_cast<const Weight*>(a->bias_D);
    const int64_t D = a->D;
#pragma omp parallel for num_threads(team(a->T* D, a->num_threads)) schedule(static)
    for (int64_t t = 0; t < a->T; ++t) {
        const S* x = static_cast<const S*>(a->x_TD) + t * D;
        S* y = static_cast<S*>(a->y_TD) + t * D;
        if (a->residual_TD) {
            const S* residual = static_cast<const S*>(a->residual_TD) + t * D;
            S* sum = static_cast<S*>(a->sum_TD) + t * D;
            each_vector(D, [&](int64_t d, auto n) { store(sum + d, load(x + d, n) + load(residual + d, n), n); });
            x = sum;
        }
        float mean = 0;
        if (CENTER) {
            mean = sum_vectors(D, [&](int64_t d, auto n) { return load(x + d, n); }) / float(D);
            a->mean_T[t] = mean;
        }
        const float squares = sum_vectors(D, [&](int64_t d, auto n) {
            const vf v = CENTER ? load(x + d, n, mean) - mean : load(x + d, n);
            return v * v;
        });
        const float rstd = 1 / __builtin_sqrtf(squares / float(D) + a->eps);
        a->rstd_T[t] = rstd;
        each_vector(D, [&](int64_t d, auto n) {
            vf v = load(x + d, n);
            if (CENTER) v -= mean;
            v = v * rstd * load(weight + d, n);
            if (bias) v += load(bias + d, n);
            store(y + d, v, n);
        });
    }
}

constexpr int64_t kGroup = 8; /* tokens whose parts of dweight are added in registers */

/* dx of `tokens` <= kGroup tokens from `begin`; adds their part to dweight, and to dbias behind it. */
template <class S, class Weight, bool CENTER>
void backward_group(const fm_normalize_backward_cpu_args* a, int64_t begin, int64_t tokens, float* dweight) {
    const Weight* weight = static_cast<const Weight*>(a->weight_D);
    const int64_t D = a->D;
    const S *x = static_cast<const S*>(a->x_TD) + begin * D, *dy = static_cast<const S*>(a->dy_TD) + begin * D;
    const S* dsum = a->dsum_TD ? static_cast<const S*>(a->dsum_TD) + begin * D : nullptr;
    S* dx = static_cast<S*>(a->dx_TD) + begin * D;
    const float* rstd = a->rstd_T + begin;
    float mean[kGroup], along[kGroup], level[kGroup]; /* of x; of the gradient times the unit row; of the gradient */
    for (int64_t t = 0; t < tokens; ++t) {
        mean[t] = CENTER ? a->mean_T[begin + t] : 0;
        const auto g = [&](int64_t d, auto n) { return load(dy + t * D + d, n) * load(weight + d, n); };
        along[t] = sum_vectors(D,
                               [&](int64_t d, auto n) {
                                   vf unit = load(x + t * D + d, n);
                                   if (CENTER) unit -= mean[t];
                                   return g(d, n) * (unit * rstd[t]);
                               }) /
                   float(D);
        level[t] = CENTER ? sum_vectors(D, g) / float(D) : 0;
    }
    each_vector(D, [&](int64_t d, auto n) {
        const vf w = load(weight + d, n);
        vf part = splat(0), plain = part;
        for (int64_t t = 0; t < tokens; ++t) {
            const vf g = load(dy + t * D + d, n);
            vf unit = load(x + t * D + d, n), rest = g * w;
            if (CENTER) unit -= mean[t], rest -= level[t];
            unit *= rstd[t];
            part += g * unit;
            plain += g;
            vf to = (rest - unit * along[t]) * rstd[t];
            if (dsum) to += load(dsum + t * D + d, n);
            store(dx + t * D + d, to, n);
        }
        store(dweight + d, load(dweight + d, n) + part, n);
        if (a->dbias_D) store(dweight + D + d, load(dweight + D + d, n) + plain, n);
    });
}

template <class S, class Weight, bool CENTER>
void normalize_backward(const fm_normalize_backward_cpu_args* a) {
    const int64_t T = a->T, D = a->D, tiles = fm_normalize_backward_workspace(T, 1) / 2;
    const int64_t tokens = tiles ? (T + tiles - 1) / tiles : 0, columns = a->dbias_D ? 2 * D : D;
    const int num_threads = team(T * D, a->num_threads);
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t i = 0; i < tiles; ++i) {
        float* tile = a->workspace + i * columns;
        memset(tile, 0, size_t(columns) * sizeof(float));
        const int64_t end = (i + 1) * tokens < T ? (i + 1) * tokens : T;
        for (int64_t t = i * tokens; t < end; t += kGroup)
            backward_group<S, Weight, CENTER>(a, t, end - t < kGroup ? end - t : kGroup, tile);
    }
    const int64_t blocks = (D + 255) / 256;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t block = 0; block < columns / D * blocks; ++block) {
        const int64_t first = block % blocks * 256, from = block / blocks * D + first;
        Weight* to = static_cast<Weight*>(block < blocks ? a->dweight_D : a->dbias_D) + first;
        each_vector(D - first < 256 ? D - first : 256, [&](int64_t d, auto n) {
            vf total = splat(0), lost = total; /* Kahan: `lost` is what rounding took from total */
            for (int64_t i = 0; i < tiles; ++i) {
                const vf part = load(a->workspace + i * columns + from + d, n) + lost, next = total + part;
                lost = part - (next - total);
                total = next;
            }
            store(to + d, total, n);
        });
    }
}

template <class S, class Args>
fm_status with_weight(const Args* a) {
    const auto run = [&](auto weight, auto center) {
        using Weight = decltype(weight);
        if constexpr (std::is_same_v<Args, fm_normalize_cpu_args>)
            normalize<S, Weight, center.value>(a);
        else
            normalize_backward<S, Weight, center.value>(a);
        return FM_OK;
    };
    const auto with_center = [&](auto weight) {
        return a->mean_T ? run(weight, std::true_type()) : run(weight, std::false_type());
    };
    if (a->weight_dtype == FM_F32) return with_center(float());
    return a->weight_dtype == a->dtype ? with_center(S()) : FM_BAD_DTYPE;
}

}  // namespace

FM_KERNEL(fm_normalize_cpu){FM_WITH_DTYPE(a->dtype, S, { return with_weight<S>(a); })}

FM_KERNEL(fm_normalize_backward_cpu) {
    FM_WITH_DTYPE(a->dtype, S, { return with_weight<S>(a); })
}
