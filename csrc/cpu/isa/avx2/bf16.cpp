#define FASTLSTM_VEC_BYTES 32
#define STORAGE BFloat16
#define TABLE k_avx2_bf16
#include "cpu/kernels.inc"
