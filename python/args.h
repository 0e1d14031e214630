// Addresses to typed pointers, status codes to exceptions.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "fastmoe/common.h"

namespace py = pybind11;
using address = std::uintptr_t;  // what fastmoe.native.ptr(tensor) returns; 0 is a null pointer

template <class T>
T* at(address a) {
    return reinterpret_cast<T*>(a);
}

// Runs a kernel without the GIL; `wanted` ends the sentence "fastmoe.<op>: " for FM_BAD_VALUE, before ", got <bad>".
template <class Args>
void run(fm_status (*kernel)(Args*), Args& args, const char* op, const char* wanted = "",
         const int64_t* bad = nullptr) {
    fm_status status;
    {
        py::gil_scoped_release release;
        status = kernel(&args);
    }
    if (status == FM_BAD_VALUE)
        throw py::value_error("fastmoe." + std::string(op) + ": " + wanted +
                              (bad ? ", got " + std::to_string(*bad) : ""));
    if (status != FM_OK)
        throw py::type_error("fastmoe." + std::string(op) + ": a storage type the native backend does not serve");
}
