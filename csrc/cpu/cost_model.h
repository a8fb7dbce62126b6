// How many threads share the work of a step, and how: the division that a cost model finds
// cheapest. Results do not depend on it. benchmarks/report/cores.py prints the choices.
//
// A cost is a time, in multiply-adds that one thread does in it from registers: 119e9 a second in
// float32 with AVX-512, 1850e9 in bfloat16 with AMX (a Xeon with AMX), 40e9 in float32 with AVX2
// (an EPYC Zen 3).
//
// The batch is split into `parts`. A task is one part in one direction, and a team of `members`
// threads works on it. In a step,
//
//   tasks    = parts * directions
//   turns    = ceil(tasks / threads)          tasks that a thread runs one after another
//   weights  = ceil(blocks / members) * 64 P  of W_hh, that a member reads; a block is 16 units
//                                             with their four gates
//   rows     = ceil(B / parts)                sequences that share each read
//   step     = turns * weights * (max(read, rows) + late) + barrier(members)
//
//   read     = read_cached                        of weights that fit in cached_bytes, their part
//                                                 of a core's own L2 cache
//            = read_far * max(1, readers / 16)    of others: the shared cache delivers to 16
//                                                 readers at full rate, and more divide that
//   readers  = min(threads, tasks * members)
//   late     = read_far / 4                       where W_hh has 8 MiB or more: it does not stay in
//                                                 the shared cache, and arithmetic hides less of
//                                                 reading it
//   barrier  = ceil(log2(members)) * barrier      the rounds in which members meet, and reading
//                                                 what the others computed
//
// Two threads were measured: the rates, reading (190 and 26 GB/s a core on the Xeon; no difference
// on Zen 3), and when a team pays, from which its barrier follows (0.4 us a round in float32 with
// AVX-512, 0.52 in AMX, 1.2 with AVX2). Beyond two threads the barrier and the 16 readers are
// assumptions. NUMA, backward's second barrier and the products around the steps are ignored. A
// cell is half of a dependency chain of 220 cycles for a vector of units.
#pragma once

#include "../lstm.h"
#include "blocks.h"
#include "runtime.h"
#include "team.h"

namespace fastlstm {
namespace {

struct Costs {
  int64_t read_cached, read_far, cached_bytes, barrier;
  int64_t cell;  // of one unit and row: estimates of whole times count it, choices do not
};
constexpr Costs kTileCosts = {16, 100, 5 << 18, 960000, 3400};  // bfloat16 with AMX; an L2 of 2 MiB
constexpr Costs kAvx512Costs = {2, 16, 5 << 18, 48000, 220};
constexpr Costs kNarrowCosts = {2, 2, 5 << 16, 48000, 220};  // an L2 of 512 KiB
constexpr int64_t kSharedReaders = 16;  // whose reads the shared cache serves at full rate
constexpr int64_t kSharedBytes =
    8 << 20;  // from which a layer's weights do not stay in the shared cache
// Those of the kernels that include this.
#if FASTLSTM_AMX
constexpr const Costs& kCosts = kTileCosts;
#elif FASTLSTM_VEC_BYTES == 64
constexpr const Costs& kCosts = kAvx512Costs;
#else
constexpr const Costs& kCosts = kNarrowCosts;
#endif

// Whether rows are so few that a layer's weights are not packed before its steps: up to four rows
// read them as they are, more pack a block of units at a time for one step
// (ForwardTask::run_block). Packing all costs about as much as three rows where the weights stay in
// the caches. Where it writes through them it costs as much as eight steps of a row. Of one step,
// 16 and 64 rows are the most for which packing by blocks was measured to be no slower.
inline bool runs_direct(const Problem& p) {
  const int64_t above = p.layers > 1 ? p.directions * p.out_size : 0;
  const int64_t input = max_of(above, p.input_kind == InputKind::dense ? p.input_size : 0);
  const bool cached = 4 * p.hidden_size * (input + p.out_size) < (1 << 18);
  const int64_t most = p.steps > 1 ? (cached ? 3 : 8) : cached ? 16 : 64;
  return !p.projected && !p.layer_norm && p.rows <= most;
}

// How one member multiplies `weights` of a layer's `all` weights with `rows` rows.
inline int64_t product_cost(const Costs& costs, int64_t weights, int64_t all, int64_t rows,
                            int64_t weight_bytes, int64_t readers) {
  const int64_t far = costs.read_far * max_of(readers, kSharedReaders) / kSharedReaders;
  const int64_t read = weights * weight_bytes > costs.cached_bytes ? far : costs.read_cached;
  const int64_t late = all * weight_bytes >= kSharedBytes ? costs.read_far / 4 : 0;
  return weights * (max_of(read, rows) + late);
}

inline int64_t barrier_cost(const Costs& costs, int64_t members) {
  int64_t rounds = 0;
  while (int64_t(1) << rounds < members) ++rounds;
  return rounds * costs.barrier;
}

// The number of parts, and of threads in a team.
struct Division {
  // work: the multiply-adds of all steps.
  Division(const Problem& p, const Costs& costs, int64_t most_threads, int64_t work,
           int64_t weight_bytes) {
    const int64_t available = worthwhile_threads(most_threads, work);
    const int64_t blocks = ceil_div(p.hidden_size, 16),
                  batch = ceil_div(p.rows, max_of(1, p.steps));
    for (int64_t n = min_of(batch, available); n > 0; --n) {
      const int64_t tasks = n * p.directions, turns = ceil_div(tasks, available);
      const int64_t most = max_of(1, min_of(min_of(available / tasks, Team::kMaxMembers), blocks));
      for (int64_t size = most; size > 0; --size) {
        const int64_t readers = min_of(available, tasks * size), rows = ceil_div(batch, n);
        const int64_t gates = ceil_div(blocks, size) * 64;
        const int64_t cost =
            turns * product_cost(costs, gates * p.out_size, blocks * 64 * p.out_size, rows,
                                 weight_bytes, readers) +
            barrier_cost(costs, size);
        if (step > 0 && cost >= step) continue;
        step = cost;
        thread_gates = turns * gates * rows;
        parts = n;
        members = size;
        threads = readers;
      }
    }
  }

  int64_t parts = 1, members = 1, threads = 1;
  int64_t step = 0;          // its cost
  int64_t thread_gates = 0;  // how many a thread computes in a step
};

// One team that divides all weights of a step evenly. most_threads: those that its work is worth.
struct EvenTeam {
  EvenTeam(const Costs& costs, int64_t most_threads, int64_t weights, int64_t rows,
           int64_t weight_bytes, int64_t barriers) {
    const int64_t most = min_of(most_threads, Team::kMaxMembers);
    for (int64_t size = most; size > 0; --size) {
      const int64_t cost =
          product_cost(costs, ceil_div(weights, size), weights, rows, weight_bytes, size) +
          barriers * barrier_cost(costs, size);
      if (step > 0 && cost >= step) continue;
      step = cost;
      members = size;
    }
  }

  int64_t members = 1;
  int64_t step = 0;  // its cost
};

}  // namespace
}  // namespace fastlstm
