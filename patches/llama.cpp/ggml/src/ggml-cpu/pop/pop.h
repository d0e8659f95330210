// Kernels for x86: products and attention of rows, computed from the tensors as they are in memory.
//
// A row's result does not depend on the number of threads, nor, with GGML_POP_ROWS_ALL, on the rows that are computed with it.

#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

struct ggml_cgraph;
struct ggml_compute_params;

#ifdef __cplusplus
extern "C" {
#endif

// Where in its op_params a graph says who computes an operation.
#define GGML_POP_OP_PARAM 15

enum ggml_pop_rows {
    GGML_POP_ROWS_FAST = 0, // the fastest kernels for so many rows
    GGML_POP_ROWS_NONE = 1, // never these kernels
    GGML_POP_ROWS_ALL  = 2, // the same kernels for any number of rows
};

// bytes of the work buffer that the operation needs, 0: these kernels do not compute it
size_t ggml_pop_work_size(int n_threads, const struct ggml_tensor * op);

// false: these kernels do not compute the operation, and nothing was done
bool ggml_pop_compute_forward(const struct ggml_compute_params * params, struct ggml_tensor * op);

// Node n of a graph whose nodes before it were computed: a product of columns that the last product packed, and nobody has overwritten.
// false: it is none, and nothing was done
bool ggml_pop_multiply_packed(const struct ggml_compute_params * params, const struct ggml_cgraph * graph, int n);

// an RMS_NORM and the MUL of its result, likewise
bool ggml_pop_rms_norm_mul(const struct ggml_compute_params * params, const struct ggml_tensor * norm, struct ggml_tensor * mul);

// The products' instructions: "amx", "avx512vnni", "avxvnni" or "avx2". GGML_POP_KERNELS set to one of these leaves out those before it.
// "off": it is 0 or off. "none": no instructions are left that this processor and this build have. Other operations have the build's.
const char * ggml_pop_kernels(void);

#ifdef __cplusplus
}
#endif
