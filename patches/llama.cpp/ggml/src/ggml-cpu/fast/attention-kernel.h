// Attention of one tile: pack Q, K and V, then compute scores, softmax and results of six rows. Layouts: attention-tile.h.
//
// If K or V of a cell is NaN or infinite, its score is NaN, and so is the sum of each row that sees the cell. A row that does not see the
// cell gives it the weight 0.
//
// Products that are added use fma explicitly. If the compiler chose, a row's bits could depend on the other rows of its group.

#pragma once

#include "attention-tile.h"
#include "types.h"
#include "vectors.h"

#include <math.h>
#include <string.h>

#include <algorithm>

// The large steps are separate functions, so the compiler allocates registers for one loop at a time.
#if defined(_MSC_VER)
#    define FAST_NOINLINE __declspec(noinline)
#else
#    define FAST_NOINLINE __attribute__((noinline))
#endif

namespace fast {

constexpr int WIDTH         = COLUMNS * LANES; // cells or dims of a register tile
constexpr int SCALE_PAIRS   = SCALE_DIMS / 2;  // pairs of dims that share a scale
constexpr int TILE_VECTORS  = TILE_CELLS / LANES;
constexpr int SCALE_VECTORS = SCALE_DIMS / LANES;

// WEIGHT_MAX * 2^x
static inline floats weight_of(floats x) {
    return exp2_scaled<13, WEIGHT_MAX>(x);
}

// cap * tanh(x). NaN stays NaN: min returns its second operand.
static inline floats soft_cap(floats x, float cap) {
    const floats e = exp2_of(min(splat(60.0f), mul(x, splat(2.0f * LOG2_E))));
    return add(div(splat(-2.0f * cap), add(e, splat(1.0f))), splat(cap));
}

// Load 64 values from dim d on, with zeros after the last dim.
template <ggml_type TYPE> static inline void load_dims(const char * row, int d, int n_dims, floats out[SCALE_VECTORS]) {
    FAST_UNROLL
    for (int i = 0; i < SCALE_VECTORS; i++) {
        out[i] = d + i * LANES < n_dims ? load_row<TYPE>(row, d + i * LANES) : splat(0.0f);
    }
}

// Return x, or NaN if x is infinite.
static inline floats nan_if_infinite(floats x) {
    return fma(x, splat(0.0f), x);
}

static inline floats max_abs(const floats x[SCALE_VECTORS]) {
    floats m = abs(x[0]);
    FAST_UNROLL
    for (int i = 1; i < SCALE_VECTORS; i++) {
        m = max_magnitude(m, abs(x[i]));
    }
    return m;
}

// Round 64 values to 16 bits. narrow() permutes the dims, the same way for Q and K.
static inline void round_dims(const floats x[SCALE_VECTORS], float inverse_scale, ints out[SCALE_VECTORS / 2]) {
    FAST_UNROLL
    for (int i = 0; i < SCALE_VECTORS / 2; i++) {
        out[i] = narrow(round(mul(x[2 * i], splat(inverse_scale))), round(mul(x[2 * i + 1], splat(inverse_scale))));
    }
}

// Pack n rows of a group; the rest of its six rows are zero.
static void pack_q(const float * const * rows, int n, const head_dims & dims, float scale, const row_group & group) {
    for (int c = 0; c < n; c++) {
        for (int d = 0; d < dims.dk; d += LANES) {
            FAST_PREFETCH_L1(rows[c] + d);
        }
    }
    for (int b = 0; b < dims.blocks(); b++) {
        const int n_pairs = std::min(SCALE_PAIRS, dims.k_pairs() - b * SCALE_PAIRS);
        for (int c = 0; c < TILE_ROWS; c++) {
            alignas(64) int16_t pairs[SCALE_DIMS] = {};
            float               max_value         = 0.0f;
            if (c < n) {
                floats x[SCALE_VECTORS];
                ints   rounded[SCALE_VECTORS / 2];
                load_dims<GGML_TYPE_F32>((const char *) rows[c], b * SCALE_DIMS, dims.dk, x);
                max_value = std::max(max_of(max_abs(x)), MIN_SCALE * QK_MAX);
                round_dims(x, QK_MAX / max_value, rounded);
                for (int i = 0; i < SCALE_VECTORS / 2; i++) {
                    store(pairs + i * LANES * 2, rounded[i]);
                }
            }
            group.q_scale[b * TILE_ROWS + c] = max_value * (scale / QK_MAX);
            for (int p = 0; p < n_pairs; p++) {
                memcpy(group.q + ((size_t) (b * SCALE_PAIRS + p) * TILE_ROWS + c) * 2, pairs + p * 2, 2 * sizeof(int16_t));
            }
        }
    }
}

// Return cell i of the tile. Past the end of the cache it is the last cell, which the mask hides.
static inline const char * cell_at(const char * cells, size_t stride, const kv_tile & tile, int i) {
    return cells + std::min(i, tile.n_cells - 1) * stride;
}

template <ggml_type TYPE>
static inline void load_k(const char * row, int d, const head_dims & dims, const kv_tile & tile, floats out[SCALE_VECTORS]) {
    load_dims<TYPE>(row, d, dims.dk, out);
    if (tile.k_centre) {
        FAST_UNROLL
        for (int i = 0; i < SCALE_VECTORS; i++) {
            out[i] = sub(out[i], load(tile.k_centre + d + i * LANES));
        }
    }
}

// Pack LANES cells from cell i on, scale block b.
template <ggml_type TYPE>
static inline void pack_k_cells(const char * k, size_t stride, const head_dims & dims, const kv_tile & tile, int b, int i) {
    alignas(64) float inverse_scale[LANES];
    floats            x[SCALE_VECTORS], maxima[LANES];
    ints              rounded[SCALE_VECTORS / 2], pairs[SCALE_VECTORS / 2][LANES];
    for (int j = 0; j < LANES; j++) {
        load_k<TYPE>(cell_at(k, stride, tile, i + j), b * SCALE_DIMS, dims, tile, x);
        maxima[j] = max_abs(x);
    }
    const floats max_value = max(splat(MIN_SCALE * QK_MAX), max_of_each(maxima));
    store(tile.k_scale + b * TILE_CELLS + i, nan_if_infinite(mul(max_value, splat(1.0f / QK_MAX))));
    store(inverse_scale, div(splat(QK_MAX), max_value));
    for (int j = 0; j < LANES; j++) {
        load_k<TYPE>(cell_at(k, stride, tile, i + j), b * SCALE_DIMS, dims, tile, x);
        round_dims(x, inverse_scale[j], rounded);
        for (int n = 0; n < SCALE_VECTORS / 2; n++) {
            pairs[n][j] = rounded[n];
        }
    }
    const int n_pairs = std::min(SCALE_PAIRS, dims.k_pairs() - b * SCALE_PAIRS);
    int16_t * out     = tile.k + ((size_t) b * SCALE_PAIRS * TILE_CELLS + (size_t) i / WIDTH * n_pairs * WIDTH + i % WIDTH) * 2;
    for (int n = 0; n * LANES < n_pairs; n++) {
        transpose(pairs[n]);
        for (int p = 0; p < LANES; p++) {
            store(out + (size_t) (n * LANES + p) * WIDTH * 2, pairs[n][p]);
        }
    }
}

template <ggml_type TYPE> static void pack_k(const char * k, size_t stride, const head_dims & dims, const kv_tile & tile) {
    for (int b = 0; b < dims.blocks(); b++) {
        for (int i = 0; i < TILE_CELLS; i += LANES) {
            pack_k_cells<TYPE>(k, stride, dims, tile, b, i);
        }
    }
}

// Return the first cell of a pair of V. V's cells have the order of the softmax weights, which narrow() permutes.
static inline int cell_of_pair(int pair) {
    const int lane = pair % LANES / 4, quarter = pair % 4;
    return pair / LANES * 2 * LANES + quarter / 2 * LANES + lane * 4 + quarter % 2 * 2;
}

template <ggml_type TYPE> static void scale_v(const char * v, size_t stride, const head_dims & dims, const kv_tile & tile) {
    for (int i = 0; i < TILE_CELLS; i += LANES) {
        floats maxima[LANES];
        for (int j = 0; j < LANES; j++) {
            const char * row = cell_at(v, stride, tile, i + j);
            maxima[j]        = splat(0.0f);
            for (int d = 0; d < dims.dv; d += LANES) {
                maxima[j] = max_magnitude(maxima[j], abs(load_row<TYPE>(row, d)));
            }
        }
        // Read as an integer, a float's bits approximate its log2, from below by up to 0.0861. Any scale that is large enough works.
        const floats scale = max(splat(MIN_SCALE), mul(max_of_each(maxima), splat(1.0f / V_MAX)));
        const floats log   = fma(bits_as_number(scale), splat(1.0f / (1 << 23)), splat(0.0862f - 127.0f));
        store(tile.v_log2 + i, fma(scale, splat(0.0f), log));
        store(tile.v_inverse + i, exp2_of(sub(splat(0.0f), log)));
    }
}

template <ggml_type TYPE> static void pack_v(const char * v, size_t stride, const head_dims & dims, const kv_tile & tile) {
    scale_v<TYPE>(v, stride, dims, tile);
    for (int pair = 0; pair < TILE_CELLS / 2; pair++) {
        const int    t = cell_of_pair(pair);
        const char * first = cell_at(v, stride, tile, t), * second = cell_at(v, stride, tile, t + 1);
        const floats first_inverse = splat(tile.v_inverse[t]), second_inverse = splat(tile.v_inverse[t + 1]);
        for (int c = 0; c < dims.dv; c += WIDTH) {
            const int width = std::min(WIDTH, dims.dv - c);
            int16_t * out   = tile.v + ((size_t) c * TILE_CELLS / 2 + pair * width) * 2;
            for (int d = 0; d < width; d += LANES) {
                const ints a = round(mul(load_row<TYPE>(first, c + d), first_inverse));
                const ints b = round(mul(load_row<TYPE>(second, c + d), second_inverse));
                store(out + d * 2, interleave(a, b));
            }
        }
    }
}

// Multiply R rows with n_pairs * V consecutive vectors. In pairs, rows are `stride` apart, and a row's pairs `step`.
template <int R, int V>
static inline void multiply(const int16_t * rows, int stride, int step, const int16_t * vectors, int n_pairs, sums out[R][V]) {
    FAST_UNROLL
    for (int c = 0; c < R; c++) {
        FAST_UNROLL
        for (int i = 0; i < V; i++) {
            out[c][i] = zero_sums();
        }
    }
    for (int p = 0; p < n_pairs; p++) {
        ints v[V];
        FAST_UNROLL
        for (int i = 0; i < V; i++) {
            v[i] = load(vectors + (p * V + i) * LANES * 2);
        }
        FAST_UNROLL
        for (int c = 0; c < R; c++) {
            int32_t pair;
            memcpy(&pair, rows + (p * step + c * stride) * 2, sizeof(pair));
            const ints w = splat(pair);
            FAST_UNROLL
            for (int i = 0; i < V; i++) {
                out[c][i] = dot(out[c][i], v[i], w);
            }
        }
    }
}

// Compute the scores of R rows and 64 cells in units of log2. Without a cap they include log2 of the scales of V.
template <int R>
static FAST_NOINLINE void score_tile(const head_dims & dims, const kv_tile & tile, const row_group & group, float out[R][TILE_CELLS]) {
    for (int c = 0; c < R; c++) {
        for (int i = 0; i < TILE_CELLS; i += LANES) {
            store(out[c] + i, add(dims.cap != 0.0f ? splat(0.0f) : load(tile.v_log2 + i), splat(group.offset[c])));
        }
    }
    for (int b = 0; b < dims.blocks(); b++) {
        const int     n_pairs = std::min(SCALE_PAIRS, dims.k_pairs() - b * SCALE_PAIRS);
        const float * q_scale = group.q_scale + b * TILE_ROWS;
        for (int t = 0; t < TILE_CELLS; t += WIDTH) {
            sums            s[R][COLUMNS];
            const int16_t * k = tile.k + ((size_t) b * SCALE_PAIRS * TILE_CELLS + (size_t) t * n_pairs) * 2;
            multiply<R, COLUMNS>(group.q + (size_t) b * SCALE_PAIRS * TILE_ROWS * 2, 1, TILE_ROWS, k, n_pairs, s);
            FAST_UNROLL
            for (int i = 0; i < COLUMNS; i++) {
                const floats k_scale = load(tile.k_scale + b * TILE_CELLS + t + i * LANES);
                FAST_UNROLL
                for (int c = 0; c < R; c++) {
                    float * o = out[c] + t + i * LANES;
                    store(o, fma(mul(to_floats(s[c][i]), k_scale), splat(q_scale[c]), load(o)));
                }
            }
        }
    }
}

// Apply the soft cap and the mask to a row's scores.
static FAST_NOINLINE void cap_and_mask(const head_dims & dims, const kv_tile & tile, const uint16_t * mask, float slope,
                                       float * scores) {
    for (int i = 0; i < TILE_CELLS; i += LANES) {
        floats x = load(scores + i);
        if (dims.cap != 0.0f) {
            x = add(soft_cap(x, dims.cap), load(tile.v_log2 + i));
        }
        if (mask) {
            const floats m = load_halves(mask + i);
            x              = hide(fma(m, splat(slope), x), m);
        }
        store(scores + i, x);
    }
}

// One step of the online softmax: convert scores of R rows to integer weights and update maxima and sums.
// old_factor and new_factor scale the results so far and this tile's results to the new maxima.
template <int R>
static FAST_NOINLINE void softmax_tile(const kv_tile & tile, const row_group & group, const float scores[R][TILE_CELLS],
                                       int16_t weights[R][TILE_CELLS], float old_factor[LANES], float new_factor[LANES]) {
    floats maxima[TILE_ROWS];
    FAST_UNROLL
    for (int c = 0; c < TILE_ROWS; c++) {
        const float * s = scores[std::min(c, R - 1)];
        maxima[c]       = load(s);
        FAST_UNROLL
        for (int i = 1; i < TILE_VECTORS; i++) {
            maxima[c] = max(maxima[c], load(s + i * LANES));
        }
    }
    alignas(64) float row_max[LANES];
    const floats      tile_max = max(max_of_rows(maxima), splat(NO_SCORE)), old = load(group.max_score), next = max(old, tile_max);
    store(group.max_score, next);
    store(row_max, tile_max);
    store(old_factor, exp2_of(sub(old, next)));
    store(new_factor, exp2_of(sub(tile_max, next)));
    FAST_UNROLL
    for (int c = 0; c < R; c++) {
        const floats offset = splat(row_max[c]);
        floats       sum    = splat(0.0f);
        ints         w[TILE_VECTORS];
        FAST_UNROLL
        for (int i = 0; i < TILE_VECTORS; i++) {
            const floats x = weight_of(sub(load(scores[c] + i * LANES), offset));
            sum            = fma(x, load(tile.v_inverse + i * LANES), sum);
            w[i]           = round(x);
        }
        FAST_UNROLL
        for (int i = 0; i < TILE_VECTORS; i += 2) {
            store(weights[c] + i * LANES, narrow(w[i], w[i + 1]));
        }
        float * s = group.sum + c * MAX_LANES;
        store(s, fma(load(s), splat(old_factor[c]), mul(sum, splat(new_factor[c]))));
    }
}

// Add R rows of weights times V vectors of dims to the results.
template <int R, int V>
static FAST_NOINLINE void add_values(const int16_t * v, const int16_t weights[R][TILE_CELLS], const float * old_factor,
                                     const float * new_factor, float * out, int dv) {
    sums s[R][V];
    for (int c = 0; c < R; c++) {
        for (int i = 0; i < V * LANES; i += 16) {
            FAST_PREFETCH_L1(out + (size_t) c * dv + i);
        }
    }
    multiply<R, V>(weights[0], TILE_CELLS / 2, 1, v, TILE_CELLS / 2, s);
    FAST_UNROLL
    for (int c = 0; c < R; c++) {
        FAST_UNROLL
        for (int i = 0; i < V; i++) {
            float * o = out + (size_t) c * dv + i * LANES;
            store(o, fma(to_floats(s[c][i]), splat(new_factor[c]), mul(load(o), splat(old_factor[c]))));
        }
    }
}

template <int R> static void attend_rows(const head_dims & dims, const kv_tile & tile, const row_group & group, bool masked) {
    alignas(64) float   scores[R][TILE_CELLS];
    alignas(64) int16_t weights[R][TILE_CELLS];
    alignas(64) float   old_factor[LANES], new_factor[LANES];
    score_tile<R>(dims, tile, group, scores);
    if (masked || dims.cap != 0.0f) {
        for (int c = 0; c < R; c++) {
            cap_and_mask(dims, tile, masked ? group.mask[c] : nullptr, masked ? group.slope[c] : 0.0f, scores[c]);
        }
    }
    softmax_tile<R>(tile, group, scores, weights, old_factor, new_factor);
    int d = 0;
    for (; d + WIDTH <= dims.dv; d += WIDTH) {
        add_values<R, COLUMNS>(tile.v + (size_t) d * TILE_CELLS, weights, old_factor, new_factor, group.out + d, dims.dv);
    }
    if constexpr (COLUMNS == 4) {
        const int16_t * v = tile.v + (size_t) d * TILE_CELLS;
        switch ((dims.dv - d) / LANES) {
            case 1:  add_values<R, 1>(v, weights, old_factor, new_factor, group.out + d, dims.dv); break;
            case 2:  add_values<R, 2>(v, weights, old_factor, new_factor, group.out + d, dims.dv); break;
            case 3:  add_values<R, 3>(v, weights, old_factor, new_factor, group.out + d, dims.dv); break;
            default: break;
        }
    }
}

// Attend with the first n rows of a group.
static void attend(const head_dims & dims, const kv_tile & tile, const row_group & group, int n, bool masked) {
    switch (n) {
        case 1:  attend_rows<1>(dims, tile, group, masked); break;
        case 2:  attend_rows<2>(dims, tile, group, masked); break;
        case 3:  attend_rows<3>(dims, tile, group, masked); break;
        case 4:  attend_rows<4>(dims, tile, group, masked); break;
        default: attend_rows<TILE_ROWS>(dims, tile, group, masked); break;
    }
}

// Merge the partial results of a later chunk of cells.
static void merge_groups(const head_dims & dims, const row_group & to, const row_group & from) {
    alignas(64) float old_factor[LANES], new_factor[LANES];
    const floats      a = load(to.max_score), b = load(from.max_score), next = max(a, b);
    store(to.max_score, next);
    store(old_factor, exp2_of(sub(a, next)));
    store(new_factor, exp2_of(sub(b, next)));
    for (int c = 0; c < TILE_ROWS; c++) {
        const floats new_scale = splat(new_factor[c]), old_scale = splat(old_factor[c]);
        float *      sum = to.sum + c * MAX_LANES;
        store(sum, fma(load(from.sum + c * MAX_LANES), new_scale, mul(load(sum), old_scale)));
        for (int d = 0; d < dims.dv; d += LANES) {
            float * out = to.out + (size_t) c * dims.dv + d;
            store(out, fma(load(from.out + (size_t) c * dims.dv + d), new_scale, mul(load(out), old_scale)));
        }
    }
}

static float sum_of_row(const float * sums) {
    return sum_of(load(sums));
}

// Return NaN if a value is NaN or infinite, else 0. Rounding to integers would hide it.
static float nan_guard(const float * x, int n) {
    floats sum = splat(0.0f);
    for (int d = 0; d < n; d += LANES) {
        sum = fma(load(x + d), splat(0.0f), sum);
    }
    return sum_of(sum);
}

// Write a row of results. Adding 0 turns -0 into +0: a masked tile may change the sign of a zero.
static void write_row(const float * out, int dv, float factor, float * to) {
    for (int d = 0; d < dv; d += LANES) {
        store(to + d, add(mul(load(out + d), splat(factor)), splat(0.0f)));
    }
}

} // namespace fast
