#include "rows.h"

#include "ggml-cpu-impl.h"
#include "vectors.h"

#ifdef FAST_VECTORS

#include <math.h>

#include <algorithm>

namespace fast {

// Call work(i) for this thread's share of n rows.
template <typename Work> static void for_each_row(const ggml_compute_params * params, int64_t n, const Work & work) {
    const int64_t rows_per_thread = (n + params->nth - 1) / params->nth;
    for (int64_t i = params->ith * rows_per_thread; i < std::min(n, (params->ith + 1) * rows_per_thread); i++) {
        work(i);
    }
}

static bool has_float_rows(const ggml_tensor * t, int64_t n) {
    return t->type == GGML_TYPE_F32 && ggml_is_contiguous_1(t) && n % LANES == 0;
}

// GELU in the tanh approximation, written as x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3)).
static inline floats gelu(floats x) {
    const floats cubic = mul(x, fma(mul(x, x), splat(0.044715f), splat(1.0f)));
    const floats minus = splat(-2.0f * 0.79788456f * LOG2_E);
    return div(x, add(exp2_of(min(mul(cubic, minus), splat(100.0f))), splat(1.0f)));
}

// gpt-oss's SwiGLU: x * sigmoid(alpha * x) * (y + 1), with x and y clamped. NaN stays NaN: min and max return their second operand.
struct swiglu_oai {
    floats alpha, limit;

    explicit swiglu_oai(const ggml_tensor * op) :
        alpha(splat(-LOG2_E * ggml_get_op_params_f32(op, 2))), limit(splat(ggml_get_op_params_f32(op, 3))) {}

    floats operator()(floats x, floats y) const {
        x = min(limit, x);
        y = max(sub(splat(0.0f), limit), min(limit, y));
        const floats gated = div(x, add(exp2_of(min(mul(x, alpha), splat(100.0f))), splat(1.0f)));
        return fma(gated, y, gated);
    }
};

// Compute activate(x, y) over the halves of each row, or over two tensors.
template <typename Activate> static void gated_rows(const ggml_compute_params * params, ggml_tensor * op, const Activate & activate) {
    const ggml_tensor * a = op->src[0], * b = op->src[1] ? op->src[1] : a;
    const int64_t n = op->ne[0];
    const bool is_split = !op->src[1], swapped = ggml_get_op_params_i32(op, 1);
    for_each_row(params, ggml_nrows(op), [&](int64_t i) {
        const float * x = (const float *) ((const char *) a->data + i * a->nb[1]) + (is_split && swapped ? n : 0);
        const float * y = (const float *) ((const char *) b->data + i * b->nb[1]) + (is_split && !swapped ? n : 0);
        float *     out = (float *) ((char *) op->data + i * op->nb[1]);
        for (int64_t k = 0; k < n; k += LANES) {
            store(out + k, activate(load(x + k), load(y + k)));
        }
    });
}

bool glu(const ggml_compute_params * params, ggml_tensor * op) {
    const int64_t n = op->ne[0];
    if (!has_float_rows(op, n) || !has_float_rows(op->src[0], n) || (op->src[1] && !has_float_rows(op->src[1], n))) {
        return false;
    }
    switch (ggml_get_glu_op(op)) {
        case GGML_GLU_OP_GEGLU:      gated_rows(params, op, [](floats x, floats y) { return mul(gelu(x), y); }); return true;
        case GGML_GLU_OP_SWIGLU_OAI: gated_rows(params, op, swiglu_oai(op)); return true;
        default:                     return false;
    }
}

bool mul_rows(const ggml_compute_params * params, ggml_tensor * op) {
    const ggml_tensor * x = op->src[0], * factors = op->src[1];
    const int64_t n = op->ne[0];
    const bool is_covered = has_float_rows(op, n) && has_float_rows(x, n) && factors->type == GGML_TYPE_F32 && factors->ne[0] == 1 &&
                            factors->ne[1] == op->ne[1] && factors->ne[2] == op->ne[2] && factors->ne[3] == op->ne[3] &&
                            ggml_is_contiguous(factors);
    if (!is_covered) {
        return false;
    }
    for_each_row(params, ggml_nrows(op), [&](int64_t i) {
        const float * in     = (const float *) ((const char *) x->data + i * x->nb[1]);
        float *       out    = (float *) ((char *) op->data + i * op->nb[1]);
        const floats  factor = splat(((const float *) factors->data)[i]);
        for (int64_t k = 0; k < n; k += LANES) {
            store(out + k, mul(load(in + k), factor));
        }
    });
    return true;
}

bool rms_norm_mul(const ggml_compute_params * params, const ggml_tensor * norm, ggml_tensor * mul_op) {
    const ggml_tensor * x = norm->src[0], * w = mul_op->src[mul_op->src[0] == norm];
    const int64_t n = mul_op->ne[0];
    const float eps = ggml_get_op_params_f32(norm, 0);
    if (!(eps >= 0.0f) || !has_float_rows(mul_op, n) || !has_float_rows(x, n) || !has_float_rows(w, n) || w->ne[0] != n ||
        ggml_nrows(w) != 1) {
        return false;
    }
    for_each_row(params, ggml_nrows(mul_op), [&](int64_t i) {
        const float * in  = (const float *) ((const char *) x->data + i * x->nb[1]);
        float *       out = (float *) ((char *) mul_op->data + i * mul_op->nb[1]);
        floats sums[4] = { splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f) };
        for (int64_t k = 0; k < n; k += LANES) {
            floats & sum = sums[k / LANES % 4];
            sum = fma(load(in + k), load(in + k), sum);
        }
        const float  mean  = sum_of(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) / (float) n;
        const floats scale = splat(1.0f / sqrtf(mean + eps));
        for (int64_t k = 0; k < n; k += LANES) {
            store(out + k, mul(mul(load(in + k), scale), load((const float *) w->data + k)));
        }
    });
    return true;
}

} // namespace fast

#else

bool fast::glu(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

bool fast::mul_rows(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

bool fast::rms_norm_mul(const ggml_compute_params *, const ggml_tensor *, ggml_tensor *) {
    return false;
}

#endif
