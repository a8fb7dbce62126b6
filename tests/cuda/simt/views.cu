// Records what threads see of copies and packets that are in flight, for test_emulated_exchange.py.
#include "planted_memory.h"
#include "shared/exchange.cuh"

namespace {

using namespace fastlstm::cuda;

constexpr unsigned kCopied = 64, kCopies = 8, kPacket = 4;  // words of a copy; copies

struct ViewArgs {
  const uint32_t* from;
  uint32_t* seen;  // (looks, 1 + kCopies) or (looks, kPacket)
  unsigned looks;
};

// Records, at each look, whether the mbarrier's phase has ended, and how many words of each copy
// have arrived (all words of the sources are 1).
SIMT_UNSEEN void look_at_copies(ViewArgs a) {
  FASTLSTM_SHARED_BUFFER(raw);
  uint32_t* to = reinterpret_cast<uint32_t*>(raw);
  Mbarrier* barrier = reinterpret_cast<Mbarrier*>(to + kCopies * kCopied);
  init(barrier, 1);
  publish_mbarriers();
  arrive_expecting(barrier, kCopies * kCopied * 4);
  for (unsigned c = 0; c < kCopies; ++c)
    bulk_load(to + c * kCopied, a.from + c * kCopied, kCopied * 4, barrier);
  for (unsigned look = 0; look < a.looks; ++look) {
    uint32_t* seen = a.seen + look * (1 + kCopies);
    for (unsigned j = 0; j < kCopies * kCopied; ++j) seen[1 + j / kCopied] += to[j] == 1;
    seen[0] = try_wait(barrier, 0);
  }
  wait(barrier, 0, 0);
}

// Block 0 sends packets of 1, 2, 3, ... and block 1 records what it polls. Words 2 and 3 are sent
// as half words.
void look_at_packets(ViewArgs a) {
  uint32_t* place = const_cast<uint32_t*>(a.from);
  for (uint32_t look = 0; look < a.looks; ++look) {
    if (blockIdx.x == 0) {
      const uint32_t n = look + 1, both = n << 16 | n;
      send_word(place, n);
      send_word(place + 1, both);
      for (unsigned half = 0; half < 4; ++half)
        send_half_word(reinterpret_cast<uint16_t*>(place + 2) + half, uint16_t(n));
      simt::yield("a test", __LINE__);
    } else {
      const uint4 v = poll_packet(place);
      const uint32_t words[kPacket] = {v.x, v.y, v.z, v.w};
      for (unsigned j = 0; j < kPacket; ++j) a.seen[look * kPacket + j] = words[j];
    }
  }
}

int run(void (*kernel)(ViewArgs), unsigned blocks, int order, uint64_t seed, unsigned looks,
        unsigned words, uint32_t* seen, char* message) {
  simt::Stream stream;
  stream.config.order = simt::Order(order);
  stream.config.seed = seed;
  Words from(kCopies * kCopied, "from");
  for (size_t j = 0; j < from.count; ++j) from.values[j] = kernel == look_at_copies;
  std::memset(seen, 0, looks * words * 4);
  const ViewArgs args{from.values, seen, looks};
  launch_cooperative(kernel, dim3(blocks), 1, 4096, &stream, args);
  int64_t races;
  return outcome(stream, true, &races, message);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int simt_views_of_copies(int order, uint64_t seed,
                                                                unsigned looks, uint32_t* seen,
                                                                char* message) {
  return run(look_at_copies, 1, order, seed, looks, 1 + kCopies, seen, message);
}
__attribute__((visibility("default"))) int simt_views_of_packets(int order, uint64_t seed,
                                                                 unsigned looks, uint32_t* seen,
                                                                 char* message) {
  return run(look_at_packets, 2, order, seed, looks, kPacket, seen, message);
}
// A launch of an empty kernel.
__attribute__((visibility("default"))) int simt_launch_clusters(unsigned ctas, unsigned cluster,
                                                                unsigned threads, unsigned shared,
                                                                char* message) {
  simt::Stream stream;
  int64_t races;
  launch_clusters(
      +[](unsigned) { cluster_barrier(); }, ctas, cluster, threads, shared, &stream, 0u);
  return outcome(stream, true, &races, message);
}

}  // extern "C"
