// AMX's tiles: eight registers of 16 rows of 64 bytes, and an instruction that multiplies two of
// them as bfloat16. Builds without AMX emulate them: so the tests run on a processor with AVX2
// everything that runs on one with AMX but these few instructions.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __AMX_BF16__
#include <immintrin.h>
#endif

namespace fastlstm {
namespace {

// The operand of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The rows of A that this thread's tiles are configured for; 0: not configured.
thread_local int tile_rows = 0;

#ifdef __AMX_BF16__

inline void load_config(const TileConfig& config) { _tile_loadconfig(&config); }
inline void release_config() { _tile_release(); }
#define FASTLSTM_TILE_ZERO(c) _tile_zero(c)
#define FASTLSTM_TILE_LOAD(c, p, stride_bytes) _tile_loadd(c, p, stride_bytes)
#define FASTLSTM_TILE_STORE(c, p, stride_bytes) _tile_stored(c, p, stride_bytes)
#define FASTLSTM_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)

#else

struct EmulatedTiles {
  TileConfig config;
  uint32_t words[8][16][16];
};
thread_local EmulatedTiles tiles;

inline void load_config(const TileConfig& config) { tiles.config = config; }
inline void release_config() { tiles.config = TileConfig(); }
inline void tile_zero(int c) { memset(tiles.words[c], 0, sizeof tiles.words[c]); }
inline void tile_load(int c, const void* p, int64_t stride) {
  tile_zero(c);
  for (int r = 0; r < tiles.config.rows[c]; ++r)
    memcpy(tiles.words[c][r], static_cast<const char*>(p) + r * stride, tiles.config.row_bytes[c]);
}
inline void tile_store(int c, void* p, int64_t stride) {
  for (int r = 0; r < tiles.config.rows[c]; ++r)
    memcpy(static_cast<char*>(p) + r * stride, tiles.words[c][r], tiles.config.row_bytes[c]);
}
inline float half_of_word(uint32_t word, bool high) {
  const uint32_t bits = high ? word & 0xffff0000U : word << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline void tile_dot(int c, int a, int b) {
  for (int m = 0; m < tiles.config.rows[c]; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n) {
        float sum;
        memcpy(&sum, &tiles.words[c][m][n], sizeof sum);
        for (int high = 0; high < 2; ++high)
          sum +=
              half_of_word(tiles.words[a][m][k], high) * half_of_word(tiles.words[b][k][n], high);
        memcpy(&tiles.words[c][m][n], &sum, sizeof sum);
      }
}
#define FASTLSTM_TILE_ZERO(c) tile_zero(c)
#define FASTLSTM_TILE_LOAD(c, p, stride_bytes) tile_load(c, p, stride_bytes)
#define FASTLSTM_TILE_STORE(c, p, stride_bytes) tile_store(c, p, stride_bytes)
#define FASTLSTM_TILE_DOT(c, a, b) tile_dot(c, a, b)

#endif

// Tiles 0 to 3 hold sums, 4 and 5 A, 6 and 7 B. Up to 16 rows of A are in tile 4, and its four sums
// side by side; of more, the rows from 16 on are in tile 5, and their sums in 2 and 3. Configuring
// the tiles takes as long as a product of 80 k, so callers change the number of rows rarely.
inline void set_tile_rows(int rows) {
  if (tile_rows == rows) return;
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool lower = tile == 2 || tile == 3 || tile == 5;
    config.row_bytes[tile] = 64;
    config.rows[tile] = uint8_t(tile > 5 ? 16 : rows <= 16 ? rows : lower ? rows - 16 : 16);
  }
  load_config(config);
  tile_rows = rows;
}

// Called at the end of a thread's work: other libraries configure the tiles for themselves, and
// while tiles are in use the operating system saves them at every context switch.
inline void release_tiles() {
  if (tile_rows == 0) return;
  release_config();
  tile_rows = 0;
}

}  // namespace
}  // namespace fastlstm
