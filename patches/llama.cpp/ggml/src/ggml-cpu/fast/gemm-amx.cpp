// Products by AMX: weights and activations as bf16, sums in f32 over all of K.
//
// bf16's 8-bit mantissa has a quarter of the rounding error of 8-bit activations with one scale per 32 values. Without scales, no work is
// left between two tile products, so the tiles are four times as fast as AVX-512 VNNI.
//
// One block (32 values along K) of a column tile, and of the weight tile of 16 rows; both are 16 x 64 bytes of bf16:
//
//   [c0:  k0 k1 ... k31]          k0,k1:    [r0: k0 k1  ][r1: k0 k1  ] ... [r15: k0 k1  ]
//   [c1:  k0 k1 ... k31]          k2,k3:    [r0: k2 k3  ][r1: k2 k3  ] ... [r15: k2 k3  ]
//   ...                           ...
//   [c15: k0 k1 ... k31]          k30,k31:  [r0: k30 k31][r1: k30 k31] ... [r15: k30 k31]
//
// A panel is 32 rows, thus two weight tiles per block. A register tile is 32 rows x 32 columns in the eight tile registers:
//
//                                 rows 0-15    rows 16-31
//                                  (tmm6)        (tmm7)       weights
//     columns 0-15   (tmm4)         tmm0          tmm1        f32 sums
//     columns 16-31  (tmm5)         tmm2          tmm3

#include "gemm.h"

#if defined(__AMXTILE__) && !defined(__AMX_TILE__) // older versions of Clang
#    define __AMX_TILE__
#endif

#if defined(__AMX_TILE__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__linux__) && defined(__x86_64__)

#include "unpack-512.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

// The wheels' variant for these processors is compiled without -mamx-bf16. Every processor with AMX has it.
#define FAST_AMX __attribute__((target("amx-tile,amx-bf16")))

namespace fast {

constexpr int COLS = 16;        // columns of a tile
constexpr int TILE = COLS * 64; // bytes of a block

// Measured together (docs/notebook/kernels-speed.md, "Packed once"). With 8 panels the column tiles are read half as often as with 4 panels
// and steps of 64 blocks, which was slower. 12 or 16 panels and steps of 16, 24, 32 or 96 blocks gained nothing.
constexpr int SHARE_PANELS = 8;
constexpr int STEP_BLOCKS  = 48;

constexpr int UNPACK_BLOCKS = 8; // 8 KiB of codes: they stay in the L1 cache between unpack() and expand()
constexpr int PACK_BLOCKS   = 8; // 8 KiB of a column tile: it stays in the L1 cache until all 16 columns are packed

// With fewer columns the next kernels are faster: 44.6 ns for 24 columns by AVX-512 VNNI, 43.7 ns by AMX, 33.2 and 42.8 ns for 12
// (docs/notebook/kernels-experts-and-decoding.md). BF16 has no such kernels, and upstream's are slower from 9 columns on.
constexpr int MIN_COLS      = 24;
constexpr int MIN_COLS_BF16 = 9;

static void pack(const float * const * cols, int n, int n_blocks, uint8_t * tile) {
    for (int first = 0; first < n_blocks; first += PACK_BLOCKS) {
        const int end = std::min(first + PACK_BLOCKS, n_blocks);
        for (int c = 0; c < COLS; c++) {
            for (int b = first; b < end; b++) {
                __m512i x = _mm512_setzero_si512();
                if (c < n) {
                    x = (__m512i) _mm512_cvtne2ps_pbh(_mm512_loadu_ps(cols[c] + 32 * b + 16), _mm512_loadu_ps(cols[c] + 32 * b));
                }
                _mm512_store_si512(tile + (size_t) b * TILE + c * 64, x);
            }
        }
    }
}

// Round two f32 of each of 16 rows to pairs of bf16.
static inline __m512i pairs_of(__m512 first, __m512 second) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low  = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(first), half), 16);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(second), half);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, high);
}

// Convert n blocks of a panel's codes and scales to weight tiles: per block one of the first 16 rows and one of the last 16.
template <int TYPE> static void expand(const uint8_t * panel, int n, uint8_t * out) {
    constexpr format f = type_of<TYPE>::fmt;
    constexpr int parts = f.halves ? 2 : 1;
    const __m512i byte = _mm512_set1_epi32(255);
    for (int b = 0; b < n; b++, panel += panel_block(f)) {
        const float * sets = (const float *) (panel + PANEL_CODES);
        for (int r = 0; r < 2; r++, out += TILE) {
            FAST_UNROLL
            for (int g = 0; g < 8; g++) {
                const int h = f.halves ? g / 4 : 0;
                const __m512 scale = _mm512_load_ps(sets + h * PANEL_ROWS + r * 16);
                const __m512 min = f.mins ? _mm512_load_ps(sets + (parts + h) * PANEL_ROWS + r * 16)
                                          : _mm512_mul_ps(scale, _mm512_set1_ps((float) -f.bias));
                const __m512i q = _mm512_load_si512(panel + g * PANEL_ROWS * 4 + r * 64);
                const auto value = [&](__m512i code) { return _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), scale, min); };
                _mm512_store_si512(out + g * 128,
                    pairs_of(value(_mm512_and_si512(q, byte)), value(_mm512_and_si512(_mm512_srli_epi32(q, 8), byte))));
                _mm512_store_si512(out + g * 128 + 64,
                    pairs_of(value(_mm512_and_si512(_mm512_srli_epi32(q, 16), byte)), value(_mm512_srli_epi32(q, 24))));
            }
        }
    }
}

// Convert n blocks of up to 32 rows of weights to weight tiles.
template <int TYPE>
static void unpack_values(const char * weights, size_t stride, int n_rows, int block, int n, uint8_t * codes, uint8_t * out) {
    if constexpr (TYPE != GGML_TYPE_BF16) {
        unpack<TYPE>(weights, stride, n_rows, block, n, codes);
        expand<TYPE>(codes, n, out);
        return;
    }
    for (int r = 0; r < n_rows; r += 16) {
        for (int b = 0; b < n; b++) {
            __m512i v[16];
            for (int j = 0; j < 16; j++) {
                v[j] = _mm512_loadu_si512(weights + std::min(r + j, n_rows - 1) * stride + (size_t) (block + b) * 64);
            }
            transpose_16(v);
            for (int j = 0; j < 16; j++) {
                _mm512_store_si512(out + (2 * b + r / 16) * TILE + j * 64, v[j]);
            }
        }
    }
}

// The place of a panel's results.
struct results {
    const gemm_share & share;
    size_t             column_stride; // bytes from column to column; 0: not constant
    int                first_row;     // within the share

    float * at(int col, int half) const { return share.out[col] + share.row + first_row + 16 * half; }

    // Return whether tile registers can be loaded from and stored to the result directly.
    bool is_full_tile(int n_cols) const { return column_stride && n_cols % COLS == 0 && share.n_rows - first_row >= PANEL_ROWS; }

    __mmask16 rows(int half) const {
        const int n = share.n_rows - first_row - 16 * half;
        return (__mmask16) (n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0);
    }
};

// A buffer for 16 columns times 16 rows of sums at the edges of the result.
struct tile_sums {
    alignas(64) float values[COLS][16];

    void read(const results & r, int col, int half) {
        for (int c = 0; c < COLS && col + c < r.share.n_cols; c++) {
            _mm512_store_ps(values[c], _mm512_maskz_loadu_ps(r.rows(half), r.at(col + c, half)));
        }
    }

    void write(const results & r, int col, int half) const {
        for (int c = 0; c < COLS && col + c < r.share.n_cols; c++) {
            _mm512_mask_storeu_ps(r.at(col + c, half), r.rows(half), _mm512_load_ps(values[c]));
        }
    }
};

// Multiply one or two tiles of columns, `next_tile` bytes apart, with 32 rows. Sums over earlier blocks are in the result and are added to.
template <bool TWO>
FAST_AMX static void multiply_tiles(const uint8_t * pairs, const uint8_t * tile, size_t next_tile, int n, bool first, const results & r,
        int col) {
    const bool whole = r.is_full_tile(std::min(r.share.n_cols - col, (TWO ? 2 : 1) * COLS));
    tile_sums sums[4];
    float * at[4];
    for (int i = 0; i < (TWO ? 4 : 2); i++) {
        at[i] = whole ? r.at(col + i / 2 * COLS, i % 2) : sums[i].values[0];
        if (!whole && !first) {
            sums[i].read(r, col + i / 2 * COLS, i % 2);
        }
    }
    const size_t stride = whole ? r.column_stride : sizeof(sums[0].values[0]);
    std::atomic_signal_fence(std::memory_order_seq_cst); // GCC's builtins do not declare that tile loads read memory
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, at[0], stride);
        _tile_loadd(1, at[1], stride);
        if (TWO) {
            _tile_loadd(2, at[2], stride);
            _tile_loadd(3, at[3], stride);
        }
    }
    for (int b = 0; b < n; b++, pairs += 2 * TILE, tile += TILE) {
        _tile_loadd(4, tile, 64);
        _tile_loadd(6, pairs, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, pairs + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO) {
            _tile_loadd(5, tile + next_tile, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, at[0], stride);
    _tile_stored(1, at[1], stride);
    if (TWO) {
        _tile_stored(2, at[2], stride);
        _tile_stored(3, at[3], stride);
    }
    for (int i = 0; !whole && i < (TWO ? 4 : 2); i++) {
        sums[i].write(r, col + i / 2 * COLS, i % 2);
    }
}

// Return the bytes from each column of the result to the next, or 0 if they are not constant.
static size_t common_column_stride(const gemm_share & s) {
    const ptrdiff_t d = s.n_cols > 1 ? s.out[1] - s.out[0] : 0;
    for (int c = 1; c + 1 < s.n_cols; c++) {
        if (s.out[c + 1] - s.out[c] != d) {
            return 0;
        }
    }
    return d > 0 ? d * sizeof(float) : 0;
}

struct alignas(64) tile_config {
    uint8_t  palette, start_row, zero[14];
    uint16_t row_bytes[16];
    uint8_t  n_rows[16];
};

template <int TYPE> FAST_AMX static void multiply(const gemm_share & s) {
    static const tile_config whole = { 1, 0, {}, { 64, 64, 64, 64, 64, 64, 64, 64 }, { 16, 16, 16, 16, 16, 16, 16, 16 } };
    _tile_loadconfig(&whole);

    constexpr int panel_bytes = STEP_BLOCKS * 2 * TILE;
    uint8_t * codes = s.scratch + (size_t) SHARE_PANELS * panel_bytes;
    const size_t column_stride = common_column_stride(s);
    for (int b = 0; b < s.n_blocks; b += STEP_BLOCKS) {
        const int n = std::min(STEP_BLOCKS, s.n_blocks - b);
        for (int r = 0; r < s.n_rows; r += PANEL_ROWS) {
            for (int i = 0; i < n; i += UNPACK_BLOCKS) {
                const int n_rows = std::min(PANEL_ROWS, s.n_rows - r);
                unpack_values<TYPE>(s.weights + r * s.stride, s.stride, n_rows, b + i, std::min(UNPACK_BLOCKS, n - i), codes,
                    s.scratch + r / PANEL_ROWS * panel_bytes + i * 2 * TILE);
            }
        }
        for (int c = 0; c < s.n_cols; c += 2 * COLS) {
            const uint8_t * tile = s.tiles + c / COLS * s.tile_stride + (size_t) b * TILE;
            const auto run = c + COLS < s.n_cols ? multiply_tiles<true> : multiply_tiles<false>;
            for (int r = 0; r < s.n_rows; r += PANEL_ROWS) {
                run(s.scratch + r / PANEL_ROWS * panel_bytes, tile, s.tile_stride, n, b == 0, { s, column_stride, r }, c);
            }
        }
    }
    _tile_release();
}

template <int TYPE> static const gemm * kernel() {
    constexpr size_t scratch = (size_t) UNPACK_BLOCKS * panel_block(type_of<TYPE>::fmt) + STEP_BLOCKS * SHARE_PANELS * 2 * TILE;
    constexpr int min_cols = TYPE == GGML_TYPE_BF16 ? MIN_COLS_BF16 : MIN_COLS;
    static const gemm g = { SHARE_PANELS * PANEL_ROWS, COLS, min_cols, TILE, scratch, pack, multiply<TYPE> };
    return &g;
}

// Linux grants the tile registers to a process on request.
static bool request_tiles() {
    const long request = 0x1023, tiles = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool may = syscall(SYS_arch_prctl, request, tiles) == 0;
    return may;
}

const gemm * gemm_amx(int type) {
    if (!request_tiles()) {
        return nullptr;
    }
    switch (type) {
#define FAST_CASE(TYPE) case TYPE: return kernel<TYPE>();
        FAST_FOR_EACH_TYPE(FAST_CASE)
        FAST_CASE(GGML_TYPE_BF16)
#undef FAST_CASE
    }
    return nullptr;
}

} // namespace fast

#else

const fast::gemm * fast::gemm_amx(int) {
    return nullptr;
}

#endif
