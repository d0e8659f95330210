// FLASH_ATTN_EXT, computed in tiles that all query heads of a K/V head share. Faster than upstream from one row on.

#pragma once

#include "ggml.h"

#include <stddef.h>

struct ggml_compute_params;

namespace fast {

// Return the work buffer's size in bytes, or 0 if the operation is not supported.
size_t attention_work_size(int n_threads, const ggml_tensor * op);

// Return false, with nothing changed, if the operation is not supported.
bool attention_forward(const ggml_compute_params * params, ggml_tensor * op);

} // namespace fast
