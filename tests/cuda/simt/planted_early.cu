// Steps like those of stepwise, one launch each, which begin early: what they may do before
// wait_for_primary(), and bugs that the race checker must see there.
//
// Each step adds, for every thread of a CTA, what all threads of all CTAs stored in the step
// before. Weights are written before the first step, or by a kernel that the first step follows.
#include "planted_memory.h"
#include "race.h"
#include "shared/device.cuh"

namespace {

using namespace fastlstm::cuda;

enum Bug {
  kNone,
  kTriggersFirst,  // no bug: the next step may begin before this one has waited
  kNeverTriggers,  // no bug
  kNobodyWaits,
  kSomeWait,            // one thread of each CTA, and no barrier follows
  kReadsFirst,          // h, before the wait
  kCopiesFirst,         // ... by an asynchronous copy
  kReadsTwoBack,        // h of two steps ago, which may still run
  kWritesFirst,         // scratch, which the step before reads
  kWritesTwoBack,       // ... which the step two back reads
  kReadsWeights,        // which the kernel before the first step writes
  kReadsProduct,        // of a library's kernel
  kWritesUnderProduct,  // what a library's kernel reads
};

constexpr int kBlocks = 3, kThreads = 32, kSteps = 6, kCount = kBlocks * kThreads;

struct StepArgs {
  Bug bug;
  int step;
  const uint32_t* weights;                    // (kCount)
  uint32_t *h, *scratch, *product, *operand;  // (kSteps + 1, kCount), then (kCount) each
};

// Keeps a read whose result is not needed.
void use(uint32_t x) { asm volatile("" : : "r"(x)); }

void step(StepArgs x) {
  FASTLSTM_SHARED_BUFFER(raw);
  uint32_t* copied = reinterpret_cast<uint32_t*>(raw);
  const int me = threadIdx.x, at = blockIdx.x * kThreads + me;
  const uint32_t* before = x.h + x.step * kCount;
  const uint32_t weight = x.weights[at];
  uint32_t sum = 0;
  const bool scratches = x.bug == kWritesFirst || (x.bug == kWritesTwoBack && x.step % 2 == 0);
  if (x.bug == kReadsFirst) use(before[at]);
  if (x.bug == kCopiesFirst && me % 4 == 0) copy_async(copied + me, before + at, 16);
  commit_async();
  if (x.bug == kReadsTwoBack && x.step > 1) use(x.h[(x.step - 1) * kCount + at]);
  if (x.bug == kReadsProduct) use(x.product[at]);
  if (scratches) x.scratch[at] = me;
  if (x.bug == kWritesUnderProduct) x.operand[at] = me;
  const bool first = x.bug == kTriggersFirst || x.bug == kReadsTwoBack || x.bug == kWritesTwoBack;
  if (first) start_dependents();
  if (x.bug != kNobodyWaits && (x.bug != kSomeWait || me == 0)) wait_for_primary();
  if (!first && x.bug != kNeverTriggers) start_dependents();
  wait_async<0>();
  if (x.bug != kSomeWait) __syncthreads();
  for (int j = 0; j < kCount; ++j) sum += before[j];
  if (x.bug == kCopiesFirst) sum += copied[me] - before[at];
  if (scratches) use(x.scratch[at - me + kThreads - 1 - me]);
  x.h[(x.step + 1) * kCount + at] = sum + weight;
}

struct PrepareArgs {
  uint32_t *weights, *h;
};
void prepare(PrepareArgs x) {
  const int at = blockIdx.x * kThreads + threadIdx.x;
  x.weights[at] = uint32_t(at) * 2654435761u;
  x.h[at] = 1;
}

bool is_right(const uint32_t* h) {
  for (int s = 0; s < kSteps; ++s) {
    uint32_t sum = 0;
    for (int j = 0; j < kCount; ++j) sum += h[s * kCount + j];
    for (int j = 0; j < kCount; ++j)
      if (h[(s + 1) * kCount + j] != sum + uint32_t(j) * 2654435761u) return false;
  }
  return true;
}

// How far the primary was, as each of the dependents' CTAs sees it.
struct StartArgs {
  int *triggered, *ended, *at_start, *after_wait;  // counts of the primary's CTAs, by CTA
  bool primary;
};
SIMT_UNSEEN void start(StartArgs x) {
  if (x.primary) {
    simt::yield("start", __LINE__);
    ++*x.triggered;
    start_dependents();
    for (int j = 0; j < 3; ++j) simt::yield("start", __LINE__);
    ++*x.ended;
    return;
  }
  x.at_start[blockIdx.x] = *x.triggered == kBlocks ? *x.ended : -1;
  wait_for_primary();
  x.after_wait[blockIdx.x] = *x.ended;
}

}  // namespace

// As simt_planted.
extern "C" __attribute__((visibility("default"))) int simt_planted_early(int bug, int order,
                                                                         uint64_t seed, int races,
                                                                         int64_t* races_found,
                                                                         char* message) {
  simt::Stream stream;
  stream.config.order = simt::Order(order);
  stream.config.seed = seed;
  stream.config.races = races != 0;
  stream.overlaps = true;
  Words weights(kCount, "weights"), h((kSteps + 1) * kCount, "h"), scratch(kCount, "scratch"),
      product(kCount, "product"), operand(kCount, "operand");
  launch(prepare, dim3(kBlocks), kThreads, 0, &stream, PrepareArgs{weights.values, h.values});
  for (int s = 0; s < kSteps; ++s) {
    if (bug == kReadsProduct || bug == kWritesUnderProduct)
      stream.run_library([&] {
        simt::race::access(uintptr_t(operand.values), 4 * kCount, false, nullptr);
        simt::race::access(uintptr_t(product.values), 4 * kCount, true, nullptr);
      });
    // What a step reads before its wait is there when the first step begins.
    const Begin begin = s == 0 && bug != kReadsWeights ? Begin::late : Begin::early;
    const StepArgs args{Bug(bug),      s, weights.values, h.values, scratch.values, product.values,
                        operand.values};
    launch(step, dim3(kBlocks), kThreads, 4 * kThreads, &stream, args, begin);
  }
  stream.finish();
  return outcome(stream, is_right(h.values), races_found, message);
}

// How many of the primary's CTAs had ended when each of the dependent's began (-1: not all had
// called start_dependents) and behind its wait.
extern "C" __attribute__((visibility("default"))) int simt_early_starts(int order, uint64_t seed,
                                                                        int* at_start,
                                                                        int* after_wait) {
  simt::Stream stream;
  stream.config.order = simt::Order(order);
  stream.config.seed = seed;
  stream.overlaps = true;
  int triggered = 0, ended = 0;
  StartArgs args{&triggered, &ended, at_start, after_wait, true};
  launch(start, dim3(kBlocks), 1, 0, &stream, args);
  args.primary = false;
  launch(start, dim3(kBlocks), 1, 0, &stream, args, Begin::early);
  stream.finish();
  return stream.error.empty() ? 0 : 2;
}
