#define FASTLSTM_VEC_BYTES 64
#define STORAGE BFloat16
#define TABLE k_avx512_bf16
#include "cpu/kernels.inc"
