#include "fastmoe/gemm.h"

#include <omp.h>

#include "gemm.h"

namespace {

using namespace fm_workspace;

/* Length of each piece when n is cut into equal pieces of at most `most`, rounded up to whole units. */
int64_t cut(int64_t n, int64_t most, int64_t unit) {
    const int64_t pieces = (n + most - 1) / most, each = (n + pieces - 1) / pieces;
    return (each + unit - 1) / unit * unit;
}

/* f(m0, m, n0, n, memory) for the blocks of an [M, N] product with K products an element: blocks shrink until the team
 * can share them evenly; an element's sum is the same in any block. */
template <class F>
void for_blocks(int64_t M, int64_t N, int64_t K, void* workspace, int num_threads, F f) {
    if (M == 0 || K == 0) return;
    const int threads = team(M * N * K / 64, num_threads);
    int64_t rows, columns, m_blocks, n_blocks;
    for (int64_t most = MC;; most /= 2) {
        rows = cut(M, most, MR), columns = cut(N, min64(most, NC), NR);
        m_blocks = (M + rows - 1) / rows, n_blocks = (N + columns - 1) / columns;
        if (threads == 1 || m_blocks * n_blocks >= 4 * threads || most <= 48) break;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t block = 0; block < m_blocks * n_blocks; ++block) {
        const int64_t m0 = block / n_blocks * rows, n0 = block % n_blocks * columns;
        f(m0, min64(rows, M - m0), n0, min64(columns, N - n0),
          static_cast<float*>(workspace) + omp_get_thread_num() * aligned(kThreadFloats));
    }
}

template <class S>
void linear(const fm_linear_cpu_args* a) {
    const int64_t I = a->I, O = a->O;
    const Lines<S> x{static_cast<const S*>(a->x_TI), I, nullptr};
    const Weight<S> weight{{static_cast<const S*>(a->weight_OI), I, nullptr}, true};
    const S* bias = static_cast<const S*>(a->bias_O);
    for_blocks(
        a->T, O, I, a->workspace, a->num_threads, [&](int64_t t0, int64_t m, int64_t o0, int64_t n, float* memory) {
            const Columns part{o0, n, 0};
            const float* c = multiply<Lane<S>>(x, t0, m, a->T <= kThin, I, weight, &part, 1, memory);
            for (int64_t t = t0; t < t0 + m; ++t, c += NC) {
                S* y = static_cast<S*>(a->y_TO) + t * O + o0;
                if (bias)
                    each_vector(n, [&](int64_t o, auto k) { store(y + o, load(c + o) + load(bias + o0 + o, k), k); });
                else
                    copy_row(c, y, n);
            }
        });
}

/* sums[o] = sum_t rows[t, o], in tiles of kTile rows. */
template <class S>
void sum_rows(const S* rows, int64_t T, int64_t O, S* sums, int num_threads) {
    constexpr int64_t kTile = 64, kColumns = 64;
    static_assert(kColumns % W == 0, "whole vectors");
#pragma omp parallel for num_threads(team(T* O, num_threads)) schedule(static)
    for (int64_t o0 = 0; o0 < O; o0 += kColumns) {
        float total[kColumns] = {};
        const int64_t n = min64(kColumns, O - o0);
        for (int64_t t0 = 0; t0 < T; t0 += kTile)
            each_vector(n, [&](int64_t o, auto k) {
                vf part = splat(0);
                for (int64_t t = t0; t < min64(t0 + kTile, T); ++t) part += load(rows + t * O + o0 + o, k);
                store(total + o, load(total + o) + part);
            });
        copy_row(total, sums + o0, n);
    }
}

template <class S>
void linear_backward(const fm_linear_backward_cpu_args* a) {
    const int64_t T = a->T, I = a->I, O = a->O;
    const Lines<S> dy{static_cast<const S*>(a->dy_TO), O, nullptr}, x{static_cast<const S*>(a->x_TI), I, nullptr};
    const Weight<S> weight{{static_cast<const S*>(a->weight_OI), I, nullptr}, false};
    S *dx = static_cast<S*>(a->dx_TI), *dweight = static_cast<S*>(a->dweight_OI);
    const auto write = [I](const float* c, S* to, int64_t m, int64_t n) {
        for (int64_t i = 0; i < m; ++i) copy_row(c + i * NC, to + i * I, n);
    };
    using L = Lane<S>;
    if (dx)
        for_blocks(T, I, O, a->workspace, a->num_threads,
                   [&](int64_t t0, int64_t m, int64_t i0, int64_t n, float* memory) {
                       const Columns part{i0, n, 0};
                       write(multiply<L>(dy, t0, m, T <= kThin, O, weight, &part, 1, memory), dx + t0 * I + i0, m, n);
                   });
    if (dweight)
        for_blocks(O, I, T, a->workspace, a->num_threads,
                   [&](int64_t o0, int64_t m, int64_t i0, int64_t n, float* memory) {
                       const float* c = multiply<L>(
                           m, n, T, memory,
                           [&](float* out, int64_t k0, int64_t k1) { pack_columns<MR, L>(out, dy, o0, m, k0, k1); },
                           [&](float* out, int64_t k0, int64_t k1) { pack_columns<NR, L>(out, x, i0, n, k0, k1); });
                       write(c, dweight + o0 * I + i0, m, n);
                   });
    if (a->dbias_O) sum_rows(dy.base, T, O, static_cast<S*>(a->dbias_O), a->num_threads);
}

}  // namespace

FM_KERNEL(fm_linear_cpu) {
    FM_WITH_DTYPE(a->dtype, S, { linear<S>(a); })
    return FM_OK;
}

FM_KERNEL(fm_linear_backward_cpu) {
    FM_WITH_DTYPE(a->dtype, S, {
        if (a->T == 0 && a->dweight_OI) memset(a->dweight_OI, 0, size_t(a->O * a->I) * sizeof(S));
        linear_backward<S>(a);
    })
    return FM_OK;
}
