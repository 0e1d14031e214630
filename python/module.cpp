#include "args.h"

void bind_permutation(py::module_& m);

PYBIND11_MODULE(_C, m) {
    m.doc() = "fastmoe's C++ kernels on raw addresses; fastmoe.native holds the checks";
    bind_permutation(m);
}
