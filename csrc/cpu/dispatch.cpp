/* The public C functions: each picks its instruction set once, by cpuid. Compiled for the baseline. */
#include "fastmoe/adamw.h"
#include "fastmoe/experts.h"
#include "fastmoe/gating.h"
#include "fastmoe/loss.h"
#include "fastmoe/norm.h"
#include "fastmoe/permutation.h"
#include "workspace.h"

namespace {
template <class F>
F pick(F baseline, F avx2, F avx512) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return avx2;
    return baseline;
}
}  // namespace

#define FM_DISPATCH(name)                                                             \
    extern "C" fm_status name##_baseline(name##_args*);                               \
    extern "C" fm_status name##_avx2(name##_args*);                                   \
    extern "C" fm_status name##_avx512(name##_args*);                                 \
    fm_status name(name##_args* a) {                                                  \
        static const auto chosen = pick(name##_baseline, name##_avx2, name##_avx512); \
        return chosen(a);                                                             \
    }

FM_DISPATCH(fm_adamw_step_cpu)
FM_DISPATCH(fm_moe_mlp_cpu)
FM_DISPATCH(fm_moe_mlp_backward_cpu)
FM_DISPATCH(fm_topk_gate_cpu)
FM_DISPATCH(fm_topk_gate_backward_cpu)
FM_DISPATCH(fm_linear_cross_entropy_cpu)
FM_DISPATCH(fm_rms_norm_cpu)
FM_DISPATCH(fm_rms_norm_backward_cpu)
FM_DISPATCH(fm_build_routing_cpu)
FM_DISPATCH(fm_build_routing_from_experts_cpu)
FM_DISPATCH(fm_permute_cpu)
FM_DISPATCH(fm_unpermute_cpu)
FM_DISPATCH(fm_unpermute_backward_cpu)

int64_t fm_build_routing_workspace(int64_t, int64_t, int64_t E) { return 16 * E; }
int64_t fm_moe_mlp_workspace(int64_t R, int64_t E, int64_t D, int64_t F, int num_threads) {
    return fm_workspace::Forward(nullptr, R, E, D, F, num_threads).floats * int64_t(sizeof(float));
}
int64_t fm_moe_mlp_backward_workspace(int64_t R, int64_t E, int64_t D, int64_t F, int num_threads) {
    return fm_workspace::Backward(nullptr, R, E, D, F, num_threads).floats * int64_t(sizeof(float));
}
int64_t fm_linear_cross_entropy_workspace(int64_t T, int64_t V, int num_threads) {
    return fm_workspace::Loss(nullptr, T, V, num_threads).floats * int64_t(sizeof(float));
}
int64_t fm_topk_gate_workspace(int64_t E, int num_threads) { return num_threads * 2 * ((E + 31) / 32 * 32); }
int64_t fm_rms_norm_backward_workspace(int64_t T, int64_t D) { return (T < 64 * 256 ? (T + 63) / 64 : 256) * D; }
