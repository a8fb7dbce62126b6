// A cell's CellRules from the problem's options: which units a step drops or keeps.
#pragma once

#include <cmath>

#include "dropout.h"
#include "lstm.h"

namespace fastlstm {

// A number for every unit of a row: one of two, as the seed draws, or without a seed one for all.
template <class T>
struct DrawnFactor {
  const int64_t* seed;
  int layer, direction;
  Drop what;
  uint64_t threshold;
  T kept, dropped;

  FASTLSTM_INLINE uint32_t row(int64_t t, int64_t b) const {
    return seed ? dropout_row(dropout_key(*seed, layer, direction, what), t, b) : 0;
  }
  FASTLSTM_INLINE T at(uint32_t row, int64_t unit) const {
    return seed == nullptr || dropout_keeps(row, unit, threshold) ? kept : dropped;
  }
};

// Those of one row (t, b).
struct RuleRow {
  uint32_t update, new_c, new_h;
};

// The rules of all cells of one direction of a layer. Zoneout without a seed is its expectation,
// as in evaluation.
template <class T>
struct DrawnRules {
  DrawnFactor<T> update, new_c, new_h;
  T clip;
  bool plain;  // nothing to do: use PlainCell

  FASTLSTM_INLINE RuleRow row(int64_t t, int64_t b) const {
    return {update.row(t, b), new_c.row(t, b), new_h.row(t, b)};
  }
  FASTLSTM_INLINE CellRules<T> at(const RuleRow& row, int64_t unit) const {
    return {update.at(row.update, unit), clip, new_c.at(row.new_c, unit),
            new_h.at(row.new_h, unit)};
  }
};

FASTLSTM_INLINE bool plain(const CellOptions& o) {
  return o.recurrent_dropout <= 0 && o.zoneout_h <= 0 && o.zoneout_c <= 0 && o.clip <= 0;
}

// `kept` where the seed drops nothing, `expected` for all without one.
template <class T>
FASTLSTM_INLINE DrawnFactor<T> drawn_factor(const Problem& p, int layer, int direction, Drop what,
                                            double probability, double kept, double expected) {
  const bool draws = p.seed != nullptr && probability > 0;
  return {draws ? p.seed : nullptr,   layer, direction, what, uint64_t(probability * 4294967296.0),
          T(draws ? kept : expected), T(0)};
}

template <class T>
FASTLSTM_INLINE DrawnRules<T> drawn_rules(const Problem& p, int layer, int direction) {
  const CellOptions& o = p.cell;
  const double rest = 1 - o.recurrent_dropout;
  return {drawn_factor<T>(p, layer, direction, Drop::update, o.recurrent_dropout,
                          rest > 0 ? 1 / rest : 0, 1),
          drawn_factor<T>(p, layer, direction, Drop::zone_c, o.zoneout_c, 1, 1 - o.zoneout_c),
          drawn_factor<T>(p, layer, direction, Drop::zone_h, o.zoneout_h, 1, 1 - o.zoneout_h),
          o.clip > 0 ? T(o.clip) : T(INFINITY), plain(o)};
}

}  // namespace fastlstm
