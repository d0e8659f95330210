// Attention of one tile: what it takes to pack Q, K and V, and six rows at a time to attend to 64 cells.
//
// See attention-tile.h.
// Products that are added are written as fma, so that no compiler's choice makes the bits of a row depend on the rows beside it.

#pragma once

#include "attention-tile.h"
#include "types.h"
#include "vectors.h"

#include <math.h>
#include <string.h>

#include <algorithm>

// each its own function, so that registers are shared out for its loop alone
#if defined(_MSC_VER)
#    define POP_NOINLINE __declspec(noinline)
#else
#    define POP_NOINLINE __attribute__((noinline))
#endif

namespace pop {

constexpr int WIDTH = COLUMNS * LANES;     // cells or dims of a register tile
constexpr int PAIRS = SCALE_DIMS / 2;      // of dims that share a scale
constexpr int VECS  = TILE_CELLS / LANES;
constexpr int PARTS = SCALE_DIMS / LANES;

// WEIGHT_MAX * 2^x
static inline floats weight_of(floats x) {
    return exp2_scaled<13, WEIGHT_MAX>(x);
}

// cap * tanh(x)
static inline floats soft_cap(floats x, float cap) {
    const floats e = exp2_of(min(mul(x, splat(2.0f * LOG2_E)), splat(60.0f)));
    return add(div(splat(-2.0f * cap), add(e, splat(1.0f))), splat(cap));
}

// 64 values from dim d on, zeros behind the last
template <ggml_type TYPE> static inline void load_dims(const char * row, int d, int n_dims, floats out[PARTS]) {
    POP_UNROLL
    for (int i = 0; i < PARTS; i++) {
        out[i] = d + i * LANES < n_dims ? load_row<TYPE>(row, d + i * LANES) : splat(0.0f);
    }
}

static inline floats largest(const floats x[PARTS]) {
    floats m = abs(x[0]);
    POP_UNROLL
    for (int i = 1; i < PARTS; i++) {
        m = max(m, abs(x[i]));
    }
    return m;
}

// 64 values as pairs of integers, in an order that Q and K share
static inline void round_dims(const floats x[PARTS], float by, ints out[PARTS / 2]) {
    POP_UNROLL
    for (int i = 0; i < PARTS / 2; i++) {
        out[i] = narrow(round(mul(x[2 * i], splat(by))), round(mul(x[2 * i + 1], splat(by))));
    }
}

// n rows, the others of the six are zero
static void pack_q(const float * const * rows, int n, const head_dims & dims, float scale, const row_group & group) {
    for (int c = 0; c < n; c++) {
        for (int d = 0; d < dims.dk; d += LANES) {
            _mm_prefetch((const char *) (rows[c] + d), _MM_HINT_T0);
        }
    }
    for (int b = 0; b < dims.blocks(); b++) {
        const int n_pairs = std::min(PAIRS, dims.k_pairs() - b * PAIRS);
        for (int c = 0; c < TILE_ROWS; c++) {
            alignas(64) int16_t pairs[SCALE_DIMS] = {};
            float               top               = 0.0f;
            if (c < n) {
                floats x[PARTS];
                ints   rounded[PARTS / 2];
                load_dims<GGML_TYPE_F32>((const char *) rows[c], b * SCALE_DIMS, dims.dk, x);
                top = std::max(max_of(largest(x)), MIN_SCALE * QK_MAX);
                round_dims(x, QK_MAX / top, rounded);
                for (int i = 0; i < PARTS / 2; i++) {
                    store(pairs + i * LANES * 2, rounded[i]);
                }
            }
            group.q_scale[b * TILE_ROWS + c] = top * (scale / QK_MAX);
            for (int p = 0; p < n_pairs; p++) {
                memcpy(group.q + ((size_t) (b * PAIRS + p) * TILE_ROWS + c) * 2, pairs + p * 2, 2 * sizeof(int16_t));
            }
        }
    }
}

// a cell of the tile, the last one in place of those that do not exist
static inline const char * cell_at(const char * cells, size_t stride, const kv_tile & tile, int i) {
    return cells + std::min(i, tile.n_cells - 1) * stride;
}

template <ggml_type TYPE>
static inline void load_k(const char * row, int d, const head_dims & dims, const kv_tile & tile, floats out[PARTS]) {
    load_dims<TYPE>(row, d, dims.dk, out);
    if (tile.k_centre) {
        POP_UNROLL
        for (int i = 0; i < PARTS; i++) {
            out[i] = sub(out[i], load(tile.k_centre + d + i * LANES));
        }
    }
}

// as many cells as a vector has lanes, from the i-th on
template <ggml_type TYPE>
static inline void pack_k_cells(const char * k, size_t stride, const head_dims & dims, const kv_tile & tile, int b, int i) {
    alignas(64) float by[LANES];
    floats            x[PARTS], tops[LANES];
    ints              rounded[PARTS / 2], pairs[PARTS / 2][LANES];
    for (int j = 0; j < LANES; j++) {
        load_k<TYPE>(cell_at(k, stride, tile, i + j), b * SCALE_DIMS, dims, tile, x);
        tops[j] = largest(x);
    }
    const floats top = max(max_of_each(tops), splat(MIN_SCALE * QK_MAX));
    store(tile.k_scale + b * TILE_CELLS + i, mul(top, splat(1.0f / QK_MAX)));
    store(by, div(splat(QK_MAX), top));
    for (int j = 0; j < LANES; j++) {
        load_k<TYPE>(cell_at(k, stride, tile, i + j), b * SCALE_DIMS, dims, tile, x);
        round_dims(x, by[j], rounded);
        for (int n = 0; n < PARTS / 2; n++) {
            pairs[n][j] = rounded[n];
        }
    }
    const int n_pairs = std::min(PAIRS, dims.k_pairs() - b * PAIRS);
    int16_t * out     = tile.k + ((size_t) b * PAIRS * TILE_CELLS + (size_t) i / WIDTH * n_pairs * WIDTH + i % WIDTH) * 2;
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

// the first cell of a pair of weights, as narrow() orders them
static inline int cell_of_pair(int pair) {
    const int lane = pair % LANES / 4, quarter = pair % 4;
    return pair / LANES * 2 * LANES + quarter / 2 * LANES + lane * 4 + quarter % 2 * 2;
}

template <ggml_type TYPE> static void scale_v(const char * v, size_t stride, const head_dims & dims, const kv_tile & tile) {
    for (int i = 0; i < TILE_CELLS; i += LANES) {
        floats tops[LANES];
        for (int j = 0; j < LANES; j++) {
            const char * row = cell_at(v, stride, tile, i + j);
            tops[j]          = splat(0.0f);
            for (int d = 0; d < dims.dv; d += LANES) {
                tops[j] = max(tops[j], abs(load_row<TYPE>(row, d)));
            }
        }
        // a float's bits are nearly its logarithm, too small by up to 0.0861: any scale that is large enough serves
        const floats top = max(mul(max_of_each(tops), splat(1.0f / V_MAX)), splat(MIN_SCALE));
        const floats log = fma(bits_as_number(top), splat(1.0f / (1 << 23)), splat(0.0862f - 127.0f));
        store(tile.v_log2 + i, log);
        store(tile.v_inverse + i, exp2_of(sub(splat(0.0f), log)));
    }
}

template <ggml_type TYPE> static void pack_v(const char * v, size_t stride, const head_dims & dims, const kv_tile & tile) {
    scale_v<TYPE>(v, stride, dims, tile);
    for (int pair = 0; pair < TILE_CELLS / 2; pair++) {
        const int    t = cell_of_pair(pair);
        const char * first = cell_at(v, stride, tile, t), * second = cell_at(v, stride, tile, t + 1);
        const floats by_first = splat(tile.v_inverse[t]), by_second = splat(tile.v_inverse[t + 1]);
        for (int c = 0; c < dims.dv; c += WIDTH) {
            const int width = std::min(WIDTH, dims.dv - c);
            int16_t * out   = tile.v + ((size_t) c * TILE_CELLS / 2 + pair * width) * 2;
            for (int d = 0; d < width; d += LANES) {
                const ints a = round(mul(load_row<TYPE>(first, c + d), by_first));
                const ints b = round(mul(load_row<TYPE>(second, c + d), by_second));
                store(out + d * 2, interleave(a, b));
            }
        }
    }
}

// R rows times n_pairs of V vectors, which lie one behind the other; the rows' pairs are `stride` apart, those of a row `step`
template <int R, int V>
static inline void multiply(const int16_t * rows, int stride, int step, const int16_t * vectors, int n_pairs, sums out[R][V]) {
    POP_UNROLL
    for (int c = 0; c < R; c++) {
        POP_UNROLL
        for (int i = 0; i < V; i++) {
            out[c][i] = no_sums();
        }
    }
    for (int p = 0; p < n_pairs; p++) {
        ints v[V];
        POP_UNROLL
        for (int i = 0; i < V; i++) {
            v[i] = load(vectors + (p * V + i) * LANES * 2);
        }
        POP_UNROLL
        for (int c = 0; c < R; c++) {
            int32_t pair;
            memcpy(&pair, rows + (p * step + c * stride) * 2, sizeof(pair));
            const ints w = splat(pair);
            POP_UNROLL
            for (int i = 0; i < V; i++) {
                out[c][i] = dot(out[c][i], v[i], w);
            }
        }
    }
}

// Scores of R rows and 64 cells in units of log2, plus the logarithms of the scales of V
template <int R>
static POP_NOINLINE void score(const head_dims & dims, const kv_tile & tile, const row_group & group, float out[R][TILE_CELLS]) {
    for (int c = 0; c < R; c++) {
        for (int i = 0; i < TILE_CELLS; i += LANES) {
            store(out[c] + i, add(dims.cap != 0.0f ? splat(0.0f) : load(tile.v_log2 + i), splat(group.offset[c])));
        }
    }
    for (int b = 0; b < dims.blocks(); b++) {
        const int     n_pairs = std::min(PAIRS, dims.k_pairs() - b * PAIRS);
        const float * q_scale = group.q_scale + b * TILE_ROWS;
        for (int t = 0; t < TILE_CELLS; t += WIDTH) {
            sums            s[R][COLUMNS];
            const int16_t * k = tile.k + ((size_t) b * PAIRS * TILE_CELLS + (size_t) t * n_pairs) * 2;
            multiply<R, COLUMNS>(group.q + (size_t) b * PAIRS * TILE_ROWS * 2, 1, TILE_ROWS, k, n_pairs, s);
            POP_UNROLL
            for (int i = 0; i < COLUMNS; i++) {
                const floats k_scale = load(tile.k_scale + b * TILE_CELLS + t + i * LANES);
                POP_UNROLL
                for (int c = 0; c < R; c++) {
                    float * o = out[c] + t + i * LANES;
                    store(o, fma(mul(to_floats(s[c][i]), k_scale), splat(q_scale[c]), load(o)));
                }
            }
        }
    }
}

// cap and mask of a row's scores
static POP_NOINLINE void change_scores(const head_dims & dims, const kv_tile & tile, const uint16_t * mask, float slope,
                                       float * scores) {
    for (int i = 0; i < TILE_CELLS; i += LANES) {
        floats x = load(scores + i);
        if (dims.cap != 0.0f) {
            x = add(soft_cap(x, dims.cap), load(tile.v_log2 + i));
        }
        if (mask) {
            x = fma(load_halves(mask + i), splat(slope), x);
        }
        store(scores + i, x);
    }
}

// Weights of R rows as integers. carry: what becomes of the sums so far; gain: the value of the new ones.
template <int R>
static POP_NOINLINE void weigh(const kv_tile & tile, const row_group & group, const float scores[R][TILE_CELLS],
                               int16_t weights[R][TILE_CELLS], float carry[LANES], float gain[LANES]) {
    floats tops[TILE_ROWS];
    POP_UNROLL
    for (int c = 0; c < TILE_ROWS; c++) {
        const float * s = scores[std::min(c, R - 1)];
        tops[c]         = load(s);
        POP_UNROLL
        for (int i = 1; i < VECS; i++) {
            tops[c] = max(tops[c], load(s + i * LANES));
        }
    }
    alignas(64) float base[LANES];
    const floats      top = max(max_of_rows(tops), splat(NO_TOP)), old = load(group.top), next = max(old, top);
    store(group.top, next);
    store(base, top);
    store(carry, exp2_of(sub(old, next)));
    store(gain, exp2_of(sub(top, next)));
    POP_UNROLL
    for (int c = 0; c < R; c++) {
        const floats less = splat(base[c]);
        floats       sum  = splat(0.0f);
        ints         w[VECS];
        POP_UNROLL
        for (int i = 0; i < VECS; i++) {
            const floats x = weight_of(sub(load(scores[c] + i * LANES), less));
            sum            = fma(x, load(tile.v_inverse + i * LANES), sum);
            w[i]           = round(x);
        }
        POP_UNROLL
        for (int i = 0; i < VECS; i += 2) {
            store(weights[c] + i * LANES, narrow(w[i], w[i + 1]));
        }
        float * s = group.sum + c * MAX_LANES;
        store(s, fma(load(s), splat(carry[c]), mul(sum, splat(gain[c]))));
    }
}

// R rows of weights times V vectors of dims
template <int R, int V>
static POP_NOINLINE void add_values(const int16_t * v, const int16_t weights[R][TILE_CELLS], const float * carry, const float * gain,
                                    float * out, int dv) {
    sums s[R][V];
    for (int c = 0; c < R; c++) {
        for (int i = 0; i < V * LANES; i += 16) {
            _mm_prefetch((const char *) (out + (size_t) c * dv + i), _MM_HINT_T0);
        }
    }
    multiply<R, V>(weights[0], TILE_CELLS / 2, 1, v, TILE_CELLS / 2, s);
    POP_UNROLL
    for (int c = 0; c < R; c++) {
        POP_UNROLL
        for (int i = 0; i < V; i++) {
            float * o = out + (size_t) c * dv + i * LANES;
            store(o, fma(to_floats(s[c][i]), splat(gain[c]), mul(load(o), splat(carry[c]))));
        }
    }
}

template <int R> static void attend_rows(const head_dims & dims, const kv_tile & tile, const row_group & group, bool masked) {
    alignas(64) float   scores[R][TILE_CELLS];
    alignas(64) int16_t weights[R][TILE_CELLS];
    alignas(64) float   carry[LANES], gain[LANES];
    score<R>(dims, tile, group, scores);
    if (masked || dims.cap != 0.0f) {
        for (int c = 0; c < R; c++) {
            change_scores(dims, tile, masked ? group.mask[c] : nullptr, masked ? group.slope[c] : 0.0f, scores[c]);
        }
    }
    weigh<R>(tile, group, scores, weights, carry, gain);
    int d = 0;
    for (; d + WIDTH <= dims.dv; d += WIDTH) {
        add_values<R, COLUMNS>(tile.v + (size_t) d * TILE_CELLS, weights, carry, gain, group.out + d, dims.dv);
    }
    if constexpr (COLUMNS == 4) {
        const int16_t * v = tile.v + (size_t) d * TILE_CELLS;
        switch ((dims.dv - d) / LANES) {
            case 1:  add_values<R, 1>(v, weights, carry, gain, group.out + d, dims.dv); break;
            case 2:  add_values<R, 2>(v, weights, carry, gain, group.out + d, dims.dv); break;
            case 3:  add_values<R, 3>(v, weights, carry, gain, group.out + d, dims.dv); break;
            default: break;
        }
    }
}

// the first n rows of a group
static void attend(const head_dims & dims, const kv_tile & tile, const row_group & group, int n, bool masked) {
    switch (n) {
        case 1:  attend_rows<1>(dims, tile, group, masked); break;
        case 2:  attend_rows<2>(dims, tile, group, masked); break;
        case 3:  attend_rows<3>(dims, tile, group, masked); break;
        case 4:  attend_rows<4>(dims, tile, group, masked); break;
        default: attend_rows<TILE_ROWS>(dims, tile, group, masked); break;
    }
}

// adds the sums of rows over further cells
static void merge_groups(const head_dims & dims, const row_group & to, const row_group & from) {
    alignas(64) float keep[LANES], gain[LANES];
    const floats      a = load(to.top), b = load(from.top), next = max(a, b);
    store(to.top, next);
    store(keep, exp2_of(sub(a, next)));
    store(gain, exp2_of(sub(b, next)));
    for (int c = 0; c < TILE_ROWS; c++) {
        const floats by = splat(gain[c]), kept = splat(keep[c]);
        float *      sum = to.sum + c * MAX_LANES;
        store(sum, fma(load(from.sum + c * MAX_LANES), by, mul(load(sum), kept)));
        for (int d = 0; d < dims.dv; d += LANES) {
            float * out = to.out + (size_t) c * dims.dv + d;
            store(out, fma(load(from.out + (size_t) c * dims.dv + d), by, mul(load(out), kept)));
        }
    }
}

static float sum_of_row(const float * sums) {
    return sum_of(load(sums));
}

// 0, or NaN where a value is none or infinite: the integers would hide it
static float nothing_of(const float * x, int n) {
    floats sum = splat(0.0f);
    for (int d = 0; d < n; d += LANES) {
        sum = fma(load(x + d), splat(0.0f), sum);
    }
    return sum_of(sum);
}

// A tile of masked cells may change the sign of a zero, so there is only one zero.
static void write_row(const float * out, int dv, float factor, float * to) {
    for (int d = 0; d < dv; d += LANES) {
        store(to + d, add(mul(load(out + d), splat(factor)), splat(0.0f)));
    }
}

} // namespace pop
