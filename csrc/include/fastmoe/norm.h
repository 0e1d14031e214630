/* Root-mean-square and layer normalisation of rows, after a residual sum where one is given. */
#pragma once
#include "fastmoe/common.h"

typedef struct {
    const void* x_TD;        /* dtype */
    const void* residual_TD; /* dtype; NULL: none */
    const void* weight_D;    /* weight_dtype: dtype or FM_F32 */
    const void* bias_D;      /* weight_dtype; NULL: none */
    void* sum_TD;            /* dtype; x + residual, which is what is normalised; NULL without a residual */
    void* y_TD;              /* dtype; (sum - mean) * rstd * weight + bias */
    float* mean_T;           /* NULL: the mean is taken for 0 (root mean square) */
    float* rstd_T;           /* 1 / sqrt(mean((sum - mean)^2) + eps) */
    int64_t T, D;
    float eps;
    fm_dtype dtype, weight_dtype;
    int num_threads;
} fm_normalize_cpu_args;
FM_API fm_status fm_normalize_cpu(fm_normalize_cpu_args* a);

typedef struct {
    const void* dy_TD;    /* dtype */
    const void* dsum_TD;  /* dtype, added to dx; NULL: none */
    const void* x_TD;     /* dtype; what was normalised */
    const void* weight_D; /* weight_dtype: dtype or FM_F32 */
    const float* mean_T;  /* NULL: as in the forward */
    const float* rstd_T;
    void* dx_TD;      /* dtype */
    void* dweight_D;  /* weight_dtype */
    void* dbias_D;    /* weight_dtype; NULL: not wanted */
    float* workspace; /* fm_normalize_backward_workspace() floats */
    int64_t T, D;
    fm_dtype dtype, weight_dtype;
    int num_threads;
} fm_normalize_backward_cpu_args;
FM_API int64_t fm_normalize_backward_workspace(int64_t T, int64_t D);
FM_API fm_status fm_normalize_backward_cpu(fm_normalize_backward_cpu_args* a);
