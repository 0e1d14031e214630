#include "fastmoe/norm.h"

#include "args.h"

void bind_norm(py::module_& m) {
    m.def("normalize_backward_workspace", &fm_normalize_backward_workspace);
    m.def("normalize",
          [](address x, address residual, address weight, address bias, address sum, address y, address mean,
             address rstd, int64_t T, int64_t D, float eps, int dtype, int weight_dtype, int threads) {
              fm_normalize_cpu_args a{at<void>(x),
                                      at<void>(residual),
                                      at<void>(weight),
                                      at<void>(bias),
                                      at<void>(sum),
                                      at<void>(y),
                                      at<float>(mean),
                                      at<float>(rstd),
                                      T,
                                      D,
                                      eps,
                                      fm_dtype(dtype),
                                      fm_dtype(weight_dtype),
                                      threads};
              run(fm_normalize_cpu, a, "normalize");
          });
    m.def("normalize_backward", [](address dy, address dsum, address x, address weight, address mean, address rstd,
                                   address dx, address dweight, address dbias, address workspace, int64_t T, int64_t D,
                                   int dtype, int weight_dtype, int threads) {
        fm_normalize_backward_cpu_args a{at<void>(dy),
                                         at<void>(dsum),
                                         at<void>(x),
                                         at<void>(weight),
                                         at<float>(mean),
                                         at<float>(rstd),
                                         at<void>(dx),
                                         at<void>(dweight),
                                         at<void>(dbias),
                                         at<float>(workspace),
                                         T,
                                         D,
                                         fm_dtype(dtype),
                                         fm_dtype(weight_dtype),
                                         threads};
        run(fm_normalize_backward_cpu, a, "normalize_backward");
    });
}
