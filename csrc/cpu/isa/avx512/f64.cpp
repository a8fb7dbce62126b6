#define FASTLSTM_VEC_BYTES 64
#define STORAGE double
#define TABLE k_avx512_f64
#include "cpu/kernels.inc"
