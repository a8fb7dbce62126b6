// Matrix products of bfloat16 with AMX's tiles, over packed weights (panels.h).
//
// A step of 32 k multiplies 32 rows of A by a panel of 32 columns, or up to 16 rows by two panels:
// it loads four or five tiles and adds four products to four tiles of sums. The instruction reads
// pairs of bfloat16 in the order in which panels hold them. Loads from L2 keep up with it, so K is
// not cut into chunks, and a small last block of rows takes no longer than an even split would.
#pragma once

#include "amx.h"
#include "panels.h"

namespace fastlstm {
namespace {

constexpr int kTileRows = 32;

// Of a sum over rows: the part of C that is one task's, and how many rows it packs at a time.
constexpr int64_t kTileM = 256, kTileN = 512, kSliceRows = 256;

static_assert(kDeep<BFloat16> == 32 && kPanel<float> == 32,
              "a step multiplies tiles of 32 k and 32 columns");

template <class F>
FASTLSTM_INLINE void for_row_blocks(int64_t rows, F&& f) {
  for (int64_t row = 0; row < rows; row += kTileRows) f(int(min_of(kTileRows, rows - row)), row);
}

// Rows of A: the next row is `stride` elements further on, the next 32 k are `step` elements on.
struct TileRows {
  const BFloat16* first;
  int64_t stride, step;
};

// to = addend + A * B, for `rows` of A. With more than 16 rows B is one panel, b[0], and the rows
// from 16 on are written to to[1]. With fewer, B is one panel or two (b[1] not null), and panel j's
// product is written to to[j].
FASTLSTM_INLINE void multiply_tiles(float* const (&to)[2], int64_t ldc, const TileRows& a,
                                    const BFloat16* const (&b)[2], int64_t depth, int rows,
                                    Addend<float> addend) {
  const bool tall = rows > 16, four = tall || b[1];
  const int64_t row_bytes = a.stride * 2, c_bytes = ldc * 4, panel_bytes = 128;
  const BFloat16* at = a.first;
  set_tile_rows(rows);
  if (addend.rows) {
    const int64_t addend_bytes = addend.stride * 4;
    const float* next = addend.rows + (tall ? 16 * addend.stride : 32);
    FASTLSTM_TILE_LOAD(0, addend.rows, addend_bytes);
    FASTLSTM_TILE_LOAD(1, addend.rows + 16, addend_bytes);
    if (four) {
      FASTLSTM_TILE_LOAD(2, next, addend_bytes);
      FASTLSTM_TILE_LOAD(3, next + 16, addend_bytes);
    }
  } else {
    FASTLSTM_TILE_ZERO(0);
    FASTLSTM_TILE_ZERO(1);
    FASTLSTM_TILE_ZERO(2);
    FASTLSTM_TILE_ZERO(3);
  }
  for (int64_t k = 0; k < depth; k += 32, at += a.step) {
    FASTLSTM_TILE_LOAD(6, b[0] + k * 32, panel_bytes);
    FASTLSTM_TILE_LOAD(4, at, row_bytes);
    FASTLSTM_TILE_LOAD(7, b[0] + k * 32 + 32, panel_bytes);
    FASTLSTM_TILE_DOT(0, 4, 6);
    FASTLSTM_TILE_DOT(1, 4, 7);
    if (tall) {
      FASTLSTM_TILE_LOAD(5, at + 16 * a.stride, row_bytes);
      FASTLSTM_TILE_DOT(2, 5, 6);
      FASTLSTM_TILE_DOT(3, 5, 7);
    } else if (four) {
      FASTLSTM_TILE_LOAD(6, b[1] + k * 32, panel_bytes);
      FASTLSTM_TILE_LOAD(7, b[1] + k * 32 + 32, panel_bytes);
      FASTLSTM_TILE_DOT(2, 4, 6);
      FASTLSTM_TILE_DOT(3, 4, 7);
    }
  }
  FASTLSTM_TILE_STORE(0, to[0], c_bytes);
  FASTLSTM_TILE_STORE(1, to[0] + 16, c_bytes);
  if (!four) return;
  FASTLSTM_TILE_STORE(2, to[1], c_bytes);
  FASTLSTM_TILE_STORE(3, to[1] + 16, c_bytes);
}

// out[g] = A (rows x depth, lda) * panel g, for four panels, panel_stride elements apart.
inline void multiply_gates(float (*out)[kTileRows][kPanel<float>], const BFloat16* a, int64_t lda,
                           const BFloat16* panels, int64_t panel_stride, int64_t depth, int rows) {
  const int gates = rows > 16 ? 1 : 2;  // of one call
  for (int g = 0; g < 4; g += gates)
    multiply_tiles({out[g][0], gates == 1 ? out[g][16] : out[g + 1][0]}, kPanel<float>,
                   {a, lda, 32}, {panels + g * panel_stride, panels + (g + 1) * panel_stride},
                   depth, rows, {});
}

// C (rows x n, ldc) = addend + A (rows x depth, lda) * panels, for panels [0, ceil(n / kPanel)).
// The rows of C and of the addend are padded to whole panels: they hold padded(n) elements.
inline void gemm_rows(float* c, int64_t ldc, const BFloat16* a, int64_t lda, const BFloat16* panels,
                      int64_t rows, int64_t depth, int64_t n, Addend<float> addend) {
  auto addend_at = [&](int64_t row, int64_t p) {
    return addend.rows ? Addend<float>{addend.rows + row * addend.stride + p * 32, addend.stride}
                       : addend;
  };
  const int64_t panel_stride = packed_depth<BFloat16>(depth) * 32, count = panels_of<float>(n);
  // Whole blocks first, so that the tiles' number of rows is set at most twice.
  const int64_t whole = rows / kTileRows * kTileRows, rest = rows - whole;
  for (int64_t p = 0; p < count && whole > 0; ++p)
    for (int64_t row = 0; row < whole; row += kTileRows) {
      float* to = c + row * ldc + p * 32;
      multiply_tiles({to, to + 16 * ldc}, ldc, {a + row * lda, lda, 32},
                     {panels + p * panel_stride, nullptr}, depth, kTileRows, addend_at(row, p));
    }
  const int panels_at_once = rest > 16 ? 1 : 2;
  for (int64_t p = 0; p < count && rest > 0; p += panels_at_once) {
    float* to = c + whole * ldc + p * 32;
    const bool pair = panels_at_once == 2 && p + 1 < count;
    const BFloat16* next = pair ? panels + (p + 1) * panel_stride : nullptr;
    multiply_tiles({to, panels_at_once == 1 ? to + 16 * ldc : to + 32}, ldc,
                   {a + whole * lda, lda, 32}, {panels + p * panel_stride, next}, depth, int(rest),
                   addend_at(whole, p));
  }
}

// Packs elements [0, n) of 32 rows of A, neighbours in K, into their place in a sliver:
// [row of C][k].
inline void pack_sliver(BFloat16* to, const BFloat16* const* rows, int64_t n) {
  for (int64_t first = 0; first < n; first += 16) {
    const int count = int(min_of(16, n - first));
    VecFu block[16];
    for (int k = 0; k < 16; ++k) {
      const BFloat16 *a = rows[2 * k] + first, *b = rows[2 * k + 1] + first;
      BFloat16 part[2][16] = {};
      if (count < 16) {
        memcpy(part[0], a, size_t(count) * sizeof(BFloat16));
        memcpy(part[1], b, size_t(count) * sizeof(BFloat16));
      }
      block[k] = count < 16 ? paired(part[0], part[1]) : paired(a, b);
    }
    transpose(block);
    for (int m = 0; m < count; ++m) __builtin_memcpy(to + (first + m) * 32, &block[m], 64);
  }
}

// C (m x n, ldc, padded to whole tiles) += A^T B over `depth` rows. A is packed in slivers
// [sliver][k / 32][kTileRows][32], B in panels.
inline void gemm_slivers(float* c, int64_t ldc, const BFloat16* slivers, const BFloat16* panels,
                         int64_t m, int64_t n, int64_t depth) {
  const int64_t deep = packed_depth<BFloat16>(depth);
  for (int64_t s = 0; s < ceil_div(m, kTileRows); ++s)
    for (int64_t p = 0; p < panels_of<float>(n); ++p) {
      float* to = c + s * kTileRows * ldc + p * 32;
      multiply_tiles({to, to + 16 * ldc}, ldc, {slivers + s * deep * kTileRows, 32, 32 * kTileRows},
                     {panels + p * deep * 32, nullptr}, depth, kTileRows, {to, ldc});
    }
}

}  // namespace
}  // namespace fastlstm
