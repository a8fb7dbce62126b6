// Draws text from a stack and its decoder on the CPU: a step is one product of every weight matrix
// with the states of the batch (1 to 64 rows).
//
// The members of a team share a step: each takes panels of every matrix (64 columns, that is 16
// units with their four gates), in the layers' order, and after every layer all meet. A panel
// is one stream of memory from first to last k; its sums stay in registers, and the cells run on
// them as soon as they are finished. Every column is summed by one thread in one order, so nothing
// depends on how many there are.
//
// Moves per step: every weight once from cache (2 x 512: 12.6 MB in fp32, a half or a quarter of
// that in bf16 or int8), which bounds batch 1 in fp32 and bf16; int8 is bound by the 11 vector
// operations that 32 weights take. Larger batches read them once for kRows rows.
#pragma once

#include "../rules.h"
#include "activations.h"
#include "draw.h"
#include "gemm.h"
#include "runtime.h"
#include "team.h"

namespace fastlstm {
namespace {

// Rows of the batch that share a pass over a panel: with four vectors of columns they fill the
// registers. A single row takes eight vectors, enough sums to hide the latency of the FMAs.
constexpr int kRows = FASTLSTM_VEC_BYTES == 64 ? 6 : 3;

// How a storage type is read. expand() turns a vector of words into kPerWord vectors of columns,
// which stand kGenerateColumns / kPerWord apart; finish() corrects their sums.
template <class T_>
struct Plain {
  typedef T_ T;
  typedef T_ Word;
  static constexpr int kPerWord = 1;
  static FASTLSTM_INLINE Vec<T> expand(Vec<T> words, int) { return words; }
  static FASTLSTM_INLINE void finish(Vec<T>*) {}
};

struct PairsBf16 {
  typedef float T;
  typedef int32_t Word;
  static constexpr int kPerWord = 2;
  static FASTLSTM_INLINE VecF expand(VecFi words, int part) {
    return bit_cast<VecF>(part == 0 ? words << 16 : words & int32_t(0xffff0000U));
  }
  static FASTLSTM_INLINE void finish(VecF*) {}
};

// Shifted to the top of the word, q[part] is 2^24 of it, plus what lower parts add below. That is
// 2^-8 of the part below as expanded itself, so their sums take it away again, once, at the end:
// a shift and a conversion for each column are all the loop pays.
struct FoursInt8 {
  typedef float T;
  typedef int32_t Word;
  static constexpr int kPerWord = 4;
  static FASTLSTM_INLINE VecF expand(VecFi words, int part) {
    return __builtin_convertvector(words << (24 - 8 * part), VecF);
  }
  static FASTLSTM_INLINE void finish(VecF* sums) {
    for (int part = 3; part > 0; --part) sums[part] -= sums[part - 1] * 0x1p-8f;
    for (int part = 0; part < 4; ++part) sums[part] *= 0x1p-24f;
  }
};

// How far ahead packed words are fetched: the hardware's own streams stop at the end of a page,
// which comes every 32 to 64 k. Elements of float or double leave them the time; there a
// prefetch a line costs more than it gives.
constexpr int64_t kAheadBytes = 4096;

// sums[m] += W x[m] for the columns of one panel and M rows of x, ldx apart.
template <class Store, int M>
void add_product(typename Store::T (*sums)[kGenerateColumns], const PackedMatrix& w, int64_t panel,
                 const typename Store::T* x, int64_t ldx) {
  typedef typename Store::T T;
  constexpr int kParts = Store::kPerWord, kWords = kGenerateColumns / kParts;
  constexpr int kVectors = kWords / kWidth<T>, kMost = (M == 1 ? 8 : 4) / kParts;
  constexpr int kGroup = kVectors < kMost ? kVectors : kMost;
  const typename Store::Word* words =
      static_cast<const typename Store::Word*>(w.data) + panel * w.depth * kWords;
  const T* scale = static_cast<const T*>(w.scale);
  for (int first = 0; first < kVectors; first += kGroup) {
    Vec<T> acc[M][kGroup][kParts] = {};
    for (int64_t k = 0; k < w.depth; ++k) {
      const typename Store::Word* row = words + k * kWords;
      if constexpr (kParts > 1)
        for (int64_t byte = 0; byte < int64_t(kWords * sizeof *row); byte += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(row) + kAheadBytes + byte);
#pragma GCC unroll 8
      for (int v = 0; v < kGroup; ++v) {
        const auto group = load(row + (first + v) * kWidth<T>);
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          const Vec<T> columns = Store::expand(group, part);
#pragma GCC unroll 6
          for (int m = 0; m < M; ++m) acc[m][v][part] += columns * x[m * ldx + k];
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kGroup; ++v) {
        Store::finish(acc[m][v]);
        for (int part = 0; part < kParts; ++part) {
          const int64_t column = part * kWords + (first + v) * kWidth<T>;
          Vec<T> sum = acc[m][v][part];
          if (scale) sum *= load(scale + panel * kGenerateColumns + column);
          store(sums[m] + column, load(sums[m] + column) + sum);
        }
      }
  }
}

template <class Store>
class Generator {
 public:
  typedef typename Store::T T;

  Generator(const Generate& g, Team& team)
      : g_(g),
        team_(team),
        wide_(max_of(round_up(g.hidden_size, kGenerateUnits),
                     g.projected ? round_up(g.out_size, kGenerateColumns) : 0)),
        units_(round_up(g.hidden_size, kGenerateUnits)),
        characters_(round_up(g.vocabulary, kGenerateColumns)),
        rows_(g.layers * g.batch),
        raw_(g.projected ? g.batch * wide_ : 0),
        c_(rows_ * units_),
        logits_(g.batch * characters_),
        order_(g.batch * g.vocabulary),
        plain_(plain(g.cell)),
        rules_{Math<T>::one(), Vec<T>{} + (g.cell.clip > 0 ? T(g.cell.clip) : T(INFINITY)),
               Vec<T>{} + T(1 - g.cell.zoneout_c), Vec<T>{} + T(1 - g.cell.zoneout_h)} {
    for (Buffer<T>& h : h_) h.reset(rows_ * wide_);
    enter(h_[0].get(), wide_, g.h0, g.out_size);
    enter(c_.get(), units_, g.c0, g.hidden_size);
  }

  void step(int64_t s, int member) {
    const T* below = nullptr;
    for (int layer = 0; layer < g_.layers; ++layer) {
      const T* h = h_[s % 2].get() + layer * g_.batch * wide_;
      T* next = h_[(s + 1) % 2].get() + layer * g_.batch * wide_;
      T* raw = g_.projected ? raw_.get() : next;
      const GenerateLayer& w = g_.weights[layer];
      share(member, units_ / kGenerateUnits, [&](auto rows, int64_t panel, int64_t b) {
        run_cells<decltype(rows)::value>(s, layer, panel, b, below, h, raw);
      });
      team_.meet();
      if (g_.projected) {
        multiply(member, w.hr, g_.out_size, nullptr, raw, next, wide_);
        team_.meet();
      }
      below = next;
    }
    const int64_t drawn = s + 1 - g_.prime_steps;
    if (drawn < 0) return;
    multiply(member, g_.decoder, g_.vocabulary, static_cast<const T*>(g_.decoder_bias), below,
             logits_.get(), characters_);
    team_.meet();
    team_.share(member, g_.batch, [&](int64_t b) {
      g_.tokens[drawn * g_.batch + b] =
          draw(g_, logits_.get() + b * characters_, order_.get() + b * g_.vocabulary, drawn, b);
    });
  }

  // The states after `steps` steps.
  void leave(int64_t steps) const {
    leave(h_[steps % 2].get(), wide_, g_.h_n, g_.out_size);
    leave(c_.get(), units_, g_.c_n, g_.hidden_size);
  }

 private:
  static int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

  // States of all layers between (rows, n) outside and padded rows here.
  void enter(T* to, int64_t stride, const void* from, int64_t n) const {
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t j = 0; j < stride; ++j)
        to[row * stride + j] = from && j < n ? static_cast<const T*>(from)[row * n + j] : T(0);
  }
  void leave(const T* from, int64_t stride, void* to, int64_t n) const {
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t j = 0; j < n; ++j) static_cast<T*>(to)[row * n + j] = from[row * stride + j];
  }

  // Calls f(Int<M>{}, panel, first row) for this member's part of the panels and all rows.
  template <class F>
  void share(int member, int64_t panels, F&& f) const {
    team_.share(member, panels, [&](int64_t panel) {
      for_even_blocks(g_.batch, kRows, [&](int rows, int64_t b) {
        with_rows<kRows>(rows, [&](auto size) { f(size, panel, b); });
      });
    });
  }

  // One panel's gates and cells, for M rows from row b on.
  template <int M>
  void run_cells(int64_t s, int layer, int64_t panel, int64_t b, const T* below, const T* h,
                 T* next) {
    const GenerateLayer& w = g_.weights[layer];
    alignas(64) T sums[M][kGenerateColumns];
    for (int m = 0; m < M; ++m) {
      const T* start = layer == 0 ? static_cast<const T*>(g_.table) + token(s, b + m) * 4 * units_
                                  : static_cast<const T*>(w.bias);
      memcpy(sums[m], start + panel * kGenerateColumns, sizeof sums[m]);
    }
    if (layer > 0) add_product<Store, M>(sums, w.ih, panel, below + b * wide_, wide_);
    add_product<Store, M>(sums, w.hh, panel, h + b * wide_, wide_);
    for (int m = 0; m < M; ++m)
      for (int64_t j = 0; j < kGenerateUnits; j += kWidth<T>) {
        const int64_t unit = panel * kGenerateUnits + j;
        T* c = c_.get() + (layer * g_.batch + b + m) * units_ + unit;
        const T* gates = sums[m] + j;
        const Vec<T> a_i = load(gates), a_f = load(gates + kGenerateUnits),
                     a_g = load(gates + 2 * kGenerateUnits), a_o = load(gates + 3 * kGenerateUnits);
        CellForward<Vec<T>> out;
        if (plain_)
          out = cell_forward<Math<T>>(a_i, a_f, a_g, a_o, load(c));
        else
          out = cell_forward<Math<T>>(a_i, a_f, a_g, a_o, load(c), load(h + (b + m) * wide_ + unit),
                                      rules_);
        store(c, out.c);
        store(next + (b + m) * wide_ + unit, out.h);
      }
  }

  // to = W x + bias, for all rows and this member's part of the n columns.
  template <class To>
  void multiply(int member, const PackedMatrix& w, int64_t n, const T* bias, const T* x, To* to,
                int64_t stride) const {
    share(member, ceil_div(n, kGenerateColumns), [&](auto rows, int64_t panel, int64_t b) {
      constexpr int M = decltype(rows)::value;
      alignas(64) T sums[M][kGenerateColumns] = {};
      if (bias)
        for (int m = 0; m < M; ++m)
          memcpy(sums[m], bias + panel * kGenerateColumns, sizeof sums[m]);
      add_product<Store, M>(sums, w, panel, x + b * wide_, wide_);
      for (int m = 0; m < M; ++m)
        for (int64_t j = 0; j < kGenerateColumns; ++j)
          to[(b + m) * stride + panel * kGenerateColumns + j] = To(sums[m][j]);
    });
  }

  int64_t token(int64_t s, int64_t b) const {
    const int64_t drawn = s - g_.prime_steps;
    return drawn < 0 ? g_.prime[s * g_.batch + b] : g_.tokens[drawn * g_.batch + b];
  }

  const Generate& g_;
  Team& team_;
  const int64_t wide_, units_, characters_, rows_;  // padded widths; rows of all layers
  Buffer<T> h_[2];                                  // h before and after even steps, or odd ones
  Buffer<T> raw_, c_;
  Buffer<double> logits_;
  Buffer<int64_t> order_;
  const bool plain_;
  const CellRules<Vec<T>> rules_;
};

template <class Store>
void generate(const Generate& g, const Runtime& runtime) {
  const int64_t steps = g.prime_steps + g.length - 1;
  Team team(steps);
  Generator<Store> generator(g, team);
  const int64_t cell =
      4 * g.hidden_size * g.out_size + (g.projected ? g.hidden_size : 0) * g.out_size;
  const int64_t work = g.batch * (g.layers * cell * 2 + g.vocabulary * g.out_size);
  const int64_t workers = min_of(min_of(runtime.threads, Team::kMost), 1 + work / kWorthAThread);
  parallel(runtime, workers, [&](int64_t) {
    team.work([&](int64_t s, int member) { generator.step(s, member); }, [](int64_t) {});
  });
  generator.leave(steps);
}

}  // namespace
}  // namespace fastlstm
