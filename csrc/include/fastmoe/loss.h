/* Output projection and softmax cross entropy in one op; the gradients are formed with the loss, chunk by chunk of
 * tokens. */
#pragma once
#include "fastmoe/common.h"

typedef struct {
    const void* x_TD;         /* dtype */
    const void* weight_VD;    /* dtype */
    const int64_t* targets_T; /* 0..V-1, or ignore_index */
    float* loss;              /* out, [1]: the sum over the targets that count, in nats */
    float* dx_TD;             /* out, d loss / d x; NULL: not wanted */
    float* dweight_VD;        /* out, d loss / d weight; NULL: not wanted */
    int64_t T, D, V, ignore_index;
    fm_dtype dtype;
    void* workspace; /* fm_linear_cross_entropy_workspace() bytes, 64-byte aligned */
    int num_threads;
    int64_t bad; /* out, with FM_BAD_VALUE: the target outside the vocabulary */
} fm_linear_cross_entropy_cpu_args;
FM_API int64_t fm_linear_cross_entropy_workspace(int64_t T, int64_t V, int num_threads);
FM_API fm_status fm_linear_cross_entropy_cpu(fm_linear_cross_entropy_cpu_args* a);
