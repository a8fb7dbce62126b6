#define FASTLSTM_VEC_BYTES 16
#define TABLE k_baseline_generate
#include "cpu/generate.inc"
