// Kernels for x86 and ARM64: matrix products, attention, GLUs and RMS norms, computed from tensors in file order.
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

// Added to GGML_POP_ROWS_FAST or GGML_POP_ROWS_ALL if a measurement showed that our kernels are faster (see
// ggml_pop_must_be_chosen).
#define GGML_POP_ROWS_CHOSEN 4

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
// If GGML_POP_KERNELS names one of these, the search starts there. On ARM64, the sets are "i8mm" and "dotprod".
// "off": the variable is 0 or off. "none": no set is supported, or our kernels compute only
// chosen operations (see ggml_pop_must_be_chosen).
// The other operations use the widest vectors of the build.
const char * ggml_pop_kernels(void);

// Return whether our kernels compute only operations with GGML_POP_ROWS_CHOSEN: on ARM64, unless GGML_POP_KERNELS names a set.
bool ggml_pop_must_be_chosen(void);

// Return which kinds llama.cpp's kernels compute faster than ours, as llama_pop_choose_kernels() reads them, and in the following lines a
// summary of the times: "Q4_K/many: llama.cpp 0.92 ms, ours 0.53 ms (...)". Valid until the thread's next call. If our kernels must be
// chosen, the text starts with the word "only" and lists the kinds that our kernels compute faster. If we have no kernels for this processor,
// the text is empty.
// kinds: numbers of weight types, or "attention", separated by spaces, the most important ones first. Kinds that the file at path (UTF-8)
// does not decide are measured with few rows and n_threads threads, within about a second, and their lines are added to the file. If our
// kernels must be chosen, the kinds are also measured with many rows. Nothing is measured if other processes are busy or the file cannot be
// written. A kind gets up to three attempts, at least 10 minutes apart. "all": measure everything again, and replace the file.
// Lines of the file: "Q4_K/few ours 812.4 820.1 ...", with the microseconds of each round, "F16/few -" if ours do not support the kind, and
// "Q4_K/few tried 1764550000.0", with the time of an attempt. Rows: "many" or "few". Forms: "ours", "llama.cpp".
const char * ggml_pop_choose(int n_threads, const char * kinds, const char * path);

#ifdef __cplusplus
}
#endif
