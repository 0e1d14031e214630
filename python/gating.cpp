#include "fastmoe/gating.h"

#include "args.h"

void bind_gating(py::module_& m) {
    m.def("topk_gate_workspace", &fm_topk_gate_workspace);
    m.def("topk_gate", [](address logits, address bias, int64_t T, int64_t E, int64_t K, int dtype, int sigmoid,
                          int renormalize, int64_t num_groups, int64_t top_groups, int top2, double scale,
                          address weights, address ids, address probs, address load, address workspace, int threads) {
        fm_topk_gate_cpu_args a{at<void>(logits),
                                at<float>(bias),
                                T,
                                E,
                                K,
                                fm_dtype(dtype),
                                sigmoid,
                                renormalize,
                                num_groups,
                                top_groups,
                                top2,
                                scale,
                                at<float>(weights),
                                at<int64_t>(ids),
                                at<float>(probs),
                                at<int64_t>(load),
                                at<float>(workspace),
                                threads,
                                0};
        try {
            run(fm_topk_gate_cpu, a, "topk_gate");
        } catch (const py::value_error&) {
            throw py::value_error(
                a.bad >= 0    ? "fastmoe.topk_gate: logits_TE must be free of NaN and +inf, got one at token " +
                                    std::to_string(a.bad)
                : a.bad == -2 ? "fastmoe.topk_gate: bias_E must be finite, got NaN or infinity"
                              : "fastmoe.topk_gate: k and the groups must fit the number of experts, got k " +
                                    std::to_string(K) + " and " + std::to_string(top_groups) + " of " +
                                    std::to_string(num_groups) + " groups for " + std::to_string(E));
        }
    });
    m.def("topk_gate_backward",
          [](address dweights, address dprobs, address ids, address probs, int64_t T, int64_t E, int64_t K, int sigmoid,
             int renormalize, double scale, address dlogits, int threads) {
              fm_topk_gate_backward_cpu_args a{at<float>(dweights),
                                               at<float>(dprobs),
                                               at<int64_t>(ids),
                                               at<float>(probs),
                                               T,
                                               E,
                                               K,
                                               sigmoid,
                                               renormalize,
                                               scale,
                                               at<float>(dlogits),
                                               threads,
                                               0};
              const std::string wanted = "topk_ids_TK must be below " + std::to_string(E) + " (bad token)";
              run(fm_topk_gate_backward_cpu, a, "topk_gate_backward", wanted.c_str(), &a.bad);
          });
}
