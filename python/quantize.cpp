#include "fastmoe/quantize.h"

#include "args.h"

void bind_quantize(py::module_& m) {
    m.def("quantize", [](address x, address codes, address scales, int64_t R, int64_t I, int dtype, int signed_codes,
                         int drawn, int64_t key, int64_t first_row, int threads) {
        fm_quantize_cpu_args a{at<void>(x), at<void>(codes), at<void>(scales), R,
                               I,           fm_dtype(dtype), signed_codes,     drawn,
                               key,         first_row,       threads};
        run(fm_quantize_cpu, a, "quantize");
    });
    m.def("dequantize",
          [](address codes, address scales, address out, int64_t R, int64_t I, int signed_codes, int threads) {
              fm_dequantize_cpu_args a{at<void>(codes), at<void>(scales), at<float>(out), R, I, signed_codes, threads};
              run(fm_dequantize_cpu, a, "dequantize");
          });
}
