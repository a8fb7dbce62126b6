// The CellRules of a unit from the problem's options: recurrent dropout and zoneout draw for every
// row and unit whether the unit is kept or dropped.
#pragma once

#include <cmath>

#include "dropout.h"
#include "lstm.h"

namespace fastlstm {

// A factor for every unit of a row. With a seed, random bits choose `kept` or `dropped` for each
// unit; without one, every unit has `kept`.
template <class T>
struct DrawnFactor {
  const int64_t* seed;
  int layer, direction;
  Drop stream;
  uint64_t threshold;
  T kept, dropped;

  FASTLSTM_INLINE uint32_t row(int64_t t, int64_t b) const {
    return seed ? dropout_row(dropout_key(*seed, layer, direction, stream), t, b) : 0;
  }
  FASTLSTM_INLINE T at(uint32_t row, int64_t unit) const {
    return seed == nullptr || dropout_keeps(row, unit, threshold) ? kept : dropped;
  }
};

// The keys of a row (t, b), one for each factor: what dropout_keeps() takes.
struct RuleRow {
  uint32_t update, new_c, new_h;
};

// The rules of all units and rows of a pseudo-layer. Without a seed zoneout is its expectation, as
// in evaluation.
template <class T>
struct DrawnRules {
  DrawnFactor<T> update, new_c, new_h;
  T clip;
  bool plain;  // every option is off: use PlainCell

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

// kept: the factor of a unit that is not dropped. expected: every unit's where nothing is drawn.
template <class T>
FASTLSTM_INLINE DrawnFactor<T> drawn_factor(const Problem& p, int layer, int direction, Drop stream,
                                            double probability, double kept, double expected) {
  DrawnFactor<T> factor{};
  const bool draws = p.seed != nullptr && probability > 0;
  factor.seed = draws ? p.seed : nullptr;
  factor.layer = layer;
  factor.direction = direction;
  factor.stream = stream;
  factor.threshold = dropout_threshold(probability);
  factor.kept = T(draws ? kept : expected);
  factor.dropped = T(0);
  return factor;
}

template <class T>
FASTLSTM_INLINE DrawnRules<T> drawn_rules(const Problem& p, int layer, int direction) {
  const CellOptions& o = p.cell;
  auto factor = [&](Drop stream, double probability, double kept, double expected) {
    return drawn_factor<T>(p, layer, direction, stream, probability, kept, expected);
  };
  DrawnRules<T> rules{};
  rules.update = factor(Drop::update, o.recurrent_dropout, dropout_scale(o.recurrent_dropout), 1);
  rules.new_c = factor(Drop::zone_c, o.zoneout_c, 1, 1 - o.zoneout_c);
  rules.new_h = factor(Drop::zone_h, o.zoneout_h, 1, 1 - o.zoneout_h);
  rules.clip = o.clip > 0 ? T(o.clip) : T(INFINITY);
  rules.plain = plain(o);
  return rules;
}

}  // namespace fastlstm
