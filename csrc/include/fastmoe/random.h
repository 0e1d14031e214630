/* Draws from a counter, Philox-4x32-10. See fastmoe/ops/random for which word is whose. */
#pragma once
#include "fastmoe/common.h"

typedef struct {
    const int64_t* key; /* [3] seed, step (both modulo 2^32), index of the first token */
    int64_t layer;      /* 0 to 2^32 - 1 */
    int64_t T, N;
    float* out_TN; /* in [0, 1) */
    int num_threads;
} fm_random_uniform_cpu_args;
FM_API fm_status fm_random_uniform_cpu(fm_random_uniform_cpu_args* a);
