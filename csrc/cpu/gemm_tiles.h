// Products of bfloat16 with AMX's tiles over packed weights (gemm.h has their layout).
//
// A step of 32 k multiplies 32 rows of A by a panel of 32 columns, or up to 16 rows by two panels:
// four products of tiles on four sums, for four or five tiles loaded. Panels of pairs are what the
// instruction reads. Loads from the second-level cache keep up, so K is not cut into chunks, and a
// thin last block of rows takes no longer than an even split would.
#pragma once

#include "amx.h"

namespace fastlstm {
namespace {

constexpr int kTileRows = 32;

// A task's part of a sum over rows, and how many rows it packs at a time.
constexpr int64_t kTileM = 256, kTileN = 512, kSliceRows = 256;

static_assert(kDeep<BFloat16> == 32 && kPanel<float> == 32, "a step of tiles");

template <class F>
FASTLSTM_INLINE void for_row_blocks(int64_t rows, F&& f) {
  for (int64_t row = 0; row < rows; row += kTileRows) f(int(min_of(kTileRows, rows - row)), row);
}

// Rows of A: `stride` elements from one to the next, `step` elements from 32 k to the next.
struct TileRows {
  const BFloat16* first;
  int64_t stride, step;
};

// `to` = start + A * B, for `rows` of A. More than 16 rows: one panel b[0], and to[1] is where the
// rows from 16 on go. Fewer: one panel or two, each with its `to`.
FASTLSTM_INLINE void multiply_tiles(float* const (&to)[2], int64_t ldc, const TileRows& a,
                                    const BFloat16* const (&b)[2], int64_t depth, int rows,
                                    Start<float> start) {
  const bool tall = rows > 16, four = tall || b[1];
  const int64_t row_bytes = a.stride * 2, c_bytes = ldc * 4, panel_bytes = 128;
  const BFloat16* at = a.first;
  set_tile_rows(rows);
  if (start.rows) {
    const float* next = start.rows + (tall ? 16 * start.stride : 32);
    FASTLSTM_TILE_LOAD(0, start.rows, start.stride * 4);
    FASTLSTM_TILE_LOAD(1, start.rows + 16, start.stride * 4);
    if (four) {
      FASTLSTM_TILE_LOAD(2, next, start.stride * 4);
      FASTLSTM_TILE_LOAD(3, next + 16, start.stride * 4);
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

// out[g] = A (rows x depth, lda) * panel g, for four neighbouring panels, `apart` elements apart.
inline void multiply_gates(float (*out)[kTileRows][kPanel<float>], const BFloat16* a, int64_t lda,
                           const BFloat16* panels, int64_t apart, int64_t depth, int rows) {
  const int each = rows > 16 ? 1 : 2;
  for (int g = 0; g < 4; g += each)
    multiply_tiles({out[g][0], each == 1 ? out[g][16] : out[g + 1][0]}, kPanel<float>, {a, lda, 32},
                   {panels + g * apart, panels + (g + 1) * apart}, depth, rows, {});
}

// C (rows x n, ldc) = start + A (rows x depth, lda) * panels, for panels [0, ceil(n / kPanel)). C
// is padded to whole panels: its row holds padded(n) elements, and so does one of `start`.
inline void gemm_rows(float* c, int64_t ldc, const BFloat16* a, int64_t lda, const BFloat16* panels,
                      int64_t rows, int64_t depth, int64_t n, Start<float> start) {
  auto from = [&](int64_t row, int64_t p) {
    return start.rows ? Start<float>{start.rows + row * start.stride + p * 32, start.stride}
                      : start;
  };
  const int64_t apart = packed_depth<BFloat16>(depth) * 32, count = panels_of<float>(n);
  // Whole blocks first: the rows of the tiles are set twice at the most.
  const int64_t whole = rows / kTileRows * kTileRows, rest = rows - whole;
  for (int64_t p = 0; p < count && whole > 0; ++p)
    for (int64_t row = 0; row < whole; row += kTileRows) {
      float* to = c + row * ldc + p * 32;
      multiply_tiles({to, to + 16 * ldc}, ldc, {a + row * lda, lda, 32},
                     {panels + p * apart, nullptr}, depth, kTileRows, from(row, p));
    }
  const int each = rest > 16 ? 1 : 2;
  for (int64_t p = 0; p < count && rest > 0; p += each) {
    float* to = c + whole * ldc + p * 32;
    const BFloat16* next = each == 2 && p + 1 < count ? panels + (p + 1) * apart : nullptr;
    multiply_tiles({to, each == 1 ? to + 16 * ldc : to + 32}, ldc, {a + whole * lda, lda, 32},
                   {panels + p * apart, next}, depth, int(rest), from(whole, p));
  }
}

// Elements [0, n) of 32 rows of A, neighbours in K, to a sliver's place for them: [row of C][k].
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

// C (m x n, ldc, padded to whole tiles) += A^T B over `depth` rows: A packed in slivers
// [sliver][k / 32][kTileRows][32], B in panels. The sum over this depth is added to C's, so a long
// sum is one of partial sums.
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
