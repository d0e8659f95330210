// Operations on rows by themselves, which take their share of a prompt's time once products are fast.

#pragma once

#include "ggml.h"

struct ggml_compute_params;

namespace pop {

// GGML_GLU_OP_GEGLU and SWIGLU_OAI. false: not covered, and nothing was done
bool glu(const ggml_compute_params * params, ggml_tensor * op);

// MUL of each row by a number of its own, as of the weights of experts, with upstream's bits. false: likewise
bool mul_rows(const ggml_compute_params * params, ggml_tensor * op);

// RMS_NORM and the MUL behind it. false: likewise
bool rms_norm_mul(const ggml_compute_params * params, const ggml_tensor * norm, ggml_tensor * mul);

} // namespace pop
