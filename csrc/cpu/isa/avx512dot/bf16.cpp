#define FASTLSTM_VEC_BYTES 64
#define FASTLSTM_BF16_PAIRS 1
#define STORAGE BFloat16
#define TABLE k_avx512dot_bf16
#include "cpu/kernels.inc"
