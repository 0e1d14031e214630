#include "fastmoe/gating.h"

#include "args.h"

void bind_gating(py::module_& m) {
    m.def("topk_gate_workspace", &fm_topk_gate_workspace);
    m.def("topk_gate", [](address logits, int64_t T, int64_t E, int64_t K, int dtype, int sigmoid, int renormalize,
                          address weights, address ids, address probs, address workspace, int threads) {
        fm_topk_gate_cpu_args a{at<void>(logits),
                                T,
                                E,
                                K,
                                fm_dtype(dtype),
                                sigmoid,
                                renormalize,
                                at<float>(weights),
                                at<int64_t>(ids),
                                at<float>(probs),
                                at<float>(workspace),
                                threads,
                                0};
        try {
            run(fm_topk_gate_cpu, a, "topk_gate");
        } catch (const py::value_error&) {
            throw py::value_error("fastmoe.topk_gate: logits_TE must be free of NaN and +inf, got one at token " +
                                  std::to_string(a.bad));
        }
    });
    m.def("topk_gate_backward", [](address dweights, address dprobs, address ids, address probs, int64_t T, int64_t E,
                                   int64_t K, int sigmoid, int renormalize, address dlogits, int threads) {
        fm_topk_gate_backward_cpu_args a{at<float>(dweights),
                                         at<float>(dprobs),
                                         at<int64_t>(ids),
                                         at<float>(probs),
                                         T,
                                         E,
                                         K,
                                         sigmoid,
                                         renormalize,
                                         at<float>(dlogits),
                                         threads,
                                         0};
        const std::string wanted = "topk_ids_TK must be below " + std::to_string(E) + " (bad token)";
        run(fm_topk_gate_backward_cpu, a, "topk_gate_backward", wanted.c_str(), &a.bad);
    });
}
