/* A linear layer. I inputs, O outputs; products and sums in float32 whatever the storage. */
#pragma once
#include "fastmoe/common.h"

typedef struct {
    const void* x_TI;      /* dtype */
    const void* weight_OI; /* dtype */
    const void* bias_O;    /* dtype; NULL: none */
    void* y_TO;            /* out, dtype: x @ weight^T + bias */
    int64_t T, I, O;
    fm_dtype dtype;
    void* workspace; /* fm_linear_workspace() bytes, 64-byte aligned */
    int num_threads;
} fm_linear_cpu_args;
FM_API int64_t fm_linear_workspace(int num_threads);
FM_API fm_status fm_linear_cpu(fm_linear_cpu_args* a);

typedef struct {
    const void* dy_TO;     /* dtype */
    const void* x_TI;      /* dtype; may be NULL without dweight */
    const void* weight_OI; /* dtype; may be NULL without dx */
    void* dx_TI;           /* out, dtype: dy @ weight; NULL: not wanted */
    void* dweight_OI;      /* out, dtype: dy^T @ x; NULL: not wanted */
    void* dbias_O;         /* out, dtype: the sum of dy's rows; NULL: not wanted */
    int64_t T, I, O;
    fm_dtype dtype;
    void* workspace; /* fm_linear_workspace() bytes, 64-byte aligned */
    int num_threads;
} fm_linear_backward_cpu_args;
FM_API fm_status fm_linear_backward_cpu(fm_linear_backward_cpu_args* a);
