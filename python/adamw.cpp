#include "fastmoe/adamw.h"

#include "args.h"

// The lists come as buffers (array.array): addresses and sizes of 8 bytes, dtype codes of 4, one entry a tensor.
void bind_adamw(py::module_& m) {
    m.def("adamw_step",
          [](py::buffer params, py::buffer grads, py::buffer exp_avgs, py::buffer exp_avg_sqs, py::buffer numels,
             py::buffer dtypes, py::buffer workspace, int64_t step, double lr, double beta1, double beta2, double eps,
             double weight_decay, double grad_scale, int threads) {
              const py::buffer_info p = params.request(), g = grads.request(), ms = exp_avgs.request(),
                                    vs = exp_avg_sqs.request(), sizes = numels.request(), types = dtypes.request(),
                                    space = workspace.request(true);
              fm_adamw_step_cpu_args a{p.size,
                                       static_cast<void**>(p.ptr),
                                       static_cast<void**>(g.ptr),
                                       static_cast<float**>(ms.ptr),
                                       static_cast<float**>(vs.ptr),
                                       static_cast<int64_t*>(sizes.ptr),
                                       static_cast<int32_t*>(types.ptr),
                                       step,
                                       lr,
                                       beta1,
                                       beta2,
                                       eps,
                                       weight_decay,
                                       grad_scale,
                                       static_cast<int64_t*>(space.ptr),
                                       threads};
              run(fm_adamw_step_cpu, a, "adamw_step", "step must be at least 1", &a.step);
          });
}
