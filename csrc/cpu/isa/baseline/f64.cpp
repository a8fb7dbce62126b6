#define FASTLSTM_VEC_BYTES 16
#define STORAGE double
#define TABLE k_baseline_f64
#include "cpu/kernels.inc"
