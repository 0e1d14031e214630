/* The public C functions: each picks its instruction set once, by cpuid. Compiled for the baseline. */
#include "fastmoe/adafactor.h"
#include "fastmoe/adamw.h"
#include "fastmoe/assignment.h"
#include "fastmoe/attention.h"
#include "fastmoe/experts.h"
#include "fastmoe/gating.h"
#include "fastmoe/gemm.h"
#include "fastmoe/loss.h"
#include "fastmoe/norm.h"
#include "fastmoe/permutation.h"
#include "fastmoe/quantize.h"
#include "fastmoe/random.h"
#include <string.h>

#include "workspace.h"

namespace {
int supported() {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return 0;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
        return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}
int level = supported();
constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512bf16"};
}  // namespace

const char* fm_isa(void) { return kNames[level]; }
fm_status fm_limit_isa(const char* name) {
    for (int i = 0; i <= supported(); ++i)
        if (strcmp(name, kNames[i]) == 0) {
            level = i;
            return FM_OK;
        }
    return FM_BAD_VALUE;
}

#define FM_DISPATCH(name)                                                                                              \
    extern "C" fm_status name##_baseline(name##_args*);                                                                \
    extern "C" fm_status name##_avx2(name##_args*);                                                                    \
    extern "C" fm_status name##_avx512(name##_args*);                                                                  \
    extern "C" fm_status name##_avx512bf16(name##_args*);                                                              \
    fm_status name(name##_args* a) {                                                                                   \
        fm_status (*const kernels[])(name##_args*) = {name##_baseline, name##_avx2, name##_avx512, name##_avx512bf16}; \
        return kernels[level](a);                                                                                      \
    }

FM_DISPATCH(fm_adafactor_step_cpu)
FM_DISPATCH(fm_adamw_step_cpu)
FM_DISPATCH(fm_balanced_assignment_cpu)
FM_DISPATCH(fm_swipe_cpu)
FM_DISPATCH(fm_attention_cpu)
FM_DISPATCH(fm_attention_backward_cpu)
FM_DISPATCH(fm_rope_cpu)
FM_DISPATCH(fm_rope_backward_cpu)
FM_DISPATCH(fm_moe_mlp_cpu)
FM_DISPATCH(fm_moe_mlp_backward_cpu)
FM_DISPATCH(fm_topk_gate_cpu)
FM_DISPATCH(fm_topk_gate_backward_cpu)
FM_DISPATCH(fm_linear_cpu)
FM_DISPATCH(fm_linear_backward_cpu)
FM_DISPATCH(fm_linear_cross_entropy_cpu)
FM_DISPATCH(fm_normalize_cpu)
FM_DISPATCH(fm_normalize_backward_cpu)
FM_DISPATCH(fm_build_routing_cpu)
FM_DISPATCH(fm_build_routing_from_experts_cpu)
FM_DISPATCH(fm_permute_cpu)
FM_DISPATCH(fm_unpermute_cpu)
FM_DISPATCH(fm_unpermute_backward_cpu)
FM_DISPATCH(fm_quantize_cpu)
FM_DISPATCH(fm_dequantize_cpu)
FM_DISPATCH(fm_random_uniform_cpu)

int64_t fm_build_routing_workspace(int64_t, int64_t, int64_t E) { return 32 * (E + 16); }

namespace {
/* f(Between, Stored) with the types that the kernels will take. */
template <class F>
int64_t with_types(fm_dtype dtype, F f) {
    if (dtype == FM_F32) return f(float(), float());
    return dtype == FM_BF16 && level == 3 ? f(uint16_t(), uint16_t()) : f(float(), uint16_t());
}
}  // namespace
int64_t fm_adafactor_step_workspace(int64_t count, const int64_t* shapes, int num_threads) {
    return fm_workspace::AdafactorList(nullptr, count, shapes, num_threads).floats * int64_t(sizeof(float));
}
int64_t fm_attention_workspace(const fm_attention* l) {
    const int K = l->dtype == FM_BF16 && level == 3 ? 2 : 1;
    return fm_workspace::AttentionForward(nullptr, *l, K).floats * int64_t(sizeof(float));
}
int64_t fm_attention_backward_workspace(const fm_attention* l) {
    const int K = l->dtype == FM_BF16 && level == 3 ? 2 : 1;
    return fm_workspace::AttentionBackward(nullptr, *l, K).floats * int64_t(sizeof(float));
}
int64_t fm_balanced_assignment_workspace(int64_t T, int64_t E) {
    return fm_workspace::Auction(nullptr, T, E).floats * int64_t(sizeof(float));
}
int64_t fm_swipe_workspace(int64_t W, int64_t K, int64_t experts_per_rank) {
    return W + 3 * K * W + K + W * experts_per_rank;
}
int64_t fm_moe_mlp_workspace(const fm_moe_layer* l) {
    return with_types(l->dtype, [&](auto between, auto stored) {
        return fm_workspace::Forward<decltype(between), decltype(stored)>(nullptr, *l).floats * int64_t(sizeof(float));
    });
}
int64_t fm_moe_mlp_backward_workspace(const fm_moe_layer* l) {
    return with_types(l->dtype, [&](auto between, auto stored) {
        return fm_workspace::Backward<decltype(between), decltype(stored)>(nullptr, *l).floats * int64_t(sizeof(float));
    });
}
int64_t fm_linear_workspace(int num_threads) {
    return num_threads * fm_workspace::aligned(fm_workspace::kThreadFloats) * int64_t(sizeof(float));
}
int64_t fm_linear_cross_entropy_workspace(int64_t T, int64_t V, int num_threads) {
    return fm_workspace::Loss(nullptr, T, V, num_threads).floats * int64_t(sizeof(float));
}
int64_t fm_topk_gate_workspace(int64_t E, int num_threads) {
    return num_threads * fm_workspace::Gate(nullptr, E).floats;
}
int64_t fm_normalize_backward_workspace(int64_t T, int64_t D) { return (T < 64 * 256 ? (T + 63) / 64 : 256) * 2 * D; }
