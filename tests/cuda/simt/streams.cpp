// Streams: queues of work that wait for each other.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <random>

#include "forked_streams.h"
#include "simt.h"

namespace simt {

void Stream::launch_now(dim3 grid, unsigned threads, size_t shared,
                        const std::function<void()>& kernel, unsigned cluster) {
  if (!error.empty()) return;
  if (cluster < 1 || cluster > 16 || grid.count() % cluster != 0) {
    error =
        "a grid of " + std::to_string(grid.count()) + " in clusters of " + std::to_string(cluster);
    return;
  }
  if (threads > 1024 || shared > 227 << 10) {
    error = "a CTA of " + std::to_string(threads) + " threads with " + std::to_string(shared) +
            " bytes of shared memory";
    return;
  }
  Config c = config;
  c.cluster = cluster;
  c.grid = grid;
  c.block = dim3(threads);
  c.shared = shared;
  c.seed = config.seed + uint64_t(launches++);
  largest_grid = std::max(largest_grid, grid.count());
  const Result outcome = launch(c, kernel);
  error = outcome.error;
  races += outcome.races;
  if (first_race.empty()) first_race = outcome.first_race;
  if (!error.empty() && !first_race.empty()) error += "; a race before that: " + first_race;
}

void Stream::run(dim3 grid, unsigned threads, size_t shared, const std::function<void()>& kernel,
                 unsigned cluster) {
  add([=] { origin_->launch_now(grid, threads, shared, kernel, cluster); });
}

void Stream::zero(void* memory, size_t bytes) {
  add([=] {
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
    if (able.empty()) return;
    Stream& next = turn == Turn::first  ? *able.front()
                   : turn == Turn::last ? *able.back()
                                        : *able[bits() % able.size()];
    const Item& item = next.items_[next.done_++];
    if (item.work) item.work();
  }
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
