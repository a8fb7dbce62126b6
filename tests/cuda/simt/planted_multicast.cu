// A ring that the CTAs of a cluster fill together by multicast, with planted bugs, which prove that
// the emulator sees them. It has the pattern of csrc/cuda/stepwise/wide_step.cuh, in integers.
//
// x is a sequence of blocks; y[rank][i] = sum over blocks of word i times (rank + block + 1). A
// warp's first thread loads: each CTA brings a quarter of every block to all four. Two warps read a
// block from their ring of kDepth slots; a slot is full when its bytes have come, and empty when
// both warps of all CTAs have read it, for then every CTA may overwrite its quarter everywhere.
#include <cstdio>

#include "planted_memory.h"
#include "shared/exchange.cuh"

namespace {

using namespace fastlstm::cuda;

enum Bug {
  kNone,
  kEmptyNotAwaited,  // by the loading thread
  kCtaLeftOut,       // of the ranks of a multicast
  kFullParity,       // wrong, of the wait for a full slot
  kEmptyParity,      // of that for an empty one
  kOwnReadersOnly,   // a slot counts as empty when the CTA's own warps have read it
  kArrivesEarly,     // before the other lanes have read
  kExitsEarly,       // while peers' arrivals are under way
  kNoBarrier,        // after the initialisation
  kRankOutside,      // of the cluster
  kWholeInEveryCta,  // each CTA sends the whole block
};

constexpr unsigned kCluster = 4, kWords = 64, kQuarter = kWords / kCluster, kDepth = 2;
constexpr unsigned kBlocks = 7, kReaders = kWords / 32;

struct Shared {
  uint32_t x[kDepth][kWords];
  Mbarrier full[kDepth], empty[kDepth];
};

struct MulticastArgs {
  Bug bug;
  const uint32_t* x;  // (kBlocks, kWords)
  uint32_t* y;        // (kCluster, kWords)
};

void load(Shared& s, const MulticastArgs& a) {
  const unsigned rank = cluster_rank(), ranks = (1u << kCluster) - 1;
  unsigned to = a.bug == kCtaLeftOut ? ranks & ~2u : a.bug == kRankOutside ? ranks + 1 : ranks;
  const unsigned first = a.bug == kWholeInEveryCta ? 0 : rank * kQuarter;
  const unsigned words = a.bug == kWholeInEveryCta ? kWords : kQuarter;
  for (unsigned k = 0; k < kBlocks; ++k) {
    const unsigned slot = k % kDepth;
    if (k >= kDepth && a.bug != kEmptyNotAwaited)
      wait(&s.empty[slot], (k / kDepth - 1 + (a.bug == kEmptyParity)) & 1, 0);
    arrive_expecting(&s.full[slot], kWords * 4);
    bulk_multicast(s.x[slot] + first, a.x + k * kWords + first, words * 4, &s.full[slot], to);
  }
  for (unsigned k = kBlocks; k < kBlocks + kDepth && a.bug != kExitsEarly; ++k)
    wait(&s.empty[k % kDepth], (k / kDepth - 1) & 1, 0);
}

void multicast_kernel(MulticastArgs a) {
  FASTLSTM_SHARED_BUFFER(buffer);
  Shared& s = *reinterpret_cast<Shared*>(buffer);
  const unsigned me = threadIdx.x, lane = me % 32, rank = cluster_rank();
  if (me == 0) {
    for (unsigned j = 0; j < kDepth; ++j) {
      init(&s.full[j], 1);
      init(&s.empty[j], a.bug == kOwnReadersOnly ? kReaders : kReaders * kCluster);
    }
    publish_mbarriers();
  }
  if (a.bug == kNoBarrier)
    __syncthreads();
  else
    cluster_barrier();
  if (me == kWords) load(s, a);
  if (me >= kWords) return;
  uint32_t sum = 0;
  for (unsigned k = 0; k < kBlocks; ++k) {
    const unsigned slot = k % kDepth;
    wait(&s.full[slot], (k / kDepth + (a.bug == kFullParity)) & 1, 0);
    const bool arrives = a.bug == kOwnReadersOnly ? lane == rank : lane < kCluster;
    if (a.bug == kArrivesEarly && arrives) arrive(remote(&s.empty[slot], lane));
    sum += s.x[slot][me] * (rank + k + 1);
    if (a.bug != kArrivesEarly) __syncwarp();
    if (a.bug != kArrivesEarly && arrives) arrive(remote(&s.empty[slot], lane));
  }
  a.y[rank * kWords + me] = sum;
}

bool is_right(const uint32_t* x, const uint32_t* y) {
  for (unsigned rank = 0; rank < kCluster; ++rank)
    for (unsigned i = 0; i < kWords; ++i) {
      uint32_t sum = 0;
      for (unsigned k = 0; k < kBlocks; ++k) sum += x[k * kWords + i] * (rank + k + 1);
      if (y[rank * kWords + i] != sum) return false;
    }
  return true;
}

}  // namespace

// As simt_planted; `way` is 0.
extern "C" __attribute__((visibility("default"))) int simt_planted_multicast(
    int bug, int, int order, uint64_t seed, int races, int64_t* races_found, char* message) {
  simt::Stream stream;
  stream.config.order = simt::Order(order);
  stream.config.seed = seed;
  stream.config.races = races != 0;
  Words x(kBlocks * kWords, "x"), y(kCluster * kWords, "y");
  for (size_t j = 0; j < x.count; ++j) x.values[j] = uint32_t(j * 2654435761u);
  const MulticastArgs args{Bug(bug), x.values, y.values};
  launch_clusters(multicast_kernel, kCluster, kCluster, kWords + 32, sizeof(Shared), &stream, args);
  return outcome(stream, is_right(x.values, y.values), races_found, message);
}
