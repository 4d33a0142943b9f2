// Memory in several nodes (NUMA), each nearer to some processors than to others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace miaotui {

// Where a thread runs: the processors it may be on, and the node of the memory beside them.
struct Seat {
  int node = 0;
  std::vector<int> cpus;
};

// The next `bytes` of a stretch of memory are read by a thread on `node`.
struct Reader {
  size_t bytes;
  int node;
};

// Moves a stretch of memory to those who read it. Huge pages stay whole and go to him who reads their middle. What the
// kernel refuses to move stays where it is.
void move_to_readers(const uint8_t* begin, const std::vector<Reader>& readers);

}  // namespace miaotui
