#define FASTLSTM_VEC_BYTES 16
#define STORAGE float
#define TABLE k_baseline_f32
#include "cpu/kernels.inc"
