/* Shared by every family: status codes, storage types, conventions.
 *
 * Conventions. Matrices are dense, row-major, in the shape the suffix of their name gives (x_TD is [T, D]). Inputs
 * never alias outputs. Functions allocate nothing and keep no state: workspaces are arguments, sized by the function
 * named beside them. num_threads is the size of the OpenMP team; results are bit-equal for every value of it. On an
 * error the outputs are undefined.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define FM_API extern "C" __attribute__((visibility("default")))
#else
#define FM_API __attribute__((visibility("default")))
#endif

typedef enum {
    FM_OK = 0,
    FM_BAD_VALUE = 1, /* an element is out of range; `bad` in the arguments holds it */
    FM_BAD_DTYPE = 2, /* a storage type this function does not serve */
} fm_status;

/* The instruction set the kernels run with: baseline, avx2, avx512 or avx512bf16. limit: to take a lesser one, for
 * tests and measurements; FM_BAD_VALUE for one this CPU lacks. The only state of the library. */
FM_API const char* fm_isa(void);
FM_API fm_status fm_limit_isa(const char* name);

typedef enum { FM_F32 = 0, FM_BF16 = 1, FM_F16 = 2 } fm_dtype;
/* What a 16-bit weight is kept in beside itself: nothing, float32, or (bfloat16) int8, the third byte. */
typedef enum { FM_NO_MASTER = 0, FM_MASTER_F32 = 1, FM_MASTER_RESIDUAL = 2 } fm_master;
