/* AdamW: one update of a list of tensors. */
#pragma once
#include "fastmoe/common.h"

typedef struct {
    int64_t count;             /* tensors; each array below has this many entries */
    void* const* params;       /* dtypes[i], updated in place */
    const void* const* grads;  /* dtypes[i] */
    float* const* exp_avgs;    /* updated in place */
    float* const* exp_avg_sqs; /* updated in place */
    const int64_t* numels;     /* elements of tensor i */
    const int32_t* dtypes;     /* fm_dtype of tensor i */
    int64_t step;              /* from 1; else FM_BAD_VALUE */
    double lr, beta1, beta2, eps, weight_decay, grad_scale;
    int64_t* workspace; /* [count+1] */
    int num_threads;
} fm_adamw_step_cpu_args;
FM_API fm_status fm_adamw_step_cpu(fm_adamw_step_cpu_args* a);
