// Products with NEON on ARM64: matrix instructions (i8mm) or dot products (dotprod). Never timed on hardware (docs/notebook/archive/kernels-arm.md).
//
// Activations are rounded to 8 bits with one scale per 32 values along K. One block of a column tile:
//
//   codes, dotprod   [c0: k0-k3 ][c1: k0-k3 ][c2: k0-k3 ][c3: k0-k3 ]   8 steps of 4 values
//   codes, i8mm      [c0: k0-k7 ][c1: k0-k7 ] [c2: k0-k7][c3: k0-k7 ]   4 steps of 8 values
//   scales           [c0][c1][c2][c3]                                   f32
//   sums             [c0][c1][c2][c3]  per half                         f32 scale * sum of the codes, if the type has mins
//
// The panel's layout is in unpack-arm.h. A register tile is 8 rows (a group) x 4 columns: 8 float sums and 8 integer sums. With dotprod, a
// sum's lanes are four rows of a column. With i8mm, they are two rows of two columns. A row's float sums follow K in the same order for any
// number of columns, and the two instruction sets give the same bits.

#include "gemm.h"

#if defined(__ARM_FEATURE_DOTPROD) && defined(__aarch64__)

#include "quantise-arm.h"
#include "unpack-arm.h"

namespace fast {
namespace {

// 8 float sums and 8 integer sums leave 16 of 32 registers for codes, scales and columns.
constexpr int COLS = 4;

// Blocks of a panel that are unpacked at once: up to 24 KiB, so that a panel mostly stays in the L1 cache.
constexpr int STEP_BLOCKS = 32;

// With fewer columns, gemv-arm.cpp computes the product. The limit is that of gemm-256.cpp.
constexpr int MIN_COLS = 5;

// Offsets of the parts of a tile's block, in bytes.
template <typename P> struct tile_of {
    static constexpr int SCALE  = 32 * COLS;
    static constexpr int SUM    = SCALE + COLS * (int) sizeof(float);
    static constexpr int LENGTH = SUM + (P::MINS ? P::HALVES : 0) * COLS * (int) sizeof(float);
};

template <typename P> void pack_32(const float * x, int c, uint8_t * tile) {
    using T = tile_of<P>;
    constexpr int step = P::I8MM ? 8 : 4; // values along K that are stored together

    int8_t codes[32];
    const quantised q = quantise(x, codes);
    FAST_UNROLL
    for (int k = 0; k < 32; k += step) {
        memcpy(tile + k * COLS + c * step, codes + k, step);
    }
    float * scale = (float *) (tile + T::SCALE) + c;
    *scale = q.scale;
    if constexpr (P::MINS) {
        float * sum = (float *) (tile + T::SUM) + c;
        for (int half = 0; half < P::HALVES; half++) {
            sum[half * COLS] = q.scale * (float) (P::HALVES == 1 ? q.sums[0] + q.sums[1] : q.sums[half]);
        }
    }
}

// The last column replaces missing ones.
template <typename P> void pack(const float * const * cols, int n, int n_blocks, uint8_t * tile) {
    for (int b = 0; b < n_blocks; b++, tile += tile_of<P>::LENGTH) {
        for (int c = 0; c < COLS; c++) {
            pack_32<P>(cols[std::min(c, n - 1)] + 32 * b, c, tile);
        }
    }
}

// The sums of a register tile with C columns.
template <bool I8MM, int C> struct shape {
    static constexpr int N_COLS = I8MM ? C / 2 : C;          // columns, or pairs of columns
    static constexpr int N_ROWS = I8MM ? GROUP_ROWS / 2 : 2; // vectors of four rows, or pairs of rows
};

template <int LANE> FAST_INLINE void add_column(int32x4_t (&sum)[2], const int8x16_t (&rows)[2], int8x16_t cols) {
    sum[0] = vdotq_laneq_s32(sum[0], rows[0], cols, LANE);
    sum[1] = vdotq_laneq_s32(sum[1], rows[1], cols, LANE);
}

// Add the products of one step along K.
template <bool I8MM, int C, typename S = shape<I8MM, C>>
FAST_INLINE void add_step(const int8_t * group, const int8_t * tile, int32x4_t (&sum)[S::N_COLS][S::N_ROWS]) {
    int8x16_t rows[S::N_ROWS];
    FAST_UNROLL
    for (int r = 0; r < S::N_ROWS; r++) {
        rows[r] = vld1q_s8(group + 16 * r);
    }
    if constexpr (I8MM) {
        FAST_UNROLL
        for (int c = 0; c < S::N_COLS; c++) {
            const int8x16_t cols = vld1q_s8(tile + 16 * c);
            FAST_UNROLL
            for (int r = 0; r < S::N_ROWS; r++) {
                sum[c][r] = vmmlaq_s32(sum[c][r], rows[r], cols);
            }
        }
    } else {
        const int8x16_t cols = vld1q_s8(tile);
        add_column<0>(sum[0], rows, cols);
        if constexpr (C > 1) { add_column<1>(sum[1], rows, cols); }
        if constexpr (C > 2) { add_column<2>(sum[2], rows, cols); }
        if constexpr (C > 3) { add_column<3>(sum[3], rows, cols); }
    }
}

// Load a value of each of a group's rows, in the order of the sums' lanes.
template <bool I8MM, int N> FAST_INLINE void load_rows(const float * values, float32x4_t (&to)[N]) {
    const float32x4_t low = vld1q_f32(values), high = vld1q_f32(values + 4);
    if constexpr (I8MM) {
        to[0] = vzip1q_f32(low, low);
        to[1] = vzip2q_f32(low, low);
        to[2] = vzip1q_f32(high, high);
        to[3] = vzip2q_f32(high, high);
    } else {
        to[0] = low;
        to[1] = high;
    }
}

// Load the value of column or pair c, in the order of the sums' lanes.
template <bool I8MM> FAST_INLINE float32x4_t load_column(const float * values, int c) {
    if constexpr (I8MM) {
        const float32x2_t pair = vld1_f32(values + 2 * c);
        return vcombine_f32(pair, pair);
    } else {
        return vld1q_dup_f32(values + c);
    }
}

// Convert between sums and columns of eight rows in memory.
template <bool I8MM, int C, typename S = shape<I8MM, C>>
FAST_INLINE void load_sums(const float * const * from, float32x4_t (&total)[S::N_COLS][S::N_ROWS]) {
    FAST_UNROLL
    for (int c = 0; c < C; c += I8MM ? 2 : 1) {
        FAST_UNROLL
        for (int half = 0; half < 2; half++) {
            const float32x4_t first = vld1q_f32(from[c] + 4 * half);
            if constexpr (I8MM) {
                const float32x4_t second = vld1q_f32(from[c + 1] + 4 * half);
                total[c / 2][2 * half]     = vzip1q_f32(first, second);
                total[c / 2][2 * half + 1] = vzip2q_f32(first, second);
            } else {
                total[c][half] = first;
            }
        }
    }
}

template <bool I8MM, int C, typename S = shape<I8MM, C>>
FAST_INLINE void store_sums(const float32x4_t (&total)[S::N_COLS][S::N_ROWS], float * const * to) {
    FAST_UNROLL
    for (int c = 0; c < C; c += I8MM ? 2 : 1) {
        FAST_UNROLL
        for (int half = 0; half < 2; half++) {
            if constexpr (I8MM) {
                const float32x4_t a = total[c / 2][2 * half], b = total[c / 2][2 * half + 1];
                vst1q_f32(to[c] + 4 * half, vuzp1q_f32(a, b));
                vst1q_f32(to[c + 1] + 4 * half, vuzp2q_f32(a, b));
            } else {
                vst1q_f32(to[c] + 4 * half, total[c][half]);
            }
        }
    }
}

// Multiply C columns of a tile with a group. Sums over earlier blocks are in the result and are added to.
template <typename P, int C>
void multiply_tile(const uint8_t * group, const uint8_t * tile, int n_blocks, bool first, float * const * to) {
    using S = shape<P::I8MM, C>;
    constexpr int steps = (P::I8MM ? 4 : 8) / P::HALVES, step_rows = 16 * S::N_ROWS, step_cols = P::I8MM ? 32 : 16;

    float32x4_t total[S::N_COLS][S::N_ROWS];
    if (first) {
        FAST_UNROLL
        for (int c = 0; c < S::N_COLS; c++) {
            FAST_UNROLL
            for (int r = 0; r < S::N_ROWS; r++) {
                total[c][r] = vdupq_n_f32(0.0f);
            }
        }
    } else {
        load_sums<P::I8MM, C>(to, total);
    }
    for (int b = 0; b < n_blocks; b++, group += P::BYTES, tile += tile_of<P>::LENGTH) {
        FAST_UNROLL
        for (int half = 0; half < P::HALVES; half++) {
            const float * scales = (const float *) (group + P::CODES) + half * GROUP_ROWS;
            int32x4_t   sum[S::N_COLS][S::N_ROWS];
            float32x4_t rows[S::N_ROWS];
            FAST_UNROLL
            for (int c = 0; c < S::N_COLS; c++) {
                FAST_UNROLL
                for (int r = 0; r < S::N_ROWS; r++) {
                    sum[c][r] = vdupq_n_s32(0);
                }
            }
            FAST_UNROLL
            for (int k = half * steps; k < (half + 1) * steps; k++) {
                add_step<P::I8MM, C>((const int8_t *) group + k * step_rows, (const int8_t *) tile + k * step_cols, sum);
            }
            load_rows<P::I8MM>(scales, rows);
            FAST_UNROLL
            for (int c = 0; c < S::N_COLS; c++) {
                const float32x4_t scale = load_column<P::I8MM>((const float *) (tile + tile_of<P>::SCALE), c);
                FAST_UNROLL
                for (int r = 0; r < S::N_ROWS; r++) {
                    total[c][r] = vfmaq_f32(total[c][r], vcvtq_f32_s32(sum[c][r]), vmulq_f32(scale, rows[r]));
                }
            }
            if constexpr (P::MINS) {
                load_rows<P::I8MM>(scales + P::HALVES * GROUP_ROWS, rows);
                FAST_UNROLL
                for (int c = 0; c < S::N_COLS; c++) {
                    const float32x4_t s = load_column<P::I8MM>((const float *) (tile + tile_of<P>::SUM) + half * COLS, c);
                    FAST_UNROLL
                    for (int r = 0; r < S::N_ROWS; r++) {
                        total[c][r] = vfmaq_f32(total[c][r], s, rows[r]);
                    }
                }
            }
        }
    }
    store_sums<P::I8MM, C>(total, to);
}

// Multiply with a group of n_rows rows. `to` has COLS elements, of which n_cols are columns of the result.
template <typename P>
void multiply_group(const uint8_t * group, const uint8_t * tile, int n_blocks, bool first, int n_rows, int n_cols, float * const * to) {
    float   rows[COLS][GROUP_ROWS] = {};
    float * cols[COLS];
    for (int c = 0; c < COLS; c++) {
        const bool is_whole = n_rows == GROUP_ROWS && c < n_cols;
        cols[c] = is_whole ? to[c] : rows[c];
        if (!is_whole && !first && c < n_cols) {
            std::copy_n(to[c], n_rows, rows[c]);
        }
    }
    switch (n_cols) {
        case 1:  multiply_tile<P, P::I8MM ? 2 : 1>(group, tile, n_blocks, first, cols); break;
        case 2:  multiply_tile<P, 2>(group, tile, n_blocks, first, cols); break;
        case 3:  multiply_tile<P, P::I8MM ? 4 : 3>(group, tile, n_blocks, first, cols); break;
        default: multiply_tile<P, 4>(group, tile, n_blocks, first, cols);
    }
    for (int c = 0; c < n_cols; c++) {
        if (cols[c] == rows[c]) {
            std::copy_n(rows[c], n_rows, to[c]);
        }
    }
}

template <int TYPE, typename P> void multiply(const gemm_share & s) {
    constexpr size_t group_bytes = (size_t) STEP_BLOCKS * P::BYTES;

    for (int b = 0; b < s.n_blocks; b += STEP_BLOCKS) {
        const int n = std::min(STEP_BLOCKS, s.n_blocks - b);
        unpack<TYPE, P>(s.weights, s.stride, s.n_rows, b, n, s.scratch, group_bytes);

        const uint8_t * tile = s.tiles + (size_t) b * tile_of<P>::LENGTH;
        for (int c = 0; c < s.n_cols; c += COLS, tile += s.tile_stride) {
            const int n_cols = std::min(COLS, s.n_cols - c);
            for (int row = 0; row < s.n_rows; row += GROUP_ROWS) {
                float * to[COLS] = {};
                for (int i = 0; i < n_cols; i++) {
                    to[i] = s.out[c + i] + s.row + row;
                }
                const uint8_t * group = s.scratch + row / GROUP_ROWS * group_bytes;
                multiply_group<P>(group, tile, n, b == 0, std::min(GROUP_ROWS, s.n_rows - row), n_cols, to);
            }
        }
    }
}

template <bool I8MM, int TYPE> const gemm * kernels_of() {
    using T = type_of<TYPE>;
    using P = panel_of<I8MM, T::fmt.mins, T::fmt.halves>;
    static constexpr gemm kernels = {
        ROWS, COLS, MIN_COLS, tile_of<P>::LENGTH, (size_t) GROUPS * STEP_BLOCKS * P::BYTES, pack<P>, multiply<TYPE, P>,
    };
    return &kernels;
}

template <bool I8MM> const gemm * kernels_for(int type) {
    switch (type) {
#define FAST_CASE(TYPE) case TYPE: return kernels_of<I8MM, TYPE>();
        FAST_FOR_EACH_TYPE(FAST_CASE)
#undef FAST_CASE
        default: return nullptr;
    }
}

} // namespace

const gemm * gemm_i8mm([[maybe_unused]] int type) {
#ifdef __ARM_FEATURE_MATMUL_INT8
    return kernels_for<true>(type);
#else
    return nullptr;
#endif
}

const gemm * gemm_dotprod(int type) {
    return kernels_for<false>(type);
}

} // namespace fast

#else

const fast::gemm * fast::gemm_i8mm(int) {
    return nullptr;
}

const fast::gemm * fast::gemm_dotprod(int) {
    return nullptr;
}

#endif
