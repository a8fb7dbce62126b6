// Grids that begin before the grid before them has ended.
#include "race.h"
#include "scheduler.h"

namespace simt {

namespace {

// Its clusters begin now or, some of them, when the primary has ended.
void begin(RunningGrid& grid) {
  for (unsigned first = 0; first < grid.of->size.count(); first += grid.of->cluster) {
    const bool now = order() == Order::fifo || draw() % 2;
    for (unsigned j = 0; j < grid.of->cluster; ++j) {
      Block& block = block_of(grid, first + j);
      if (now)
        begin(block);
      else
        grid.held.push_back(&block);
    }
  }
}

void trigger(Block& block) {
  if (block.triggered) return;
  block.triggered = true;
  RunningGrid& grid = *block.grid;
  if (--grid.untriggered == 0 && grid.dependent) begin(*grid.dependent);
}

}  // namespace

void start_dependents() { trigger(*self->block); }

void wait_for_primary(const char* file, int line) {
  RunningGrid& grid = *self->block->grid;
  grid.waited = true;
  if (grid.primary == nullptr) return;
  if (!grid.primary->ended) {
    self->where = "wait_for_primary";
    self->file = file;
    self->line = line;
    grid.primary->waiting.push_back(self);
    sleep();
  }
  race::learn(grid.primary->end);
}

void end_block() { trigger(*self->block); }

void end_grid() {
  RunningGrid& grid = *self->block->grid;
  if (grid.of->early && !grid.waited)
    fail("a kernel that was launched early ends, and none of its threads has waited");
  grid.ended = true;
  std::vector<unsigned> ids;
  for (unsigned rank = 0; rank < grid.of->size.count(); ++rank)
    for (unsigned id : threads_of(block_of(grid, rank))) ids.push_back(id);
  race::fence_async_copies(ids);  // the end of a grid shows what it wrote to bulk copies, too
  grid.end = race::all_of(ids);
  for (Thread* thread : grid.waiting) wake(thread);
  grid.waiting.clear();
  if (grid.dependent == nullptr) return;
  for (Block* block : grid.dependent->held) begin(*block);
  grid.dependent->held.clear();
}

}  // namespace simt
