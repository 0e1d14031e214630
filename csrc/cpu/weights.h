/* How an optimizer reads and writes the weights of a row. */
#pragma once
#include "quantize.h"

namespace {

template <class P>
inline void each_vector_of_block(P p, int64_t i, const vf* weight, const vu* draws) {
    for (int j = 0; j < kBlock / W; ++j) p.store_at(i + j * W, weight[j], draws[j], full{});
}

/* S, and beside them nothing (void), float, or the code8 of a 24-bit weight. What is rounded up or down goes by the
 * high 16 bits of draws. */
template <class S, class Master>
struct weights {
    static constexpr bool random = true;
    bf16* p;
    Master* residual;
    template <class N>
    vf load_at(int64_t i, N n) const {
        return bit_cast<vf>(bit_cast<vi>(load(p + i, n)) + (__builtin_convertvector(load(residual + i, n), vi) << 8));
    }
    template <class N>
    void store_at(int64_t i, vf weight, vu draws, N n) const {
        const vi word = (bit_cast<vi>(weight) + bit_cast<vi>((draws >> 16) & 0xffu)) >> 8, high = (word + 0x80) >> 8;
        store_low(p + i, bit_cast<vu>(high), n);
        store_low(residual + i, bit_cast<vu>(word - (high << 8)), n);
    }
    /* kBlock columns, as store_at would. */
    void store_block(int64_t i, const vf* weight, const vu* draws) const {
        vu highs[kBlock / W], lows[kBlock / W];
        for (int j = 0; j < kBlock / W; ++j) {
            const vi word = (bit_cast<vi>(weight[j]) + bit_cast<vi>((draws[j] >> 16) & 0xffu)) >> 8;
            const vi high = (word + 0x80) >> 8;
            highs[j] = bit_cast<vu>(high) & 0xffffu, lows[j] = bit_cast<vu>(word - (high << 8));
        }
        store_low_block(p + i, highs), store_low_block(residual + i, lows);
    }
};
template <class S>
struct weights<S, void> {
    static constexpr bool random = sizeof(S) < 4;
    S* p;
    void* absent;
    template <class N>
    vf load_at(int64_t i, N n) const {
        return load(p + i, n);
    }
    template <class N>
    void store_at(int64_t i, vf weight, vu draws, N n) const {
        store_rounded(p + i, weight, draws >> 16, n);
    }
    void store_block(int64_t i, const vf* weight, const vu* draws) const {
        if constexpr (__is_same(S, bf16)) {
            vu words[kBlock / W];
            for (int j = 0; j < kBlock / W; ++j) words[j] = (bit_cast<vu>(weight[j]) + (draws[j] >> 16)) >> 16;
            store_low_block(p + i, words);
        } else {
            each_vector_of_block(*this, i, weight, draws);
        }
    }
};
template <class S>
struct weights<S, float> {
    static constexpr bool random = false;
    S* p;
    float* master;
    template <class N>
    vf load_at(int64_t i, N n) const {
        return load(master + i, n);
    }
    template <class N>
    void store_at(int64_t i, vf weight, vu, N n) const {
        store(master + i, weight, n);
        store(p + i, weight, n);
    }
    void store_block(int64_t i, const vf* weight, const vu* draws) const {
        each_vector_of_block(*this, i, weight, draws);
    }
};

}  // namespace
