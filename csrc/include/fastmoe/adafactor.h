/* Adafactor: one update of a list of tensors, each a stack of matrices or a vector. */
#pragma once
#include "fastmoe/common.h"

typedef struct {
    int64_t count;             /* tensors; each array below has this many entries */
    void* const* params;       /* dtypes[i], updated in place */
    const void* const* grads;  /* dtypes[i] */
    float* const* rows;        /* [matrices, n] and */
    float* const* columns;     /* [matrices, m] of a stack, updated in place */
    float* const* squares;     /* [n] of a vector, updated in place */
    void* const* masters;      /* kinds[i], updated in place */
    const int64_t* shapes;     /* [count, 3]: matrices, n, m; of a vector -1, n, 1 */
    const int32_t* dtypes;     /* fm_dtype of tensor i */
    const int32_t* kinds;      /* fm_master of tensor i; a residual with another dtype than FM_BF16: FM_BAD_DTYPE */
    const int64_t* keys;       /* of the draws of tensor i */
    const int64_t* first_rows; /* the number of its first row in those draws */
    const double* betas;       /* what tensor i keeps of its second moments */
    const double* rates;       /* its step, before scaling */
    int32_t scaled;            /* whether a step is multiplied by max(eps_weight, RMS of the weights) */
    double eps_square, eps_weight, clip_threshold, weight_decay, grad_scale;
    void* workspace; /* fm_adafactor_step_workspace bytes */
    int num_threads;
} fm_adafactor_step_cpu_args;
FM_API fm_status fm_adafactor_step_cpu(fm_adafactor_step_cpu_args* a);
FM_API int64_t fm_adafactor_step_workspace(int64_t count, const int64_t* shapes, int num_threads);
