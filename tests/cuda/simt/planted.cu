// Small kernels with planted bugs, which prove that the emulator and its race checker see them.
//
// `exchange` is the pattern of kernels that signal by flags: in every round, each block publishes a
// number, all meet at a counter in global memory, and each sums what the others published. Many of
// its bugs leave the result right on the CPU, whose memory is always in order: only the checker
// tells.
#include <cstdio>

#include "shared/device.cuh"

namespace {

using namespace fastlstm::cuda;

enum Bug {
  kNone,
  kFences,              // no bug: relaxed accesses between fences
  kNoBarrierToArrive,   // a block arrives before all its threads have written
  kNoBarrierAfterWait,  // threads go on before their block has seen the others
  kRelaxedArrive,
  kRelaxedWait,
  kFenceDropped,   // before the relaxed arrival
  kNoFenceToRead,  // after the relaxed wait
  kOneBuffer,      // a round overwrites what others still read
  kWaitTooShort,   // for the round before
  kWaitTooLong,    // for an arrival that never comes
  kFlagNotReset,   // the counter of an earlier launch satisfies the waits
  kCopyNotWaited,  // shared memory read before its asynchronous copy has arrived
  kCopyNotBarred,  // ... before other threads' copies have
  kCopyTooEarly,   // ... overwritten by a copy while others read
  kUninitialised,  // shared memory
  kPastTheEnd,     // of shared memory
  kDivergentBarrier,
  kShuffleOutside,  // from a lane that does not take part
};

constexpr int kBlocks = 4, kThreads = 64, kRounds = 5, kSlot = kThreads;

struct ExchangeArgs {
  Bug bug;
  float *slots, *out;  // (2, kBlocks, kSlot), (kBlocks)
  unsigned* counter;
};

SIMT_UNSEEN unsigned poll_relaxed(const unsigned* flag) {
  simt::poll(flag, *flag, "poll_relaxed");
  simt::relaxed_load(flag);
  return *flag;
}

SIMT_UNSEEN unsigned poll_acquire(const unsigned* flag) {
  simt::poll(flag, *flag, "poll_acquire");
  simt::acquire(flag);
  return *flag;
}

SIMT_UNSEEN void add_release(unsigned* flag) {
  simt::release(flag);
  *flag += 1;
}

void exchange(ExchangeArgs x) {
  FASTLSTM_SHARED_BUFFER(raw);
  float* sums = reinterpret_cast<float*>(raw);
  const int me = threadIdx.x, block = blockIdx.x;
  const bool fences = x.bug == kFences || x.bug == kFenceDropped || x.bug == kNoFenceToRead;
  float sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    float* slots = x.slots + (x.bug == kOneBuffer ? 0 : round % 2) * kBlocks * kSlot;
    slots[block * kSlot + me] = float(round + block + me);
    if (x.bug != kNoBarrierToArrive) __syncthreads();
    if (me == 0) {
      unsigned target = unsigned(round + 1) * kBlocks;
      if (x.bug == kWaitTooShort) target -= kBlocks;
      if (x.bug == kWaitTooLong) target += 1;
      if (fences) {
        if (x.bug != kFenceDropped) __threadfence();
        atomicAdd(x.counter, 1u);
        while (poll_relaxed(x.counter) < target) {
        }
        if (x.bug != kNoFenceToRead) __threadfence();
      } else {
        if (x.bug == kRelaxedArrive)
          atomicAdd(x.counter, 1u);
        else
          add_release(x.counter);
        while ((x.bug == kRelaxedWait ? poll_relaxed : poll_acquire)(x.counter) < target) {
        }
      }
    }
    if (x.bug != kNoBarrierAfterWait) __syncthreads();
    for (int other = 0; other < kBlocks; ++other) sum += slots[other * kSlot + me];
  }
  sums[me] = sum;
  __syncthreads();
  if (me == 0) {
    float all = 0;
    for (int j = 0; j < kThreads; ++j) all += sums[j];
    x.out[block] = all;
  }
}

struct SharedArgs {
  Bug bug;
  const float* from;  // (kRounds, kThreads * 4)
  float* out;
};

// Every thread copies 16 bytes to shared memory; its neighbour reads them.
void shared_memory(SharedArgs x) {
  FASTLSTM_SHARED_BUFFER(raw);
  float* values = reinterpret_cast<float*>(raw);
  const int me = threadIdx.x, next = (me + 1) % kThreads;
  float sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    if (x.bug != kUninitialised)
      copy_async(values + 4 * me, x.from + (round * kThreads + me) * 4, 16);
    commit_async();
    if (x.bug != kCopyNotWaited) wait_async<0>();
    if (x.bug == kDivergentBarrier && me == 0)
      __syncthreads();
    else if (x.bug != kCopyNotBarred)
      __syncthreads();
    if (x.bug == kCopyNotWaited) sum += values[4 * me];
    sum += values[4 * (x.bug == kPastTheEnd ? me + kThreads : next)];
    if (x.bug == kCopyNotWaited) wait_async<0>();
    if (x.bug != kCopyTooEarly) __syncthreads();
  }
  if (x.bug == kShuffleOutside) {
    if (me % 32 < 16) sum += __shfl_xor_sync(0xffffu, sum, 16) * 0;
  }
  x.out[me] = sum;
}

struct Numbers {
  Numbers(size_t count, const char* name) : values(count, 0.f) {
    simt::track(values.data(), count * sizeof(float), name);
  }
  ~Numbers() { simt::untrack(values.data()); }
  std::vector<float> values;
};

}  // namespace

// Runs one bug's kernel under a schedule. 0: result right, 1: wrong, 2: it did not end well.
extern "C" __attribute__((visibility("default"))) int simt_planted(int bug, int order,
                                                                   uint64_t seed, int races,
                                                                   int64_t* races_found,
                                                                   char* message) {
  simt::Stream stream;
  stream.config.order = simt::Order(order);
  stream.config.seed = seed;
  stream.config.races = races != 0;
  bool right = true;
  if (bug < kCopyNotWaited) {
    Numbers slots(2 * kBlocks * kSlot, "slots"), out(kBlocks, "out");
    unsigned counter = 0;
    for (int launches = 0; launches < 2; ++launches) {
      if (bug != kFlagNotReset) counter = 0;
      const ExchangeArgs args{Bug(bug), slots.values.data(), out.values.data(), &counter};
      launch(exchange, dim3(kBlocks), kThreads, kThreads * sizeof(float), &stream, args);
      float expected = 0;
      for (int round = 0; round < kRounds; ++round)
        for (int j = 0; j < kBlocks * kThreads; ++j)
          expected += float(round + j / kThreads + j % kThreads);
      for (float x : out.values) right &= x == expected;
    }
  } else {
    Numbers from(kRounds * kThreads * 4, "from"), out(kThreads, "out");
    for (size_t j = 0; j < from.values.size(); ++j) from.values[j] = float(j);
    const SharedArgs args{Bug(bug), from.values.data(), out.values.data()};
    launch(shared_memory, dim3(1), kThreads, kThreads * 16, &stream, args);
    for (int me = 0; me < kThreads; ++me) {
      float expected = 0;
      for (int round = 0; round < kRounds; ++round)
        expected += float((round * kThreads + (me + 1) % kThreads) * 4);
      right &= out.values[me] == expected;
    }
  }
  *races_found = stream.races;
  snprintf(message, 512, "%s", (stream.error.empty() ? stream.first_race : stream.error).c_str());
  return !stream.error.empty() ? 2 : !right;
}
