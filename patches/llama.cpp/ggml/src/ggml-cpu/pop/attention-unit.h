// A unit of attention: some queries of all query heads that share a K/V head.
// K and V are packed tile by tile, once for all of its rows.

#pragma once

#include "attention-kernel.h"

#include "ggml-impl.h"

#include <math.h>
#include <string.h>

#include <algorithm>

namespace pop {

namespace {

// Chunks begin anew and are merged in turn, whether one thread goes through them or many.
constexpr int CHUNK_CELLS = 1024;

constexpr float LARGE_K = 6.0f; // times the median: a bias

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
    int       n_queries, n_cells, n_heads, n_shared; // query heads, and of these those that share a K/V head
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

    // more than the differences of scores counts
    bool absolute() const { return sinks || dims.cap != 0.0f; }

    int n_chunks() const { return (n_cells + CHUNK_CELLS - 1) / CHUNK_CELLS; }

    // of n queries: one for all query heads, unless each has its own
    int mask_rows(int n) const { return !mask ? 1 : mask->ne[2] > 1 ? n * n_shared : n; }

    // of ALiBi
    float slope(int head) const {
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        const int   whole = 1 << (int) floor(log2((double) n_heads));
        const float m0 = powf(2.0f, -max_bias / whole), m1 = powf(2.0f, -max_bias / 2.0f / whole);
        return head < whole ? powf(m0, head + 1) : powf(m1, 2 * (head - whole) + 1);
    }
};

// The sums of rows over some cells.
struct partial {
    float * top;
    float * sum;
    float * out;

    template <typename Take> void lay_out(const attention & a, size_t n_groups, const Take & take) {
        take(top, n_groups * MAX_LANES);
        take(sum, n_groups * TILE_ROWS * MAX_LANES);
        take(out, n_groups * TILE_ROWS * a.dims.dv);
    }

    void clear(const attention & a, size_t n_groups) const {
        std::fill_n(top, n_groups * MAX_LANES, NO_TOP);
        std::fill_n(sum, n_groups * TILE_ROWS * MAX_LANES, 0.0f);
        std::fill_n(out, n_groups * TILE_ROWS * a.dims.dv, 0.0f);
    }
};

// Where things lie in a part of the work buffer, and how large it is.
struct layout {
    uintptr_t at; // null may not be added to

    template <typename T> void operator()(T *& to, size_t n) {
        to = (T *) at;
        at += GGML_PAD(n * sizeof(T), 64);
    }
};

inline int groups_of(const attention & a, int n_queries) {
    return (n_queries * a.n_shared + TILE_ROWS - 1) / TILE_ROWS;
}

inline size_t partial_size(const attention & a, int n_queries) {
    partial p;
    layout  take = { 0 };
    p.lay_out(a, groups_of(a, n_queries), [&](auto *& to, size_t n) { take(to, n); });
    return take.at;
}

inline partial partial_at(const attention & a, int n_queries, char * base) {
    partial p;
    layout  take = { (uintptr_t) base };
    p.lay_out(a, groups_of(a, n_queries), [&](auto *& to, size_t n) { take(to, n); });
    return p;
}

// A thread's part of the work buffer.
struct scratch {
    int16_t *    q;
    float *      q_scale;
    float *      offset;
    partial      total, chunk;
    float *      sizes; // of K's values in the first cells
    kv_tile      tile;
    mask_state * states; // of the mask's rows in this tile
    uint16_t *   edge;   // the mask's rows in the last tile, with the cells that do not exist
    size_t       size;

    scratch(const attention & a, int n_queries, char * base) {
        const size_t n_groups = groups_of(a, n_queries), blocks = a.dims.blocks(), pairs = a.dims.k_pairs();
        layout       take     = { (uintptr_t) base };
        take(q, n_groups * pairs * TILE_ROWS * 2);
        take(q_scale, n_groups * blocks * TILE_ROWS);
        take(offset, n_groups * TILE_ROWS);
        total.lay_out(a, n_groups, [&](auto *& to, size_t n) { take(to, n); });
        chunk.lay_out(a, a.n_chunks() > 1 ? n_groups : 0, [&](auto *& to, size_t n) { take(to, n); });
        take(sizes, a.dims.dk);
        take(tile.k_centre, blocks * SCALE_DIMS);
        take(tile.k, pairs * TILE_CELLS * 2);
        take(tile.k_scale, blocks * TILE_CELLS);
        take(tile.v, (size_t) a.dims.dv * TILE_CELLS);
        take(tile.v_log2, TILE_CELLS);
        take(tile.v_inverse, TILE_CELLS);
        take(states, a.mask_rows(n_queries));
        take(edge, (size_t) a.mask_rows(n_queries) * TILE_CELLS);
        size = take.at - (uintptr_t) base;
    }

    row_group group(const attention & a, const partial & p, int i) const {
        row_group g;
        g.q       = q + (size_t) i * a.dims.k_pairs() * TILE_ROWS * 2;
        g.q_scale = q_scale + (size_t) i * a.dims.blocks() * TILE_ROWS;
        g.offset  = offset + (size_t) i * TILE_ROWS;
        g.top     = p.top + (size_t) i * MAX_LANES;
        g.sum     = p.sum + (size_t) i * TILE_ROWS * MAX_LANES;
        g.out     = p.out + (size_t) i * TILE_ROWS * a.dims.dv;
        return g;
    }
};

constexpr uint16_t MASKED = 0xfc00; // -infinity

// Some queries of one sequence and K/V head. Its rows are those of the first query, then those of the next: a group's rows see
// mostly the same cells, also where each query is of another answer.
struct unit {
    const attention & a;
    const scratch &   s;
    const int         seq, kv_head, first, n; // n queries from the first on
    const int         n_rows, n_groups;

    unit(const attention & a, const scratch & s, int seq, int kv_head, int first, int n) :
        a(a), s(s), seq(seq), kv_head(kv_head), first(first), n(n), n_rows(n * a.n_shared), n_groups(groups_of(a, n)) {}

    int query_of(int row) const { return first + row / a.n_shared; }
    int head_of(int row) const { return kv_head * a.n_shared + row % a.n_shared; }

    // of the mask's rows in use
    int mask_index(int row) const { return row * a.mask_rows(n) / n_rows; }

    const uint16_t * mask_row(int row) const {
        const ggml_tensor * m  = a.mask;
        const size_t        at = head_of(row) % m->ne[2] * m->nb[2] + seq % m->ne[3] * m->nb[3];
        return (const uint16_t *) ((const char *) m->data + query_of(row) * m->nb[1] + at);
    }

    // of a tile's cells
    const uint16_t * mask_of(int row, int cell) const {
        const bool is_edge = cell + TILE_CELLS > a.n_cells;
        return is_edge ? s.edge + (size_t) mask_index(row) * TILE_CELLS : mask_row(row) + cell;
    }

    const char * cells_of(const ggml_tensor * t, int cell) const {
        return (const char *) t->data + cell * t->nb[1] + kv_head * t->nb[2] + seq / (a.q->ne[3] / t->ne[3]) * t->nb[3];
    }

    const float * q_row(int row) const {
        const size_t at = query_of(row) * a.q->nb[1] + head_of(row) * a.q->nb[2] + seq * a.q->nb[3];
        return (const float *) ((const char *) a.q->data + at);
    }

    void read_k(int cell, float * to) const {
        if (a.k->type == GGML_TYPE_F32) {
            memcpy(to, cells_of(a.k, cell), a.dims.dk * sizeof(float));
        } else {
            ggml_get_type_traits(a.k->type)->to_float(cells_of(a.k, cell), to, a.dims.dk);
        }
    }

    // The large values of cells 0 and 1, since the first token's K is often unlike all others. A row that sees cell 0 alone has weight 1
    // there whatever the centre is, unless a cap or sinks count: these take cell 0. False: nothing is large.
    bool find_centre() const {
        const int dk = a.dims.dk;
        float *   centre = s.tile.k_centre, * other = s.sizes;
        read_k(0, centre);
        std::fill_n(centre + dk, a.dims.blocks() * SCALE_DIMS - dk, 0.0f);
        if (a.n_cells > 1 && !a.absolute()) {
            read_k(1, other);
            for (int d = 0; d < dk; d++) {
                const float smaller = fabsf(other[d]) < fabsf(centre[d]) ? other[d] : centre[d];
                centre[d]           = centre[d] * other[d] > 0.0f ? smaller : 0.0f;
            }
        }
        std::transform(centre, centre + dk, s.sizes, [](float x) { return fabsf(x); });
        std::nth_element(s.sizes, s.sizes + dk / 2, s.sizes + dk);
        const float large = LARGE_K * std::max(s.sizes[dk / 2], MIN_SCALE);
        bool        any   = false;
        for (int d = 0; d < dk; d++) {
            const bool is_large = fabsf(centre[d]) > large;
            centre[d]           = is_large ? centre[d] : 0.0f;
            any                 = any || is_large;
        }
        return any;
    }

    // Softmax takes no notice of what is added to all scores of a row, a cap and sinks do.
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

    kv_tile begin() const {
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
        } else if (a.absolute()) {
            find_offsets();
        }
        return tile;
    }

    void fill_edge(int cell) const {
        const int n_cells = a.n_cells - cell;
        for (int row = 0; row < n_rows; row += n_rows / a.mask_rows(n)) {
            uint16_t * edge = s.edge + (size_t) mask_index(row) * TILE_CELLS;
            if (a.mask) {
                memcpy(edge, mask_row(row) + cell, n_cells * sizeof(uint16_t));
            } else {
                std::fill_n(edge, n_cells, (uint16_t) 0);
            }
            std::fill_n(edge + n_cells, TILE_CELLS - n_cells, MASKED);
        }
    }

    // false: no row sees any of the tile's cells
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

    // the next chunk's to those so far
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
            if (a.sinks) {
                const float sink = ((const float *) a.sinks->data)[head_of(row)] * LOG2_E;
                sum += (float) WEIGHT_MAX * exp2f(sink - group.top[c]);
            }
            const bool   seen = group.top[c] != NO_TOP;
            const float  factor = (seen ? 1.0f / sum : 0.0f) + nothing_of(q_row(row), a.dims.dk);
            const size_t to   = ((size_t) seq * a.n_queries + query_of(row)) * a.n_heads + head_of(row);
            write_row(group.out + (size_t) c * a.dims.dv, a.dims.dv, factor, (float *) a.out->data + to * a.dims.dv);
        }
    }

    void compute() const {
        const kv_tile tile = begin();
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
        const kv_tile tile = begin();
        to.clear(a, n_groups);
        attend_chunk(chunk, tile, to);
    }
};

} // namespace

} // namespace pop
