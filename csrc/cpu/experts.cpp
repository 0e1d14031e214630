#include "fastmoe/experts.h"

#include <math.h>
#include <omp.h>

#include <type_traits>

#include "gemm.h"

namespace {

using namespace fm_workspace;

/* The row blocks of all experts: block b of expert e when first_block[e] <= b < first_block[e+1]. */
struct RowBlocks {
    const int32_t* offsets;
    int32_t* first_block;
    int64_t E;
    RowBlocks(const int32_t* offsets, int32_t* memory, int64_t E) : offsets(offsets), first_block(memory), E(E) {
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
struct Layer : fm_moe_layer {
    int64_t Z;
    bool gate; /* is there one */
    const int32_t *src_row, *dst_row, *offsets;
    const S *gate_up, *down, *gate_up_bias, *down_bias;
    const int32_t* token; /* [R] src_row / K */
    float* memory;        /* the threads' blocks */

    template <class Args>
    Layer(const Args* a, int32_t* token, float* memory)
        : fm_moe_layer(a->layer),
          Z(width_of_z(a->layer)),
          gate(gated(a->layer)),
          src_row(a->src_row_R),
          dst_row(a->dst_row_TK),
          offsets(a->offsets),
          gate_up(static_cast<const S*>(a->gate_up)),
          down(static_cast<const S*>(a->down)),
          gate_up_bias(static_cast<const S*>(a->gate_up_bias)),
          down_bias(static_cast<const S*>(a->down_bias)),
          token(token),
          memory(memory) {
        for (int64_t r = 0; r < offsets[E]; ++r) token[r] = int32_t(src_row[r] / K);
    }
    float* block_memory() const { return memory + omp_get_thread_num() * aligned(kThreadFloats); }
    int64_t used() const { return offsets[E]; }
    /* Rows [T, D] of the tokens as the products read them; `room` where that is another type. */
    template <class Between>
    Lines<Between> by_token(const void* rows, Between* room) const {
        const S* from = static_cast<const S*>(rows);
        if constexpr (std::is_same_v<S, Between>) return {from, D, token};
#pragma omp parallel for num_threads(num_threads) schedule(static)
        for (int64_t t = 0; t < T; ++t)
            each_vector(D, [&](int64_t d, auto n) { store(room + t * D + d, load(from + t * D + d, n), n); });
        return {room, D, token};
    }
    /* The weights of e as right-hand sides with k = D or F (forward) and k = Z or D (backward). */
    Weight<S> up_of(int64_t e) const { return {{gate_up + e * Z * D, transposed ? Z : D, nullptr}, !transposed}; }
    Weight<S> down_of(int64_t e) const { return {{down + e * D * F, transposed ? D : F, nullptr}, !transposed}; }
    Weight<S> up_back_of(int64_t e) const { return {up_of(e).lines, bool(transposed)}; }
    Weight<S> down_back_of(int64_t e) const { return {down_of(e).lines, bool(transposed)}; }
    int64_t z_columns() const { return f_columns(*this); }
    /* Columns of z for f0..f1-1, at their places in C. */
    int z_parts(int64_t f0, int64_t f1, Columns* parts) const {
        const int64_t n = f1 - f0;
        if (gate && interleaved) return parts[0] = {2 * f0, 2 * n, 0}, 1;
        parts[0] = {f0, n, 0};
        if (gate) parts[1] = {F + f0, n, up_at(n)};
        return gate ? 2 : 1;
    }
    static int64_t up_at(int64_t n) { return (n + NR - 1) / NR * NR; }
};

/* f(task) for every task, several at a time where they are many. */
template <class F>
void for_tasks(int64_t tasks, int threads, F f) {
    const int64_t chunk = tasks / (threads * 64);
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk < 1 ? 1 : chunk > 64 ? 64 : int(chunk))
    for (int64_t task = 0; task < tasks; ++task) f(task);
}

/* f(e, r0, r1, n0, n1) for every (row block, column block) of [rows of e, N]. */
template <class S, class F>
void for_row_blocks(const Layer<S>& layer, const RowBlocks& blocks, int64_t N, int64_t columns, F f) {
    const int64_t column_blocks = (N + columns - 1) / columns;
    for_tasks(blocks.count() * column_blocks, layer.num_threads, [&](int64_t task) {
        int64_t e, r0, r1;
        blocks.find(task / column_blocks, &e, &r0, &r1);
        const int64_t n0 = task % column_blocks * columns;
        f(e, r0, r1, n0, min64(n0 + columns, N));
    });
}

/* out[t] = sum_k weight[t,k] * rows[dst[t,k]] in order of k; weights == nullptr adds unweighted. */
template <class S, class Between, class Weight>
void combine(const Layer<S>& layer, const Between* rows, const Weight* weights, S* out) {
    const int64_t K = layer.K, D = layer.D;
#pragma omp parallel for num_threads(layer.num_threads) schedule(static)
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

/* Rows of floats, whole vectors past n included, which hold anything. */
template <class F>
inline void whole_vectors(int64_t n, F f) {
    for (int64_t i = 0; i < n; i += W) f(i);
}

inline vf gelu_slope(vf x) { return 0.5f * (1.f + erf(x * 0.70710678f)) + x * exp(-0.5f * x * x) * 0.39894228f; }
inline vf gelu(vf x) { return 0.5f * x * (1.f + erf(x * 0.70710678f)); }
inline vf tanh_of_gelu(vf x) { return tanh(0.79788456f * (x + 0.044715f * x * x * x)); }
inline vf gelu_tanh(vf x) { return 0.5f * x * (1.f + tanh_of_gelu(x)); }
inline vf gelu_tanh_slope(vf x) {
    const vf t = tanh_of_gelu(x);
    return 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * 0.79788456f * (1.f + 0.134145f * x * x);
}
inline vf at_most(vf x, float most) { return select(x > splat(most), splat(most), x); } /* NaN stays */
inline vf at_least(vf x, float least) { return select(x < splat(least), splat(least), x); }

void activate(const fm_moe_layer& l, int64_t n, const float* gate, const float* up, float* act) {
    const auto rows = [&](auto f) {
        whole_vectors(n, [&](int64_t i) { store(act + i, f(load(gate + i), load(up + i))); });
    };
    const auto row = [&](auto f) { whole_vectors(n, [&](int64_t i) { store(act + i, f(load(up + i))); }); };
    switch (l.activation) {
        case FM_SWIGLU:
            return rows([](vf g, vf u) { return g * sigmoid(g) * u; });
        case FM_GEGLU:
            return rows([](vf g, vf u) { return gelu(g) * u; });
        case FM_GEGLU_TANH:
            return rows([](vf g, vf u) { return gelu_tanh(g) * u; });
        case FM_CLAMPED_SWIGLU:
            return rows([&](vf g, vf u) {
                g = at_most(g, l.limit), u = at_least(at_most(u, l.limit), -l.limit);
                return g * sigmoid(g * l.alpha) * (u + 1.f);
            });
        case FM_GELU:
            return row([](vf u) { return gelu(u); });
        case FM_GELU_TANH:
            return row([](vf u) { return gelu_tanh(u); });
        case FM_RELU:
            return row([](vf u) { return at_least(u, 0); });
        case FM_RELU2:
            return row([](vf u) { return at_least(u, 0) * at_least(u, 0); });
    }
}

/* From dact and z: act, dgate and dup. */
void activate_backward(const fm_moe_layer& l, int64_t n, const float* dact, const float* gate, const float* up,
                       float* act, float* dgate, float* dup) {
    const auto rows = [&](auto f) {
        whole_vectors(n, [&](int64_t i) {
            vf a, dg, du;
            f(load(dact + i), load(gate + i), load(up + i), &a, &dg, &du);
            store(act + i, a), store(dgate + i, dg), store(dup + i, du);
        });
    };
    const auto row = [&](auto f) {
        whole_vectors(n, [&](int64_t i) {
            vf a, du;
            f(load(dact + i), load(up + i), &a, &du);
            store(act + i, a), store(dup + i, du);
        });
    };
    switch (l.activation) {
        case FM_SWIGLU:
            return rows([](vf d, vf g, vf u, vf* a, vf* dg, vf* du) {
                const vf s = sigmoid(g), silu = g * s;
                *a = silu * u, *dg = d * u * (s + silu * (1.f - s)), *du = d * silu;
            });
        case FM_GEGLU:
            return rows([](vf d, vf g, vf u, vf* a, vf* dg, vf* du) {
                const vf act = gelu(g);
                *a = act * u, *dg = d * u * gelu_slope(g), *du = d * act;
            });
        case FM_GEGLU_TANH:
            return rows([](vf d, vf g, vf u, vf* a, vf* dg, vf* du) {
                const vf act = gelu_tanh(g);
                *a = act * u, *dg = d * u * gelu_tanh_slope(g), *du = d * act;
            });
        case FM_CLAMPED_SWIGLU:
            return rows([&](vf d, vf gate, vf up, vf* a, vf* dg, vf* du) {
                const vf g = at_most(gate, l.limit), u = at_least(at_most(up, l.limit), -l.limit);
                const vf s = sigmoid(g * l.alpha), zero = splat(0);
                *a = g * s * (u + 1.f);
                *dg = select(gate > splat(l.limit), zero, d * (u + 1.f) * (s + l.alpha * g * s * (1.f - s)));
                *du = select((up > splat(l.limit)) | (up < splat(-l.limit)), zero, d * g * s);
            });
        case FM_GELU:
            return row([](vf d, vf u, vf* a, vf* du) { *a = gelu(u), *du = d * gelu_slope(u); });
        case FM_GELU_TANH:
            return row([](vf d, vf u, vf* a, vf* du) { *a = gelu_tanh(u), *du = d * gelu_tanh_slope(u); });
        case FM_RELU:
            return row([](vf d, vf u, vf* a, vf* du) { *a = at_least(u, 0), *du = select(u > splat(0), d, splat(0)); });
        case FM_RELU2:
            return row([](vf d, vf u, vf* a, vf* du) {
                const vf act = at_least(u, 0);
                *a = act * act, *du = d * 2.f * act;
            });
    }
}

/* gate and up of n columns of F, in float. */
struct Halves {
    alignas(64) float gate[NC], up[NC];
};

/* The row of C to its halves; those that lie in C are used there. */
template <class S>
void split(const Layer<S>& layer, const float* c, int64_t n, Halves* scratch, const float** gate, const float** up) {
    if (layer.gate && layer.interleaved) {
        for (int64_t f = 0; f < n; ++f) scratch->gate[f] = c[2 * f], scratch->up[f] = c[2 * f + 1];
        *gate = scratch->gate, *up = scratch->up;
    } else {
        *gate = c, *up = layer.gate ? c + Layer<S>::up_at(n) : c;
    }
}

/* gate and up columns f0.. of a row of z (or dz): scaled and stored in z's order. */
template <class S, class To>
void store_z(const Layer<S>& layer, const float* gate, const float* up, float scale, To* row, int64_t f0, int64_t n) {
    if (layer.gate && layer.interleaved) {
        for (int64_t f = 0; f < n; ++f) {
            from_float(row + 2 * (f0 + f), gate[f] * scale);
            from_float(row + 2 * (f0 + f) + 1, up[f] * scale);
        }
        return;
    }
    if (layer.gate) each_vector(n, [&](int64_t f, auto rest) { store(row + f0 + f, load(gate + f) * scale, rest); });
    To* ups = row + (layer.gate ? layer.F : 0) + f0;
    each_vector(n, [&](int64_t f, auto rest) { store(ups + f, load(up + f) * scale, rest); });
}

/* A row of z to its halves; whole vectors of floats are used where they are. */
template <class S>
void load_z(const Layer<S>& layer, const S* row, int64_t f0, int64_t n, Halves* z, const float** gate,
            const float** up) {
    *gate = z->gate, *up = z->up;
    if (layer.gate && layer.interleaved) {
        for (int64_t f = 0; f < n; ++f)
            z->gate[f] = to_float(row[2 * (f0 + f)]), z->up[f] = to_float(row[2 * (f0 + f) + 1]);
        return;
    }
    const S *gates = row + f0, *ups = row + (layer.gate ? layer.F : 0) + f0;
    if constexpr (std::is_same_v<S, float>)
        if (n % W == 0) {
            *gate = gates, *up = ups;
            return;
        }
    if (layer.gate) each_vector(n, [&](int64_t f, auto rest) { store(z->gate + f, load(gates + f, rest)); });
    each_vector(n, [&](int64_t f, auto rest) { store(z->up + f, load(ups + f, rest)); });
}

template <class S>
inline float rounded(float x) {
    S s;
    from_float(&s, x);
    return to_float(s);
}

/* 8-bit z: blocks of FM_Z8_BLOCK columns of gate, then of up; value = q * scale, scale = largest magnitude / 127. */
template <class S>
struct Z8 {
    const Layer<S>& layer;
    int64_t blocks, halves;
    explicit Z8(const Layer<S>& layer)
        : layer(layer), blocks((layer.F + FM_Z8_BLOCK - 1) / FM_Z8_BLOCK), halves(layer.gate ? 2 : 1) {}
    int8_t* at(int8_t* row, int64_t half, int64_t f) const {
        return row + (layer.interleaved && halves == 2 ? 2 * f + half : half * layer.F + f);
    }
    int64_t step() const { return layer.interleaved && halves == 2 ? 2 : 1; }
    void quantize(const float* values, int64_t half, int64_t f0, int64_t n, int8_t* row, bf16* scales) const {
        for (int64_t b = 0; b < n; b += FM_Z8_BLOCK) {
            const int64_t count = min64(FM_Z8_BLOCK, n - b);
            float v[FM_Z8_BLOCK], most = 0;
            bool finite = true;
            for (int64_t i = 0; i < count; ++i) {
                v[i] = rounded<S>(values[b + i]);
                const float size = fabsf(v[i]);
                finite &= size <= 3.4028235e38f;
                most = size > most ? size : most;
            }
            bf16* scale = scales + half * blocks + (f0 + b) / FM_Z8_BLOCK;
            from_float(scale, finite ? most * (1.f / 127) : __builtin_nanf(""));
            const float unit = to_float(*scale);
            int8_t* to = at(row, half, f0 + b);
            for (int64_t i = 0; i < count; ++i) {
                float q = unit > 0 ? nearbyintf(v[i] / unit) : 0.f;
                q = q > 127 ? 127 : q < -127 ? -127 : q;
                to[i * step()] = int8_t(q);
            }
        }
    }
    void dequantize(int8_t* row, const bf16* scales, int64_t half, int64_t f0, int64_t n, float* values) const {
        const int8_t* from = at(row, half, f0);
        for (int64_t i = 0; i < n; ++i)
            values[i] = rounded<S>(from[i * step()] * to_float(scales[half * blocks + (f0 + i) / FM_Z8_BLOCK]));
    }
};

template <class S>
void add_bias(const S* bias, float* c, int64_t n) {
    each_vector(n, [&](int64_t i, auto rest) { store(c + i, load(c + i) + load(bias + i, rest)); });
}

/* z = x gate_up^T + bias for every row; row(r, f0, n, gate, up) takes it. */
template <class L, class S, class Between, class Row>
void for_rows_of_z(const Layer<S>& layer, const RowBlocks& blocks, const Lines<Between>& x, Row row) {
    for_row_blocks(
        layer, blocks, layer.F, layer.z_columns(), [&](int64_t e, int64_t r0, int64_t r1, int64_t f0, int64_t f1) {
            Columns parts[2];
            const int num_parts = layer.z_parts(f0, f1, parts);
            float* c = multiply<L>(x, r0, r1 - r0, r1 - r0 <= kThin, layer.D, layer.up_of(e), parts, num_parts,
                                   layer.block_memory());
            Halves scratch;
            for (int64_t r = r0; r < r1; ++r, c += NC) {
                for (int part = 0; layer.gate_up_bias && part < num_parts; ++part)
                    add_bias(layer.gate_up_bias + e * layer.Z + parts[part].n0, c + parts[part].at, parts[part].n);
                const float *gate, *up;
                split(layer, c, f1 - f0, &scratch, &gate, &up);
                row(r, f0, f1 - f0, gate, up);
            }
        });
}

template <class S, class Weight>
void forward(const fm_moe_mlp_cpu_args* a) {
    using L = Lane<S>;
    using Between = typename L::Between;
    const Forward<Between, S> ws(a->workspace, a->layer);
    const Layer<S> layer(a, ws.token, ws.threads);
    const RowBlocks blocks(a->offsets, ws.first_block, layer.E);
    const int64_t D = layer.D, F = layer.F, Z = layer.Z, R = layer.R, used = layer.used();
    S* z = static_cast<S*>(a->z_RZ);
    int8_t* z8 = static_cast<int8_t*>(a->z_RZ);
    bf16* scales = static_cast<bf16*>(a->z_scale);
    const Z8<S> codec(layer);
    const int64_t num_scales = codec.halves * codec.blocks;
    if (layer.save == FM_SAVE_Z && R > used) memset(z + used * Z, 0, size_t((R - used) * Z) * sizeof(S));
    if (layer.save == FM_SAVE_Z8 && R > used) {
        memset(z8 + used * Z, 0, size_t((R - used) * Z));
        memset(scales + used * num_scales, 0, size_t((R - used) * num_scales) * sizeof(bf16));
    }
    for_rows_of_z<L>(layer, blocks, layer.by_token(a->x_TD, ws.x),
                     [&](int64_t r, int64_t f0, int64_t n, const float* gate, const float* up) {
                         if (layer.save == FM_SAVE_Z) store_z(layer, gate, up, 1.f, z + r * Z, f0, n);
                         if (layer.save == FM_SAVE_Z8) {
                             if (layer.gate) codec.quantize(gate, 0, f0, n, z8 + r * Z, scales + r * num_scales);
                             codec.quantize(up, codec.halves - 1, f0, n, z8 + r * Z, scales + r * num_scales);
                         }
                         alignas(64) float act[NC];
                         activate(layer, n, gate, up, act);
                         copy_row(act, ws.act + r * F + f0, n);
                     });
    const Lines<Between> act{ws.act, F, nullptr};
    for_row_blocks(layer, blocks, D, NC, [&](int64_t e, int64_t r0, int64_t r1, int64_t d0, int64_t d1) {
        const Columns part{d0, d1 - d0, 0};
        float* c = multiply<L>(act, r0, r1 - r0, r1 - r0 <= kThin, F, layer.down_of(e), &part, 1, layer.block_memory());
        for (int64_t r = r0; r < r1; ++r, c += NC) {
            if (layer.down_bias) add_bias(layer.down_bias + e * D + d0, c, d1 - d0);
            copy_row(c, ws.y + r * D + d0, d1 - d0);
        }
    });
    combine(layer, ws.y, static_cast<const Weight*>(a->weights_TK), static_cast<S*>(a->y_TD));
}

/* The experts a gradient holds: all, or those with rows. */
struct Owners {
    const int32_t* experts; /* NULL: all */
    int64_t count;
    int64_t operator[](int64_t i) const { return experts ? experts[i] : i; }
};

/* A block of the gradient of an expert with few rows: to[m, n] = sum_r a[r, m] b[r, n], straight to memory. a and b
 * hold their rows' columns m0.. and n0.. as floats, MC and NC apart. */
template <class S>
void outer_products(int64_t rows, const float* a, int64_t m, const float* b, int64_t n, S* to, int64_t stride,
                    bool streamed) {
    alignas(64) float line[NC];
    for (int64_t i = 0; i < m; ++i, to += stride) {
        whole_vectors(n, [&](int64_t j) {
            vf sum = splat(0);
            for (int64_t r = 0; r < rows; ++r) sum += splat(a[r * MC + i]) * load(b + r * NC + j);
            store(line + j, sum);
        });
        if (streamed)
            stream_row(line, to, n);
        else
            copy_row(line, to, n);
    }
}

/* out[i] [M, N] = sum over rows r of expert owners[i] of A[r, M]^T B[r, N], rows of both read through their Lines; zero
 * without rows. */
template <class L, class S, class A, class B>
void weight_gradient(const Layer<S>& layer, const Owners& owners, int64_t M, int64_t N, const Lines<A>& a,
                     const Lines<B>& b, S* out) {
    const int64_t rows_each = piece(M), m_blocks = (M + rows_each - 1) / rows_each, n_blocks = (N + NC - 1) / NC;
    const bool streamed = owners.count * M * N * int64_t(sizeof(S)) >= int64_t(32) << 20; /* no cache will hold it */
    for_tasks(owners.count * m_blocks * n_blocks, layer.num_threads, [&](int64_t task) {
        const int64_t i = task / (m_blocks * n_blocks), e = owners[i], m0 = task / n_blocks % m_blocks * rows_each,
                      n0 = task % n_blocks * NC;
        const int64_t m1 = min64(m0 + rows_each, M), n1 = min64(n0 + NC, N), r0 = layer.offsets[e],
                      rows = layer.offsets[e + 1] - r0;
        S* to = out + (i * M + m0) * N + n0;
        if (rows == 0) {
            for (int64_t m = m0; m < m1; ++m, to += N) memset(to, 0, size_t(n1 - n0) * sizeof(S));
            return;
        }
        const Block block(layer.block_memory());
        if (rows <= kThin) {
            for (int64_t r = 0; r < rows; ++r) {
                const A* from = a.line(r0 + r) + m0;
                const B* other = b.line(r0 + r) + n0;
                each_vector(m1 - m0, [&](int64_t j, auto rest) { store(block.a + r * MC + j, load(from + j, rest)); });
                each_vector(n1 - n0, [&](int64_t j, auto rest) { store(block.b + r * NC + j, load(other + j, rest)); });
            }
            outer_products(rows, block.a, m1 - m0, block.b, n1 - n0, to, N, streamed);
            if (streamed) stream_end();
            return;
        }
        const float* c = multiply<L>(
            m1 - m0, n1 - n0, rows, layer.block_memory(),
            [&](float* packed, int64_t k0, int64_t k1) {
                pack_columns<MR, L>(packed, a, m0, m1 - m0, r0 + k0, r0 + k1);
            },
            [&](float* packed, int64_t k0, int64_t k1) {
                pack_columns<NR, L>(packed, b, n0, n1 - n0, r0 + k0, r0 + k1);
            });
        for (int64_t m = m0; m < m1; ++m, c += NC, to += N) {
            if (streamed)
                stream_row(c, to, n1 - n0);
            else
                copy_row(c, to, n1 - n0);
        }
        if (streamed) stream_end();
    });
}

constexpr int64_t kRowsOfSum = 32;

/* out[e] [N] = sum over rows r of e of weight[r] * A[r, N]; weight == nullptr adds unweighted. */
template <class S, class A>
void bias_gradient(const Layer<S>& layer, int64_t N, const Lines<A>& a, const float* weight, S* out) {
    const int64_t blocks = (N + NC - 1) / NC;
    for_tasks(layer.E * blocks, layer.num_threads, [&](int64_t task) {
        const int64_t e = task / blocks, n0 = task % blocks * NC, n = min64(NC, N - n0);
        alignas(64) float total[NC], sum[NC]; /* every kRowsOfSum rows sum from zero */
        const auto clear = [&](float* row) { whole_vectors(n, [&](int64_t i) { store(row + i, splat(0)); }); };
        clear(total);
        for (int64_t r0 = layer.offsets[e], end = layer.offsets[e + 1]; r0 < end; r0 += kRowsOfSum) {
            clear(sum);
            for (int64_t r = r0; r < min64(r0 + kRowsOfSum, end); ++r) {
                const A* row = a.line(r) + n0;
                const float w = weight ? weight[r] : 1.f;
                each_vector(n, [&](int64_t i, auto rest) { store(sum + i, load(sum + i) + load(row + i, rest) * w); });
            }
            whole_vectors(n, [&](int64_t i) { store(total + i, load(total + i) + load(sum + i)); });
        }
        copy_row(total, out + e * N + n0, n);
    });
}

template <class S, class Weight>
void backward(const fm_moe_mlp_backward_cpu_args* a) {
    using L = Lane<S>;
    using Between = typename L::Between;
    const Backward<Between, S> ws(a->workspace, a->layer);
    const Layer<S> layer(a, ws.token, ws.threads);
    const RowBlocks blocks(a->offsets, ws.first_block, layer.E);
    const int64_t D = layer.D, F = layer.F, Z = layer.Z, parts = f_blocks(layer);
    const Lines<Between> x = layer.by_token(a->x_TD, ws.x), dy = layer.by_token(a->dy_TD, ws.dy);
    const Weight* weights = static_cast<const Weight*>(a->weights_TK);
    for (int64_t r = 0; r < layer.used(); ++r) ws.weight[r] = to_float(weights[a->src_row_R[r]]);
    const S* z = static_cast<const S*>(a->z_RZ);
    int8_t* z8 = static_cast<int8_t*>(const_cast<void*>(a->z_RZ));
    const bf16* scales = static_cast<const bf16*>(a->z_scale);
    const Z8<S> codec(layer);
    if (layer.save == FM_SAVE_X) {
        for_rows_of_z<L>(layer, blocks, x, [&](int64_t r, int64_t f0, int64_t n, const float* gate, const float* up) {
            store_z(layer, gate, up, 1.f, ws.z + r * Z, f0, n);
        });
        z = ws.z;
    }

    /* dact = dy down; with z at hand: dz, weight * act and the partial dots <dact, act> (with the bias: <dy, y>) */
    for_row_blocks(layer, blocks, F, layer.z_columns(), [&](int64_t e, int64_t r0, int64_t r1, int64_t f0, int64_t f1) {
        const int64_t n = f1 - f0;
        const Columns part{f0, n, 0};
        const float* c =
            multiply<L>(dy, r0, r1 - r0, r1 - r0 <= kThin, D, layer.down_back_of(e), &part, 1, layer.block_memory());
        Halves at, d;
        alignas(64) float act[NC];
        for (int64_t r = r0; r < r1; ++r, c += NC) {
            const float *gate = at.gate, *up = at.up;
            if (layer.save == FM_SAVE_Z8) {
                const bf16* scale = scales + r * codec.halves * codec.blocks;
                if (layer.gate) codec.dequantize(z8 + r * Z, scale, 0, f0, n, at.gate);
                codec.dequantize(z8 + r * Z, scale, codec.halves - 1, f0, n, at.up);
            } else {
                load_z(layer, z + r * Z, f0, n, &at, &gate, &up);
            }
            activate_backward(layer, n, c, gate, up, act, d.gate, d.up);
            float dot = sum_vectors(n, [&](int64_t f, auto rest) { return load(c + f, rest) * load(act + f, rest); });
            if (f0 == 0 && layer.down_bias)
                dot += sum_vectors(D, [&](int64_t i, auto rest) {
                    return load(dy.line(r) + i, rest) * load(layer.down_bias + e * D + i, rest);
                });
            ws.dot[r * parts + f0 / layer.z_columns()] = dot;
            store_z(layer, d.gate, d.up, ws.weight[r], ws.dz + r * Z, f0, n);
            Between* acts = ws.act + r * F + f0;
            each_vector(n, [&](int64_t f, auto rest) { store(acts + f, load(act + f) * ws.weight[r], rest); });
        }
    });
    if (a->dweights_TK) {
        Weight* dweights = static_cast<Weight*>(a->dweights_TK);
#pragma omp parallel for num_threads(layer.num_threads) schedule(static)
        for (int64_t slot = 0; slot < layer.T * layer.K; ++slot) {
            const int64_t r = a->dst_row_TK[slot];
            float total = 0;
            for (int64_t part = 0; r >= 0 && part < parts; ++part) total += ws.dot[r * parts + part];
            from_float(dweights + slot, total);
        }
    }
    Owners owners{nullptr, layer.E};
    if (a->sparse) {
        owners = {ws.touched, 0};
        for (int64_t e = 0; e < layer.E; ++e)
            if (layer.offsets[e + 1] > layer.offsets[e]) ws.touched[owners.count++] = int32_t(e);
    }
    const Lines<Between> dz{ws.dz, Z, nullptr}, act{ws.act, F, nullptr};
    if (S* out = static_cast<S*>(a->ddown)) {
        if (layer.transposed)
            weight_gradient<L>(layer, owners, F, D, act, dy, out);
        else
            weight_gradient<L>(layer, owners, D, F, dy, act, out);
    }
    if (S* out = static_cast<S*>(a->dgate_up)) {
        if (layer.transposed)
            weight_gradient<L>(layer, owners, D, Z, x, dz, out);
        else
            weight_gradient<L>(layer, owners, Z, D, dz, x, out);
    }
    if (a->dgate_up_bias) bias_gradient(layer, Z, dz, nullptr, static_cast<S*>(a->dgate_up_bias));
    if (a->ddown_bias) bias_gradient(layer, D, dy, ws.weight, static_cast<S*>(a->ddown_bias));
    if (a->dx_TD) {
        for_row_blocks(layer, blocks, D, NC, [&](int64_t e, int64_t r0, int64_t r1, int64_t d0, int64_t d1) {
            const Columns part{d0, d1 - d0, 0};
            const float* c =
                multiply<L>(dz, r0, r1 - r0, r1 - r0 <= kThin, Z, layer.up_back_of(e), &part, 1, layer.block_memory());
            for (int64_t r = r0; r < r1; ++r, c += NC) copy_row(c, ws.dx + r * D + d0, d1 - d0);
        });
        combine(layer, ws.dx, static_cast<const Weight*>(nullptr), static_cast<S*>(a->dx_TD));
    }
}

}  // namespace

FM_KERNEL(fm_moe_mlp_cpu) {
    const fm_moe_layer& layer = a->layer;
    FM_WITH_DTYPE(layer.dtype, S, {
        if (layer.weight_dtype == FM_F32)
            forward<S, float>(a);
        else if (layer.weight_dtype == layer.dtype)
            forward<S, S>(a);
        else
            return FM_BAD_DTYPE;
    })
    return FM_OK;
}

FM_KERNEL(fm_moe_mlp_backward_cpu) {
    const fm_moe_layer& layer = a->layer;
    FM_WITH_DTYPE(layer.dtype, S, {
        if (layer.weight_dtype == FM_F32)
            backward<S, float>(a);
        else if (layer.weight_dtype == layer.dtype)
            backward<S, S>(a);
        else
            return FM_BAD_DTYPE;
    })
    return FM_OK;
}
