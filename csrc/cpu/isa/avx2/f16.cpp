#define FASTLSTM_VEC_BYTES 32
#define STORAGE Half
#define TABLE k_avx2_f16
#include "cpu/kernels.inc"
