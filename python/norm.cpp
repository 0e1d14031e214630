#include "fastmoe/norm.h"

#include "args.h"

void bind_norm(py::module_& m) {
    m.def("rms_norm_backward_workspace", &fm_rms_norm_backward_workspace);
    m.def("rms_norm", [](address x, address weight, address y, address rstd, int64_t T, int64_t D, float eps, int dtype,
                         int weight_dtype, int threads) {
        fm_rms_norm_cpu_args a{at<void>(x),     at<void>(weight),       at<void>(y), at<float>(rstd), T, D, eps,
                               fm_dtype(dtype), fm_dtype(weight_dtype), threads};
        run(fm_rms_norm_cpu, a, "rms_norm");
    });
    m.def("rms_norm_backward", [](address dy, address x, address weight, address rstd, address dx, address dweight,
                                  address workspace, int64_t T, int64_t D, int dtype, int weight_dtype, int threads) {
        fm_rms_norm_backward_cpu_args a{at<void>(dy),
                                        at<void>(x),
                                        at<void>(weight),
                                        at<float>(rstd),
                                        at<void>(dx),
                                        at<void>(dweight),
                                        at<float>(workspace),
                                        T,
                                        D,
                                        fm_dtype(dtype),
                                        fm_dtype(weight_dtype),
                                        threads};
        run(fm_rms_norm_backward_cpu, a, "rms_norm_backward");
    });
}
