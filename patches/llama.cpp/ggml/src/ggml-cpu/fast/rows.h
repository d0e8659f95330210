// Row operations: GLUs, scaling by expert weights, RMS norms. Once products are fast, upstream's loops for them take a visible share of
// prefill: 5 to 7 % with experts (docs/notebook/kernels-experts-and-decoding.md).

#pragma once

#include "ggml.h"

struct ggml_compute_params;

namespace fast {

// Each function returns false, with nothing changed, if it does not support the operation.

// Compute GGML_GLU_OP_GEGLU or GGML_GLU_OP_SWIGLU_OAI.
bool glu(const ggml_compute_params * params, ggml_tensor * op);

// Compute a MUL of each row by its own factor, such as an expert's weight. Bit for bit equal to upstream.
bool mul_rows(const ggml_compute_params * params, ggml_tensor * op);

// Compute an RMS_NORM and the MUL of its result.
bool rms_norm_mul(const ggml_compute_params * params, const ggml_tensor * norm, ggml_tensor * mul);

} // namespace fast
