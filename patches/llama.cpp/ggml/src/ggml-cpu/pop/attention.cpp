// Attention: what is covered, and how threads share it.
//
// Tiles begin at multiples of 64 cells, and one that a row does not see changes no bit of its result. So that depends neither on
// the other rows, nor on how long the cache is behind the last cell that the row sees, nor on how rows are shared out. It depends
// on K of the first two cells, whoever's they are, from which the bias of K is read. A NaN in Q stays one; K and V have none.

#include "attention.h"

#include "pop.h"

#include "ggml-cpu-impl.h"

#include "vectors.h"

#ifdef POP_VECTORS

#include "attention-unit.h"

namespace pop {

namespace {

constexpr int UNIT_ROWS = 384; // of a unit
constexpr int FEW       = 16;  // so few queries may share out chunks of cells, too

bool covered(const ggml_tensor * op) {
    const ggml_tensor * q = op->src[0], * k = op->src[1], * v = op->src[2], * mask = op->src[3];
    const auto rows_lie_flat = [](const ggml_tensor * t) { return t->nb[0] == ggml_type_size(t->type); };
    return q->type == GGML_TYPE_F32 && k_packer(k->type) && v_packer(v->type) && (!mask || mask->type == GGML_TYPE_F16) &&
           q->ne[1] > 0 && k->ne[1] > 0 && k->ne[1] < INT32_MAX / 2 && v->ne[1] == k->ne[1] &&
           q->ne[0] == k->ne[0] && k->ne[0] % 16 == 0 && v->ne[0] % 16 == 0 &&
           k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3] && q->ne[2] % k->ne[2] == 0 && q->ne[3] % k->ne[3] == 0 &&
           rows_lie_flat(q) && rows_lie_flat(k) && rows_lie_flat(v) && op->nb[0] == sizeof(float) && op->nb[1] == v->ne[0] * sizeof(float) &&
           q->nb[1] % sizeof(float) == 0 && k->nb[1] % 2 == 0 && v->nb[1] % 2 == 0;
}

// queries of a unit: fewer where threads would be idle
int unit_queries(const attention & a, int n_threads) {
    const int64_t heads = a.k->ne[2] * a.q->ne[3];
    int           n     = std::max(1, UNIT_ROWS / a.n_shared);
    const int64_t share = heads * a.n_queries / (4 * (int64_t) n_threads); // four units a thread
    if (n_threads > 1 && share < n) {
        n = (int) std::max<int64_t>(share, std::min(n, std::max(1, UNIT_ROWS / 4 / a.n_shared)));
    }
    return std::min(n, a.n_queries);
}

// How an operation is cut: into units, and these into chunks of cells where there are few queries and many threads.
struct cut {
    int    n_queries; // of a unit
    int    n_blocks, n_heads, n_units, n_chunks;
    size_t scratch_size, partial_size; // bytes; of a thread, of a chunk of a unit

    cut(const attention & a, int n_threads) : n_queries(unit_queries(a, n_threads)), n_heads((int) a.k->ne[2]) {
        n_blocks            = (a.n_queries + n_queries - 1) / n_queries;
        n_units             = n_blocks * n_heads * (int) a.q->ne[3];
        const bool in_parts = a.n_queries <= FEW && n_threads > 1 && n_units < 2 * n_threads;
        n_chunks            = in_parts ? a.n_chunks() : 1;
        scratch_size        = scratch(a, n_queries, nullptr).size;
        partial_size        = pop::partial_size(a, n_queries);
    }

    size_t size(int n_threads) const {
        return 64 + n_threads * scratch_size + (n_chunks > 1 ? (size_t) n_units * n_chunks * partial_size : 0);
    }

    // the last queries see the most cells: they come first
    unit unit_at(const attention & a, const scratch & s, int i) const {
        const int first = (n_blocks - 1 - i / n_heads % n_blocks) * n_queries;
        return unit(a, s, i / n_heads / n_blocks, i % n_heads, first, std::min(n_queries, a.n_queries - first));
    }
};

// calls work(i) for each i below n, in one of the threads
template <typename Work> void share_out(const ggml_compute_params * params, int n, const Work & work) {
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (int i = params->ith; i < n; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        work(i);
    }
}

void compute_in_parts(const ggml_compute_params * params, const attention & a, const cut & c, const scratch & s, char * parts) {
    const auto part = [&](int unit, int chunk) {
        return partial_at(a, c.n_queries, parts + ((size_t) unit * c.n_chunks + chunk) * c.partial_size);
    };
    share_out(params, c.n_units * c.n_chunks, [&](int i) {
        const int unit = i / c.n_chunks, chunk = i % c.n_chunks;
        c.unit_at(a, s, unit).compute_chunk(chunk, part(unit, chunk));
    });
    ggml_barrier(params->threadpool);
    for (int i = params->ith; i < c.n_units; i += params->nth) {
        const unit u = c.unit_at(a, s, i);
        for (int chunk = 1; chunk < c.n_chunks; chunk++) {
            u.merge(part(i, 0), part(i, chunk));
        }
        u.write(part(i, 0));
    }
}

} // namespace

size_t attention_work_size(int n_threads, const ggml_tensor * op) {
    if (!covered(op)) {
        return 0;
    }
    const attention a(op);
    size_t          size = 0;
    for (int n = 1; n <= n_threads; n++) { // fewer may come
        size = std::max(size, cut(a, n).size(n));
    }
    return size;
}

bool attention_forward(const ggml_compute_params * params, ggml_tensor * op) {
    if (!covered(op)) {
        return false;
    }
    const attention a(op);
    const cut       c(a, params->nth);
    char *          base = (char *) GGML_PAD((uintptr_t) params->wdata, 64);
    const scratch   s(a, c.n_queries, base + params->ith * c.scratch_size);
    GGML_ASSERT(params->wsize >= c.size(params->nth));
    if (c.n_chunks > 1) {
        compute_in_parts(params, a, c, s, base + params->nth * c.scratch_size);
    } else {
        share_out(params, c.n_units, [&](int i) { c.unit_at(a, s, i).compute(); });
    }
    return true;
}

} // namespace pop

#else

namespace pop {

size_t attention_work_size(int, const ggml_tensor *) {
    return 0;
}

bool attention_forward(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

} // namespace pop

#endif
