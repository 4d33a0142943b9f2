#include "numa.h"

#include <algorithm>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace miaotui {

#ifdef __linux__
namespace {

constexpr uintptr_t kPage = 4 << 10, kHugePage = 2 << 20;
constexpr unsigned kMove = 2;  // MPOL_MF_MOVE: pages that no other process has

// The pages at begin, begin + step, … below end. One that was never read has no place yet, so each is read first. Ends
// where the call is refused altogether, as in a container without CAP_SYS_NICE.
void move(uintptr_t begin, uintptr_t end, uintptr_t step, int node) {
  constexpr size_t kAtOnce = 4096;
  const std::vector<int> nodes(kAtOnce, node);
  std::vector<int> status(kAtOnce);
  std::vector<void*> pages;
  while (begin < end) {
    pages.clear();
    for (; begin < end && pages.size() < kAtOnce; begin += step) {
      pages.push_back(reinterpret_cast<void*>(begin));
      static_cast<void>(*static_cast<const volatile uint8_t*>(pages.back()));
    }
    if (syscall(SYS_move_pages, 0, pages.size(), pages.data(), nodes.data(), status.data(), kMove) < 0) return;
  }
}

}  // namespace

void move_to_readers(const uint8_t* begin, const std::vector<Reader>& readers) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
  uintptr_t end = first;
  for (const Reader& reader : readers) end += reader.bytes;
  auto border = [&](uintptr_t at) { return std::clamp((at + kHugePage / 2) / kHugePage * kHugePage, first, end); };
  uintptr_t at = first;
  for (const Reader& reader : readers) {
    const uintptr_t from = border(at), to = border(at += reader.bytes);
    move(from, to, kHugePage, reader.node);  // huge pages, of which one address moves all; then what lies on small ones
    move(from, to, kPage, reader.node);
  }
}
#else
void move_to_readers(const uint8_t*, const std::vector<Reader>&) {}
#endif

}  // namespace miaotui
