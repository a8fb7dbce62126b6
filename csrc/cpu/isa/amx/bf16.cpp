#define FASTLSTM_VEC_BYTES 64
#define FASTLSTM_BF16_PAIRS 1
#define FASTLSTM_AMX 1
#define STORAGE BFloat16
#define TABLE k_amx_bf16
#include "cpu/kernels.inc"
