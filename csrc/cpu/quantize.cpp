#include "fastmoe/quantize.h"

#include "quantize.h"

/* reference.py to the bit: this file is compiled without fusing products with sums, and divides. */

namespace {

constexpr int64_t kTask = 512; /* blocks */
constexpr int kVectors = kBlock / W;
constexpr int32_t kInfinity = 0x7f800000;

/* The first `count` <= 32 values of a block, then zeros. */
template <class S>
void load_block(const S* p, int64_t count, vf (&x)[kVectors]) {
    S part[kBlock] = {};
    if (count < kBlock) p = static_cast<const S*>(memcpy(part, p, size_t(count) * sizeof(S)));
    for (int i = 0; i < kVectors; ++i) x[i] = load(p + i * W);
}

/* int8_t codes have a sign. */
template <class Code>
constexpr float kLargest = Code(-1) < 0 ? 127.f : 255.f;

template <class Code>
struct codes {
    typedef Code type __attribute__((vector_size(W)));
};

/* The codes of a block of `count` values, zeros past them; returns its scale. The low 8 bits of draws round up or down;
 * NULL: to nearest. */
template <class Code>
bf16 encode(const vf (&x)[kVectors], const vu* draws, Code* p, int64_t count) {
    vi top{};
    for (const vf& v : x) {
        const vi m = bit_cast<vi>(magnitude(v));
        top = top > m ? top : m;
    }
    const int32_t largest = fold<W, int32_t>(top, [](auto a, auto b) { return a > b ? a : b; });
    const bf16 scale{uint16_t(largest < kInfinity ? (largest + 0xffff) >> 16 : 0x7fc0)};
    const vf unit = splat(to_float(scale)), zero = splat(0);
    Code part[kBlock], *to = count < kBlock ? part : p;
    for (int i = 0; i < kVectors; ++i) {
        const vf share = magnitude(x[i]) / unit; /* NaN where the scale is 0 or NaN */
        const vf code = kLargest<Code> * sqrt(select(share >= zero, share, zero));
        const vf up = draws ? code + __builtin_convertvector(bit_cast<vi>(draws[i] & 0xffu), vf) * 0x1p-8f
                            : code + 12582912.f - 12582912.f; /* half to even */
        vi c = __builtin_convertvector(up, vi);
        if (kLargest<Code> == 127.f) {
            const vi negative = x[i] < zero;
            c = (c ^ negative) - negative;
        } else {
            c = (c > 1 ? c : vi{} + 1) & (x[i] > zero);
        }
        const auto narrow = __builtin_convertvector(c, typename codes<Code>::type);
        memcpy(to + i * W, &narrow, W);
    }
    if (count < kBlock) memcpy(p, part, size_t(count));
    return scale;
}

/* The values of a block of `count` codes; past them anything. */
template <class Code>
void decode(const Code* p, bf16 scale, int64_t count, vf (&x)[kVectors]) {
    Code part[kBlock] = {};
    if (count < kBlock) p = static_cast<const Code*>(memcpy(part, p, size_t(count)));
    for (int i = 0; i < kVectors; ++i) {
        const vi c = __builtin_convertvector(load_bits<typename codes<Code>::type>(p + i * W), vi);
        const vf share = __builtin_convertvector(c, vf) / kLargest<Code>;
        x[i] = to_float(scale) * share * magnitude(share);
    }
}

/* f(row, first column, block, values in it) for every block of R rows of I, tasks of them side by side. */
template <class F>
void each_block(int64_t R, int64_t I, int num_threads, F f) {
    const int64_t blocks = (I + kBlock - 1) / kBlock, total = R * blocks, tasks = (total + kTask - 1) / kTask;
#pragma omp parallel for num_threads(team(R* I, num_threads)) schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t end = (task + 1) * kTask < total ? (task + 1) * kTask : total;
        int64_t row = task * kTask / blocks, column = task * kTask % blocks * kBlock;
        for (int64_t block = task * kTask; block < end; ++block) {
            f(row, column, block, I - column < kBlock ? I - column : kBlock);
            column += kBlock;
            if (column >= I) ++row, column = 0;
        }
    }
}

template <class S, class Code>
void quantize(const fm_quantize_cpu_args* a) {
    const S* from = static_cast<const S*>(a->x_RI);
    Code* to = static_cast<Code*>(a->codes_RI);
    bf16* scales = static_cast<bf16*>(a->scales);
    each_block(a->R, a->I, a->num_threads, [=](int64_t row, int64_t column, int64_t block, int64_t count) {
        vf x[kVectors];
        vu draws[kVectors];
        load_block(from + row * a->I + column, count, x);
        if (a->drawn) {
            const row_words words(uint64_t(a->key), uint64_t(a->first_row + row));
            for (int i = 0; i < kVectors; ++i) draws[i] = random_bits(column_words(column + i * W), words);
        }
        scales[block] = encode(x, a->drawn ? draws : nullptr, to + row * a->I + column, count);
    });
}

template <class Code>
void dequantize(const fm_dequantize_cpu_args* a) {
    const Code* codes = static_cast<const Code*>(a->codes_RI);
    const bf16* scales = static_cast<const bf16*>(a->scales);
    float* out = a->out_RI;
    each_block(a->R, a->I, a->num_threads, [=](int64_t row, int64_t column, int64_t block, int64_t count) {
        vf x[kVectors];
        const int64_t at = row * a->I + column;
        decode(codes + at, scales[block], count, x);
        if (count == kBlock)
            for (int i = 0; i < kVectors; ++i) store(out + at + i * W, x[i]);
        else
            memcpy(out + at, x, size_t(count) * sizeof(float));
    });
}

}  // namespace

FM_KERNEL(fm_quantize_cpu) {
    FM_WITH_DTYPE(a->dtype, S, {
        if (a->signed_codes)
            quantize<S, int8_t>(a);
        else
            quantize<S, uint8_t>(a);
    })
    return FM_OK;
}

FM_KERNEL(fm_dequantize_cpu) {
    if (a->signed_codes)
        dequantize<int8_t>(a);
    else
        dequantize<uint8_t>(a);
    return FM_OK;
}
