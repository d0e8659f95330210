// Data layouts of attention: a tile of cells, a group of rows, and the ranges of their integers.
//
// Q, K, V and the softmax weights of a tile are 16-bit integers with scales, so both products are sums of integers:
//   Q  one scale per row and 64 dims               K  one scale per cell and 64 dims
//   V  one scale per cell, over all dims           weights  one scale per row and tile
// A cell's integer weight is exp(score) times the scale of its V. So a cell with a tiny V (an attention sink) takes no bits from the others.
// Large values in K of the first cells are a bias of the model. They are subtracted, which changes all scores of a row by the same amount.
//
// A tile is 64 cells of a K/V head. A group is six rows: queries of any query heads that share the K/V head.
//
//                      64 cells                                  dv dims
//              +----+----+----+----+                      +----+----+----+----+
//      K tile  |    |    |    |    | dk dims     V tile   |    |    |    |    | 64 cells
//              +----+----+----+----+                      +----+----+----+----+
//              WIDTH cells each                            WIDTH dims each
//   six  +--+  +----+----+----+----+  softmax   +-------+ +----+----+----+----+
//   rows | Q|  | scores, f32       | -------->  |weights| | out += weights x V|
//        +--+  +----+----+----+----+            +-------+ +----+----+----+----+
//         dk                                     64 cells
//
// WIDTH (attention-kernel.h) is the register tile's width: 64 with AVX-512, 16 with 256-bit vectors.
// The multiply-add instructions (vpdpwssd, vpmaddwd) take pairs of adjacent 16-bit integers, so pairs are the innermost axis:
//
//   K, one of dk/64 scale blocks, one column of WIDTH cells:    V, one column of WIDTH dims:
//     dims 0,1:  [c0d0 c0d1][c1d0 c1d1] ... WIDTH cells           cells 0,1:  [c0d0 c1d0][c0d1 c1d1] ... WIDTH dims
//     dims 2,3:  [c0d2 c0d3][c1d2 c1d3] ...                       next pair:  ...                  (see cell_of_pair)
//
//   Q: dims 0,1 of rows 0 to 5:  [r0d0 r0d1][r1d0 r1d1] ... [r5d0 r5d1], then dims 2,3, ...

#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fast {

constexpr int TILE_CELLS = 64; // the cells of one V sum; with more, V_MAX and WEIGHT_MAX would have to shrink
constexpr int TILE_ROWS  = 6;  // rows that fit the registers next to COLUMNS vectors (see vectors-*.h)
constexpr int SCALE_DIMS = 64; // the dims of one QK sum; with more, QK_MAX would have to shrink
constexpr int MAX_LANES  = 16; // floats of the widest vector

// The largest integers for which sums of 64 products stay below 2^31: 64 * 5792^2 = 2.147e9, 64 * 4095 * 8191 = 2.147e9.
constexpr float QK_MAX     = 5792.0f;
constexpr float V_MAX      = 4095.0f;
constexpr int   WEIGHT_MAX = 8191;

constexpr float LOG2_E    = 1.44269504f;
constexpr float NO_SCORE  = -1e30f; // maximum score of a row that has seen no cell; finite, so differences are not NaN
constexpr float MIN_SCALE = 1e-12f; // scale of an all-zero block, which avoids a division by zero

struct head_dims {
    int   dk, dv; // multiples of 16
    float cap;    // soft cap of the logits, times log2(e); 0: none

    int k_pairs() const { return (dk + 31) / 32 * 16; }
    int blocks() const { return (dk + SCALE_DIMS - 1) / SCALE_DIMS; }
};

struct kv_tile {
    float *   k_centre;  // [blocks * 64], the bias that is subtracted from K; null: none
    int16_t * k;         // [blocks][cells / WIDTH][pairs of dims][WIDTH][2]
    float *   k_scale;   // [blocks][cells]
    int16_t * v;         // [dims / WIDTH][pairs of cells][WIDTH][2]
    float *   v_log2;    // [cells], log2 of the scale of V
    float *   v_inverse; // [cells], 1 / scale of V
    int       n_cells;   // up to 64; fewer at the end of the cache
};

struct row_group {
    int16_t * q;         // [pairs of dims][rows][2]
    float *   q_scale;   // [blocks][rows], including the scale of the scores
    float *   offset;    // [rows], added to all scores of a row, in units of log2 or of the cap
    float *   max_score; // [16], the maximum over all tiles so far
    float *   sum;       // [rows][16], partial sums of the weights
    float *   out;       // [rows][dv]

    const uint16_t * mask[TILE_ROWS];  // [64] each, also for cells past the end of the cache
    float            slope[TILE_ROWS]; // factor of the mask, times log2(e)
};

enum mask_state { MASK_NONE, MASK_SOME, MASK_ALL };

} // namespace fast
