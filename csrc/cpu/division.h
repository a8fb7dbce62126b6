// How the work of a layer's steps is divided among threads. Results do not depend on it.
//
// The batch is split into parts. Each part is a task that runs all steps of its sequences and never
// waits for another task. Where there are more threads than tasks, a team of threads works on each
// task: it divides the units of a step, and its members meet after every step. Sequences of one
// part share every read of the weights. cost_model.h chooses the number of parts and the size of a
// team.
#pragma once

#include "cost_model.h"
#include "rows.h"
#include "runtime.h"

namespace fastlstm {
namespace {

// Sequences [begin, end) of the batch.
struct Sequences {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// Splits the batch into parts that have about the same number of rows.
class BatchSplit {
 public:
  BatchSplit(const Rows& rows, int64_t total_rows, int64_t parts)
      : count(max_of(1, min_of(parts, rows.batch))), ends_(count + 1) {
    Buffer<int64_t> length(rows.batch);
    for (int64_t b = 0; b < rows.batch; ++b) length[b] = 0;
    for (int64_t row = 0; row < total_rows; ++row) ++length[rows.b(row)];
    ends_[0] = 0;
    for (int64_t j = 1, b = 0, sum = 0; j <= count; ++j) {
      // Every part has at least one sequence, and leaves one for each part after it.
      const int64_t last = rows.batch - (count - j);
      do sum += length[b++];
      while (b < last && sum + length[b] / 2 < total_rows * j / count);
      if (j == count) b = rows.batch;
      ends_[j] = b;
    }
  }

  Sequences part(int64_t j) const { return {ends_[j], ends_[j + 1]}; }

  const int64_t count;

 private:
  Buffer<int64_t> ends_;  // part j is [ends_[j], ends_[j + 1])
};

// Calls run(task) in `members` threads for each of `count` tasks. Every task gets its first thread
// before any gets a second.
template <class F>
void run_teams(const Runtime& runtime, const Division& division, int64_t count, F&& run) {
  parallel(Runtime{int(division.threads), runtime.parallel}, count * division.members,
           [&](int64_t j) { run(j % count); });
}

}  // namespace
}  // namespace fastlstm
