#define FASTLSTM_VEC_BYTES 64
#define STORAGE float
#define TABLE k_avx512_f32
#include "cpu/kernels.inc"
