// A forward CTA's product with h by tensor cores, and the partial sums of its warps.
//
// The 16 bytes that a thread polls are its B fragments of two mma: the order of K within a slab is
// the same in both operands, whatever it is. Of a block of weights the first mma multiplies the
// gates i and f of eight units, the second g and o, so that a thread's accumulators are all gates
// of its cells.
//
// The code of a step is kept short: beyond some 12 KB its instructions are fetched anew in every
// step. So what is rare (a NaN, a sequence that enters late) has no code of its own in every slab.
#pragma once

#include "forward_weights.cuh"

namespace fastlstm {
namespace cuda {

// Slabs that are loaded ahead where a warp has many sums: what registers hold beside them without
// spilling, by compiler target.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kAheadOfBlocks = 1;
#else
constexpr int kAheadOfBlocks = 2;
#endif

template <class S, int kShape>
class GridForwardProduct : GridForwardWeights<TensorGrid<kShape>> {
  typedef GridForwardWeights<TensorGrid<kShape>> Weights;
  using Weights::slabs_;

 public:
  typedef S Storage;
  typedef PhaseCode<MmaElement<S>> Code;
  typedef FastMath Math;
  using Weights::kBlocks, Weights::kGrid, Weights::kSequences, Weights::offset;
  static constexpr ForwardLayout kLayout = forward_layout(kGrid);
  static constexpr int kTiles = kGrid.tiles, kSlabs = kGrid.slabs;
  // Where there are few independent sums, each is split in two chains, and more loads are in
  // flight.
  static constexpr int kChains = kBlocks * kTiles <= 2 ? 2 : 1;
  static constexpr int kAhead = kTiles == 1    ? 4
                                : kTiles == 4  ? 1
                                : kBlocks == 2 ? 3
                                               : kAheadOfBlocks;
  static constexpr bool kHandsOver = false;
  typedef float Sums[kChains][kBlocks][2][kTiles][4];

  using Weights::Weights;

  // sums += weights times h. The first polls are issued before meanwhile(), which sets `sums`, and
  // their words are looked at after it. It returns the sequences that enter late: the other CTAs
  // sent zeros for them, and their h is in the packets that h0() returns.
  template <class Meanwhile, class FirstHidden>
  __device__ __forceinline__ void multiply(Sums& sums, HiddenOperand h, uint64_t limit,
                                           Meanwhile&& meanwhile, FirstHidden&& h0) const {
    SequenceRange late{0, 0};
    uint32_t kept[kTiles];  // bits of each tile's words that are multiplied
#pragma unroll
    for (int j = 0; j < kTiles; ++j) kept[j] = ~h.check;
    bool first = true;
    // A second time for sequences that enter late.
#pragma unroll 1
    for (;;) {
      const int slabs = h.packets ? slabs_ : 0;
      uint4 v[kAhead][kTiles];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (k < slabs) load(h.packets, k, v[k]);
      if (first) late = meanwhile();
      const uint32_t above = multiply_slabs(sums, h, slabs, kept, v, limit);
      if constexpr (Code::kAboveOne != 0)
        if (__any_sync(~0u, (above & h.check) != 0)) put_nans(sums, h);
      if (!first || late.begin >= late.end) break;
      first = false;
      h = {h0(), 0, 0};
      const int lane = recomputed_thread() % 32;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int n = j * 8 + lane / 4;
        kept[j] = late.begin <= n && n < late.end ? ~0u : 0u;
      }
    }
    if (kChains == 2) {
#pragma unroll
      for (int j = 0; j < kBlocks * 2 * kTiles * 4; ++j)
        (&sums[0][0][0][0][0])[j] += (&sums[kChains - 1][0][0][0][0])[j];
    }
  }

 private:
  using Weights::place;
  __device__ __forceinline__ static void load(const unsigned char* h, int k, uint4 (&v)[kTiles]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) v[j] = poll_packet(h + place(k, j));
  }

  // Returns bits that are set, among those of the phase, where an element was above 1.
  __device__ __forceinline__ uint32_t multiply_slabs(Sums& sums, const HiddenOperand& h, int slabs,
                                                     const uint32_t (&kept)[kTiles],
                                                     uint4 (&v)[kAhead][kTiles],
                                                     uint64_t limit) const {
    uint32_t above = 0;
#pragma unroll
    for (int k = 0; k < kSlabs; ++k) {
      if (k >= slabs) break;
      uint4(&packets)[kTiles] = v[k % kAhead];
      if (__any_sync(~0u, (off_phase(packets, h.phase) & h.check) != 0)) {
        PollingPatience patience(limit);
        do {
#pragma unroll
          for (int d = 0; d < kAhead; ++d) {
            if (k + d >= kSlabs) continue;
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
              uint4& packet = v[(k + d) % kAhead][j];
              const uint32_t off = k + d < slabs ? off_phase(packet, h.phase) & h.check : 0;
              poll_packet_if(off, h.packets + place(k + d, j), packet);
            }
          }
          patience.check();
        } while (__any_sync(~0u, (off_phase(packets, h.phase) & h.check) != 0));
      }
      uint4 b[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        b[j] = make_uint4(packets[j].x & kept[j], packets[j].y & kept[j], packets[j].z & kept[j],
                          packets[j].w & kept[j]);
        above |= above_one(b[j]);
      }
      // The next load is issued before the products or, where registers are short, after them.
      const bool loads = k + kAhead < kSlabs && k + kAhead < slabs;
      if (kTiles < 4 && loads) load(h.packets, k + kAhead, packets);
      add(sums, k, b);
      if (kTiles >= 4 && loads) load(h.packets, k + kAhead, packets);
    }
    return above;
  }

  // Of words without their phase: elements above 1 stand for NaNs, and set the phase's bits.
  __device__ __forceinline__ static uint32_t above_one(const uint4& b) {
    constexpr uint32_t kAbove = Code::kAboveOne;
    if (kAbove == 0) return 0;
    return (b.x + kAbove) | (b.y + kAbove) | (b.z + kAbove) | (b.w + kAbove);
  }
  // Makes NaNs of the sums of sequences whose h has one. No other CTA overwrites h before this one
  // has ended its product.
  __device__ __forceinline__ void put_nans(Sums& sums, const HiddenOperand& h) const {
    const int lane = recomputed_thread() % 32;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      uint32_t above = 0;
#pragma unroll 1
      for (int k = 0; k < slabs_; ++k) {
        uint4 v = poll_packet(h.packets + place(k, j));
        v = make_uint4(v.x & ~h.check, v.y & ~h.check, v.z & ~h.check, v.w & ~h.check);
        above |= above_one(v);
      }
      const uint32_t lanes = __ballot_sync(~0u, (above & h.check) != 0);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = lane % 4 * 2 + e;  // the sequence's lanes are 4 * n to 4 * n + 3
        if ((lanes >> 4 * n & 15) == 0) continue;
#pragma unroll
        for (int m = 0; m < kBlocks; ++m)
#pragma unroll
          for (int tile = 0; tile < 2; ++tile)
            sums[0][m][tile][j][e] = sums[0][m][tile][j][2 + e] = float_of(0x7fffffffu);
      }
    }
  }

  __device__ __forceinline__ void add(Sums& sums, int k, const uint4 (&b)[kTiles]) const {
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const uint4 w = this->fragment(k * kBlocks + m, step * 2 + tile);
          const uint32_t a[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            const uint32_t x[2] = {step ? b[n].z : b[n].x, step ? b[n].w : b[n].y};
            mma(sums[step * (kChains - 1)][m][tile][n], a, x, MmaElement<S>());
          }
        }
  }
};

// ---- partial sums ----
//
// All eight warps have partial sums of every cell; one of them, the cell's owner, adds them. A
// warp's cells are numbered by (block, tile of sequences, one of two sequences), and an owner has
// `cells` successive ones.
template <class Product>
class PartialSums {
 public:
  static constexpr ForwardLayout kLayout = Product::kLayout;
  static constexpr int kCells = kLayout.cells, kOwners = kLayout.owners, kParts = kLayout.parts;
  static constexpr int kOwnerBytes = kLayout.partial_bytes / kOwners;

  __device__ __forceinline__ explicit PartialSums(unsigned char* shared)
      : warp_(warp_of_thread()), partial_(reinterpret_cast<float4*>(shared)) {}

  // Sums of an owner's cells begin with what is added to them; all others begin with zeros.
  __device__ __forceinline__ void begin(typename Product::Sums& sums,
                                        const float (&initial)[kCells][4]) const {
    if constexpr (Product::kHandsOver) {
      memcpy(sums, initial, sizeof sums);
    } else {
#pragma unroll
      for (int m = 0; m < Product::kBlocks; ++m)
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
#pragma unroll
          for (int j = 0; j < Product::kTiles; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int x = cell(m, j, i % 2);
              sums[Product::kChains - 1][m][tile][j][i] = 0;
              sums[0][m][tile][j][i] =
                  x / kCells == warp_ ? initial[x % kCells][tile * 2 + i / 2] : 0.0f;
            }
    }
  }
  // Before a barrier: hands the sums of all cells to their owners. `gates` (i, f, g, o of each
  // cell) becomes what an owner keeps: its own sums where a cell's place has one part less than
  // there are warps, or, where the product has handed them over, what is added to them.
  __device__ __forceinline__ void hand_over(const typename Product::Sums& sums,
                                            float (&gates)[kCells][4]) const {
    if constexpr (Product::kHandsOver) {
      memcpy(gates, sums, sizeof gates);
    } else {
      // Indices in warps below the owner, and above it.
      uint32_t below = warp_ * 32 + lane_of_thread();
      if (kParts < kGridWarps) pin(below);  // else each owner's would be kept in a register
      const uint32_t above = below - 32;
#pragma unroll
      for (int m = 0; m < Product::kBlocks; ++m)
#pragma unroll
        for (int j = 0; j < Product::kTiles; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int x = cell(m, j, e), owner = x / kCells, r = x % kCells;
            const float i = sums[0][m][0][j][e], f = sums[0][m][0][j][2 + e],
                        g = sums[0][m][1][j][e], o = sums[0][m][1][j][2 + e];
            if (kParts < kGridWarps && owner == warp_)
              gates[r][0] = i, gates[r][1] = f, gates[r][2] = g, gates[r][3] = o;
            else
              partial_[(kParts == kGridWarps || warp_ < owner ? below : above) + x * kParts * 32] =
                  make_float4(i, f, g, o);
          }
    }
  }
  // Behind it, in an owner.
  __device__ __forceinline__ void add_parts(float (&gates)[kCells][4]) const {
    constexpr bool kKeeps = Product::kHandsOver || kParts < kGridWarps;
    const float4* from = partial_ + warp_ * kCells * kParts * 32 + lane_of_thread();
#pragma unroll
    for (int k = 0; k < kParts; ++k)
#pragma unroll
      for (int r = 0; r < kCells; ++r) {
        const float4 sum = from[(r * kParts + k) * 32];
        if (!kKeeps && k == 0)
          gates[r][0] = sum.x, gates[r][1] = sum.y, gates[r][2] = sum.z, gates[r][3] = sum.w;
        else
          gates[r][0] += sum.x, gates[r][1] += sum.y, gates[r][2] += sum.z, gates[r][3] += sum.w;
      }
  }

  // Whether this thread owns cells; their unit in the CTA, and the sequence of each in the group.
  __device__ __forceinline__ bool owns() const { return warp_ < kOwners; }
  __device__ __forceinline__ static int unit(unsigned thread) {
    return int(thread / 32 * kCells / (2 * Product::kTiles) * 8 + thread % 32 / 4);
  }
  __device__ __forceinline__ static int sequence(int r, unsigned thread) {
    const unsigned x = thread / 32 * kCells + r;
    return int(x / 2 % Product::kTiles * 8 + thread % 4 * 2 + x % 2);
  }

 private:
  __device__ __forceinline__ static constexpr int cell(int block, int tile, int e) {
    return (block * Product::kTiles + tile) * 2 + e;
  }

  const int warp_;
  float4* partial_;
};

}  // namespace cuda
}  // namespace fastlstm
