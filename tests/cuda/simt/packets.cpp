// Packets through global memory: each 32-bit word, and each half word that was sent as such,
// becomes visible by itself. A reader sees any of the last writes, but never goes back in time.
#include <algorithm>
#include <unordered_map>

#include "exchange_state.h"
#include "race.h"
#include "scheduler.h"

namespace simt {

namespace {

constexpr size_t kWritesKept = 4;  // of a word, the last ones

struct Write {
  uint32_t value, mask;
};
struct Reader {
  unsigned thread, block, barriers;  // barriers: those that its block had passed at its last look
  uint64_t seen[2];                  // by half: the number of the last write that it has seen
};
struct Word {
  std::vector<Write> writes;  // the first one is of both halves
  uint64_t first = 0;         // its number
  std::vector<Reader> readers;

  uint64_t newest() const { return first + writes.size() - 1; }
  uint32_t value(uint64_t low, uint64_t high) const {
    uint32_t result = 0;
    for (size_t j = 0; j < writes.size(); ++j) {
      const uint32_t seen = (first + j <= low ? 0xffffu : 0) | (first + j <= high ? ~0xffffu : 0);
      const uint32_t mask = writes[j].mask & seen;
      result = (result & ~mask) | (writes[j].value & mask);
    }
    return result;
  }
};

std::unordered_map<uint32_t*, Word> words;

// Which words of packets are late. In turns, each word is late or not by itself, and the words at
// some of a packet's four places are late for all threads while the others are not. By draws for
// each word alone, a whole warp would hardly ever see, say, every first word and not every second
// one.
struct Lag {
  unsigned late_places = 0;  // a bit for each place; 0: each word by itself
  unsigned polls_left = 0;

  void count_poll() {
    if (polls_left-- > 0) return;
    const unsigned threads = std::min(thread_count(), 2048u);
    late_places = late_places == 0 ? unsigned(1 + draw() % 14) : 0;  // neither none nor all
    polls_left = unsigned(draw() % (late_places == 0 ? threads / 4 + 1 : 4 * threads));
  }
  // A poll in vain counts as many, for there may be few threads that still poll.
  void count_vain_poll() { polls_left -= std::min(polls_left, 63u); }

  // How many of the `ahead` writes that a thread has not seen of a word it sees now.
  uint64_t seen_of(uint64_t ahead, const uint32_t* word) const {
    if (order() == Order::fifo) return ahead;
    if (late_places != 0) return late_places >> (uintptr_t(word) / 4 % 4) & 1 ? 0 : ahead;
    return draw() % 2 ? ahead : draw() % (ahead + 1);
  }
} lag;

Word& word_at(uint32_t* at) {
  Word& word = words[at];
  if (word.writes.empty() || word.value(word.newest(), word.newest()) != *at) {
    word.first += word.writes.size();  // written by an ordinary store, or before the launch
    word.writes.assign(1, {*at, ~0u});
  }
  return word;
}

// The running thread as a reader; appends it where it is new.
Reader& reader_of(Word& word, bool* is_new) {
  for (Reader& r : word.readers)
    if (r.thread == self->id) return r;
  if (is_new) *is_new = true;
  word.readers.push_back({self->id, self->block->id, 0, {word.first, word.first}});
  return word.readers.back();
}

// The last write that the running thread, or another of its block before a barrier, has seen.
uint64_t seen_before(const Word& word, int half) {
  uint64_t seen = word.first;
  for (const Reader& r : word.readers)
    if (r.thread == self->id || (r.block == self->block->id && r.barriers < self->block->barriers))
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
  while (word.writes.size() > kWritesKept) {
    const uint32_t kept = word.value(word.first + 1, word.first + 1);
    word.writes.erase(word.writes.begin());
    word.writes[0] = {kept, ~0u};
    ++word.first;
  }
  progress();
}

// A word as the running thread sees it. Sets `changed` where it sees more than before, or looks for
// the first time.
uint32_t look(uint32_t* at, bool* changed) {
  Word& word = word_at(at);
  Reader& me = reader_of(word, changed);
  uint64_t seen[2];
  for (int half = 0; half < 2; ++half) {
    seen[half] = seen_before(word, half);
    const uint64_t ahead = word.newest() - seen[half];
    if (ahead > 0) seen[half] += lag.seen_of(ahead, at);
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
  lag.count_poll();
  uint32_t* at = static_cast<uint32_t*>(const_cast<void*>(from));
  uint32_t values[4];
  for (int j = 0; j < 4; ++j) values[j] = look(at + j, changed);
  return {values[0], values[1], values[2], values[3]};
}

void check_alignment(const void* place, unsigned bytes, const char* what) {
  if (uintptr_t(place) % bytes != 0)
    fail(std::string(what) + ": an address that " + std::to_string(bytes) + " do not divide");
}

}  // namespace

void forget_packets() {
  words.clear();
  lag = {};
}

uint4 packet_poll(const void* from, const char* file, int line) {
  check_alignment(from, 16, "poll_packet");
  race::access_packet(uintptr_t(from), 16, false, __builtin_return_address(0));
  bool changed = false;
  const uint4 packet = look_at_packet(from, &changed);
  if (changed) {
    progress();
    return packet;
  }
  lag.count_vain_poll();
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
