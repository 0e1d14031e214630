#include "fastmoe/adamw.h"

#include "weights.h"

namespace {

constexpr int64_t kChunk = 16384; /* elements: rows of one tensor or a part of one row */
constexpr int64_t kPiece = 512;   /* columns whose moments wait for the scales of their blocks */

struct rule { /* of one tensor */
    float beta1, rate1, beta2, rate2, grad_scale, inverse_correction2, eps, decay, step_size;
    float root_unit, least; /* step_size * m / (sqrt(v * inverse_correction2) + eps) = m / (root * root_unit + least) */
};

/* One step of W elements: kept is v, or its root if rooted. */
template <bool exact, bool rooted>
inline void advance(vf g, vf& mean, vf& kept, vf& weight, const rule& c) {
    g *= c.grad_scale;
    vf square = rooted ? kept * kept : kept;
    if (exact) {
        mean += c.rate1 * (g - mean);
        kept = c.beta2 * square + c.rate2 * (g * g);
        weight = weight * c.decay - c.step_size * (mean / (sqrt(kept * c.inverse_correction2) + c.eps));
    } else {
        mean = c.beta1 * mean + c.rate1 * g;
        square = c.beta2 * square + c.rate2 * (g * g);
        const vf root = sqrt(square);
        weight = weight * c.decay - mean * reciprocal(root * c.root_unit + c.least);
        kept = rooted ? root : square;
    }
}
inline vu draws_of_square(vu draws) { return ((draws * kColumn) >> 8) & 0xffffu; }

/* count columns from `column` on of a row; moments float, bf16 or f16. */
template <class P, class S, class M>
void update(P p, const S* grad, M* m, M* v, int64_t count, int64_t column, row_words row, rule c) {
    constexpr bool exact = sizeof(M) == 4, rooted = __is_same(M, f16);
    int64_t done = 0;
    if constexpr (__is_same(M, bf16) && __is_same(P, weights<bf16, void>)) { /* even and odd columns apart */
        const vu odd = vu{} + kColumn;
        vu columns = column_words(0) * 2u + uint32_t(column) * kColumn;
        for (; done + 2 * W <= count; done += 2 * W, columns += 2 * W * kColumn) {
            const vu draws[2] = {random_bits(columns, row), random_bits(columns + odd, row)};
            pair g = load_pair(grad + done), mean = load_pair(m + done), square = load_pair(v + done),
                 weight = load_pair(p.p + done);
            advance<exact, rooted>(g.even, mean.even, square.even, weight.even, c);
            advance<exact, rooted>(g.odd, mean.odd, square.odd, weight.odd, c);
            store_pair(m + done, mean, draws[0] & 0xffffu, draws[1] & 0xffffu);
            store_pair(v + done, square, draws_of_square(draws[0]), draws_of_square(draws[1]));
            store_pair(p.p + done, weight, draws[0] >> 16, draws[1] >> 16);
        }
    }
    vu columns = column_words(column + done);
    each_vector(count - done, [&](int64_t j, auto n) {
        const int64_t i = done + j;
        const vu draws = exact && !P::random ? vu{} : random_bits(columns, row);
        columns += W * kColumn;
        vf mean = load(m + i, n), kept = load(v + i, n), weight = p.load_at(i, n);
        advance<exact, rooted>(load(grad + i, n), mean, kept, weight, c);
        if (exact) {
            store(m + i, mean, n), store(v + i, kept, n);
        } else {
            store_rounded(m + i, mean, draws & 0xffffu, n);
            store_rounded(v + i, kept, draws_of_square(draws), n);
        }
        p.store_at(i, weight, draws, n);
    });
}

/* The same with codes, where column is a multiple of 32: the moments of up to kPiece columns first, then the scales of
 * their blocks, then weights and codes. */
template <class P, class S>
void update(P p, const S* grad, code8* m, ucode8* v, bf16* m_scales, bf16* v_scales, int64_t count, int64_t column,
            row_words row, rule c) {
    float mean[kPiece], root[kPiece];
    float m_unit[kPiece / kBlock], v_unit[kPiece / kBlock];
    static_assert(kPiece / kBlock % W == 0, "whole vectors of blocks");
    vu m_most[kPiece / kBlock] = {}, v_most[kPiece / kBlock] = {}; /* of a block, lane by lane */
    const float rate1 = c.rate1 * c.grad_scale, rate2 = __builtin_sqrtf(c.rate2) * c.grad_scale;
    const float m_decay = c.beta1 * kUnit, v_decay = __builtin_sqrtf(c.beta2) * kRootUnit;
    vu columns = column_words(column);
    for (int64_t first = 0; first < count; first += kPiece) {
        const int64_t piece = count - first < kPiece ? count - first : kPiece, blocks = (piece + kBlock - 1) / kBlock;
        bf16 *m_scale = m_scales + first / kBlock, *v_scale = v_scales + first / kBlock;
        each_vector(blocks, [&](int64_t b, auto n) {
            store(m_unit + b, load(m_scale + b, n) * m_decay, full{});
            store(v_unit + b, load(v_scale + b, n) * v_decay, full{});
        });
        each_block(piece, [&](int64_t b, auto size) {
            vu m_more = {}, v_more = {};
            each_of_block(size, [&](int64_t j, auto n) {
                const int64_t i = b * kBlock + j;
                const vf g = load(grad + first + i, n), code = load(m + first + i, n), old = load(v + first + i, n);
                const vf scaled = g * rate2, was = old * old * v_unit[b];
                const vf new_mean = code * magnitude(code) * m_unit[b] + g * rate1;
                const vf new_root = sqrt(was * was + scaled * scaled);
                store(mean + i, new_mean), store(root + i, new_root);
                m_more = larger(m_more, bit_cast<vu>(magnitude(new_mean)));
                v_more = larger(v_more, bit_cast<vu>(new_root));
            });
            m_most[b] = m_more, v_most[b] = v_more;
        });
        each_vector(blocks, [&](int64_t b, auto n) {
            const vf m_new = to_scale(largest_lanes(m_most + b)), v_new = to_scale(largest_lanes(v_most + b));
            store_low(m_scale + b, bit_cast<vu>(m_new) >> 16, n);
            store_low(v_scale + b, bit_cast<vu>(v_new) >> 16, n);
            store(m_unit + b, coder(m_new)), store(v_unit + b, root_coder(v_new));
        });
        const auto new_weight = [&](int64_t i, auto n) {
            const vf step = load(mean + i) * reciprocal(load(root + i) * c.root_unit + c.least);
            return p.load_at(first + i, n) * c.decay - step;
        };
        for (int64_t b = 0; b < piece / kBlock; ++b) {
            vu draws[kBlock / W], m_codes[kBlock / W], v_codes[kBlock / W];
            vf weight[kBlock / W];
#pragma GCC unroll 8
            for (int j = 0; j < kBlock / W; ++j, columns += W * kColumn) {
                const int64_t i = b * kBlock + j * W;
                draws[j] = random_bits(columns, row);
                weight[j] = new_weight(i, full{});
                m_codes[j] = to_codes(m, load(mean + i), splat(m_unit[b]), draws[j]);
                v_codes[j] = to_codes(v, load(root + i), splat(v_unit[b]), draws[j]);
            }
            p.store_block(first + b * kBlock, weight, draws);
            store_low_block(m + first + b * kBlock, m_codes);
            store_low_block(v + first + b * kBlock, v_codes);
        }
        each_vector(piece % kBlock, [&](int64_t j, auto n) {
            const int64_t b = piece / kBlock, i = b * kBlock + j;
            const vu draws = random_bits(columns, row);
            columns += W * kColumn;
            p.store_at(first + i, new_weight(i, n), draws, n);
            store_codes(m + first + i, load(mean + i), splat(m_unit[b]), draws, n);
            store_codes(v + first + i, load(root + i), splat(v_unit[b]), draws, n);
        });
    }
}

double power(double base, int64_t exponent) {
    double result = 1;
    for (; exponent; exponent /= 2, base *= base)
        if (exponent % 2) result *= base;
    return result;
}

rule rule_of(const fm_adamw_step_cpu_args* a, int64_t tensor) {
    const double correction1 = 1 - power(a->beta1, a->steps[tensor]);
    const double correction2 = 1 - power(a->beta2, a->steps[tensor]);
    const double step_size = a->lr / correction1;
    return {float(a->beta1),
            float(1 - a->beta1),
            float(a->beta2),
            float(1 - a->beta2),
            float(a->grad_scale),
            float(1 / correction2),
            float(a->eps),
            float(a->decays[tensor]),
            float(step_size),
            step_size ? float(1 / (__builtin_sqrt(correction2) * step_size)) : 0.f,
            step_size ? float(a->eps / step_size) : __builtin_inff()};
}

/* Of a tensor's rows: what a chunk holds. */
struct chunking {
    int64_t rows, columns, pieces; /* of rows, or one row in pieces */
    int64_t rows_in_chunk;
    chunking(const fm_adamw_step_cpu_args* a, int64_t i) {
        const bool flat = a->moments[i] == FM_MOMENTS_F32 && (a->dtypes[i] == FM_F32 || a->masters[i] == FM_MASTER_F32);
        columns = flat ? a->numels[i] : a->columns[i]; /* without draws and blocks rows do not matter */
        rows = columns ? a->numels[i] / columns : 0;
        pieces = (columns + kChunk - 1) / kChunk;
        rows_in_chunk = columns && columns < kChunk ? kChunk / columns : 1;
    }
    int64_t chunks() const { return pieces > 1 ? rows * pieces : (rows + rows_in_chunk - 1) / rows_in_chunk; }
};

template <class T>
T* at_element(T* p, int64_t i) {
    return p + i;
}
void* at_element(void*, int64_t) { return nullptr; }

template <class S, class Master>
void update_chunk(const fm_adamw_step_cpu_args* a, int64_t tensor, int64_t chunk) {
    const chunking k(a, tensor);
    const int64_t first = k.pieces > 1 ? chunk / k.pieces : chunk * k.rows_in_chunk;
    const int64_t past = k.rows - first < k.rows_in_chunk ? k.rows : first + k.rows_in_chunk;
    const int64_t column = k.pieces > 1 ? chunk % k.pieces * kChunk : 0;
    const int64_t count = k.columns - column < kChunk ? k.columns - column : kChunk;
    const rule c = rule_of(a, tensor);
    for (int64_t r = first; r < past; ++r) {
        const row_words row(uint64_t(a->keys[tensor]), uint64_t(a->first_rows[tensor] + r));
        const int64_t at = r * k.columns + column, block = r * ((k.columns + kBlock - 1) / kBlock) + column / kBlock;
        const weights<S, Master> p{static_cast<S*>(a->params[tensor]) + at,
                                   at_element(static_cast<Master*>(a->master_weights[tensor]), at)};
        const S* grad = static_cast<const S*>(a->grads[tensor]) + at;
        void *m = a->exp_avgs[tensor], *v = a->exp_avg_sqs[tensor];
        switch (a->moments[tensor]) {
            case FM_MOMENTS_F32:
                update(p, grad, static_cast<float*>(m) + at, static_cast<float*>(v) + at, count, column, row, c);
                break;
            case FM_MOMENTS_BF16:
                update(p, grad, static_cast<bf16*>(m) + at, static_cast<bf16*>(v) + at, count, column, row, c);
                break;
            case FM_MOMENTS_F16:
                update(p, grad, static_cast<f16*>(m) + at, static_cast<f16*>(v) + at, count, column, row, c);
                break;
            default:
                update(p, grad, static_cast<code8*>(m) + at, static_cast<ucode8*>(v) + at,
                       static_cast<bf16*>(a->exp_avg_scales[tensor]) + block,
                       static_cast<bf16*>(a->exp_avg_sq_scales[tensor]) + block, count, column, row, c);
        }
    }
}

bool served(int32_t dtype, int32_t moments, int32_t master) {
    const bool master_served = master == FM_NO_MASTER || (master == FM_MASTER_F32 && dtype != FM_F32) ||
                               (master == FM_MASTER_RESIDUAL && dtype == FM_BF16);
    return dtype >= FM_F32 && dtype <= FM_F16 && moments >= FM_MOMENTS_F32 && moments <= FM_MOMENTS_CODES &&
           master_served;
}

}  // namespace

FM_KERNEL(fm_adamw_step_cpu) {
    int64_t* first_chunk = a->workspace; /* of each tensor, then of none */
    int64_t elements = 0;
    first_chunk[0] = 0;
    for (int64_t i = 0; i < a->count; ++i) {
        if (!served(a->dtypes[i], a->moments[i], a->masters[i])) return FM_BAD_DTYPE;
        if (a->steps[i] < 1) return a->bad = a->steps[i], FM_BAD_VALUE;
        first_chunk[i + 1] = first_chunk[i] + chunking(a, i).chunks();
        elements += a->numels[i];
    }
    const int64_t chunks = first_chunk[a->count];
#pragma omp parallel for num_threads(team(elements, a->num_threads)) schedule(dynamic, 4)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        int64_t tensor = 0, past = a->count; /* first_chunk[tensor] <= chunk < first_chunk[past] */
        while (past - tensor > 1) {
            const int64_t middle = (tensor + past) / 2;
            (first_chunk[middle] <= chunk ? tensor : past) = middle;
        }
        const int64_t part = chunk - first_chunk[tensor];
        const int32_t dtype = a->dtypes[tensor], master = a->masters[tensor];
        if (master == FM_MASTER_RESIDUAL)
            update_chunk<bf16, code8>(a, tensor, part);
        else if (dtype == FM_F32)
            update_chunk<float, void>(a, tensor, part);
        else if (dtype == FM_BF16)
            master ? update_chunk<bf16, float>(a, tensor, part) : update_chunk<bf16, void>(a, tensor, part);
        else
            master ? update_chunk<f16, float>(a, tensor, part) : update_chunk<f16, void>(a, tensor, part);
    }
    return FM_OK;
}
