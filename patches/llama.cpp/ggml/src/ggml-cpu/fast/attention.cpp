// Attention: which operations are supported, and how threads share one.
//
// A row's result depends on the cells that the row sees, not on the other rows, the cache's length or the number of threads: tiles start
// at multiples of 64 cells, and a fully masked tile changes no bit. One exception: the bias of K is read from the first two cells, even
// if they belong to another sequence. A row's result is NaN if its Q, or K or V of a cell that it sees, contains NaN or infinity.

#include "attention.h"

#include "ggml-cpu-impl.h"

#include "vectors.h"

#ifdef FAST_VECTORS

#include "attention-unit.h"

namespace fast {

namespace {

// A unit packs K and V once for all of its rows. With 384 rows, packing a tile costs little next to the attention of 64 groups, and Q, sums
// and results (170 KiB at a head size of 64) stay in the L2 cache. Other values were not measured.
constexpr int MAX_UNIT_ROWS = 384;
// With few queries (decode, the last rows of a prompt) there may be fewer units than threads, so units are split into chunks of cells.
// The limit bounds the memory of partial results, which grows with queries times chunks.
constexpr int MAX_SPLIT_QUERIES = 16;

bool is_supported(const ggml_tensor * op) {
    const ggml_tensor * q = op->src[0], * k = op->src[1], * v = op->src[2], * mask = op->src[3];
    const auto has_contiguous_rows = [](const ggml_tensor * t) { return t->nb[0] == ggml_type_size(t->type); };
    return q->type == GGML_TYPE_F32 && k_packer(k->type) && v_packer(v->type) && (!mask || mask->type == GGML_TYPE_F16) &&
           q->ne[1] > 0 && k->ne[1] > 0 && k->ne[1] < INT32_MAX / 2 && v->ne[1] == k->ne[1] &&
           q->ne[0] == k->ne[0] && k->ne[0] % 16 == 0 && v->ne[0] % 16 == 0 &&
           k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3] && q->ne[2] % k->ne[2] == 0 && q->ne[3] % k->ne[3] == 0 &&
           has_contiguous_rows(q) && has_contiguous_rows(k) && has_contiguous_rows(v) &&
           op->nb[0] == sizeof(float) && op->nb[1] == v->ne[0] * sizeof(float) &&
           q->nb[1] % sizeof(float) == 0 && k->nb[1] % 2 == 0 && v->nb[1] % 2 == 0;
}

// Return the queries of a unit: fewer than MAX_UNIT_ROWS allows if threads would be idle.
int unit_queries(const attention & a, int n_threads) {
    const int64_t heads = a.k->ne[2] * a.q->ne[3];
    int           n     = std::max(1, MAX_UNIT_ROWS / a.n_shared);
    const int64_t share = heads * a.n_queries / (4 * (int64_t) n_threads); // four units per thread finish at about the same time
    if (n_threads > 1 && share < n) {
        n = (int) std::max<int64_t>(share, std::min(n, std::max(1, MAX_UNIT_ROWS / 4 / a.n_shared)));
    }
    return std::min(n, a.n_queries);
}

// The division of an operation into units and, with few queries and many threads, of units into chunks of cells.
struct work_split {
    int    n_queries; // per unit
    int    n_blocks, n_heads, n_units, n_chunks;
    size_t scratch_size, partial_size; // bytes per thread, and per chunk of a unit

    work_split(const attention & a, int n_threads) : n_queries(unit_queries(a, n_threads)), n_heads((int) a.k->ne[2]) {
        n_blocks            = (a.n_queries + n_queries - 1) / n_queries;
        n_units             = n_blocks * n_heads * (int) a.q->ne[3];
        const bool is_split = a.n_queries <= MAX_SPLIT_QUERIES && n_threads > 1 && n_units < 2 * n_threads;
        n_chunks            = is_split ? a.n_chunks() : 1;
        scratch_size        = scratch(a, n_queries, nullptr).size;
        partial_size        = fast::partial_size(a, n_queries);
    }

    size_t size(int n_threads) const {
        return 64 + n_threads * scratch_size + (n_chunks > 1 ? (size_t) n_units * n_chunks * partial_size : 0);
    }

    // Start with the last queries: they see the most cells, and a long unit at the end would keep one thread busy alone.
    attention_unit unit_at(const attention & a, const scratch & s, int i) const {
        const int first = (n_blocks - 1 - i / n_heads % n_blocks) * n_queries;
        return attention_unit(a, s, i / n_heads / n_blocks, i % n_heads, first, std::min(n_queries, a.n_queries - first));
    }
};

// Call work(i) for each i < n, each in one of the threads.
template <typename Work> void parallel_for(const ggml_compute_params * params, int n, const Work & work) {
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (int i = params->ith; i < n; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        work(i);
    }
}

void compute_split(const ggml_compute_params * params, const attention & a, const work_split & c, const scratch & s, char * parts) {
    const auto part = [&](int unit, int chunk) {
        return partial_at(a, c.n_queries, parts + ((size_t) unit * c.n_chunks + chunk) * c.partial_size);
    };
    parallel_for(params, c.n_units * c.n_chunks, [&](int i) {
        const int unit = i / c.n_chunks, chunk = i % c.n_chunks;
        c.unit_at(a, s, unit).compute_chunk(chunk, part(unit, chunk));
    });
    ggml_barrier(params->threadpool);
    for (int i = params->ith; i < c.n_units; i += params->nth) {
        const attention_unit u = c.unit_at(a, s, i);
        for (int chunk = 1; chunk < c.n_chunks; chunk++) {
            u.merge(part(i, 0), part(i, chunk));
        }
        u.write(part(i, 0));
    }
}

} // namespace

size_t attention_work_size(int n_threads, const ggml_tensor * op) {
    if (!is_supported(op)) {
        return 0;
    }
    const attention a(op);
    size_t          size = 0;
    for (int n = 1; n <= n_threads; n++) { // ggml may run fewer threads than it planned
        size = std::max(size, work_split(a, n).size(n));
    }
    return size;
}

bool attention_forward(const ggml_compute_params * params, ggml_tensor * op) {
    if (!is_supported(op)) {
        return false;
    }
    const attention a(op);
    const work_split       c(a, params->nth);
    char *          base = (char *) GGML_PAD((uintptr_t) params->wdata, 64);
    const scratch   s(a, c.n_queries, base + params->ith * c.scratch_size);
    GGML_ASSERT(params->wsize >= c.size(params->nth));
    if (c.n_chunks > 1) {
        compute_split(params, a, c, s, base + params->nth * c.scratch_size);
    } else {
        parallel_for(params, c.n_units, [&](int i) { c.unit_at(a, s, i).compute(); });
    }
    return true;
}

} // namespace fast

#else

namespace fast {

size_t attention_work_size(int, const ggml_tensor *) {
    return 0;
}

bool attention_forward(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

} // namespace fast

#endif
