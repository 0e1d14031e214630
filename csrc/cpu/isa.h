/* Every source beside dispatch.cpp is compiled once per instruction set: FM_ISA is baseline, avx2, avx512 or
 * avx512bf16. All helpers live in an unnamed namespace and no standard containers are used, so that the linker cannot
 * merge the instruction sets' copies of a function. */
#pragma once
#include "fastmoe/common.h"

#define FM_JOIN2(a, b) a##_##b
#define FM_JOIN(a, b) FM_JOIN2(a, b)
/* FM_KERNEL(fm_permute_cpu) { ... a->x_TD ... } defines this instruction set's fm_permute_cpu. */
#define FM_KERNEL(name) extern "C" fm_status FM_JOIN(name, FM_ISA)(name##_args * a)
