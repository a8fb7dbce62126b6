// A kernel of a thread-block cluster with planted bugs, which prove that the emulator sees them.
//
// The pattern of a recurrence, in integers: h[t][i] = x[t][i] + sum over k of h[t-1][k] * weight(i,
// k). A CTA owns kUnits of the kHidden units. Two warps compute: each thread sums a quarter of k
// for one unit, and 16 threads add the quarters and send the new h to all CTAs, into one of two
// buffers, whose halves have an mbarrier each. A third warp loads x into a ring of kDepth slots; a
// slot is full when its bytes have come, and empty again when those 16 threads have read it. The
// new h also leaves for global memory by bulk stores.
#include <cstdio>

#include "planted_memory.h"
#include "shared/exchange.cuh"

namespace {

using namespace fastlstm::cuda;

enum Bug {
  kNone,
  kMissingExpect,  // the bytes of h are not announced
  kWrongParity,    // of the wait for h
  kParityStuck,    // it does not toggle
  kOneBuffer,      // for h
  kSlotReused,     // x is loaded before its slot is empty
  kExitsEarly,     // while peers still write
  kHalfOfK,        // the wait is for one half of h alone
  kBytesTooMany,   // announced
  kBytesTooFew,
  kSourceOverwritten,  // one tile, from which copies may still read
  kStoreNotRead,       // a tile overwritten that bulk stores have not read yet
  kStoreAtExit,        // bulk stores that nobody waited for
  kNoFence,            // before bulk copies
  kMisaligned,         // a bulk copy
  kOddSize,            // of 24 bytes
  kPastTheEnd,         // of a peer's shared memory
  kLoadOfStored,       // x, by a bulk copy of what this kernel has stored
  kNotWaited,          // for x
  kTooManyArrivals,    // at the mbarrier of an empty slot
  kExpectsEarly,       // the bytes of a phase that does not run yet
  kNotPublished,       // mbarriers
  kNoBarrierAfterInit,
  kNotInitialised,
  kInitialisedTwice,
  kOverwritten,     // an mbarrier
  kRankOutside,     // of the cluster
  kParityOfTwo,     // the phase instead of its parity
  kOnlooker,        // a warp waits for phases that may end before it has seen the one before
  kDivergentCount,  // of a named barrier
};

constexpr unsigned kCluster = 4, kUnits = 16, kHidden = kCluster * kUnits, kDepth = 3, kSteps = 7;
constexpr unsigned kWorkers = 64, kThreads = 128, kGroups = 2;

uint32_t weight(unsigned i, unsigned k) { return 2 * i + 5 * k + 1; }

struct Shared {
  uint32_t h[2][kHidden], x[kDepth][kUnits], tile[2][kUnits], sums[kHidden / kUnits][kUnits];
  Mbarrier arrived[2][2], full[kDepth], empty[kDepth];  // arrived: by buffer and half
};

struct ClusterArgs {
  Bug bug;
  bool bulk;    // h is sent by bulk copies
  uint32_t* x;  // (kGroups, kCluster, kSteps, kUnits)
  uint32_t* y;  // as x
};

void start(Shared& s, Bug bug) {
  if (threadIdx.x == 0) {
    for (unsigned j = 0; j < 4 && bug != kNotInitialised; ++j) init(&s.arrived[j / 2][j % 2], 1);
    for (unsigned j = 0; j < kDepth; ++j) {
      init(&s.full[j], 1);
      init(&s.empty[j], kUnits);
    }
    if (bug == kInitialisedTwice) init(&s.full[0], 1);
    if (bug == kOverwritten) s.full[0].state = 0;
    if (bug != kNotPublished) publish_mbarriers();
  }
  if (bug != kNoBarrierAfterInit) cluster_barrier();
}

void load(Shared& s, const ClusterArgs& a, uint32_t* x) {
  if (a.bug == kLoadOfStored) ++x[0];
  for (unsigned t = 0; t < kSteps; ++t) {
    const unsigned slot = t % kDepth;
    if (t >= kDepth && a.bug != kSlotReused) wait(&s.empty[slot], (t / kDepth - 1) & 1, 0);
    arrive_expecting(&s.full[slot], kUnits * 4);
    bulk_load(s.x[slot], x + t * kUnits + (a.bug == kMisaligned),
              a.bug == kOddSize ? 24 : kUnits * 4, &s.full[slot]);
  }
}

// Of one step, by the 16 threads that hold it.
void send(Shared& s, const ClusterArgs& a, unsigned t, const uint32_t* tile) {
  const unsigned me = threadIdx.x, buffer = a.bug == kOneBuffer ? 0 : t & 1, rank = cluster_rank();
  uint32_t* place = &s.h[buffer][rank * kUnits];
  if (a.bug == kPastTheEnd) place = reinterpret_cast<uint32_t*>(&s + 1) - 8;
  Mbarrier* barrier = &s.arrived[buffer][rank / 2];
  if (a.bulk) {
    if (a.bug != kNoFence) fence_async_copies();
    __syncwarp(0xffffu);
    if (me < kCluster) {
      const unsigned peer = me + (a.bug == kRankOutside);
      bulk_send(remote(place, peer), tile, kUnits * 4, remote(barrier, peer));
    }
  } else {
    if (a.bug != kNoFence) fence_async_copies();  // before the bulk store
    __syncwarp(0xffffu);
    const unsigned peer = me / 4 + (a.bug == kRankOutside);
    send_async(remote(place, peer) + me % 4 * 16, reinterpret_cast<const uint4*>(tile)[me % 4],
               remote(barrier, peer));
  }
}

void work(Shared& s, const ClusterArgs& a, uint32_t* y) {
  const unsigned me = threadIdx.x, unit = me % kUnits, quarter = me / kUnits;
  const unsigned rank = cluster_rank(), i = rank * kUnits + unit;
  unsigned announced = kHidden / 2 * 4;
  if (a.bug == kBytesTooMany) announced += 16;
  if (a.bug == kBytesTooFew) announced -= 16;
  auto expect = [&](unsigned buffer) {
    for (int half = 0; half < 2; ++half)
      if (a.bug == kMissingExpect)
        arrive(&s.arrived[buffer][half]);
      else
        arrive_expecting(&s.arrived[buffer][half], announced);
  };
  auto wait_for_h = [&](unsigned t, unsigned half) {
    unsigned parity = t >> 1 & 1;
    if (a.bug == kOneBuffer) parity = t & 1;
    if (a.bug == kWrongParity) parity ^= 1;
    if (a.bug == kParityStuck) parity = 0;
    if (a.bug == kParityOfTwo) parity = t >> 1;
    wait(&s.arrived[a.bug == kOneBuffer ? 0 : t & 1][a.bug == kHalfOfK ? 0 : half], parity, 0);
  };
  if (me == 0) {
    expect(0);
    if (a.bug != kOneBuffer) expect(1);
    if (a.bug == kExpectsEarly) expect(0);
  }
  for (unsigned t = 0; t < kSteps; ++t) {
    uint32_t sum = 0;
    if (t > 0) {
      wait_for_h(t - 1, quarter / 2);
      const uint32_t* h = s.h[a.bug == kOneBuffer ? 0 : (t - 1) & 1];
      for (unsigned k = quarter * kUnits; k < (quarter + 1) * kUnits; ++k)
        sum += h[k] * weight(i, k);
    }
    s.sums[quarter][unit] = sum;
    named_barrier(1, a.bug == kDivergentCount && me < 32 ? 32 : kWorkers);
    if (me == 0 && t > 0 && t + 1 < kSteps) {  // all have seen the end of the phase before
      wait_for_h(t - 1, 1);
      expect((t - 1) & 1);
    }
    if (me < kUnits) {
      const unsigned slot = t % kDepth;
      if (a.bug != kNotWaited) wait(&s.full[slot], t / kDepth & 1, 0);
      uint32_t h = s.x[slot][unit];
      arrive(&s.empty[slot]);
      if (a.bug == kTooManyArrivals && me == 0) arrive(&s.empty[slot]);
      for (unsigned q = 0; q < kHidden / kUnits; ++q) h += s.sums[q][unit];
      uint32_t* tile = s.tile[a.bug == kSourceOverwritten ? 0 : t & 1];
      if (me == 0 && a.bug != kStoreNotRead && a.bug != kSourceOverwritten) bulk_wait_read<1>();
      __syncwarp(0xffffu);
      tile[unit] = h;
      send(s, a, t, tile);
      if (me == 0) {
        bulk_store(y + t * kUnits, tile, kUnits * 4);
        bulk_commit();
      }
    }
    named_barrier(2, kWorkers);
  }
  if (me == 0 && a.bug != kStoreAtExit) bulk_wait_read<0>();
  if (a.bug != kExitsEarly) wait_for_h(kSteps - 1, quarter / 2);
}

void cluster_kernel(ClusterArgs a) {
  FASTLSTM_SHARED_BUFFER(raw);
  Shared& s = *reinterpret_cast<Shared*>(raw);
  start(s, a.bug);
  const size_t begin = size_t(blockIdx.x) * kSteps * kUnits;
  if (threadIdx.x < kWorkers)
    work(s, a, a.y + begin);
  else if (threadIdx.x == kWorkers)
    load(s, a, a.x + begin);
  else if (a.bug == kOnlooker && threadIdx.x == kWorkers + 32)
    for (unsigned t = 0; t < kSteps; ++t) wait(&s.full[t % kDepth], t / kDepth & 1, 0);
  if (a.bug != kExitsEarly) cluster_barrier();  // peers may still read what this CTA sent
}

bool is_right(const uint32_t* x, const uint32_t* y) {
  for (unsigned group = 0; group < kGroups; ++group) {
    uint32_t h[kHidden] = {};
    for (unsigned t = 0; t < kSteps; ++t) {
      uint32_t next[kHidden];
      for (unsigned i = 0; i < kHidden; ++i) {
        const size_t at = ((group * kCluster + i / kUnits) * kSteps + t) * kUnits + i % kUnits;
        next[i] = x[at];
        for (unsigned k = 0; k < kHidden; ++k) next[i] += h[k] * weight(i, k);
        if (y[at] != next[i]) return false;
      }
      for (unsigned i = 0; i < kHidden; ++i) h[i] = next[i];
    }
  }
  return true;
}

}  // namespace

// As simt_planted; `bulk`: h is sent by bulk copies.
extern "C" __attribute__((visibility("default"))) int simt_planted_cluster(
    int bug, int bulk, int order, uint64_t seed, int races, int64_t* races_found, char* message) {
  simt::Stream stream;
  stream.config.order = simt::Order(order);
  stream.config.seed = seed;
  stream.config.races = races != 0;
  Words x(kGroups * kCluster * kSteps * kUnits + 4, "x"), y(x.count, "y");
  for (size_t j = 0; j < x.count; ++j) x.values[j] = uint32_t(j * 2654435761u);
  const ClusterArgs args{Bug(bug), bulk != 0, x.values, y.values};
  launch_clusters(cluster_kernel, kGroups * kCluster, kCluster, kThreads, sizeof(Shared), &stream,
                  args);
  return outcome(stream, is_right(x.values, y.values), races_found, message);
}
