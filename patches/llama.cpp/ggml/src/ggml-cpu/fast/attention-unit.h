// A unit of attention: a range of queries, of all query heads that share a K/V head.
// The unit packs K and V tile by tile, once for all of its rows.

#pragma once

#include "attention-kernel.h"

#include "ggml-impl.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <cmath>

namespace fast {

namespace {

// Every chunk starts with empty sums, and chunks are merged in order. So one thread and many threads compute the same bits.
// 16 tiles: merging costs little, and a cache of a few thousand cells still has a chunk for each thread. Other values were not measured.
constexpr int CHUNK_CELLS = 1024;

// Values of K above this multiple of the median magnitude count as bias, such as Qwen 2.5's (docs/notebook/kernels-speed.md).
// The value is not critical: any centre leaves the softmax unchanged.
constexpr float LARGE_K = 6.0f;

using pack_kv = void (*)(const char * cells, size_t stride, const head_dims & dims, const kv_tile & tile);

pack_kv k_packer(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16:  return pack_k<GGML_TYPE_F16>;
        case GGML_TYPE_BF16: return pack_k<GGML_TYPE_BF16>;
        case GGML_TYPE_F32:  return pack_k<GGML_TYPE_F32>;
        case GGML_TYPE_Q8_0: return pack_k<GGML_TYPE_Q8_0>;
        default:             return nullptr;
    }
}

pack_kv v_packer(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16:  return pack_v<GGML_TYPE_F16>;
        case GGML_TYPE_BF16: return pack_v<GGML_TYPE_BF16>;
        case GGML_TYPE_F32:  return pack_v<GGML_TYPE_F32>;
        case GGML_TYPE_Q8_0: return pack_v<GGML_TYPE_Q8_0>;
        default:             return nullptr;
    }
}

struct attention {
    const ggml_tensor * q, * k, * v, * mask, * sinks, * out;

    head_dims dims;
    int       n_queries, n_cells;
    int       n_heads, n_shared; // query heads in all, and per K/V head
    float     scale, max_bias;

    explicit attention(const ggml_tensor * op) :
        q(op->src[0]), k(op->src[1]), v(op->src[2]), mask(op->src[3]), sinks(op->src[4]), out(op) {
        float cap;
        memcpy(&scale, op->op_params, sizeof(float));
        memcpy(&max_bias, op->op_params + 1, sizeof(float));
        memcpy(&cap, op->op_params + 2, sizeof(float));
        dims      = { (int) k->ne[0], (int) v->ne[0], cap * LOG2_E };
        n_queries = (int) q->ne[1];
        n_cells   = (int) k->ne[1];
        n_heads   = (int) q->ne[2];
        n_shared  = (int) (q->ne[2] / k->ne[2]);
        scale     = cap != 0.0f ? scale / cap : scale * LOG2_E;
    }

    // Return whether the result depends on the scores themselves, not only on their differences.
    bool needs_absolute_scores() const { return sinks || dims.cap != 0.0f; }

    int n_chunks() const { return (n_cells + CHUNK_CELLS - 1) / CHUNK_CELLS; }

    // Return the number of mask rows for n queries. Query heads share a row unless the mask has one per head.
    int mask_rows(int n) const { return !mask ? 1 : mask->ne[2] > 1 ? n * n_shared : n; }

    // Return ALiBi's slope.
    float slope(int head) const {
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        const int   whole = 1 << (int) floor(log2((double) n_heads));
        const float m0 = powf(2.0f, -max_bias / whole), m1 = powf(2.0f, -max_bias / 2.0f / whole);
        return head < whole ? powf(m0, head + 1) : powf(m1, 2 * (head - whole) + 1);
    }
};

// Partial results of all rows over a range of cells.
struct partial {
    float * max_score;
    float * sum;
    float * out;

    template <typename Allocate> void allocate_from(const attention & a, size_t n_groups, const Allocate & allocate) {
        allocate(max_score, n_groups * MAX_LANES);
        allocate(sum, n_groups * TILE_ROWS * MAX_LANES);
        allocate(out, n_groups * TILE_ROWS * a.dims.dv);
    }

    void clear(const attention & a, size_t n_groups) const {
        std::fill_n(max_score, n_groups * MAX_LANES, NO_SCORE);
        std::fill_n(sum, n_groups * TILE_ROWS * MAX_LANES, 0.0f);
        std::fill_n(out, n_groups * TILE_ROWS * a.dims.dv, 0.0f);
    }
};

// Assigns consecutive addresses of the work buffer. Starting at 0 it measures the size.
struct bump_allocator {
    uintptr_t at; // an integer, since pointer arithmetic on null is undefined

    template <typename T> void operator()(T *& to, size_t n) {
        to = (T *) at;
        at += GGML_PAD(n * sizeof(T), 64);
    }
};

inline int count_groups(const attention & a, int n_queries) {
    return (n_queries * a.n_shared + TILE_ROWS - 1) / TILE_ROWS;
}

inline size_t partial_size(const attention & a, int n_queries) {
    partial        p;
    bump_allocator allocate = { 0 };
    p.allocate_from(a, count_groups(a, n_queries), [&](auto *& to, size_t n) { allocate(to, n); });
    return allocate.at;
}

inline partial partial_at(const attention & a, int n_queries, char * base) {
    partial        p;
    bump_allocator allocate = { (uintptr_t) base };
    p.allocate_from(a, count_groups(a, n_queries), [&](auto *& to, size_t n) { allocate(to, n); });
    return p;
}

// A thread's part of the work buffer.
struct scratch {
    int16_t *    q;
    float *      q_scale;
    float *      offset;
    partial      total, chunk;
    float *      k_magnitudes; // [dk], absolute values of K in the first cells
    kv_tile      tile;
    mask_state * states;       // [mask rows], state of each row in this tile
    uint16_t *   edge_mask;    // [mask rows][64], the mask in the last tile, padded past the end of the cache
    size_t       size;

    scratch(const attention & a, int n_queries, char * base) {
        const size_t n_groups = count_groups(a, n_queries), blocks = a.dims.blocks(), pairs = a.dims.k_pairs();
        bump_allocator allocate = { (uintptr_t) base };
        allocate(q, n_groups * pairs * TILE_ROWS * 2);
        allocate(q_scale, n_groups * blocks * TILE_ROWS);
        allocate(offset, n_groups * TILE_ROWS);
        total.allocate_from(a, n_groups, [&](auto *& to, size_t n) { allocate(to, n); });
        chunk.allocate_from(a, a.n_chunks() > 1 ? n_groups : 0, [&](auto *& to, size_t n) { allocate(to, n); });
        allocate(k_magnitudes, a.dims.dk);
        allocate(tile.k_centre, blocks * SCALE_DIMS);
        allocate(tile.k, pairs * TILE_CELLS * 2);
        allocate(tile.k_scale, blocks * TILE_CELLS);
        allocate(tile.v, (size_t) a.dims.dv * TILE_CELLS);
        allocate(tile.v_log2, TILE_CELLS);
        allocate(tile.v_inverse, TILE_CELLS);
        allocate(states, a.mask_rows(n_queries));
        allocate(edge_mask, (size_t) a.mask_rows(n_queries) * TILE_CELLS);
        size = allocate.at - (uintptr_t) base;
    }

    row_group group(const attention & a, const partial & p, int i) const {
        row_group g;
        g.q       = q + (size_t) i * a.dims.k_pairs() * TILE_ROWS * 2;
        g.q_scale = q_scale + (size_t) i * a.dims.blocks() * TILE_ROWS;
        g.offset  = offset + (size_t) i * TILE_ROWS;
        g.max_score = p.max_score + (size_t) i * MAX_LANES;
        g.sum     = p.sum + (size_t) i * TILE_ROWS * MAX_LANES;
        g.out     = p.out + (size_t) i * TILE_ROWS * a.dims.dv;
        return g;
    }
};

constexpr uint16_t MASKED = 0xfc00; // -infinity

// A range of queries of one sequence and K/V head. Rows are sorted by query, then by query head, so a group's rows see
// mostly the same cells, even if each query belongs to another sequence's answer.
struct attention_unit {
    const attention & a;
    const scratch &   s;
    const int         seq, kv_head, first, n; // n queries from the first on
    const int         n_rows, n_groups;

    attention_unit(const attention & a, const scratch & s, int seq, int kv_head, int first, int n) :
        a(a), s(s), seq(seq), kv_head(kv_head), first(first), n(n), n_rows(n * a.n_shared), n_groups(count_groups(a, n)) {}

    int query_of(int row) const { return first + row / a.n_shared; }
    int head_of(int row) const { return kv_head * a.n_shared + row % a.n_shared; }

    // Return the index in `states` and `edge_mask`.
    int mask_index(int row) const { return row * a.mask_rows(n) / n_rows; }

    const uint16_t * mask_row(int row) const {
        const ggml_tensor * m  = a.mask;
        const size_t        at = head_of(row) % m->ne[2] * m->nb[2] + seq % m->ne[3] * m->nb[3];
        return (const uint16_t *) ((const char *) m->data + query_of(row) * m->nb[1] + at);
    }

    // Return the row's mask for the tile at `cell`.
    const uint16_t * mask_of(int row, int cell) const {
        const bool is_edge = cell + TILE_CELLS > a.n_cells;
        return is_edge ? s.edge_mask + (size_t) mask_index(row) * TILE_CELLS : mask_row(row) + cell;
    }

    const char * cells_of(const ggml_tensor * t, int cell) const {
        return (const char *) t->data + cell * t->nb[1] + kv_head * t->nb[2] + seq / (a.q->ne[3] / t->ne[3]) * t->nb[3];
    }

    const float * q_row(int row) const {
        const size_t at = query_of(row) * a.q->nb[1] + head_of(row) * a.q->nb[2] + seq * a.q->nb[3];
        return (const float *) ((const char *) a.q->data + at);
    }

    // Read K with zeros for NaN and infinity, which would reach the scores of all cells through the centre.
    void read_finite_k(int cell, float * to) const {
        if (a.k->type == GGML_TYPE_F32) {
            memcpy(to, cells_of(a.k, cell), a.dims.dk * sizeof(float));
        } else {
            ggml_get_type_traits(a.k->type)->to_float(cells_of(a.k, cell), to, a.dims.dk);
        }
        std::replace_if(to, to + a.dims.dk, [](float x) { return !std::isfinite(x); }, 0.0f);
    }

    // Set the centre to the values of K that are large in both cells 0 and 1: the first token's K is often unlike all others.
    // With a cap or sinks only cell 0 is read: a row that sees only cell 0 must not depend on cell 1.
    // Return false if no value is large.
    bool find_centre() const {
        const int dk = a.dims.dk;
        float *   centre = s.tile.k_centre, * other = s.k_magnitudes;
        read_finite_k(0, centre);
        std::fill_n(centre + dk, a.dims.blocks() * SCALE_DIMS - dk, 0.0f);
        if (a.n_cells > 1 && !a.needs_absolute_scores()) {
            read_finite_k(1, other);
            for (int d = 0; d < dk; d++) {
                const float smaller = fabsf(other[d]) < fabsf(centre[d]) ? other[d] : centre[d];
                centre[d]           = centre[d] * other[d] > 0.0f ? smaller : 0.0f;
            }
        }
        std::transform(centre, centre + dk, s.k_magnitudes, [](float x) { return fabsf(x); });
        std::nth_element(s.k_magnitudes, s.k_magnitudes + dk / 2, s.k_magnitudes + dk);
        const float large = LARGE_K * std::max(s.k_magnitudes[dk / 2], MIN_SCALE);
        bool        any   = false;
        for (int d = 0; d < dk; d++) {
            const bool is_large = fabsf(centre[d]) > large;
            centre[d]           = is_large ? centre[d] : 0.0f;
            any                 = any || is_large;
        }
        return any;
    }

    // Compute what the centre takes from each row's scores. A softmax ignores such an offset; a cap and sinks do not.
    void find_offsets() const {
        for (int row = 0; row < n_rows; row++) {
            float         sum = 0.0f;
            const float * q   = q_row(row);
            for (int d = 0; d < a.dims.dk; d++) {
                sum += q[d] * s.tile.k_centre[d];
            }
            s.offset[row] = sum * a.scale;
        }
    }

    kv_tile prepare() const {
        for (int i = 0; i < n_groups; i++) {
            const float * rows[TILE_ROWS];
            const int     n_here = std::min(TILE_ROWS, n_rows - i * TILE_ROWS);
            for (int c = 0; c < n_here; c++) {
                rows[c] = q_row(i * TILE_ROWS + c);
            }
            pack_q(rows, n_here, a.dims, a.scale, s.group(a, s.total, i));
        }
        std::fill_n(s.offset, n_groups * TILE_ROWS, 0.0f);
        kv_tile tile = s.tile;
        if (!find_centre()) {
            tile.k_centre = nullptr;
        } else if (a.needs_absolute_scores()) {
            find_offsets();
        }
        return tile;
    }

    void fill_edge(int cell) const {
        const int n_cells = a.n_cells - cell;
        for (int row = 0; row < n_rows; row += n_rows / a.mask_rows(n)) {
            uint16_t * edge = s.edge_mask + (size_t) mask_index(row) * TILE_CELLS;
            if (a.mask) {
                memcpy(edge, mask_row(row) + cell, n_cells * sizeof(uint16_t));
            } else {
                std::fill_n(edge, n_cells, (uint16_t) 0);
            }
            std::fill_n(edge + n_cells, TILE_CELLS - n_cells, MASKED);
        }
    }

    // Return false if all rows mask all of the tile's cells.
    bool read_mask(int cell) const {
        const bool is_edge = cell + TILE_CELLS > a.n_cells;
        bool       any     = false;
        if (is_edge) {
            fill_edge(cell);
        }
        for (int row = 0; row < n_rows; row += n_rows / a.mask_rows(n)) {
            const mask_state state = a.mask || is_edge ? state_of_mask(mask_of(row, cell)) : MASK_NONE;
            s.states[mask_index(row)] = state;
            any                       = any || state != MASK_ALL;
        }
        return any;
    }

    void attend_group(int i, const kv_tile & tile, int cell, const partial & to) const {
        row_group  group  = s.group(a, to, i);
        const int  n_here = std::min(TILE_ROWS, n_rows - i * TILE_ROWS);
        bool       all = true, masked = false;
        for (int c = 0; c < n_here; c++) {
            const mask_state state = s.states[mask_index(i * TILE_ROWS + c)];
            all                    = all && state == MASK_ALL;
            masked                 = masked || state != MASK_NONE;
        }
        if (all) {
            return;
        }
        for (int c = 0; masked && c < TILE_ROWS; c++) {
            const int row  = std::min(i * TILE_ROWS + c, n_rows - 1);
            group.mask[c]  = mask_of(row, cell);
            group.slope[c] = a.slope(head_of(row)) * LOG2_E;
        }
        attend(a.dims, tile, group, n_here, masked);
    }

    void attend_chunk(int chunk, kv_tile tile, const partial & to) const {
        const int end = std::min(a.n_cells, (chunk + 1) * CHUNK_CELLS);
        for (int cell = chunk * CHUNK_CELLS; cell < end; cell += TILE_CELLS) {
            tile.n_cells = std::min(TILE_CELLS, a.n_cells - cell);
            if (!read_mask(cell)) {
                continue;
            }
            k_packer(a.k->type)(cells_of(a.k, cell), a.k->nb[1], a.dims, tile);
            v_packer(a.v->type)(cells_of(a.v, cell), a.v->nb[1], a.dims, tile);
            for (int i = 0; i < n_groups; i++) {
                attend_group(i, tile, cell, to);
            }
        }
    }

    void merge(const partial & to, const partial & from) const {
        for (int i = 0; i < n_groups; i++) {
            merge_groups(a.dims, s.group(a, to, i), s.group(a, from, i));
        }
    }

    void write(const partial & p) const {
        for (int row = 0; row < n_rows; row++) {
            const row_group group = s.group(a, p, row / TILE_ROWS);
            const int       c     = row % TILE_ROWS;
            float           sum   = sum_of_row(group.sum + c * MAX_LANES);
            const bool      seen  = group.max_score[c] != NO_SCORE || std::isnan(sum);
            if (a.sinks) {
                const float sink = ((const float *) a.sinks->data)[head_of(row)] * LOG2_E;
                sum += (float) WEIGHT_MAX * exp2f(sink - group.max_score[c]);
            }
            const float  factor = (seen ? 1.0f / sum : 0.0f) + nan_guard(q_row(row), a.dims.dk);
            const size_t to   = ((size_t) seq * a.n_queries + query_of(row)) * a.n_heads + head_of(row);
            write_row(group.out + (size_t) c * a.dims.dv, a.dims.dv, factor, (float *) a.out->data + to * a.dims.dv);
        }
    }

    void compute() const {
        const kv_tile tile = prepare();
        s.total.clear(a, n_groups);
        attend_chunk(0, tile, s.total);
        for (int chunk = 1; chunk < a.n_chunks(); chunk++) {
            s.chunk.clear(a, n_groups);
            attend_chunk(chunk, tile, s.chunk);
            merge(s.total, s.chunk);
        }
        write(s.total);
    }

    void compute_chunk(int chunk, const partial & to) const {
        const kv_tile tile = prepare();
        to.clear(a, n_groups);
        attend_chunk(chunk, tile, to);
    }
};

} // namespace

} // namespace fast
