#include "fastmoe/adamw.h"

#include "args.h"

// The lists come as buffers (array.array), one entry a tensor: addresses, sizes, steps, keys and rows of 8 bytes, codes
// of 4, decays as doubles.
void bind_adamw(py::module_& m) {
    m.def("adamw_step",
          [](py::list addresses, py::list codes, py::list sizes, py::buffer decays, double lr, double beta1,
             double beta2, double eps, double grad_scale, py::buffer workspace, int threads) {
              const auto at = [](py::handle list, int i) {
                  return py::cast<py::buffer>(py::cast<py::list>(list)[i]).request().ptr;
              };
              const auto pointers = [&](int i) { return static_cast<void**>(at(addresses, i)); };
              const auto numbers = [&](int i) { return static_cast<int64_t*>(at(sizes, i)); };
              const auto kinds = [&](int i) { return static_cast<int32_t*>(at(codes, i)); };
              const py::buffer_info by = decays.request();
              fm_adamw_step_cpu_args a{by.size,
                                       pointers(0),
                                       pointers(1),
                                       pointers(2),
                                       pointers(3),
                                       pointers(4),
                                       pointers(5),
                                       pointers(6),
                                       numbers(0),
                                       numbers(1),
                                       kinds(0),
                                       kinds(1),
                                       kinds(2),
                                       numbers(2),
                                       numbers(3),
                                       numbers(4),
                                       static_cast<double*>(by.ptr),
                                       lr,
                                       beta1,
                                       beta2,
                                       eps,
                                       grad_scale,
                                       static_cast<int64_t*>(workspace.request(true).ptr),
                                       threads,
                                       0};
              run(fm_adamw_step_cpu, a, "adamw_step", "steps must be at least 1", &a.bad);
          });
}
