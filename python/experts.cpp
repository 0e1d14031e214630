#include "fastmoe/experts.h"

#include "args.h"

void bind_experts(py::module_& m) {
    m.def("moe_mlp_workspace", &fm_moe_mlp_workspace);
    m.def("moe_mlp_backward_workspace", &fm_moe_mlp_backward_workspace);
    m.def("moe_mlp", [](address x, address weights, address src, address dst, address offsets, address gate_up,
                        address down, address y, address z, int64_t T, int64_t K, int64_t R, int64_t E, int64_t D,
                        int64_t F, int dtype, int weight_dtype, address workspace, int threads) {
        fm_moe_mlp_cpu_args a{at<void>(x),
                              at<void>(weights),
                              at<int32_t>(src),
                              at<int32_t>(dst),
                              at<int32_t>(offsets),
                              at<void>(gate_up),
                              at<void>(down),
                              at<void>(y),
                              at<void>(z),
                              T,
                              K,
                              R,
                              E,
                              D,
                              F,
                              fm_dtype(dtype),
                              fm_dtype(weight_dtype),
                              at<void>(workspace),
                              threads};
        run(fm_moe_mlp_cpu, a, "moe_mlp");
    });
    m.def("moe_mlp_backward", [](address dy, address x, address weights, address src, address dst, address offsets,
                                 address gate_up, address down, address z, address dx, address dweights,
                                 address dgate_up, address ddown, int64_t T, int64_t K, int64_t R, int64_t E, int64_t D,
                                 int64_t F, int dtype, int weight_dtype, address workspace, int threads) {
        fm_moe_mlp_backward_cpu_args a{at<void>(dy),
                                       at<void>(x),
                                       at<void>(weights),
                                       at<int32_t>(src),
                                       at<int32_t>(dst),
                                       at<int32_t>(offsets),
                                       at<void>(gate_up),
                                       at<void>(down),
                                       at<void>(z),
                                       at<void>(dx),
                                       at<void>(dweights),
                                       at<void>(dgate_up),
                                       at<void>(ddown),
                                       T,
                                       K,
                                       R,
                                       E,
                                       D,
                                       F,
                                       fm_dtype(dtype),
                                       fm_dtype(weight_dtype),
                                       at<void>(workspace),
                                       threads};
        run(fm_moe_mlp_backward_cpu, a, "moe_mlp_backward");
    });
}
