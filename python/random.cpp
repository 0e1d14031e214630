#include "fastmoe/random.h"

#include "args.h"

void bind_random(py::module_& m) {
    m.def("random_uniform", [](address key, int64_t layer, int64_t T, int64_t N, address out, int threads) {
        fm_random_uniform_cpu_args a{at<int64_t>(key), layer, T, N, at<float>(out), threads};
        run(fm_random_uniform_cpu, a, "random_uniform");
    });
}
