/* How the expert layer's workspace is cut; shared by the kernels and by the functions that size it. */
#pragma once
#include <stdint.h>

namespace fm_experts {

constexpr int64_t kThreadFloats = 3 * 192 * 192 + 64; /* checked against gemm.h's kBlockFloats */
constexpr int64_t kHalf = 96;                         /* columns of F in one block of the two-sided products */

inline int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }
inline int64_t f_blocks(int64_t F) { return (F + kHalf - 1) / kHalf; }

/* Takes pieces of a buffer in order; with a null buffer it only counts. */
struct Cutter {
    float* memory;
    int64_t used = 0;
    float* take(int64_t floats) {
        float* piece = memory ? memory + used : nullptr;
        used += aligned(floats);
        return piece;
    }
};

struct Forward {
    float *token, *first_block, *act, *y, *threads;
    int64_t floats;
    Forward(void* memory, int64_t R, int64_t E, int64_t D, int64_t F, int num_threads) {
        Cutter cut{static_cast<float*>(memory)};
        token = cut.take(R), first_block = cut.take(E + 1), act = cut.take(R * F), y = cut.take(R * D);
        threads = cut.take(num_threads * aligned(kThreadFloats));
        floats = cut.used;
    }
};

struct Backward {
    float *token, *weight, *first_block, *dz, *act, *dx, *dot, *threads;
    int64_t floats;
    Backward(void* memory, int64_t R, int64_t E, int64_t D, int64_t F, int num_threads) {
        Cutter cut{static_cast<float*>(memory)};
        token = cut.take(R), weight = cut.take(R), first_block = cut.take(E + 1), dz = cut.take(R * 2 * F);
        act = cut.take(R * F), dx = cut.take(R * D), dot = cut.take(R * f_blocks(F));
        threads = cut.take(num_threads * aligned(kThreadFloats));
        floats = cut.used;
    }
};

}  // namespace fm_experts
