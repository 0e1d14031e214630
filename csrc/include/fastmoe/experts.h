/* The expert layer as one op: y_t = sum_k w[t,k] * down_e(silu(gate_e(x_t)) * up_e(x_t)). Rows of an expert are
 * gathered while they are packed, the activation is the epilogue of the first product, the weighted sum gathers rows
 * back. */
#pragma once
#include "fastmoe/common.h"

typedef struct {
    const void* x_TD;         /* dtype */
    const void* weights_TK;   /* weight_dtype: dtype or FM_F32 */
    const int32_t* src_row_R; /* the routing, see permutation.h */
    const int32_t* dst_row_TK;
    const int32_t* offsets;   /* [E+1] */
    const void* gate_up_E2FD; /* dtype, gate rows first */
    const void* down_EDF;     /* dtype */
    void* y_TD;               /* out, dtype */
    void* z_R2F;              /* out, dtype: the pre-activation; NULL: not kept. Rows past offsets[E] are zero */
    int64_t T, K, R, E, D, F;
    fm_dtype dtype, weight_dtype;
    void* workspace; /* fm_moe_mlp_workspace() bytes, 64-byte aligned */
    int num_threads;
} fm_moe_mlp_cpu_args;
FM_API int64_t fm_moe_mlp_workspace(int64_t R, int64_t E, int64_t D, int64_t F, int num_threads);
FM_API fm_status fm_moe_mlp_cpu(fm_moe_mlp_cpu_args* a);

typedef struct {
    const void* dy_TD; /* dtype */
    const void* x_TD;
    const void* weights_TK;
    const int32_t* src_row_R;
    const int32_t* dst_row_TK;
    const int32_t* offsets;
    const void* gate_up_E2FD;
    const void* down_EDF;
    const void* z_R2F;   /* as kept by the forward */
    void* dx_TD;         /* out, dtype; NULL: not wanted; so are the three below */
    void* dweights_TK;   /* out, weight_dtype */
    void* dgate_up_E2FD; /* out, dtype; zero for an expert without rows */
    void* ddown_EDF;     /* out, dtype; likewise */
    int64_t T, K, R, E, D, F;
    fm_dtype dtype, weight_dtype;
    void* workspace; /* fm_moe_mlp_backward_workspace() bytes, 64-byte aligned */
    int num_threads;
} fm_moe_mlp_backward_cpu_args;
FM_API int64_t fm_moe_mlp_backward_workspace(int64_t R, int64_t E, int64_t D, int64_t F, int num_threads);
FM_API fm_status fm_moe_mlp_backward_cpu(fm_moe_mlp_backward_cpu_args* a);
