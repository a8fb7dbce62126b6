// A thread takes a set of streams for each device that it uses and returns it when it ends, for
// another thread to take: libraries keep memory for every stream that they have seen. Graphs are
// recorded on streams of their own. A replay uses the memory that cuBLAS kept for those, and may
// run beside later calls.
#include "forked_streams.h"

#include <map>
#include <mutex>
#include <vector>

#include "shared/device.cuh"

namespace fastlstm {
namespace cuda {
namespace {

struct StreamSet {
  cudaEvent_t event = nullptr;
  std::vector<cudaStream_t> streams, recorded;  // for calls that run, and for those of graphs
};

// Sets that no thread has, by device. Never destroyed: threads may end after static objects do.
struct FreeSets {
  std::mutex mutex;
  std::map<int, std::vector<StreamSet>> sets;
};
FreeSets& free_sets() {
  static FreeSets& all = *new FreeSets;
  return all;
}

class ThreadSets {
 public:
  ~ThreadSets() {
    FreeSets& all = free_sets();
    const std::lock_guard<std::mutex> lock(all.mutex);
    for (const auto& set : sets_) all.sets[set.first].push_back(set.second);
  }

  StreamSet& current() {
    int device = 0;
    check(cudaGetDevice(&device), "the current device");
    const auto known = sets_.find(device);
    if (known != sets_.end()) return known->second;
    FreeSets& all = free_sets();
    const std::lock_guard<std::mutex> lock(all.mutex);
    std::vector<StreamSet>& unused = all.sets[device];
    StreamSet set;
    if (!unused.empty()) {
      set = unused.back();
      unused.pop_back();
    }
    return sets_[device] = set;
  }

 private:
  std::map<int, StreamSet> sets_;  // by device
};

StreamSet& stream_set() {
  static thread_local ThreadSets sets;
  return sets.current();
}

// Lets a thread create streams and events while a graph is recorded.
class Relaxed {
 public:
  Relaxed() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "capture mode"); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

void* forked_stream(void* stream, int index) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "a stream's capture");
  StreamSet& set = stream_set();
  std::vector<cudaStream_t>& streams =
      status == cudaStreamCaptureStatusNone ? set.streams : set.recorded;
  while (int(streams.size()) <= index) {
    const Relaxed relaxed;
    cudaStream_t created = nullptr;
    check(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking), "a stream");
    streams.push_back(created);
  }
  return streams[index];
}

void follow(void* stream, void* other) {
  // One event serves all: a wait is for what the event recorded last before it.
  cudaEvent_t& event = stream_set().event;
  if (event == nullptr) {
    const Relaxed relaxed;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event");
  }
  check(cudaEventRecord(event, static_cast<cudaStream_t>(other)), "an event's record");
  check(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), event, 0), "a wait for an event");
}

}  // namespace cuda
}  // namespace fastlstm
