#include "rows.h"

#include "ggml-cpu-impl.h"
#include "vectors.h"

#ifdef POP_VECTORS

#include <math.h>

#include <algorithm>

namespace pop {

// calls work(i) for this thread's share of n rows
template <typename Work> static void share_rows(const ggml_compute_params * params, int64_t n, const Work & work) {
    const int64_t each = (n + params->nth - 1) / params->nth;
    for (int64_t i = params->ith * each; i < std::min(n, (params->ith + 1) * each); i++) {
        work(i);
    }
}

static bool of_rows(const ggml_tensor * t, int64_t n) {
    return t->type == GGML_TYPE_F32 && ggml_is_contiguous_1(t) && n % LANES == 0;
}

// gelu by tanh, as x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3))
static inline floats gelu(floats x) {
    const floats cubic = mul(x, fma(mul(x, x), splat(0.044715f), splat(1.0f)));
    const floats minus = splat(-2.0f * 0.79788456f * LOG2_E);
    return div(x, add(exp2_of(min(mul(cubic, minus), splat(100.0f))), splat(1.0f)));
}

bool geglu(const ggml_compute_params * params, ggml_tensor * op) {
    const ggml_tensor * a = op->src[0], * b = op->src[1] ? op->src[1] : a;
    const int64_t n = op->ne[0];
    if (ggml_get_glu_op(op) != GGML_GLU_OP_GEGLU || !of_rows(op, n) || !of_rows(a, n) || !of_rows(b, n)) {
        return false;
    }
    const bool is_split = !op->src[1], swapped = ggml_get_op_params_i32(op, 1);
    share_rows(params, ggml_nrows(op), [&](int64_t i) {
        const float * x = (const float *) ((const char *) a->data + i * a->nb[1]) + (is_split && swapped ? n : 0);
        const float * y = (const float *) ((const char *) b->data + i * b->nb[1]) + (is_split && !swapped ? n : 0);
        float *     out = (float *) ((char *) op->data + i * op->nb[1]);
        for (int64_t k = 0; k < n; k += LANES) {
            store(out + k, mul(gelu(load(x + k)), load(y + k)));
        }
    });
    return true;
}

bool rms_norm_mul(const ggml_compute_params * params, const ggml_tensor * norm, ggml_tensor * mul_op) {
    const ggml_tensor * x = norm->src[0], * w = mul_op->src[mul_op->src[0] == norm];
    const int64_t n = mul_op->ne[0];
    const float eps = ggml_get_op_params_f32(norm, 0);
    if (!(eps >= 0.0f) || !of_rows(mul_op, n) || !of_rows(x, n) || !of_rows(w, n) || w->ne[0] != n || ggml_nrows(w) != 1) {
        return false;
    }
    share_rows(params, ggml_nrows(mul_op), [&](int64_t i) {
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

} // namespace pop

#else

bool pop::geglu(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

bool pop::rms_norm_mul(const ggml_compute_params *, const ggml_tensor *, ggml_tensor *) {
    return false;
}

#endif
