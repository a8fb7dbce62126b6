#define FASTLSTM_VEC_BYTES 32
#define TABLE k_avx2_generate
#include "cpu/generate.inc"
