#include "args.h"

void bind_adamw(py::module_& m);
void bind_experts(py::module_& m);
void bind_gating(py::module_& m);
void bind_loss(py::module_& m);
void bind_norm(py::module_& m);
void bind_permutation(py::module_& m);

PYBIND11_MODULE(_C, m) {
    m.doc() = "fastmoe's C++ kernels on raw addresses; fastmoe.native holds the checks";
    bind_adamw(m);
    bind_experts(m);
    bind_gating(m);
    bind_loss(m);
    bind_norm(m);
    bind_permutation(m);
}
