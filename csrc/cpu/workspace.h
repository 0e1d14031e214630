/* Cutting a workspace into pieces; shared by the kernels and by the functions that size their workspaces. */
#pragma once
#include <stdint.h>

namespace {
namespace fm_workspace {

constexpr int64_t kThreadFloats =
    3 * 192 * 192 + 64; /* what gemm.h's multiply() needs; checked against kBlockFloats there */

inline int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

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

/* The expert layer. */
constexpr int64_t kHalf = 96; /* columns of F in one block of the products with two sides, gate and up */
inline int64_t f_blocks(int64_t F) { return (F + kHalf - 1) / kHalf; }

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

/* The loss. Tokens go in chunks whose logits fit 64 MiB, a chunk in blocks of kRows, whatever the thread count. */
constexpr int64_t kRows = 96;

struct Loss {
    float *dlogits, *loss_T, *threads;
    int64_t chunk, floats;
    Loss(void* memory, int64_t T, int64_t V, int num_threads) {
        chunk = (int64_t(16) << 20) / V / kRows * kRows;
        if (chunk < kRows) chunk = kRows;
        if (chunk > T) chunk = T;
        Cutter cut{static_cast<float*>(memory)};
        dlogits = cut.take(chunk * V), loss_T = cut.take(T), threads = cut.take(num_threads * aligned(kThreadFloats));
        floats = cut.used;
    }
};

}  // namespace fm_workspace
}  // namespace
