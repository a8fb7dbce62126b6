// A team on its own: every piece of every share is done once, by threads that come early, late or
// never, and what one share wrote the next one reads. Prints nothing if all is right.
#include "cpu/team.h"

#include <stdio.h>
#include <stdlib.h>

#include <chrono>
#include <thread>
#include <vector>

using fastlstm::Team;

namespace {

unsigned drawn(unsigned& state) { return (state = state * 1664525u + 1013904223u) >> 8; }

void fail(const char* what) {
  printf("%s\n", what);
  exit(1);
}

// Threads add up cells of a row; each step reads what all members wrote in the step before.
void run(int threads, int expected, int64_t steps, int64_t pieces, unsigned seed) {
  Team team(0, 1);
  for (int round = 0; round < 2; ++round) {
    std::vector<int64_t> row(pieces, 0), next(pieces, 0);
    int64_t alone = 0;
    team.begin(steps, expected);
    std::vector<std::thread> workers;
    for (int n = 0; n < threads; ++n)
      workers.emplace_back([&, n] {
        unsigned state = seed + unsigned(n);
        if (drawn(state) % 3 == 0) std::this_thread::yield();
        team.run([&](int64_t s, Team::Member& member) {
          if (s % 5 == 4) return;  // a step without work
          team.share(member, pieces, [&](int64_t j) {
            int64_t sum = 1;
            for (int64_t k = 0; k < pieces; ++k) sum = (sum + row[k]) % 1000003;
            next[j] = sum + j;
            if ((j + s) % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(20));
          });
          team.share_ranges(member, pieces, [&](int64_t first, int64_t last) {
            for (int64_t j = first; j < last; ++j) row[j] = next[j];
          });
          team.share(member, 1, [&](int64_t) { ++alone; });
        });
      });
    for (std::thread& worker : workers) worker.join();
    std::vector<int64_t> right(pieces, 0);
    int64_t worked = 0;
    for (int64_t s = 0; s < steps; ++s) {
      if (s % 5 == 4) continue;
      ++worked;
      int64_t sum = 1;
      for (int64_t k = 0; k < pieces; ++k) sum = (sum + right[k]) % 1000003;
      for (int64_t j = 0; j < pieces; ++j) right[j] = sum + j;
    }
    if (row != right) fail("a step read what another had not written, or a piece was not done");
    if (alone != worked) fail("a single piece was done more than once, or not at all");
  }
}

}  // namespace

int main() {
  unsigned seed = 1;
  for (int threads : {1, 2, 3, 5, 8})
    for (int64_t pieces : {1, 2, 7, 40})
      for (int expected : {1, threads, threads + 1}) run(threads, expected, 12, pieces, ++seed);
}
