// What forward and backward share: the rows of the problem, one layer's input, packed weights and
// the division of work among threads.
#pragma once

#include "../rules.h"
#include "activations.h"
#include "gemm.h"
#include "runtime.h"
#include "team.h"

namespace fastlstm {
namespace {

// Row strides that are a multiple of 1 KiB put a tile's rows in the same cache sets.
template <class T>
FASTLSTM_INLINE int64_t spread(int64_t n) {
  const int64_t wide = padded<T>(n);
  return wide * int64_t(sizeof(T)) % 1024 == 0 ? wide + kPanel<T> : wide;
}

// Saved.gates, for each unit of a row.

// The (t, b) pairs in time-major order, sequences of different lengths packed longest first.
class Rows {
 public:
  explicit Rows(const Problem& p)
      : steps(p.steps), batch(p.batch), first_(p.steps + 1), t_(p.rows), b_(p.rows) {
    first_[0] = 0;
    for (int64_t t = 0, row = 0; t < steps; ++t) {
      const int64_t n = p.batch_sizes ? p.batch_sizes[t] : batch;
      for (int64_t b = 0; b < n; ++b, ++row) {
        t_[row] = t;
        b_[row] = b;
      }
      first_[t + 1] = row;
    }
  }

  int64_t at(int64_t t, int64_t b) const { return first_[t] + b; }
  // How many sequences reach step t; 0 outside the steps.
  int64_t active(int64_t t) const { return t < 0 || t >= steps ? 0 : first_[t + 1] - first_[t]; }
  int64_t t(int64_t row) const { return t_[row]; }
  int64_t b(int64_t row) const { return b_[row]; }

  const int64_t steps, batch;

 private:
  Buffer<int64_t> first_, t_, b_;
};

// Dropout of one layer's output, a row at a time.
template <class T>
struct Dropout {
  Dropout(const Problem& p, int layer) : width(p.out_size) {
    if (p.dropout <= 0 || layer >= p.layers - 1) return;
    threshold = uint64_t(p.dropout * 4294967296.0);
    scale = p.dropout >= 1 ? T(0) : T(1 / (1 - p.dropout));
    for (int d = 0; d < p.directions; ++d) key[d] = dropout_key(*p.seed, layer, d);
  }

  bool active() const { return threshold > 0; }
  // Columns [first, first + n) of row (t, b) of the layer's output (directions side by side).
  template <class E>
  void apply(E* values, int64_t t, int64_t b, int64_t first, int64_t n) const {
    const uint32_t rows[2] = {dropout_row(key[0], t, b), dropout_row(key[1], t, b)};
    for (int64_t j = 0; j < n; ++j) {
      const int d = first + j >= width;
      const bool keep = dropout_keeps(rows[d], first + j - d * width, threshold);
      from_acc(keep ? to_acc(values[j]) * scale : T(0), values[j]);
    }
  }

  int64_t width;
  uint64_t threshold = 0;
  T scale = 1;
  uint32_t key[2] = {0, 0};
};

// The rules of a vector of units.
template <class T>
FASTLSTM_INLINE CellRules<Vec<T>> rules_of(const DrawnRules<T>& drawn, const RuleRow& row,
                                           int64_t unit) {
  auto factor = [&](const DrawnFactor<T>& from, uint32_t hash) {
    if (from.seed == nullptr) return Vec<T>{} + from.kept;
    T lanes[kWidth<T>];
    for (int j = 0; j < kWidth<T>; ++j) lanes[j] = from.at(hash, unit + j);
    return load(lanes);
  };
  return {factor(drawn.update, row.update), Vec<T>{} + drawn.clip, factor(drawn.new_c, row.new_c),
          factor(drawn.new_h, row.new_h)};
}

// The input of one layer, converted to what is multiplied, with the lower layer's dropout.
template <class S>
class LayerInput {
 public:
  typedef Acc<S> T;

  LayerInput(const Problem& p, const Saved& saved, const Rows& rows, int layer)
      : rows_(rows), dropout_(p, layer > 0 ? layer - 1 : p.layers) {
    if (layer == 0) {
      width = p.input_size;
      kind = p.input_kind;
      base_ = p.input;
      stride_t_ = p.batch_sizes ? 0 : p.stride_t;
      stride_b_ = p.stride_b;
      packed_ = p.batch_sizes != nullptr;
    } else {
      width = p.directions * p.out_size;
      kind = InputKind::dense;
      base_ = static_cast<const S*>(saved.hidden) + (layer - 1) * p.rows * width;
      stride_b_ = width;
      packed_ = true;
    }
  }

  // Columns [first, first + n) of a row.
  void load(Operand<S>* to, int64_t row, int64_t first, int64_t n) const {
    convert(to, static_cast<const S*>(base_) + offset(row) + first, n);
    if (dropout_.active()) dropout_.apply(to, rows_.t(row), rows_.b(row), first, n);
  }

  int64_t index(int64_t row) const {
    return kind == InputKind::index64 ? static_cast<const int64_t*>(base_)[offset(row)]
                                      : int64_t(static_cast<const int32_t*>(base_)[offset(row)]);
  }

  int64_t width;
  InputKind kind;

 private:
  int64_t offset(int64_t row) const {
    return packed_ ? row * stride_b_ : rows_.t(row) * stride_t_ + rows_.b(row) * stride_b_;
  }

  const Rows& rows_;
  Dropout<T> dropout_;
  const void* base_;
  int64_t stride_t_ = 0, stride_b_ = 0;
  bool packed_;
};

// Splits the batch among tasks so that each has about the same number of rows: sequences do not
// meet within a layer, so the tasks need no barrier. Range j is [split[j], split[j + 1]).
class BatchSplit {
 public:
  BatchSplit(const Rows& rows, int64_t total_rows, int64_t parts)
      : count(max_of(1, min_of(parts, rows.batch))), split_(count + 1) {
    Buffer<int64_t> length(rows.batch);
    for (int64_t b = 0; b < rows.batch; ++b) length[b] = 0;
    for (int64_t row = 0; row < total_rows; ++row) ++length[rows.b(row)];
    split_[0] = 0;
    for (int64_t j = 1, b = 0, sum = 0; j <= count; ++j) {
      // Every part keeps at least one sequence, and leaves one for each part after it.
      const int64_t last = rows.batch - (count - j);
      do sum += length[b++];
      while (b < last && sum + length[b] / 2 < total_rows * j / count);
      if (j == count) b = rows.batch;
      split_[j] = b;
    }
  }

  int64_t begin(int64_t j) const { return split_[j]; }
  int64_t end(int64_t j) const { return split_[j + 1]; }

  const int64_t count;

 private:
  Buffer<int64_t> split_;
};

// How the steps of a layer are divided among threads: the batch into parts, which never meet, and
// the units of a part among a team, whose members meet in every step. Sequences that share a part
// share every read of the weights. Results do not depend on any of it.
struct Division {
  // In multiplications of one thread: the least that a weight costs, the least where a thread's do
  // not stay in its second-level cache of 2 MiB, and a meeting.
#if FASTLSTM_AMX
  static constexpr int64_t kReadWeight = 16, kFarWeight = 100, kMeeting = 480000;
#elif FASTLSTM_VEC_BYTES == 64
  static constexpr int64_t kReadWeight = 2, kFarWeight = 16, kMeeting = 24000;
#else
  static constexpr int64_t kReadWeight = 2, kFarWeight = 2, kMeeting = 24000;
#endif
  static constexpr int64_t kNearBytes = 5 << 18;

  Division(const Problem& p, int64_t threads, int64_t work, int64_t weight_bytes) {
    if (work < 2 * kWorthAThread) return;
    const int64_t blocks = ceil_div(p.hidden_size, 16), block = 64 * p.out_size;
    const int64_t batch = ceil_div(p.rows, p.steps);
    int64_t least = 0;
    for (int64_t n = min_of(batch, threads); n > 0; --n) {
      const int64_t teams = n * p.directions;
      const int64_t size = max_of(1, min_of(min_of(threads / teams, Team::kMost), blocks));
      const int64_t own = ceil_div(blocks, size) * block;
      const int64_t read = own * weight_bytes > kNearBytes ? kFarWeight : kReadWeight;
      const int64_t cost = ceil_div(teams, threads) * own * max_of(read, ceil_div(batch, n)) +
                           (size > 1 ? size * kMeeting : 0);
      if (least > 0 && cost >= least) continue;
      least = cost;
      parts = n;
      members = size;
    }
  }

  int64_t parts = 1, members = 1;
};

// Calls run(task) in `members` threads for each of `count` tasks: first once for all of them.
template <class F>
void run_teams(const Runtime& runtime, const Division& division, int64_t count, F&& run) {
  const bool alone = division.parts * division.members == 1;
  parallel(alone ? Runtime{1, nullptr} : runtime, count * division.members,
           [&](int64_t j) { run(j % count); });
}

// A matrix packed into panels of operands E.
template <class E>
struct Panels {
  typedef Acc<E> T;

  // B's columns are rows in memory: `column(panel, j)` is where the panel's column j begins, or
  // null in the padding. Squares of words are transposed in registers.
  template <class Column>
  void pack_columns(const Runtime& runtime, int64_t count, int64_t rows, Column&& column) {
    constexpr int kWords = kWidth<T>, kBlock = kWords * kPair<E>;
    for_panels(runtime, count, rows, [&](E* panel, int64_t p) {
      for (int first = 0; first < kPanel<T>; first += kWords)
        for (int64_t k = 0; k < stored; k += kBlock) {
          Vec<Word<E>> words[kWords];
          for (int j = 0; j < kWords; ++j) {
            E elements[kBlock] = {};
            const auto* from = column(p, first + j);
            const int64_t n = min_of(kBlock, depth - k);
            if (from && n == kBlock)
              convert(elements, from + k, kBlock);
            else if (from && n > 0)
              convert(elements, from + k, n);
            words[j] = load_words(elements);
          }
          transpose(words);
          for (int j = 0; j < kWords && k + j * kPair<E> < stored; ++j)
            memcpy(panel + packed_at<E>(k + j * kPair<E>, first), &words[j], sizeof words[j]);
        }
    });
  }
  // B (rows x columns, row-major), as it stands.
  template <class S>
  void pack_plain(const Runtime& runtime, const S* b, int64_t rows, int64_t columns) {
    for_panels(runtime, panels_of<T>(columns), rows, [&](E* panel, int64_t p) {
      const int64_t first = p * kPanel<T>, n = min_of(kPanel<T>, columns - first);
      for (int64_t k = 0; k < stored; k += kPair<E>) {
        E own[kPair<E>][kPanel<T>] = {};
        const E* at[kPair<E>];
        for (int q = 0; q < kPair<E>; ++q) {
          at[q] = own[q];
          if (n == kPanel<T> && k + q < depth)
            convert(own[q], b + (k + q) * columns + first, kPanel<T>);
          else if (k + q < depth)
            convert(own[q], b + (k + q) * columns + first, n);
        }
        interleave(panel + packed_at<E>(k, 0), at, kPanel<T>);
      }
    });
  }
  // The transpose of B (columns x rows, row-major).
  template <class S>
  void pack_transposed(const Runtime& runtime, const S* b, int64_t rows, int64_t columns) {
    pack_columns(runtime, panels_of<T>(columns), rows, [=](int64_t p, int j) {
      const int64_t column = p * kPanel<T> + j;
      return column < columns ? b + column * rows : nullptr;
    });
  }

  const E* panel(int64_t p) const { return data.get() + p * stored * kPanel<T>; }

  Buffer<E> data;
  int64_t depth = 0, stored = 0;  // stored: packed_depth

 private:
  template <class F>
  void for_panels(const Runtime& runtime, int64_t count, int64_t rows, F&& f) {
    depth = rows;
    stored = packed_depth<E>(depth);
    data.reset(count * stored * kPanel<T>);
    const int64_t tasks = min_of(count, 4 * runtime.threads);
    parallel_if_worth(runtime, 4 * count * depth * kPanel<T>, tasks, [&](int64_t task) {
      for (int64_t p = count * task / tasks; p < count * (task + 1) / tasks; ++p)
        f(data.get() + p * stored * kPanel<T>, p);
    });
  }
};

template <class S>
const S* cell_part(const void* all, int64_t cell, int64_t per_cell) {
  return all ? static_cast<const S*>(all) + cell * per_cell : nullptr;
}
template <class S>
S* cell_part(void* all, int64_t cell, int64_t per_cell) {
  return all ? static_cast<S*>(all) + cell * per_cell : nullptr;
}

}  // namespace
}  // namespace fastlstm
