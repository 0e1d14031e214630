#include "fastmoe/permutation.h"

#include "args.h"

void bind_permutation(py::module_& m) {
    m.def("build_routing_workspace", &fm_build_routing_workspace);
    m.def("build_routing", [](address ids, int is64, int64_t T, int64_t K, int64_t E, int64_t capacity, address src,
                              address dst, address offsets, address workspace, int threads) {
        fm_build_routing_cpu_args a{at<void>(ids),
                                    is64,
                                    T,
                                    K,
                                    E,
                                    capacity,
                                    at<int32_t>(src),
                                    at<int32_t>(dst),
                                    at<int32_t>(offsets),
                                    at<int32_t>(workspace),
                                    threads,
                                    0};
        const std::string wanted = "topk_ids_TK must be in -1.." + std::to_string(E - 1);
        run(fm_build_routing_cpu, a, "build_routing", wanted.c_str(), &a.bad);
    });
    m.def("build_routing_from_experts", [](address tokens, int tokens64, address offsets_in, int offsets64, int64_t R,
                                           int64_t T, int64_t E, address src, address dst, address offsets) {
        fm_build_routing_from_experts_cpu_args a{
            at<void>(tokens), tokens64,         at<void>(offsets_in), offsets64, R, T, E,
            at<int32_t>(src), at<int32_t>(dst), at<int32_t>(offsets), 0};
        const std::string wanted = "token_R must ascend in 0.." + std::to_string(T - 1) +
                                   " inside each expert and offsets from 0 to " + std::to_string(R) +
                                   " (bad row, -1 for the offsets)";
        run(fm_build_routing_from_experts_cpu, a, "build_routing_from_experts", wanted.c_str(), &a.bad);
    });
    m.def("permute", [](address x, address src, address y, int64_t R, int64_t D, int64_t K, int bytes, int threads) {
        fm_permute_cpu_args a{at<void>(x), at<int32_t>(src), at<void>(y), R, D, K, bytes, threads};
        run(fm_permute_cpu, a, "permute");
    });
    m.def("unpermute", [](address y, address dst, address weights, address out, int64_t T, int64_t K, int64_t D,
                          int dtype, int weight_dtype, int threads) {
        fm_unpermute_cpu_args a{at<void>(y), at<int32_t>(dst), at<void>(weights),      at<void>(out), T, K,
                                D,           fm_dtype(dtype),  fm_dtype(weight_dtype), threads};
        run(fm_unpermute_cpu, a, "unpermute");
    });
    m.def("unpermute_backward",
          [](address dout, address y, address src, address dst, address weights, address dy, address dweights,
             int64_t R, int64_t T, int64_t K, int64_t D, int dtype, int weight_dtype, int threads) {
              fm_unpermute_backward_cpu_args a{at<void>(dout),
                                               at<void>(y),
                                               at<int32_t>(src),
                                               at<int32_t>(dst),
                                               at<void>(weights),
                                               at<void>(dy),
                                               at<void>(dweights),
                                               R,
                                               T,
                                               K,
                                               D,
                                               fm_dtype(dtype),
                                               fm_dtype(weight_dtype),
                                               threads};
              run(fm_unpermute_backward_cpu, a, "unpermute_backward");
          });
}
