#include "draw.h"

#include <algorithm>
#include <cmath>

#include "../draw.h"

namespace fastlstm {
namespace {

// Sets the logits of tokens to -inf that are outside the top_k likeliest, or outside the nucleus
// top_p of these. Of two equal logits, the one with the lower index counts as likelier. The largest
// logit is 0.
void filter(const Generate& g, double* logits, int64_t* order) {
  const int64_t n = g.vocabulary;
  auto likelier = [logits](int64_t a, int64_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  };
  for (int64_t j = 0; j < n; ++j) order[j] = j;
  int64_t kept = n;
  if (g.top_k > 0 && g.top_k < n) {
    kept = g.top_k;
    std::nth_element(order, order + kept, order + n, likelier);
  }
  if (g.top_p < 1) {
    std::sort(order, order + kept, likelier);
    double total = 0, before = 0;
    for (int64_t j = 0; j < kept; ++j) total += std::exp(logits[order[j]]);
    // A token stays while the likelier ones have less than top_p: the first always stays.
    int64_t nucleus = 0;
    while (nucleus < kept && (nucleus == 0 || before < g.top_p * total))
      before += std::exp(logits[order[nucleus++]]);
    kept = nucleus;
  }
  for (int64_t j = kept; j < n; ++j) logits[order[j]] = -INFINITY;
}

// The noise of a token with these upper bits.
double noise(const DrawRow& row, uint32_t bits) {
  const uint64_t k = uint64_t(bits) << 20 | draw_low_bits(row);
  return -std::log(-std::log((double(k) + 0.5) * 0x1p-52));
}

// A bound of that without logarithms: -log(u) > 1 - u, which is at least 2^-(n + 1) where its first
// n bits are 0.
double most_noise(uint32_t bits) {
  const uint64_t rest = uint64_t(~bits) << 32 | 1 << 11;  // of 1 - u; n is 52 at most
  return (__builtin_clzll(rest) + 1) * 0.69314718056;     // log(2), rounded up
}

}  // namespace

int64_t draw(const Generate& g, double* logits, int64_t* order, int64_t step, int64_t b) {
  const int64_t n = g.vocabulary;
  const int64_t best = std::max_element(logits, logits + n) - logits;
  if (g.temperature == 0) return best;
  const double largest = logits[best];
  // Sorting needs a strict order, which NaN breaks.
  bool ordered = true;
  for (int64_t j = 0; j < n; ++j) {
    logits[j] = (logits[j] - largest) / g.temperature;
    ordered &= logits[j] <= 0;
  }
  if (!ordered) return best;
  if (g.top_k > 0 || g.top_p < 1) filter(g, logits, order);
  const DrawRow row = draw_row(draw_keys(*g.seed), g.offset + step, b);
  // Few tokens can exceed what the likeliest one has: only those need their noise.
  int64_t token = best;
  double highest = noise(row, draw_upper_bits(row, best));
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t bits = draw_upper_bits(row, j);
    if (j == best || logits[j] + most_noise(bits) < highest) continue;
    const double score = logits[j] + noise(row, bits);
    if (score > highest || (score == highest && j < token)) highest = score, token = j;
  }
  return token;
}

}  // namespace fastlstm
