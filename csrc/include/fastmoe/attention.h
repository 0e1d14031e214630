/* Attention: softmax(scale * q k^T) v over the keys that each query may see. Products and sums in float32.
 *
 * A layout says which blocks of FM_ATTENTION_BLOCK queries and as many keys are visited at all, and which of those need
 * no look at their elements. In the others query q sees the keys q + low .. q + high.
 */
#pragma once
#include "fastmoe/common.h"

#define FM_ATTENTION_BLOCK 64
#define FM_ATTENTION_HEAD 256 /* the largest H */

/* [B, heads, S, H] with any strides, in elements; the last dimension is contiguous. */
typedef struct {
    const void* p;
    int64_t B, N, S;
} fm_heads;

typedef struct {
    int64_t B, N, M, Sq, Sk, H; /* N query heads, N / M of them to each of M key heads */
    int64_t low, high;
    float scale; /* > 0 */
    fm_dtype dtype;
    int num_threads;
    /* The key blocks of query block i: entries q_first[i] .. q_first[i+1]-1, ascending. An entry is 2 * block + (1: the
     * whole block is seen). q_order: the query blocks in the order of work. */
    const int32_t *q_first, *q_entries, *q_order;
    /* The query blocks of a key block in the same form; k_turn: the place of this key block among the entries of that
     * query block. */
    const int32_t *k_first, *k_entries, *k_turn;
} fm_attention;

typedef struct {
    fm_attention layer;
    fm_heads q, k, v; /* dtype; [B, N, Sq, H], [B, M, Sk, H] twice */
    void* out;        /* out, dtype [B, Sq, N, H]; 0 for a query that sees no key */
    float* lse_BNS;   /* out: the logarithm of the sum of exp(score); -inf for such a query */
    void* workspace;  /* fm_attention_workspace() bytes, 64-byte aligned */
} fm_attention_cpu_args;
FM_API int64_t fm_attention_workspace(const fm_attention* layer);
FM_API fm_status fm_attention_cpu(fm_attention_cpu_args* a);

typedef struct {
    fm_attention layer;
    fm_heads dout;         /* dtype [B, N, Sq, H] */
    const float* dlse_BNS; /* NULL: zero */
    fm_heads q, k, v;
    const void* out; /* what the forward gave */
    const float* lse_BNS;
    void* dq; /* out, dtype [B, Sq, N, H] */
    void* dk; /* out, dtype [B, Sk, M, H] */
    void* dv;
    void* workspace; /* fm_attention_backward_workspace() bytes, 64-byte aligned */
} fm_attention_backward_cpu_args;
FM_API int64_t fm_attention_backward_workspace(const fm_attention* layer);
FM_API fm_status fm_attention_backward_cpu(fm_attention_backward_cpu_args* a);

/* Rotary positions: q and k of a fused projection turned, q, k and v taken apart. */
typedef struct {
    int64_t B, S, N, M, H; /* H even */
    fm_dtype dtype;
    int num_threads;
    const void* qkv_BSAH;  /* dtype; A = N + 2 M heads: q, k, v */
    const float* table_SH; /* of each position the cosines of its H / 2 angles, then the sines */
    void* q_BSNH;          /* out, dtype: halves (l, r) become (l cos - r sin, r cos + l sin) */
    void* k_BSMH;          /* out: likewise */
    void* v_BSMH;          /* out: as it is */
} fm_rope_cpu_args;
FM_API fm_status fm_rope_cpu(fm_rope_cpu_args* a);

typedef struct {
    int64_t B, S, N, M, H;
    fm_dtype dtype;
    int num_threads;
    fm_heads dq, dk, dv; /* dtype */
    const float* table_SH;
    void* dqkv_BSAH; /* out, dtype */
} fm_rope_backward_cpu_args;
FM_API fm_status fm_rope_backward_cpu(fm_rope_backward_cpu_args* a);
