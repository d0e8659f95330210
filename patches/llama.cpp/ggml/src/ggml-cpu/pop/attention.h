// FLASH_ATTN_EXT in tiles that the query heads of a K/V head share; from one row on faster than upstream's.

#pragma once

#include "ggml.h"

#include <stddef.h>

struct ggml_compute_params;

namespace pop {

// bytes of the work buffer, 0: not covered
size_t attention_work_size(int n_threads, const ggml_tensor * op);

// false: not covered, and nothing was done
bool attention_forward(const ggml_compute_params * params, ggml_tensor * op);

} // namespace pop
