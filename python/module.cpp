#include "args.h"

void bind_adafactor(py::module_& m);
void bind_adamw(py::module_& m);
void bind_assignment(py::module_& m);
void bind_attention(py::module_& m);
void bind_experts(py::module_& m);
void bind_gating(py::module_& m);
void bind_gemm(py::module_& m);
void bind_loss(py::module_& m);
void bind_norm(py::module_& m);
void bind_permutation(py::module_& m);
void bind_quantize(py::module_& m);
void bind_random(py::module_& m);

PYBIND11_MODULE(_C, m) {
    m.doc() = "fastmoe's C++ kernels on raw addresses; fastmoe.native holds the checks";
    m.def("isa", &fm_isa);
    m.def("limit_isa", [](const std::string& name) {
        if (fm_limit_isa(name.c_str()) != FM_OK)
            throw py::value_error(
                "fastmoe.limit_isa: name must be baseline, avx2, avx512 or avx512bf16 and served by "
                "this CPU, got " +
                name);
    });
    bind_adafactor(m);
    bind_adamw(m);
    bind_assignment(m);
    bind_attention(m);
    bind_experts(m);
    bind_gating(m);
    bind_gemm(m);
    bind_loss(m);
    bind_norm(m);
    bind_permutation(m);
    bind_quantize(m);
    bind_random(m);
}
