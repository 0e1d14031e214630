/* Tokens to experts or workers, each of which takes an exact number of them. See fastmoe/ops/assignment. */
#pragma once
#include "fastmoe/common.h"

typedef struct {
    const float* scores_TE;
    int64_t T, E;    /* T a multiple of E, below 2^31 */
    int64_t* ids_T;  /* T / E tokens an expert */
    void* workspace; /* fm_balanced_assignment_workspace() bytes */
    int num_threads;
    int64_t bad; /* out, with FM_BAD_VALUE: the first row that is not finite */
} fm_balanced_assignment_cpu_args;
FM_API int64_t fm_balanced_assignment_workspace(int64_t T, int64_t E);
FM_API fm_status fm_balanced_assignment_cpu(fm_balanced_assignment_cpu_args* a);

typedef struct {
    const void* topk_ids_TK; /* int32 or int64; -1 chooses nothing */
    int ids_are_int64;
    const int64_t* counts_WWK; /* [s, w, j] tokens of rank s whose choice j is on worker w */
    int64_t T, K, W, rank, experts_per_rank;
    int64_t* ids_TK;
    int64_t* workspace; /* fm_swipe_workspace() int64 */
    int64_t bad;        /* out, with FM_BAD_VALUE: the id outside -1..E-1; -1: the counts do not fit */
} fm_swipe_cpu_args;
FM_API int64_t fm_swipe_workspace(int64_t W, int64_t K, int64_t experts_per_rank);
FM_API fm_status fm_swipe_cpu(fm_swipe_cpu_args* a);
