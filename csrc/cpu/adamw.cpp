#include "fastmoe/adamw.h"

#include "vec.h"

namespace {

constexpr int64_t kChunk = 16384; /* elements; a chunk lies inside one tensor */

struct coefficients {
    float rate1, beta2, rate2, grad_scale, inverse_correction2, eps, decay, step_size;
};

template <class S>
void update(S* param, const S* grad, float* m, float* v, int64_t count, const coefficients& c) {
    each_vector(count, [&](int64_t i, auto n) {
        const vf g = load(grad + i, n) * c.grad_scale;
        vf mean = load(m + i, n), square = load(v + i, n);
        mean += c.rate1 * (g - mean);
        square = c.beta2 * square + c.rate2 * (g * g);
        store(m + i, mean, n);
        store(v + i, square, n);
        const vf denominator = sqrt(square * c.inverse_correction2) + c.eps;
        store(param + i, load(param + i, n) * c.decay - c.step_size * (mean / denominator), n);
    });
}

fm_status update_chunk(const fm_adamw_step_cpu_args* a, int64_t tensor, int64_t begin, const coefficients& c) {
    const int64_t left = a->numels[tensor] - begin, count = left < kChunk ? left : kChunk;
    float *m = a->exp_avgs[tensor] + begin, *v = a->exp_avg_sqs[tensor] + begin;
    FM_WITH_DTYPE(a->dtypes[tensor], S, {
        update(static_cast<S*>(a->params[tensor]) + begin, static_cast<const S*>(a->grads[tensor]) + begin, m, v, count,
               c);
    })
    return FM_OK;
}

double power(double base, int64_t exponent) {
    double result = 1;
    for (; exponent; exponent /= 2, base *= base)
        if (exponent % 2) result *= base;
    return result;
}

}  // namespace

FM_KERNEL(fm_adamw_step_cpu) {
    if (a->step < 1) return FM_BAD_VALUE;
    int64_t* first_chunk = a->workspace; /* of each tensor, then of none */
    first_chunk[0] = 0;
    for (int64_t i = 0; i < a->count; ++i) {
        if (a->dtypes[i] < FM_F32 || a->dtypes[i] > FM_F16) return FM_BAD_DTYPE;
        first_chunk[i + 1] = first_chunk[i] + (a->numels[i] + kChunk - 1) / kChunk;
    }
    const int64_t chunks = first_chunk[a->count];
    const double correction1 = 1 - power(a->beta1, a->step), correction2 = 1 - power(a->beta2, a->step);
    const coefficients c{float(1 - a->beta1),
                         float(a->beta2),
                         float(1 - a->beta2),
                         float(a->grad_scale),
                         float(1 / correction2),
                         float(a->eps),
                         float(1 - a->lr * a->weight_decay),
                         float(a->lr / correction1)};
#pragma omp parallel for num_threads(chunks < a->num_threads ? int(chunks) + !chunks : a->num_threads) schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        int64_t tensor = 0, past = a->count; /* first_chunk[tensor] <= chunk < first_chunk[past] */
        while (past - tensor > 1) {
            const int64_t middle = (tensor + past) / 2;
            (first_chunk[middle] <= chunk ? tensor : past) = middle;
        }
        update_chunk(a, tensor, (chunk - first_chunk[tensor]) * kChunk, c);
    }
    return FM_OK;
}
