#define FASTLSTM_VEC_BYTES 16
#define STORAGE Half
#define TABLE k_baseline_f16
#include "cpu/kernels.inc"
