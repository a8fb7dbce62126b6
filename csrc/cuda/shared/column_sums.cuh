// Launches of the sums of columns (sums.cuh): the gradients of biases, and of what layer
// normalisation scales and shifts by.
#pragma once

#include "stack.cuh"
#include "sums.cuh"

namespace fastlstm {
namespace cuda {

template <class S>
class ColumnSums {
  typedef Acc<S> T;

 public:
  // For matrices of all rows and up to `columns` columns.
  ColumnSums(Stack<S>& stack, int64_t columns)
      : stack_(stack), partial_(stack.arena.template take<T>(parts() * columns)) {}

  // Where the sums of each group of columns go; any of them may be null.
  struct Targets {
    S* to[2];
    S* copy_to[2];  // the same sums
  };

  // Sums `columns` columns, `group_columns` to a group. The first `used_columns` sums of a group
  // are stored.
  template <class From>
  void run(const From* from, int64_t stride, int64_t columns, const Targets& targets,
           int64_t group_columns, int64_t used_columns) const {
    ColumnArgs<From, T> of_parts{};
    of_parts.from = from;
    of_parts.to[0] = partial_;
    of_parts.rows = stack_.problem.rows;
    of_parts.stride = stride;
    of_parts.part_rows = kSumRows;
    of_parts.columns = of_parts.group_columns = of_parts.used_columns = int(columns);

    ColumnArgs<T, S> of_all{};
    of_all.from = partial_;
    for (int group = 0; group < 2; ++group) {
      of_all.to[group] = targets.to[group];
      of_all.copy_to[group] = targets.copy_to[group];
    }
    of_all.rows = of_all.part_rows = parts();
    of_all.stride = columns;
    of_all.columns = int(columns);
    of_all.group_columns = int(group_columns);
    of_all.used_columns = int(used_columns);

    const unsigned blocks = blocks_of(columns, 32);
    stack_.run_kernel(column_kernel<From, T>, dim3(unsigned(parts()), blocks), 32 * kSumWarps,
                      kColumnShared<T>, of_parts);
    stack_.run_kernel(column_kernel<T, S>, dim3(1, blocks), 32 * kSumWarps, kColumnShared<T>,
                      of_all);
  }

 private:
  int64_t parts() const { return (stack_.problem.rows + kSumRows - 1) / kSumRows; }

  Stack<S>& stack_;
  T* partial_;  // the sums of each part of the rows
};

}  // namespace cuda
}  // namespace fastlstm
