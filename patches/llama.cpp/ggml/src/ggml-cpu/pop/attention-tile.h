// Shared by the driver and the kernels of attention: a tile of cells, a group of rows, and the ranges of their integers.
//
// Q, K, V and the weights of a tile are 16-bit integers with scales, so that both products are sums of integers:
//   Q  a scale for each row and 64 dims            K  a scale for each cell and 64 dims
//   V  a scale for each cell, over all dims        weights  a scale for each row and tile
// The weight of a cell is exp(score) times the scale of its V. So a cell with a tiny V (an attention sink) takes no bits from others.
// K is taken less what is large in the first cells, which is a bias of the model: all scores of a row change by the same.

#pragma once

#include <stddef.h>
#include <stdint.h>

namespace pop {

constexpr int TILE_CELLS = 64;
constexpr int TILE_ROWS  = 6;
constexpr int SCALE_DIMS = 64;
constexpr int MAX_LANES  = 16; // of a vector

// the sums of 64 products stay below 2^31
constexpr float QK_MAX     = 5792.0f;
constexpr float V_MAX      = 4095.0f;
constexpr int   WEIGHT_MAX = 8191; // below 2^13

constexpr float LOG2_E    = 1.44269504f;
constexpr float NO_TOP    = -1e30f; // the maximum of a row that has seen no cell: finite, so that differences are
constexpr float MIN_SCALE = 1e-12f; // of a block of zeros

struct head_dims {
    int   dk, dv; // multiples of 16
    float cap;    // of the logits, times log2(e); 0: none

    int k_pairs() const { return (dk + 31) / 32 * 16; }
    int blocks() const { return (dk + SCALE_DIMS - 1) / SCALE_DIMS; }
};

// 64 cells of a K/V head
struct kv_tile {
    float *   k_centre;  // [blocks * 64], what is subtracted from K; null: nothing
    int16_t * k;         // [blocks][cells / width][pairs of dims][width][2], in the kernel's order
    float *   k_scale;   // [blocks][cells]
    int16_t * v;         // [dims / width][pairs of cells][width][2], in the kernel's order
    float *   v_log2;    // [cells], of the scale of V
    float *   v_inverse; // [cells]
    int       n_cells;   // that exist
};

// Up to six rows, of any query heads that share the K/V head
struct row_group {
    int16_t * q;       // [pairs of dims][rows][2]
    float *   q_scale; // [blocks][rows], times the scale of the scores
    float *   offset;  // [rows], of all scores of a row, in units of log2 or of the cap
    float *   top;     // [16], the maximum so far
    float *   sum;     // [rows][16], partial sums of the weights
    float *   out;     // [rows][dv]

    const uint16_t * mask[TILE_ROWS];  // of the tile's cells, also of those that do not exist
    float            slope[TILE_ROWS]; // of the mask, times log2(e)
};

enum mask_state { MASK_NONE, MASK_SOME, MASK_ALL };

} // namespace pop
