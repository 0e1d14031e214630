#include "fastmoe/assignment.h"

#include "args.h"

void bind_assignment(py::module_& m) {
    m.def("balanced_assignment_workspace", &fm_balanced_assignment_workspace);
    m.def("swipe_workspace", &fm_swipe_workspace);
    m.def("balanced_assignment", [](address scores, int64_t T, int64_t E, address ids, address workspace, int threads) {
        fm_balanced_assignment_cpu_args a{at<float>(scores), T, E, at<int64_t>(ids), at<void>(workspace), threads, 0};
        run(fm_balanced_assignment_cpu, a, "balanced_assignment", "scores_TE must be finite (bad row)", &a.bad);
    });
    m.def("swipe", [](address topk_ids, int is64, address counts, int64_t T, int64_t K, int64_t W, int64_t rank,
                      int64_t experts_per_rank, address ids, address workspace) {
        fm_swipe_cpu_args a{
            at<void>(topk_ids),     is64, at<int64_t>(counts), T, K, W, rank, experts_per_rank, at<int64_t>(ids),
            at<int64_t>(workspace), 0};
        const std::string wanted = "topk_ids_TK must be in -1.." + std::to_string(W * experts_per_rank - 1) +
                                   ", counts_WWK at least 0 and for this rank those of the ids (bad id, -1: a count)";
        run(fm_swipe_cpu, a, "swipe", wanted.c_str(), &a.bad);
    });
}
