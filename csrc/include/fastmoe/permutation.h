/* Routing (who goes where) and the movement of rows into expert order and back. See fastmoe/ops/permutation for an
 * example. */
#pragma once
#include "fastmoe/common.h"

typedef struct {
    const void* topk_ids_TK; /* int32 or int64; -1 drops the slot */
    int ids_are_int64;
    int64_t T, K, E, capacity; /* capacity < 0: none */
    int32_t* src_row_R;        /* [T*K] flat slot of each row, -1 for padding */
    int32_t* dst_row_TK;       /* [T, K] row of each slot, -1 for dropped */
    int32_t* offsets;          /* [E+1] */
    int32_t* workspace;        /* fm_build_routing_workspace() int32 */
    int num_threads;
    int64_t bad; /* out, with FM_BAD_VALUE: the id outside -1..E-1 */
} fm_build_routing_cpu_args;
FM_API int64_t fm_build_routing_workspace(int64_t T, int64_t K, int64_t E);
FM_API fm_status fm_build_routing_cpu(fm_build_routing_cpu_args* a);

typedef struct {
    const void* token_R; /* [R] token of each row, ascending inside an expert */
    int tokens_are_int64;
    const void* offsets_in; /* [E+1], 0 to R */
    int offsets_are_int64;
    int64_t R, T, E;
    int32_t* src_row_R;  /* [R] t*E + e */
    int32_t* dst_row_TE; /* [T, E] */
    int32_t* offsets;    /* [E+1] */
    int64_t bad;         /* out, with FM_BAD_VALUE: the row whose token is out of range or order; -1: the offsets */
} fm_build_routing_from_experts_cpu_args;
FM_API fm_status fm_build_routing_from_experts_cpu(fm_build_routing_from_experts_cpu_args* a);

typedef struct {
    const void* x_TD; /* elements of element_bytes (2, 4 or 8) */
    const int32_t* src_row_R;
    void* y_RD; /* y[r] = x[src_row[r] / K]; zero for padding */
    int64_t R, D, K;
    int element_bytes, num_threads;
} fm_permute_cpu_args;
FM_API fm_status fm_permute_cpu(fm_permute_cpu_args* a);

typedef struct {
    const void* y_RD;          /* dtype */
    const int32_t* dst_row_TK; /* [T, K] */
    const void* weights_TK;    /* weight_dtype; NULL adds unweighted */
    void* out_TD;              /* dtype; out[t] = sum_k w[t,k] * y[dst[t,k]], float32 sums in order of k */
    int64_t T, K, D;
    fm_dtype dtype, weight_dtype;
    int num_threads;
} fm_unpermute_cpu_args;
FM_API fm_status fm_unpermute_cpu(fm_unpermute_cpu_args* a);

typedef struct {
    const void* dout_TD;       /* dtype */
    const void* y_RD;          /* dtype */
    const int32_t* src_row_R;  /* [R] */
    const int32_t* dst_row_TK; /* [T, K] */
    const void* weights_TK;    /* weight_dtype */
    void* dy_RD;               /* dtype; w[src[r]] * dout[src[r] / K], zero for padding */
    void* dweights_TK;         /* weight_dtype; <dout[t], y[dst[t,k]]>, zero for dropped */
    int64_t R, T, K, D;
    fm_dtype dtype, weight_dtype;
    int num_threads;
} fm_unpermute_backward_cpu_args;
FM_API fm_status fm_unpermute_backward_cpu(fm_unpermute_backward_cpu_args* a);
