// Kernels for x86: matrix products, attention, GLUs and RMS norms, computed from tensors in file order.
//
// A row's result never depends on the number of threads. With GGML_POP_ROWS_ALL it does not depend on the other rows either.
//
// Symbols that other files of ggml call have the prefix ggml_pop_, like all of our symbols in ggml.

#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

struct ggml_cgraph;
struct ggml_compute_params;

#ifdef __cplusplus
extern "C" {
#endif

// Index in op_params of the operation's enum ggml_pop_rows.
#define GGML_POP_OP_PARAM 15

enum ggml_pop_rows {
    GGML_POP_ROWS_FAST = 0, // the fastest kernels for the number of rows, possibly upstream's
    GGML_POP_ROWS_NONE = 1, // upstream's kernels only
    GGML_POP_ROWS_ALL  = 2, // the same kernels for any number of rows
};

// Return the work buffer's size in bytes, or 0 if these kernels do not support the operation.
size_t ggml_pop_work_size(int n_threads, const struct ggml_tensor * op);

// Compute the operation. Return false, with nothing changed, if these kernels do not support it.
bool ggml_pop_compute_forward(const struct ggml_compute_params * params, struct ggml_tensor * op);

// Compute node n of a graph from the columns that the preceding product left packed in the work buffer.
// All nodes preceding n must be computed. Return false, with nothing changed, if the buffer does not hold n's columns.
bool ggml_pop_multiply_packed(const struct ggml_compute_params * params, const struct ggml_cgraph * graph, int n);

// Compute an RMS_NORM and the MUL of its result. Return false, with nothing changed, if they are not supported.
bool ggml_pop_rms_norm_mul(const struct ggml_compute_params * params, const struct ggml_tensor * norm, struct ggml_tensor * mul);

// Return the instruction set of matrix products: "amx", "avx512vnni", "avxvnni" or "avx2", the first that the processor and build support.
// If GGML_POP_KERNELS names one of these, the search starts there. "off": the variable is 0 or off. "none": no set is supported.
// The other operations use the widest vectors of the build.
const char * ggml_pop_kernels(void);

#ifdef __cplusplus
}
#endif
