/* The expert layer as one op: y_t = sum_k w[t,k] * (act(x_t gate_up_e^T + bias) down_e^T + bias). Rows of an expert are
 * gathered while they are packed, the activation is the epilogue of the first product, the weighted sum gathers rows
 * back. */
#pragma once
#include "fastmoe/common.h"

/* The first four have a gate: gate_up holds Z = 2F columns, gate first or alternating. The others: Z = F. */
typedef enum {
    FM_SWIGLU,
    FM_GEGLU,
    FM_GEGLU_TANH,
    FM_CLAMPED_SWIGLU,
    FM_GELU,
    FM_GELU_TANH,
    FM_RELU,
    FM_RELU2,
} fm_activation;

typedef enum { FM_SAVE_NONE, FM_SAVE_Z, FM_SAVE_Z8, FM_SAVE_X } fm_save;

#define FM_Z8_BLOCK 64 /* columns of F that share a scale */

typedef struct {
    int64_t T, K, R, E, D, F;
    fm_dtype dtype, weight_dtype; /* weight_dtype: dtype or FM_F32 */
    fm_activation activation;
    int interleaved, transposed; /* gate and up alternate; gate_up is [E, D, Z] and down [E, F, D] */
    float alpha, limit;          /* of FM_CLAMPED_SWIGLU */
    fm_save save;                /* what the forward keeps for the backward */
    int num_threads;
} fm_moe_layer;

typedef struct {
    fm_moe_layer layer;
    const void* x_TD;         /* dtype */
    const void* weights_TK;   /* weight_dtype */
    const int32_t* src_row_R; /* the routing, see permutation.h */
    const int32_t* dst_row_TK;
    const int32_t* offsets;   /* [E+1] */
    const void* gate_up;      /* dtype, [E, Z, D] */
    const void* down;         /* dtype, [E, D, F] */
    const void* gate_up_bias; /* dtype, [E, Z]; NULL: none */
    const void* down_bias;    /* dtype, [E, D]; NULL: none */
    void* y_TD;               /* out, dtype */
    void* z_RZ;               /* out with FM_SAVE_Z, dtype, or FM_SAVE_Z8, int8. Rows past offsets[E] are zero */
    void* z_scale;            /* out with FM_SAVE_Z8, bfloat16 [R, Z/F * ceil(F / FM_Z8_BLOCK)] */
    void* workspace;          /* fm_moe_mlp_workspace() bytes, 64-byte aligned */
} fm_moe_mlp_cpu_args;
FM_API int64_t fm_moe_mlp_workspace(const fm_moe_layer* layer);
FM_API fm_status fm_moe_mlp_cpu(fm_moe_mlp_cpu_args* a);

typedef struct {
    fm_moe_layer layer;
    const void* dy_TD; /* dtype */
    const void* x_TD;
    const void* weights_TK;
    const int32_t* src_row_R;
    const int32_t* dst_row_TK;
    const int32_t* offsets;
    const void* gate_up;
    const void* down;
    const void* gate_up_bias; /* used with FM_SAVE_X */
    const void* down_bias;
    const void* z_RZ; /* as kept by the forward */
    const void* z_scale;
    int sparse;          /* dgate_up and ddown hold the experts with rows only, in order */
    void* dx_TD;         /* out, dtype; NULL: not wanted; so are the five below */
    void* dweights_TK;   /* out, weight_dtype */
    void* dgate_up;      /* out, dtype; zero for an expert without rows */
    void* ddown;         /* out, dtype; likewise */
    void* dgate_up_bias; /* out, dtype */
    void* ddown_bias;    /* out, dtype */
    void* workspace;     /* fm_moe_mlp_backward_workspace() bytes, 64-byte aligned */
} fm_moe_mlp_backward_cpu_args;
FM_API int64_t fm_moe_mlp_backward_workspace(const fm_moe_layer* layer);
FM_API fm_status fm_moe_mlp_backward_cpu(fm_moe_mlp_backward_cpu_args* a);
