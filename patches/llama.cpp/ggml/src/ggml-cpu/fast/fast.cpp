// Entry points for ggml: kernel selection, the work buffer, and how threads share a matrix product.
//
// A product has two phases with a barrier between them. First the threads pack all columns (activations) into tiles. Then each thread
// takes panels (rows of weights) from a shared counter, and multiplies each panel with all tiles.

#include "fast.h"

#include "attention.h"
#include "rows.h"
#include "gemm.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "ops.h"
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>

namespace fast {

//
// kernel selection
//

using kernels_by_type = const gemm * (*)(int type);

struct instructions {
    const char *    name;
    kernels_by_type kernels[4]; // in descending order of min_cols
};

#ifndef __AVXVNNI__
static const gemm * not_built(int) { return nullptr; }
#endif

static const instructions all_instructions[] = {
    { "amx",        { gemm_amx, gemm_512, gemv_512 } },
    { "avx512vnni", { gemm_512, gemv_512 } },
#ifdef __AVXVNNI__
    { "avxvnni",    { gemm_256, gemv_256 } },
#else
    { "avxvnni",    { not_built } },
#endif
    { "avx2",       { gemm_256, gemv_256 } },
};

static std::string requested_kernels() {
    const char * value = getenv("GGML_POP_KERNELS");
    return value ? value : "";
}

static bool is_off() {
    return requested_kernels() == "0" || requested_kernels() == "off";
}

// Return the first supported set, starting at the one that GGML_POP_KERNELS names.
static const instructions * find_instructions() {
    if (is_off()) {
        return nullptr;
    }
    const auto is_requested = [](const instructions & i) { return requested_kernels() == i.name; };
    const auto computes     = [](const instructions & i) { return i.kernels[0](GGML_TYPE_Q8_0) != nullptr; };
    const auto begin = std::begin(all_instructions), end = std::end(all_instructions), first = std::find_if(begin, end, is_requested);
    const auto found = std::find_if(first == end ? begin : first, end, computes);
    return found == end ? nullptr : found;
}

static const instructions * instructions_in_use() {
    static const instructions * const found = find_instructions();
    return found;
}

static ggml_pop_rows rows_mode(const ggml_tensor * op) {
    return (ggml_pop_rows) ggml_get_op_params_i32(op, GGML_POP_OP_PARAM);
}

static bool is_enabled_for(const ggml_tensor * op) {
    return instructions_in_use() && rows_mode(op) != GGML_POP_ROWS_NONE;
}

//
// the work buffer
//

// A bump allocator over the work buffer. With a null buffer it only measures the size.
struct arena {
    uintptr_t base; // an integer, since pointer arithmetic on null is undefined
    size_t    size = 0;

    explicit arena(void * wdata) : base(GGML_PAD((uintptr_t) wdata, 64)) {}

    template <typename T> T * allocate(size_t n) {
        T * p = (T *) (base + size);
        size += GGML_PAD(n * sizeof(T), 64);
        return p;
    }

    size_t needed() const { return size + 64; }
};

//
// products
//

static bool has_float_rows(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float);
}

// Return null if the kernels do not support the operation.
static const gemm * kernel_for(const ggml_tensor * op) {
    if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) {
        return nullptr;
    }
    const ggml_tensor * weights = op->src[0];
    const bool is_plain = !weights->extra && weights->nb[0] == ggml_type_size(weights->type) && weights->ne[0] % 32 == 0 && weights->ne[0] > 0 &&
                          weights->ne[3] == 1 && (op->op == GGML_OP_MUL_MAT_ID || weights->ne[2] == 1);
    if (!is_plain || !has_float_rows(op->src[1]) || !has_float_rows(op)) {
        return nullptr;
    }
    const gemm * g = instructions_in_use()->kernels[0](weights->type);
    if (rows_mode(op) == GGML_POP_ROWS_ALL) {
        return g ? g : gemm_float(weights->type);
    }
    for (const kernels_by_type * k = instructions_in_use()->kernels; *k; k++) {
        g = (*k)(weights->type);
        if (g && ggml_nrows(op) >= g->min_cols * weights->ne[2]) {
            return g;
        }
    }
    return nullptr;
}

// Threads finish together if each takes several tasks. Measured with 2 and 8 threads (docs/notebook/kernels-speed.md, "Packed once").
// A split by columns unpacks the weights once per part, so it uses half the tasks.
constexpr int TASKS_PER_THREAD = 4;

static int64_t n_tiles(const gemm & g, int64_t n_cols) {
    return (n_cols + g.n_cols - 1) / g.n_cols;
}

// Return the rows of weights in a task: a full panel, or less if the matrix has too few rows for all threads.
static int64_t rows_per_task(const gemm & g, const ggml_tensor * op, int n_threads) {
    const int64_t tasks = op->op == GGML_OP_MUL_MAT && n_threads > 1 ? TASKS_PER_THREAD * n_threads : 1;
    return std::min<int64_t>(g.n_rows, GGML_PAD((op->ne[0] + tasks - 1) / tasks, 32));
}

// Return column i of a tensor of two to four dimensions, counted in memory order.
static float * column(const ggml_tensor * t, int64_t i) {
    const int64_t i1 = i % t->ne[1], i2 = i / t->ne[1] % t->ne[2], i3 = i / t->ne[1] / t->ne[2];
    return (float *) ((char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3]);
}

// ROPE writes this many floats per thread to the start of the work buffer. Packed columns start after them, so ROPE preserves them.
// After a ROPE of larger heads, columns are packed again.
constexpr int64_t ROPE_DIMS = 512, ROPE_FLOATS = ROPE_DIMS + CACHE_LINE_SIZE_F32;

// A product's part of the work buffer. In products with experts it follows expert_work's arrays, which every product computes again.
//
//   | ROPE's floats     | out[n_cols] | tile 0 | tile 1 | ... | scratch of thread 0 | scratch of thread 1 | ... |
//   | n_threads * 528 f |  pointers   |<- tile_stride ->|     |<- scratch_stride  ->|
struct product_work {
    float **  out; // [n_cols], the columns of the result
    uint8_t * tiles;
    uint8_t * scratch;
    size_t    tile_stride;    // bytes
    size_t    scratch_stride; // bytes

    product_work(arena & a, const gemm & g, const ggml_tensor * op, int64_t max_tiles, int n_threads) {
        a.allocate<float>(n_threads * ROPE_FLOATS);
        tile_stride    = GGML_PAD(op->src[0]->ne[0], 256) / 32 * g.block_bytes;
        scratch_stride = GGML_PAD(g.scratch_bytes, 64);
        out            = a.allocate<float *>(ggml_nrows(op));
        tiles          = a.allocate<uint8_t>(max_tiles * tile_stride);
        scratch        = a.allocate<uint8_t>(n_threads * scratch_stride);
    }
};

static void multiply_rows(const gemm & g, const ggml_tensor * weights, int64_t matrix, int64_t row, int64_t n_rows, const product_work & w,
        int64_t first_tile, int64_t first_col, int64_t n_cols, int ith) {
    gemm_share s;
    s.row         = (size_t) row;
    s.weights     = (const char *) weights->data + matrix * weights->nb[2] + s.row * weights->nb[1];
    s.stride      = weights->nb[1];
    s.n_rows      = (int) std::min(n_rows, weights->ne[1] - row);
    s.n_blocks    = (int) (weights->ne[0] / 32);
    s.tiles       = w.tiles + first_tile * w.tile_stride;
    s.tile_stride = w.tile_stride;
    s.n_cols      = (int) n_cols;
    s.out         = w.out + first_col;
    s.scratch     = w.scratch + ith * w.scratch_stride;
    g.multiply(s);
}

static size_t mul_mat_size(const gemm & g, const ggml_tensor * op, int n_threads) {
    arena a(nullptr);
    product_work(a, g, op, n_tiles(g, ggml_nrows(op)), n_threads);
    return a.needed();
}

static void mul_mat(const ggml_compute_params * params, const gemm & g, ggml_tensor * op, bool is_packed) {
    const ggml_tensor * weights = op->src[0];
    const int64_t n_cols = ggml_nrows(op), tiles = n_tiles(g, n_cols);
    arena a(params->wdata);
    const product_work w(a, g, op, tiles, params->nth);
    GGML_ASSERT(params->wsize >= a.needed());

    for (int64_t t = params->ith; t < tiles; t += params->nth) {
        const float * cols[MAX_TILE_COLS];
        const int64_t first = t * g.n_cols, n = std::min<int64_t>(g.n_cols, n_cols - first);
        for (int64_t i = 0; i < n; i++) {
            cols[i] = column(op->src[1], first + i);
            w.out[first + i] = column(op, first + i);
        }
        if (!is_packed) {
            g.pack(cols, (int) n, (int) (weights->ne[0] / 32), w.tiles + t * w.tile_stride);
        }
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    // If the matrix has too few rows for all threads, split the columns as well. Each part unpacks the weights again.
    const int64_t rows   = rows_per_task(g, op, params->nth);
    const int64_t panels = (weights->ne[1] + rows - 1) / rows;
    const int64_t parts  = params->nth == 1 ? 1 : (TASKS_PER_THREAD / 2 * params->nth + panels - 1) / panels;
    const int64_t step   = std::max<int64_t>(2, (tiles + parts - 1) / parts);
    for (int64_t i = params->ith;; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t tile = i / panels * step;
        if (tile >= tiles) {
            break;
        }
        const int64_t first = tile * g.n_cols;
        multiply_rows(g, weights, 0, i % panels * rows, rows, w, tile, first, std::min(step * g.n_cols, n_cols - first), params->ith);
    }
}

//
// products with routed experts
//

struct expert {
    int64_t matrix;
    int64_t first_col, n_cols;
    int64_t first_tile;
};

struct expert_work {
    int64_t * n_experts;   // the number of experts with columns
    expert *  experts;     // [n_experts]
    const float ** cols;   // [n_cols], sorted by expert, like product.out
    int64_t * next_col;    // [number of matrices]
    product_work product;

    static int64_t max_tiles(const gemm & g, const ggml_tensor * op) {
        const int64_t n_cols = ggml_nrows(op);
        return std::min(n_cols, n_cols / g.n_cols + op->src[0]->ne[2]);
    }

    expert_work(arena & a, const gemm & g, const ggml_tensor * op, int n_threads) :
        n_experts(a.allocate<int64_t>(1)),
        experts  (a.allocate<expert>(op->src[0]->ne[2])),
        cols     (a.allocate<const float *>(ggml_nrows(op))),
        next_col (a.allocate<int64_t>(op->src[0]->ne[2])),
        product  (a, g, op, max_tiles(g, op), n_threads) {}
};

static size_t mul_mat_id_size(const gemm & g, const ggml_tensor * op, int n_threads) {
    arena a(nullptr);
    expert_work(a, g, op, n_threads);
    return a.needed();
}

// Sort columns by expert. Shapes: ids [n_used, n_tokens], input [n, n_used or 1, n_tokens], result [n, n_used, n_tokens].
static void sort_by_expert(const gemm & g, ggml_tensor * op, const expert_work & w) {
    const ggml_tensor * input = op->src[1], * ids = op->src[2];
    const int64_t n_matrices = op->src[0]->ne[2];
    const auto id_at = [&](int64_t i, int64_t token) {
        const int32_t id = *(const int32_t *) ((const char *) ids->data + i * ids->nb[0] + token * ids->nb[1]);
        GGML_ASSERT(id >= 0 && id < n_matrices);
        return id;
    };
    std::fill(w.next_col, w.next_col + n_matrices, 0);
    for (int64_t token = 0; token < ids->ne[1]; token++) {
        for (int64_t i = 0; i < ids->ne[0]; i++) {
            w.next_col[id_at(i, token)]++;
        }
    }
    int64_t n = 0, col = 0, tile = 0;
    for (int64_t m = 0; m < n_matrices; m++) {
        const int64_t n_cols = w.next_col[m];
        w.next_col[m] = col;
        if (n_cols > 0) {
            w.experts[n++] = { m, col, n_cols, tile };
            col  += n_cols;
            tile += n_tiles(g, n_cols);
        }
    }
    *w.n_experts = n;
    for (int64_t token = 0; token < ids->ne[1]; token++) {
        for (int64_t i = 0; i < ids->ne[0]; i++) {
            const int64_t c = w.next_col[id_at(i, token)]++;
            w.cols[c]        = (const float *) ((const char *) input->data + i % input->ne[1] * input->nb[1] + token * input->nb[2]);
            w.product.out[c] = (float *) ((char *) op->data + i * op->nb[1] + token * op->nb[2]);
        }
    }
}

static void mul_mat_id(const ggml_compute_params * params, const gemm & g, ggml_tensor * op, bool is_packed) {
    const ggml_tensor * weights = op->src[0];
    arena a(params->wdata);
    const expert_work w(a, g, op, params->nth);
    GGML_ASSERT(params->wsize >= a.needed());

    if (params->ith == 0) {
        sort_by_expert(g, op, w);
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const int n_blocks = (int) (weights->ne[0] / 32);
    for (int64_t e = 0; e < *w.n_experts && !is_packed; e++) {
        const expert & x = w.experts[e];
        for (int64_t t = 0; t < n_tiles(g, x.n_cols); t++) {
            if ((x.first_tile + t) % params->nth == params->ith) {
                const int64_t first = t * g.n_cols, n = std::min<int64_t>(g.n_cols, x.n_cols - first);
                g.pack(w.cols + x.first_col + first, (int) n, n_blocks, w.product.tiles + (x.first_tile + t) * w.product.tile_stride);
            }
        }
    }
    ggml_barrier(params->threadpool);

    const int64_t rows   = rows_per_task(g, op, params->nth);
    const int64_t panels = (weights->ne[1] + rows - 1) / rows;
    for (int64_t i = params->ith; i < *w.n_experts * panels; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const expert & x = w.experts[i / panels];
        multiply_rows(g, weights, x.matrix, i % panels * rows, rows, w.product, x.first_tile, x.first_col, x.n_cols, params->ith);
    }
}

static bool multiply(const ggml_compute_params * params, ggml_tensor * op, bool is_packed) {
    const gemm * g = kernel_for(op);
    if (g) {
        (op->op == GGML_OP_MUL_MAT ? mul_mat : mul_mat_id)(params, *g, op, is_packed);
    }
    return g;
}

//
// products that share packed columns: Q, K and V; an FFN's gate and up projections
//

// Return whether the operation leaves the packed columns in the work buffer intact.
static bool preserves_packed_columns(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_ADD:
        case GGML_OP_ADD_ID:
        case GGML_OP_MUL:
        case GGML_OP_RMS_NORM: return op->src[0]->type == GGML_TYPE_F32;
        case GGML_OP_ROPE:     return op->ne[0] <= ROPE_DIMS;
        default:               return false;
    }
}

static bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * p = (const char *) a->data, * q = (const char *) b->data;
    return p < q + ggml_nbytes(b) && q < p + ggml_nbytes(a);
}

// Return whether the work buffer holds the columns of product n, left by the preceding product.
static bool has_packed_columns(const ggml_cgraph * graph, int n) {
    const ggml_tensor * op = graph->nodes[n];
    const gemm * g = kernel_for(op);
    for (int i = n - 1; g && i >= 0; i--) {
        const ggml_tensor * before = graph->nodes[i];
        if (ggml_op_is_empty(before->op)) {
            continue;
        }
        if (!(before->flags & GGML_TENSOR_FLAG_COMPUTE) || overlap(before, op->src[1])) {
            return false;
        }
        if (before->op == op->op) {
            const gemm * h = is_enabled_for(before) ? kernel_for(before) : nullptr;
            return h && h->pack == g->pack && h->n_cols == g->n_cols && h->block_bytes == g->block_bytes && before->src[1] == op->src[1] &&
                   before->src[2] == op->src[2] && before->src[0]->ne[2] == op->src[0]->ne[2];
        }
        if (!preserves_packed_columns(before)) {
            return false;
        }
    }
    return false;
}

} // namespace fast

size_t ggml_pop_work_size(int n_threads, const ggml_tensor * op) {
    if (!fast::is_enabled_for(op)) {
        return 0;
    }
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        return fast::attention_work_size(n_threads, op);
    }
    const fast::gemm * g = fast::kernel_for(op);
    return !g ? 0 : op->op == GGML_OP_MUL_MAT ? fast::mul_mat_size(*g, op, n_threads) : fast::mul_mat_id_size(*g, op, n_threads);
}

bool ggml_pop_compute_forward(const ggml_compute_params * params, ggml_tensor * op) {
    if (params->use_ref || !fast::is_enabled_for(op)) {
        return false;
    }
    switch (op->op) {
        case GGML_OP_FLASH_ATTN_EXT: return fast::attention_forward(params, op);
        case GGML_OP_GLU:            return fast::glu(params, op);
        case GGML_OP_MUL:            return fast::mul_rows(params, op);
        default:                     break;
    }
    return fast::multiply(params, op, false);
}

bool ggml_pop_multiply_packed(const ggml_compute_params * params, const ggml_cgraph * graph, int n) {
    ggml_tensor * op = graph->nodes[n];
    return !params->use_ref && fast::is_enabled_for(op) && fast::has_packed_columns(graph, n) && fast::multiply(params, op, true);
}

bool ggml_pop_rms_norm_mul(const ggml_compute_params * params, const ggml_tensor * norm, ggml_tensor * mul) {
    return fast::is_enabled_for(norm) && fast::rms_norm_mul(params, norm, mul);
}

const char * ggml_pop_kernels(void) {
    return fast::is_off() ? "off" : !fast::instructions_in_use() ? "none" : fast::instructions_in_use()->name;
}
