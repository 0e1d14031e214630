#include "fastmoe/gemm.h"

#include "args.h"

void bind_gemm(py::module_& m) {
    m.def("linear_workspace", &fm_linear_workspace);
    m.def("linear", [](address x, address weight, address bias, address y, int64_t T, int64_t I, int64_t O, int dtype,
                       address workspace, int threads) {
        fm_linear_cpu_args a{at<void>(x), at<void>(weight), at<void>(bias),      at<void>(y), T, I,
                             O,           fm_dtype(dtype),  at<void>(workspace), threads};
        run(fm_linear_cpu, a, "linear");
    });
    m.def("linear_backward", [](address dy, address x, address weight, address dx, address dweight, address dbias,
                                int64_t T, int64_t I, int64_t O, int dtype, address workspace, int threads) {
        fm_linear_backward_cpu_args a{at<void>(dy),
                                      at<void>(x),
                                      at<void>(weight),
                                      at<void>(dx),
                                      at<void>(dweight),
                                      at<void>(dbias),
                                      T,
                                      I,
                                      O,
                                      fm_dtype(dtype),
                                      at<void>(workspace),
                                      threads};
        run(fm_linear_backward_cpu, a, "linear_backward");
    });
}
