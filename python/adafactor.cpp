#include "fastmoe/adafactor.h"

#include "args.h"

// The lists come as buffers (array.array): addresses, shapes, keys, rows and rates of 8 bytes, codes of 4.
void bind_adafactor(py::module_& m) {
    m.def("adafactor_step_workspace", [](py::buffer shapes, int threads) {
        const py::buffer_info sizes = shapes.request();
        return fm_adafactor_step_workspace(sizes.size / 3, static_cast<int64_t*>(sizes.ptr), threads);
    });
    m.def(
        "adafactor_step",
        [](py::buffer params, py::buffer grads, py::buffer rows, py::buffer columns, py::buffer squares,
           py::buffer masters, py::buffer shapes, py::buffer dtypes, py::buffer kinds, py::buffer keys,
           py::buffer first_rows, py::buffer betas, py::buffer rates, bool scaled, double eps_square, double eps_weight,
           double clip_threshold, double weight_decay, double grad_scale, address workspace, int threads) {
            const py::buffer_info p = params.request(), g = grads.request(), r = rows.request(), c = columns.request(),
                                  s = squares.request(), w = masters.request(), sizes = shapes.request(),
                                  types = dtypes.request(), masters_are = kinds.request(), k = keys.request(),
                                  first = first_rows.request(), kept = betas.request(), steps = rates.request();
            fm_adafactor_step_cpu_args a{p.size,
                                         static_cast<void**>(p.ptr),
                                         static_cast<void**>(g.ptr),
                                         static_cast<float**>(r.ptr),
                                         static_cast<float**>(c.ptr),
                                         static_cast<float**>(s.ptr),
                                         static_cast<void**>(w.ptr),
                                         static_cast<int64_t*>(sizes.ptr),
                                         static_cast<int32_t*>(types.ptr),
                                         static_cast<int32_t*>(masters_are.ptr),
                                         static_cast<int64_t*>(k.ptr),
                                         static_cast<int64_t*>(first.ptr),
                                         static_cast<double*>(kept.ptr),
                                         static_cast<double*>(steps.ptr),
                                         scaled,
                                         eps_square,
                                         eps_weight,
                                         clip_threshold,
                                         weight_decay,
                                         grad_scale,
                                         at<void>(workspace),
                                         threads};
            run(fm_adafactor_step_cpu, a, "adafactor_step");
        });
}
