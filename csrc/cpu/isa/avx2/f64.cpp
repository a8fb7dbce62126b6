#define FASTLSTM_VEC_BYTES 32
#define STORAGE double
#define TABLE k_avx2_f64
#include "cpu/kernels.inc"
