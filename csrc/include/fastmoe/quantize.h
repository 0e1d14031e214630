/* 8-bit codes with a bfloat16 scale for every block of 32 along a row. See fastmoe/ops/quantize for what they mean. */
#pragma once
#include "fastmoe/common.h"

typedef struct {
    const void* x_RI; /* dtype */
    void* codes_RI;   /* signed_codes ? int8 : uint8 */
    void* scales;     /* [R, ceil(I / 32)] bfloat16 */
    int64_t R, I;
    fm_dtype dtype;
    int signed_codes;
    int drawn; /* round up or down by draws from key; else to nearest */
    int64_t key, first_row;
    int num_threads;
} fm_quantize_cpu_args;
FM_API fm_status fm_quantize_cpu(fm_quantize_cpu_args* a);

typedef struct {
    const void* codes_RI; /* signed_codes ? int8 : uint8 */
    const void* scales;   /* [R, ceil(I / 32)] bfloat16 */
    float* out_RI;
    int64_t R, I;
    int signed_codes;
    int num_threads;
} fm_dequantize_cpu_args;
FM_API fm_status fm_dequantize_cpu(fm_dequantize_cpu_args* a);
