/* Gating: router logits to the K experts of each token and their weights. See fastmoe/ops/gating for an example. */
#pragma once
#include "fastmoe/common.h"

typedef struct {
    const void* logits_TE; /* dtype */
    const float* bias_E;   /* experts are picked by score + bias; NULL: by logit */
    int64_t T, E, K;
    fm_dtype dtype;
    int sigmoid;     /* score of an expert: 0 softmax over the E logits, 1 sigmoid of its own */
    int renormalize; /* divides a token's K weights by their sum + 1e-20 */
    int64_t num_groups,
        top_groups;    /* experts are picked from the best top_groups of num_groups equal runs; 1, 1: all */
    int top2;          /* a group is as good as 0 its best expert, 1 the sum of its two best scores (+ bias) */
    double scale;      /* of the weights, in the end */
    float* weights_TK; /* scores of the K best, the best first, the lower id first among equals */
    int64_t* ids_TK;
    float* probs_TE;  /* every expert's score */
    int64_t* load_E;  /* how often each expert was picked */
    float* workspace; /* fm_topk_gate_workspace() floats */
    int num_threads;
    int64_t bad; /* out, with FM_BAD_VALUE: the first token whose logits hold NaN or +inf or are all -inf; -1: K or the
                    groups do not fit E; -2: bias_E holds NaN or infinity */
} fm_topk_gate_cpu_args;
FM_API int64_t fm_topk_gate_workspace(int64_t E, int num_threads);
FM_API fm_status fm_topk_gate_cpu(fm_topk_gate_cpu_args* a);

typedef struct {
    const float* dweights_TK;
    const float* dprobs_TE;
    const int64_t* ids_TK; /* a negative id stands for expert 0 */
    const float* probs_TE; /* as the forward gave them */
    int64_t T, E, K;
    int sigmoid, renormalize;
    double scale;
    float* dlogits_TE;
    int num_threads;
    int64_t bad; /* out, with FM_BAD_VALUE: the first token with an id past E-1; -1: K outside 1..E */
} fm_topk_gate_backward_cpu_args;
FM_API fm_status fm_topk_gate_backward_cpu(fm_topk_gate_backward_cpu_args* a);
