// Streams: queues of work that wait for each other.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <random>

#include "forked_streams.h"
#include "scheduler.h"

namespace simt {

// Grids of a session: three are a chain, in which the primary may not have waited yet.
constexpr uint64_t kFewestGrids = 3, kMostGrids = 5;
constexpr unsigned kMostThreads = 1 << 15;  // of a session that has several grids

void Stream::launch_now(const Grid& grid, Stream& stream) {
  if (!error.empty()) return;
  const unsigned cluster = grid.cluster, threads = grid.block.count();
  if (cluster < 1 || cluster > 16 || grid.size.count() % cluster != 0) {
    error = "a grid of " + std::to_string(grid.size.count()) + " in clusters of " +
            std::to_string(cluster);
    return;
  }
  if (grid.size.y > 65535 || grid.size.z > 65535) {
    error = "a grid of " + std::to_string(grid.size.y) + " CTAs along y and " +
            std::to_string(grid.size.z) + " along z";
    return;
  }
  if (threads > 1024 || grid.shared > 227 << 10) {
    error = "a CTA of " + std::to_string(threads) + " threads with " + std::to_string(grid.shared) +
            " bytes of shared memory";
    return;
  }
  largest_grid = std::max(largest_grid, grid.size.count());
  join_session(grid, stream);
  ++launches;
}

// An early grid joins the session that the grid before it on its stream is in. Sessions of a few
// grids keep the checker's clocks short; which grids share one differs from seed to seed.
void Stream::join_session(const Grid& grid, Stream& stream) {
  unsigned threads = grid.size.count() * grid.block.count();
  for (const Grid& g : session_) threads += g.size.count() * g.block.count();
  const size_t most =
      kFewestGrids + std::mt19937_64(session_seed_)() % (kMostGrids - kFewestGrids + 1);
  if (!grid.early || session_stream_ != &stream || session_.size() >= most ||
      threads > kMostThreads)
    run_session();
  if (session_.empty()) session_seed_ = config.seed + uint64_t(launches);
  session_.push_back(grid);
  session_stream_ = &stream;
  if (!overlaps) run_session();
}

void Stream::run_session() {
  const std::vector<Grid> grids = std::move(session_);
  session_.clear();
  if (grids.empty() || !error.empty()) return;
  Config c = config;
  c.seed = session_seed_;
  const Result outcome = launch(c, grids);
  error = outcome.error;
  races += outcome.races;
  if (first_race.empty()) first_race = outcome.first_race;
  if (!error.empty() && !first_race.empty()) error += "; a race before that: " + first_race;
}

void Stream::run(const Grid& grid) {
  add([=] { origin_->launch_now(grid, *this); });
}

void Stream::run_library(const std::function<void()>& work) {
  Grid grid;
  grid.kernel = [work] {
    if (order() != Order::fifo && draw() % 2) start_dependents();
    work();
  };
  add([=] { origin_->join_session(grid, *this); });
}

void Stream::zero(void* memory, size_t bytes) {
  add([=] {
    origin_->run_session();
    ++origin_->launches;
    std::memset(memory, 0, bytes);
  });
}

void Stream::add(std::function<void()> work) {
  if (origin_->turn == Turn::issued)
    work();
  else
    items_.push_back({std::move(work), nullptr, 0});
}

void Stream::follow(Stream& other) {
  if (origin_->follows++ == origin_->forgotten || origin_->turn == Turn::issued) return;
  items_.push_back({nullptr, &other, other.items_.size()});
}

Stream& Stream::forked(int index) {
  while (int(forked_.size()) <= index) {
    forked_.push_back(std::make_unique<Stream>());
    forked_.back()->origin_ = this;
  }
  return *forked_[size_t(index)];
}

bool Stream::ready() const {
  if (done_ == items_.size()) return false;
  const Item& next = items_[done_];
  return next.other == nullptr || next.other->done_ >= next.count;
}

// Marks the first `count` items, and all that they wait for, as needed.
void Stream::need(size_t count) {
  while (needed_ < count) {
    const Item& item = items_[needed_++];
    if (item.other) item.other->need(item.count);
  }
}

void Stream::finish() {
  std::vector<Stream*> all{this};
  for (const auto& stream : forked_) all.push_back(stream.get());
  need(items_.size());
  for (const Stream* stream : all)
    if (stream->needed_ < stream->items_.size() && error.empty())
      error = "a forked stream has work that the first stream does not wait for";
  std::mt19937_64 bits(config.seed);
  for (;;) {
    std::vector<Stream*> able;
    std::copy_if(all.begin(), all.end(), std::back_inserter(able),
                 [](const Stream* stream) { return stream->ready(); });
    if (able.empty()) break;
    Stream& next = turn == Turn::first  ? *able.front()
                   : turn == Turn::last ? *able.back()
                                        : *able[bits() % able.size()];
    const Item& item = next.items_[next.done_++];
    if (item.work) item.work();
  }
  run_session();
}

}  // namespace simt

namespace fastlstm {
namespace cuda {

void* forked_stream(void* stream, int index) {
  return &static_cast<simt::Stream*>(stream)->forked(index);
}

void follow(void* stream, void* other) {
  static_cast<simt::Stream*>(stream)->follow(*static_cast<simt::Stream*>(other));
}

}  // namespace cuda
}  // namespace fastlstm
