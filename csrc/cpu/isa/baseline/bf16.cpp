#define FASTLSTM_VEC_BYTES 16
#define STORAGE BFloat16
#define TABLE k_baseline_bf16
#include "cpu/kernels.inc"
