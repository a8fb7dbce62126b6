#define FASTLSTM_VEC_BYTES 64
#define STORAGE Half
#define TABLE k_avx512_f16
#include "cpu/kernels.inc"
