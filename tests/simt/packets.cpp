// Packets through global memory: each 32-bit word, and each half word that was sent as such,
// becomes visible on its own. A reader sees any of the last writes, but never goes back.
#include <algorithm>
#include <unordered_map>

#include "exchange_state.h"
#include "race.h"
#include "scheduler.h"

namespace simt {

namespace {

constexpr size_t kKept = 4;  // the last writes of a word

struct Write {
  uint32_t value, mask;
};
struct Reader {
  unsigned thread, block, barriers;  // barriers: those of its block when it last looked
  uint64_t seen[2];                  // by half: the last write that it knows of
};
struct Word {
  std::vector<Write> writes;  // the first of both halves
  uint64_t first = 0;         // its number
  std::vector<Reader> readers;

  uint64_t newest() const { return first + writes.size() - 1; }
  uint32_t value(uint64_t low, uint64_t high) const {
    uint32_t found = 0;
    for (size_t j = 0; j < writes.size(); ++j) {
      const uint32_t seen = (first + j <= low ? 0xffffu : 0) | (first + j <= high ? ~0xffffu : 0);
      const uint32_t mask = writes[j].mask & seen;
      found = (found & ~mask) | (writes[j].value & mask);
    }
    return found;
  }
};

std::unordered_map<uint32_t*, Word> words;

Word& word_at(uint32_t* at) {
  Word& word = words[at];
  if (word.writes.empty() || word.value(word.newest(), word.newest()) != *at) {
    word.first += word.writes.size();  // by an ordinary store, or before the launch
    word.writes.assign(1, {*at, ~0u});
  }
  return word;
}

// Appends the running thread where it is new.
Reader& reader_of(Word& word, bool* is_new) {
  for (Reader& r : word.readers)
    if (r.thread == self->id) return r;
  if (is_new) *is_new = true;
  word.readers.push_back({self->id, self->block->rank, 0, {word.first, word.first}});
  return word.readers.back();
}

// What the running thread, or another of its block before a barrier, has seen for certain.
uint64_t seen_before(const Word& word, int half) {
  uint64_t seen = word.first;
  for (const Reader& r : word.readers)
    if (r.thread == self->id ||
        (r.block == self->block->rank && r.barriers < self->block->barriers))
      seen = std::max(seen, r.seen[half]);
  return seen;
}

void send(uint32_t* at, uint32_t value, uint32_t mask) {
  Word& word = word_at(at);
  word.writes.push_back({value, mask});
  *at = (*at & ~mask) | (value & mask);
  Reader& me = reader_of(word, nullptr);
  if (mask & 0xffffu) me.seen[0] = word.newest();
  if (mask & ~0xffffu) me.seen[1] = word.newest();
  me.barriers = self->block->barriers;
  while (word.writes.size() > kKept) {
    const uint32_t kept = word.value(word.first + 1, word.first + 1);
    word.writes.erase(word.writes.begin());
    word.writes[0] = {kept, ~0u};
    ++word.first;
  }
  progress();
}

// One word as the running thread sees it; `changed`: more of it than before, or for the first time.
uint32_t look(uint32_t* at, bool* changed) {
  Word& word = word_at(at);
  Reader& me = reader_of(word, changed);
  uint64_t seen[2];
  for (int half = 0; half < 2; ++half) {
    seen[half] = seen_before(word, half);
    const uint64_t ahead = word.newest() - seen[half];
    if (ahead == 0) continue;
    const bool fresh = order() == Order::fifo || draw() % 2;
    seen[half] += fresh ? ahead : draw() % (ahead + 1);
  }
  // What was sent as a word is seen as a word.
  for (size_t j = 0; j < word.writes.size(); ++j) {
    const uint64_t number = word.first + j;
    if (word.writes[j].mask == ~0u && number <= std::max(seen[0], seen[1]))
      for (uint64_t& s : seen) s = std::max(s, number);
  }
  for (int half = 0; half < 2; ++half) {
    if (seen[half] != me.seen[half]) *changed = true;
    me.seen[half] = seen[half];
  }
  me.barriers = self->block->barriers;
  return word.value(seen[0], seen[1]);
}

uint4 look_at_packet(const void* from, bool* changed) {
  uint32_t* at = static_cast<uint32_t*>(const_cast<void*>(from));
  uint32_t found[4];
  for (int j = 0; j < 4; ++j) found[j] = look(at + j, changed);
  return {found[0], found[1], found[2], found[3]};
}

void check_alignment(const void* place, unsigned bytes, const char* what) {
  if (uintptr_t(place) % bytes != 0)
    fail(std::string(what) + ": an address that " + std::to_string(bytes) + " do not divide");
}

}  // namespace

void forget_packets() { words.clear(); }

uint4 packet_poll(const void* from, const char* file, int line) {
  check_alignment(from, 16, "poll_packet");
  race::access_packet(uintptr_t(from), 16, false, __builtin_return_address(0));
  bool changed = false;
  const uint4 found = look_at_packet(from, &changed);
  if (changed) {
    progress();
    return found;
  }
  yield("poll_packet", line, file);
  changed = false;
  const uint4 later = look_at_packet(from, &changed);
  if (changed) progress();
  return later;
}

void packet_send(void* to, const uint4& value) {
  check_alignment(to, 16, "send_packet");
  race::access_packet(uintptr_t(to), 16, true, __builtin_return_address(0));
  uint32_t* at = static_cast<uint32_t*>(to);
  send(at, value.x, ~0u);
  send(at + 1, value.y, ~0u);
  send(at + 2, value.z, ~0u);
  send(at + 3, value.w, ~0u);
}

void packet_send_word(void* to, uint32_t value) {
  check_alignment(to, 4, "send_word");
  race::access_packet(uintptr_t(to), 4, true, __builtin_return_address(0));
  send(static_cast<uint32_t*>(to), value, ~0u);
}

void packet_send_half_word(void* to, uint16_t value) {
  check_alignment(to, 2, "send_half_word");
  race::access_packet(uintptr_t(to), 2, true, __builtin_return_address(0));
  const bool high = uintptr_t(to) % 4 != 0;
  send(reinterpret_cast<uint32_t*>(uintptr_t(to) & ~uintptr_t(3)), uint32_t(value) << 16 * high,
       high ? ~0xffffu : 0xffffu);
}

}  // namespace simt
