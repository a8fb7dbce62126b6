// A kernel over the grid with planted bugs: CTAs exchange words that carry the phase of their step.
//
// The recurrence of planted_cluster.cu. A CTA sends its part of h[t] into one of two slots, in one
// of three ways; the lowest bit of every word, or half word, tells h[t] from h[t-2]. A thread polls
// the same packet in every step, until all its words have the right phase.
#include "planted_memory.h"
#include "shared/exchange.cuh"

namespace {

using namespace fastlstm::cuda;

enum Bug {
  kNone,
  kPhaseStuck,      // the phase does not toggle
  kFirstWordOnly,   // the others are read before they were validated
  kOneSlot,         // for h[t] and h[t+1]
  kNotZeroed,       // slots that hold the phases of an earlier launch
  kPlainLoad,       // of what was validated
  kPlainStore,      // in the place of a send
  kDataBehindWord,  // ordinary data, read because a word sent after it was there
  kMisaligned,
};
enum Way { kWords, kHalfWords, kPackets };

constexpr unsigned kBlocks = 4, kUnits = 16, kHidden = kBlocks * kUnits, kThreads = kHidden;
constexpr unsigned kSteps = 7;

struct GridArgs {
  Bug bug;
  Way way;
  const uint32_t* x;    // (kSteps, kHidden)
  uint32_t *y, *slots;  // as x; (2, kHidden), zero
};
struct Shared {
  uint32_t h[2][kHidden], sums[kHidden / kUnits][kUnits];
};

uint32_t weight(unsigned i, unsigned k) { return 2 * i + 5 * k + 1; }
uint32_t mask_of(Way way) { return way == kHalfWords ? 0x7fff : 0x7fffffff; }

// Puts h[t] into shared memory.
void receive(const GridArgs& a, unsigned t, uint32_t* h) {
  const unsigned phase = a.bug == kPhaseStuck ? 1 : (t >> 1 & 1) ^ 1;
  const bool halves = a.way == kHalfWords;
  const unsigned packets = kHidden / (halves ? 8 : 4);
  if (threadIdx.x >= packets) return;
  const uint32_t* slot = a.slots + (a.bug == kOneSlot ? 0 : t & 1) * kHidden;
  const uint32_t* from = slot + 4 * threadIdx.x + (a.bug == kMisaligned);
  const uint32_t bits = halves ? 0x10001u : 1u, right = phase * bits;
  uint4 v;
  do v = poll_packet(from);
  while (a.bug == kFirstWordOnly
             ? (v.x ^ right) & bits
             : ((v.x ^ right) | (v.y ^ right) | (v.z ^ right) | (v.w ^ right)) & bits);
  if (a.bug == kPlainLoad) v = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  for (unsigned j = 0; j < 4; ++j)
    if (halves) {
      h[8 * threadIdx.x + 2 * j] = (words[j] & 0xffff) >> 1;
      h[8 * threadIdx.x + 2 * j + 1] = words[j] >> 17;
    } else {
      h[4 * threadIdx.x + j] = words[j] >> 1;
    }
}

void send(const GridArgs& a, unsigned t, uint32_t value) {
  const unsigned i = blockIdx.x * kUnits + threadIdx.x;
  uint32_t* slot = a.slots + (a.bug == kOneSlot ? 0 : t & 1) * kHidden;
  const uint32_t word = value << 1 | (a.bug == kPhaseStuck ? 1 : (t >> 1 & 1) ^ 1);
  if (a.bug == kPlainStore) {
    if (a.way == kHalfWords)
      reinterpret_cast<uint16_t*>(slot)[i] = uint16_t(word);
    else
      slot[i] = word;
  } else if (a.way == kHalfWords) {
    send_half_word(reinterpret_cast<uint16_t*>(slot) + i, uint16_t(word));
  } else if (a.way == kWords) {
    send_word(slot + i, word);
  } else {
    const unsigned lane = threadIdx.x, first = lane / 4 * 4;
    const uint4 packet = {__shfl_sync(0xffffu, word, first), __shfl_sync(0xffffu, word, first + 1),
                          __shfl_sync(0xffffu, word, first + 2),
                          __shfl_sync(0xffffu, word, first + 3)};
    if (lane % 4 == 0) send_packet(slot + i, packet);
  }
}

void grid_kernel(GridArgs a) {
  FASTLSTM_SHARED_BUFFER(raw);
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const unsigned me = threadIdx.x, unit = me % kUnits, quarter = me / kUnits;
  const unsigned i = blockIdx.x * kUnits + unit;
  for (unsigned t = 0; t < kSteps; ++t) {
    uint32_t sum = 0;
    if (t > 0) {
      uint32_t* h = s.h[t & 1];
      receive(a, t - 1, h);
      __syncthreads();
      if (a.bug == kDataBehindWord) h = a.y + (t - 1) * kHidden;
      for (unsigned k = quarter * kUnits; k < (quarter + 1) * kUnits; ++k)
        sum += h[k] * weight(i, k);
    }
    s.sums[quarter][unit] = sum;
    __syncthreads();
    if (me >= kUnits) continue;
    uint32_t h = a.x[t * kHidden + i];
    for (unsigned q = 0; q < kHidden / kUnits; ++q) h += s.sums[q][unit];
    h &= mask_of(a.way);
    a.y[t * kHidden + i] = h;
    if (t + 1 < kSteps) send(a, t, h);
  }
}

bool is_right(Way way, const uint32_t* x, const uint32_t* y) {
  uint32_t h[kHidden] = {};
  for (unsigned t = 0; t < kSteps; ++t) {
    uint32_t next[kHidden];
    for (unsigned i = 0; i < kHidden; ++i) {
      next[i] = x[t * kHidden + i];
      for (unsigned k = 0; k < kHidden; ++k) next[i] += h[k] * weight(i, k);
      next[i] &= mask_of(way);
      if (y[t * kHidden + i] != next[i]) return false;
    }
    std::memcpy(h, next, sizeof h);
  }
  return true;
}

}  // namespace

// As simt_planted; `way`: how h is sent.
extern "C" __attribute__((visibility("default"))) int simt_planted_grid(int bug, int way, int order,
                                                                        uint64_t seed, int races,
                                                                        int64_t* races_found,
                                                                        char* message) {
  simt::Stream stream;
  stream.config.order = simt::Order(order);
  stream.config.seed = seed;
  stream.config.races = races != 0;
  Words x(kSteps * kHidden, "x"), y(x.count, "y"), slots(2 * kHidden, "slots");
  bool right = true;
  for (int launches = 0; launches < 2; ++launches) {
    for (size_t j = 0; j < x.count; ++j) x.values[j] = uint32_t((j + launches) * 2654435761u);
    if (bug != kNotZeroed) zero_async(slots.values, slots.count * 4, &stream);
    std::memset(y.values, 0, y.count * 4);
    const GridArgs args{Bug(bug), Way(way), x.values, y.values, slots.values};
    launch_cooperative(grid_kernel, dim3(kBlocks), kThreads, sizeof(Shared), &stream, args);
    right &= is_right(Way(way), x.values, y.values);
  }
  return outcome(stream, right, races_found, message);
}
