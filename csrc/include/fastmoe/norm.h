/* Root-mean-square normalisation of rows. */
#pragma once
#include "fastmoe/common.h"

typedef struct {
    const void* x_TD;     /* dtype */
    const void* weight_D; /* weight_dtype: dtype or FM_F32 */
    void* y_TD;           /* dtype; x * rstd * weight */
    float* rstd_T;        /* 1 / sqrt(mean(x^2) + eps) */
    int64_t T, D;
    float eps;
    fm_dtype dtype, weight_dtype;
    int num_threads;
} fm_rms_norm_cpu_args;
FM_API fm_status fm_rms_norm_cpu(fm_rms_norm_cpu_args* a);

typedef struct {
    const void* dy_TD;    /* dtype */
    const void* x_TD;     /* dtype */
    const void* weight_D; /* weight_dtype: dtype or FM_F32 */
    const float* rstd_T;
    void* dx_TD;      /* dtype */
    void* dweight_D;  /* weight_dtype */
    float* workspace; /* fm_rms_norm_backward_workspace() floats */
    int64_t T, D;
    fm_dtype dtype, weight_dtype;
    int num_threads;
} fm_rms_norm_backward_cpu_args;
FM_API int64_t fm_rms_norm_backward_workspace(int64_t T, int64_t D);
FM_API fm_status fm_rms_norm_backward_cpu(fm_rms_norm_backward_cpu_args* a);
