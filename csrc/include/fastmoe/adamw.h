/* AdamW: one update of a list of tensors. */
#pragma once
#include "fastmoe/common.h"

typedef enum {
    FM_MOMENTS_F32 = FM_F32,
    FM_MOMENTS_BF16 = FM_BF16,
    FM_MOMENTS_F16 = FM_F16, /* exp_avg_sqs: the square root */
    FM_MOMENTS_CODES = 3,    /* int8 and uint8, with scales; exp_avg_sqs: the square root */
} fm_moments;

/* g = grad * grad_scale; m += (1-beta1)(g-m); v += (1-beta2)(g^2-v); p = p decay - lr/(1-beta1^step) m /
 * (sqrt(v/(1-beta2^step)) + eps). Everything but float32 states and their weights is rounded by draws of the keys. */
typedef struct {
    int64_t count;                  /* tensors; each array below has this many entries */
    void* const* params;            /* dtypes[i], updated in place as are all below but grads */
    const void* const* grads;       /* dtypes[i] */
    void* const* exp_avgs;          /* moments[i] */
    void* const* exp_avg_sqs;       /* moments[i] */
    void* const* exp_avg_scales;    /* bfloat16 [rows, ceil(columns/32)] with FM_MOMENTS_CODES */
    void* const* exp_avg_sq_scales; /* so */
    void* const* master_weights;    /* masters[i] */
    const int64_t* numels;          /* elements of tensor i, rows * columns */
    const int64_t* columns;         /* of tensor i, at least 1 */
    const int32_t* dtypes;          /* fm_dtype */
    const int32_t* moments;         /* fm_moments */
    const int32_t* masters;         /* fm_master; else FM_BAD_DTYPE */
    const int64_t* steps;           /* from 1; else FM_BAD_VALUE and bad */
    const int64_t* keys;            /* of the draws */
    const int64_t* first_rows;      /* what row 0 of tensor i is for its draws */
    const double* decays;           /* what the weight is multiplied by */
    double lr, beta1, beta2, eps, grad_scale;
    int64_t* workspace; /* [count+1] */
    int num_threads;
    int64_t bad;
} fm_adamw_step_cpu_args;
FM_API fm_status fm_adamw_step_cpu(fm_adamw_step_cpu_args* a);
