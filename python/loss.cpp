#include "fastmoe/loss.h"

#include "args.h"

void bind_loss(py::module_& m) {
    m.def("linear_cross_entropy_workspace", &fm_linear_cross_entropy_workspace);
    m.def("linear_cross_entropy",
          [](address x, address weight, address targets, address loss, address dx, address dweight, int64_t T,
             int64_t D, int64_t V, int64_t ignore_index, int dtype, address workspace, int threads) {
              fm_linear_cross_entropy_cpu_args a{at<void>(x),
                                                 at<void>(weight),
                                                 at<int64_t>(targets),
                                                 at<float>(loss),
                                                 at<float>(dx),
                                                 at<float>(dweight),
                                                 T,
                                                 D,
                                                 V,
                                                 ignore_index,
                                                 fm_dtype(dtype),
                                                 at<void>(workspace),
                                                 threads,
                                                 0};
              const std::string wanted =
                  "targets_T must be in 0.." + std::to_string(V - 1) + " or " + std::to_string(ignore_index);
              run(fm_linear_cross_entropy_cpu, a, "linear_cross_entropy", wanted.c_str(), &a.bad);
          });
}
