#include "fastmoe/experts.h"

#include "args.h"

namespace {
// (T, K, R, E, D, F), dtype, weight_dtype, activation, interleaved, transposed, alpha, limit, save, num_threads
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using LayerOf = std::tuple<Sizes, int, int, int, bool, bool, float, float, int, int>;

fm_moe_layer layer_of(const LayerOf& l) {
    const auto& [sizes, dtype, weight_dtype, activation, interleaved, transposed, alpha, limit, save, threads] = l;
    const auto& [T, K, R, E, D, F] = sizes;
    return {T,
            K,
            R,
            E,
            D,
            F,
            fm_dtype(dtype),
            fm_dtype(weight_dtype),
            fm_activation(activation),
            interleaved,
            transposed,
            alpha,
            limit,
            fm_save(save),
            threads};
}
}  // namespace

void bind_experts(py::module_& m) {
    m.def("moe_mlp_workspace", [](const LayerOf& l) {
        const fm_moe_layer layer = layer_of(l);
        return fm_moe_mlp_workspace(&layer);
    });
    m.def("moe_mlp_backward_workspace", [](const LayerOf& l) {
        const fm_moe_layer layer = layer_of(l);
        return fm_moe_mlp_backward_workspace(&layer);
    });
    m.def("moe_mlp", [](const LayerOf& l, address x, address weights, address src, address dst, address offsets,
                        address gate_up, address down, address gate_up_bias, address down_bias, address y, address z,
                        address scale, address workspace) {
        fm_moe_mlp_cpu_args a{
            layer_of(l),          at<void>(x),       at<void>(weights), at<int32_t>(src),       at<int32_t>(dst),
            at<int32_t>(offsets), at<void>(gate_up), at<void>(down),    at<void>(gate_up_bias), at<void>(down_bias),
            at<void>(y),          at<void>(z),       at<void>(scale),   at<void>(workspace)};
        run(fm_moe_mlp_cpu, a, "moe_mlp");
    });
    m.def("moe_mlp_backward",
          [](const LayerOf& l, address dy, address x, address weights, address src, address dst, address offsets,
             address gate_up, address down, address gate_up_bias, address down_bias, address z, address scale,
             bool sparse, address dx, address dweights, address dgate_up, address ddown, address dgate_up_bias,
             address ddown_bias, address workspace) {
              fm_moe_mlp_backward_cpu_args a{layer_of(l),
                                             at<void>(dy),
                                             at<void>(x),
                                             at<void>(weights),
                                             at<int32_t>(src),
                                             at<int32_t>(dst),
                                             at<int32_t>(offsets),
                                             at<void>(gate_up),
                                             at<void>(down),
                                             at<void>(gate_up_bias),
                                             at<void>(down_bias),
                                             at<void>(z),
                                             at<void>(scale),
                                             sparse,
                                             at<void>(dx),
                                             at<void>(dweights),
                                             at<void>(dgate_up),
                                             at<void>(ddown),
                                             at<void>(dgate_up_bias),
                                             at<void>(ddown_bias),
                                             at<void>(workspace)};
              run(fm_moe_mlp_backward_cpu, a, "moe_mlp_backward");
          });
}
