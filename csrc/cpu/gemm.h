// The matrix products of the CPU kernels. There are two implementations: gemm_registers.h computes
// a tile of C in vector registers, gemm_tiles.h in AMX's tile registers. A build has one of them.
//
// Both offer
//   gemm_rows()       C = addend + A * panels: products with weights,
//   multiply_gates()  the same for the four gates of one block of units,
//   gemm_slivers()    C += A^T * B: sums over rows, of A packed in slivers by pack_sliver(),
//   for_row_blocks()  blocks of at most kTileRows rows,
// and the sizes kTileRows, kTileM, kTileN and kSliceRows.
#pragma once

#if FASTLSTM_AMX
#include "gemm_tiles.h"
#else
#include "gemm_registers.h"
#endif
