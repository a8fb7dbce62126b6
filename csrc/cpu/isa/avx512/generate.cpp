#define FASTLSTM_VEC_BYTES 64
#define TABLE k_avx512_generate
#include "cpu/generate.inc"
