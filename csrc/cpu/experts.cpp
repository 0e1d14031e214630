#include "fastmoe/experts.h"

#include <omp.h>

#include "gemm.h"

namespace {

using namespace fm_workspace;
static_assert(2 * kHalf == NC && kHalf % NR == 0, "two halves fill a block");

/* The row blocks of all experts: block b of expert e when first_block[e] <= b < first_block[e+1]. */
struct RowBlocks {
    const int32_t* offsets;
    int32_t* first_block;
    int64_t E;
    RowBlocks(const int32_t* offsets, float* memory, int64_t E)
        : offsets(offsets), first_block(reinterpret_cast<int32_t*>(memory)), E(E) {
        int32_t total = 0;
        for (int64_t e = 0; e < E; ++e) {
            const int64_t rows = offsets[e + 1] - offsets[e];
            first_block[e] = total;
            if (rows) total += int32_t((rows + piece(rows) - 1) / piece(rows));
        }
        first_block[E] = total;
    }
    int64_t count() const { return first_block[E]; }
    void find(int64_t block, int64_t* e, int64_t* r0, int64_t* r1) const {
        int64_t low = 0, high = E; /* the last expert whose first block is <= block */
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (first_block[middle] <= block ? low : high) = middle;
        }
        const int64_t rows = offsets[low + 1] - offsets[low], each = piece(rows);
        *e = low;
        *r0 = offsets[low] + (block - first_block[low]) * each;
        *r1 = min64(*r0 + each, offsets[low + 1]);
    }
};

template <class S>
struct Layer {
    int64_t T, K, R, E, D, F;
    const int32_t *src_row, *dst_row, *offsets;
    const S *gate_up, *down;
    int32_t* token; /* [R] src_row / K */
    int threads;
    float* memory; /* the threads' blocks */

    template <class Args>
    Layer(const Args* a, float* token, float* memory)
        : T(a->T),
          K(a->K),
          R(a->R),
          E(a->E),
          D(a->D),
          F(a->F),
          src_row(a->src_row_R),
          dst_row(a->dst_row_TK),
          offsets(a->offsets),
          gate_up(static_cast<const S*>(a->gate_up_E2FD)),
          down(static_cast<const S*>(a->down_EDF)),
          token(reinterpret_cast<int32_t*>(token)),
          threads(a->num_threads),
          memory(memory) {
        for (int64_t r = 0; r < offsets[E]; ++r) this->token[r] = int32_t(src_row[r] / K);
    }
    float* block_memory() const { return memory + omp_get_thread_num() * aligned(kThreadFloats); }
    Lines<S> gate_up_of(int64_t e) const { return {gate_up + e * 2 * F * D, D, nullptr}; }
    Lines<S> down_of(int64_t e) const { return {down + e * D * F, F, nullptr}; }
};

/* For every (row block, column block) of [rows of e, N]: product, then epilogue(e, r0, r1, n0, n1, C). */
template <class S, class Product, class Epilogue>
void for_row_blocks(const Layer<S>& layer, const RowBlocks& blocks, int64_t N, int64_t columns, Product product,
                    Epilogue epilogue) {
    const int64_t column_blocks = (N + columns - 1) / columns, tasks = blocks.count() * column_blocks;
#pragma omp parallel for num_threads(layer.threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
        int64_t e, r0, r1;
        blocks.find(task / column_blocks, &e, &r0, &r1);
        const int64_t n0 = task % column_blocks * columns, n1 = min64(n0 + columns, N);
        epilogue(e, r0, r1, n0, n1, product(layer.block_memory(), e, r0, r1, n0, n1));
    }
}

/* out[t] = sum_k weight[t,k] * rows[dst[t,k]] in order of k; weights == nullptr adds unweighted. */
template <class S, class Weight>
void combine(const Layer<S>& layer, const float* rows, const Weight* weights, S* out) {
    const int64_t K = layer.K, D = layer.D;
#pragma omp parallel for num_threads(layer.threads) schedule(static)
    for (int64_t t = 0; t < layer.T; ++t) {
        const int32_t* dst = layer.dst_row + t * K;
        each_vector(D, [&](int64_t d, auto n) {
            vf total = splat(0);
            for (int64_t k = 0; k < K; ++k) {
                if (dst[k] < 0) continue;
                const vf v = load(rows + int64_t(dst[k]) * D + d, n);
                total += weights ? v * to_float(weights[t * K + k]) : v;
            }
            store(out + t * D + d, total, n);
        });
    }
}

template <class S, class Weight>
void forward(const fm_moe_mlp_cpu_args* a) {
    const Forward ws(a->workspace, a->R, a->E, a->D, a->F, a->num_threads);
    const Layer<S> layer(a, ws.token, ws.threads);
    const RowBlocks blocks(a->offsets, ws.first_block, a->E);
    const int64_t D = a->D, F = a->F;
    const Lines<S> x{static_cast<const S*>(a->x_TD), D, layer.token};
    S* z = static_cast<S*>(a->z_R2F);
    const int64_t used = a->offsets[a->E];
    if (z) memset(z + used * 2 * F, 0, size_t((a->R - used) * 2 * F) * sizeof(S));

    for_row_blocks(
        layer, blocks, F, kHalf,
        [&](float* memory, int64_t e, int64_t r0, int64_t r1, int64_t f0, int64_t f1) {
            return multiply(
                r1 - r0, 2 * kHalf, D, memory,
                [&](float* out, int64_t k0, int64_t k1) { pack_lines<MR>(out, x, r0, r1 - r0, k0, k1); },
                [&](float* out, int64_t k0, int64_t k1) {
                    pack_lines<NR>(out, layer.gate_up_of(e), f0, f1 - f0, k0, k1);
                    pack_lines<NR>(out + kHalf * (k1 - k0), layer.gate_up_of(e), F + f0, f1 - f0, k0, k1);
                });
        },
        [&](int64_t, int64_t r0, int64_t r1, int64_t f0, int64_t f1, const float* c) {
            for (int64_t r = r0; r < r1; ++r, c += NC) {
                if (z) {
                    copy_row(c, z + r * 2 * F + f0, f1 - f0);
                    copy_row(c + kHalf, z + r * 2 * F + F + f0, f1 - f0);
                }
                float* act = ws.act + r * F + f0;
                each_vector(f1 - f0, [&](int64_t f, auto n) {
                    const vf gate = load(c + f);
                    store(act + f, gate * sigmoid(gate) * load(c + kHalf + f), n);
                });
            }
        });
    const Lines<float> act{ws.act, F, nullptr};
    for_row_blocks(
        layer, blocks, D, NC,
        [&](float* memory, int64_t e, int64_t r0, int64_t r1, int64_t d0, int64_t d1) {
            return multiply(
                r1 - r0, d1 - d0, F, memory,
                [&](float* out, int64_t k0, int64_t k1) { pack_lines<MR>(out, act, r0, r1 - r0, k0, k1); },
                [&](float* out, int64_t k0, int64_t k1) {
                    pack_lines<NR>(out, layer.down_of(e), d0, d1 - d0, k0, k1);
                });
        },
        [&](int64_t, int64_t r0, int64_t r1, int64_t d0, int64_t d1, const float* c) {
            for (int64_t r = r0; r < r1; ++r, c += NC) copy_row(c, ws.y + r * D + d0, d1 - d0);
        });
    combine(layer, ws.y, static_cast<const Weight*>(a->weights_TK), static_cast<S*>(a->y_TD));
}

/* out[e] [M, N] = sum over e's rows r of A[r, M]^T B[r, N], rows of both read through their Lines; zero without rows.
 */
template <class S, class A, class B>
void weight_gradient(const Layer<S>& layer, int64_t M, int64_t N, const Lines<A>& a, const Lines<B>& b, S* out) {
    const int64_t rows_each = piece(M), m_blocks = (M + rows_each - 1) / rows_each, n_blocks = (N + NC - 1) / NC;
    const int64_t tasks = layer.E * m_blocks * n_blocks;
#pragma omp parallel for num_threads(layer.threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t e = task / (m_blocks * n_blocks), m0 = task / n_blocks % m_blocks * rows_each,
                      n0 = task % n_blocks * NC;
        const int64_t m1 = min64(m0 + rows_each, M), n1 = min64(n0 + NC, N), r0 = layer.offsets[e],
                      rows = layer.offsets[e + 1] - r0;
        S* to = out + (e * M + m0) * N + n0;
        if (rows == 0) {
            for (int64_t m = m0; m < m1; ++m, to += N) memset(to, 0, size_t(n1 - n0) * sizeof(S));
            continue;
        }
        const float* c = multiply(
            m1 - m0, n1 - n0, rows, layer.block_memory(),
            [&](float* packed, int64_t k0, int64_t k1) { pack_columns<MR>(packed, a, m0, m1 - m0, r0 + k0, r0 + k1); },
            [&](float* packed, int64_t k0, int64_t k1) { pack_columns<NR>(packed, b, n0, n1 - n0, r0 + k0, r0 + k1); });
        for (int64_t m = m0; m < m1; ++m, c += NC, to += N) copy_row(c, to, n1 - n0);
    }
}

template <class S, class Weight>
void backward(const fm_moe_mlp_backward_cpu_args* a) {
    const Backward ws(a->workspace, a->R, a->E, a->D, a->F, a->num_threads);
    const Layer<S> layer(a, ws.token, ws.threads);
    const RowBlocks blocks(a->offsets, ws.first_block, a->E);
    const int64_t D = a->D, F = a->F, parts = f_blocks(F);
    const Lines<S> x{static_cast<const S*>(a->x_TD), D, layer.token},
        dy{static_cast<const S*>(a->dy_TD), D, layer.token};
    const Weight* weights = static_cast<const Weight*>(a->weights_TK);
    const S* z = static_cast<const S*>(a->z_R2F);
    for (int64_t r = 0; r < a->offsets[a->E]; ++r) ws.weight[r] = to_float(weights[a->src_row_R[r]]);

    /* dact = dy down; with z at hand: dz, weight * act and the partial dots <dact, act> */
    for_row_blocks(
        layer, blocks, F, kHalf,
        [&](float* memory, int64_t e, int64_t r0, int64_t r1, int64_t f0, int64_t f1) {
            return multiply(
                r1 - r0, f1 - f0, D, memory,
                [&](float* out, int64_t k0, int64_t k1) { pack_lines<MR>(out, dy, r0, r1 - r0, k0, k1); },
                [&](float* out, int64_t k0, int64_t k1) {
                    pack_columns<NR>(out, layer.down_of(e), f0, f1 - f0, k0, k1);
                });
        },
        [&](int64_t, int64_t r0, int64_t r1, int64_t f0, int64_t f1, const float* c) {
            for (int64_t r = r0; r < r1; ++r, c += NC) {
                const S *gates = z + r * 2 * F + f0, *ups = gates + F;
                float *dgates = ws.dz + r * 2 * F + f0, *dups = dgates + F, *acts = ws.act + r * F + f0;
                const float weight = ws.weight[r];
                ws.dot[r * parts + f0 / kHalf] = sum_vectors(f1 - f0, [&](int64_t f, auto n) {
                    const vf gate = load(gates + f, n), up = load(ups + f, n), dact = load(c + f); /* C is 0 past n */
                    const vf s = sigmoid(gate), silu = gate * s, act = silu * up, g = dact * weight;
                    store(dgates + f, g * up * (s + silu * (1.f - s)), n);
                    store(dups + f, g * silu, n);
                    store(acts + f, act * weight, n);
                    return dact * act;
                });
            }
        });
    if (a->dweights_TK) {
        Weight* dweights = static_cast<Weight*>(a->dweights_TK);
#pragma omp parallel for num_threads(a->num_threads) schedule(static)
        for (int64_t slot = 0; slot < a->T * a->K; ++slot) {
            const int64_t r = a->dst_row_TK[slot];
            float total = 0;
            for (int64_t part = 0; r >= 0 && part < parts; ++part) total += ws.dot[r * parts + part];
            from_float(dweights + slot, total);
        }
    }
    const Lines<float> dz{ws.dz, 2 * F, nullptr}, act{ws.act, F, nullptr};
    if (a->ddown_EDF) weight_gradient(layer, D, F, dy, act, static_cast<S*>(a->ddown_EDF));
    if (a->dgate_up_E2FD) weight_gradient(layer, 2 * F, D, dz, x, static_cast<S*>(a->dgate_up_E2FD));
    if (a->dx_TD) {
        for_row_blocks(
            layer, blocks, D, NC,
            [&](float* memory, int64_t e, int64_t r0, int64_t r1, int64_t d0, int64_t d1) {
                return multiply(
                    r1 - r0, d1 - d0, 2 * F, memory,
                    [&](float* out, int64_t k0, int64_t k1) { pack_lines<MR>(out, dz, r0, r1 - r0, k0, k1); },
                    [&](float* out, int64_t k0, int64_t k1) {
                        pack_columns<NR>(out, layer.gate_up_of(e), d0, d1 - d0, k0, k1);
                    });
            },
            [&](int64_t, int64_t r0, int64_t r1, int64_t d0, int64_t d1, const float* c) {
                for (int64_t r = r0; r < r1; ++r, c += NC) copy_row(c, ws.dx + r * D + d0, d1 - d0);
            });
        combine(layer, ws.dx, static_cast<const Weight*>(nullptr), static_cast<S*>(a->dx_TD));
    }
}

}  // namespace

FM_KERNEL(fm_moe_mlp_cpu) {
    FM_WITH_DTYPE(a->dtype, S, {
        if (a->weight_dtype == FM_F32)
            forward<S, float>(a);
        else if (a->weight_dtype == a->dtype)
            forward<S, S>(a);
        else
            return FM_BAD_DTYPE;
    })
    return FM_OK;
}

FM_KERNEL(fm_moe_mlp_backward_cpu) {
    FM_WITH_DTYPE(a->dtype, S, {
        if (a->weight_dtype == FM_F32)
            backward<S, float>(a);
        else if (a->weight_dtype == a->dtype)
            backward<S, S>(a);
        else
            return FM_BAD_DTYPE;
    })
    return FM_OK;
}
