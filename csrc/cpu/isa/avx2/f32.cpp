#define FASTLSTM_VEC_BYTES 32
#define STORAGE float
#define TABLE k_avx2_f32
#include "cpu/kernels.inc"
