// Zeroed, page-aligned memory that costs nothing until it is touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#else
#include <cstdlib>
#include <cstring>
#endif

namespace miaotui {

// Huge pages for what is streamed whole; small ones for what is large on paper and touched here and there.
enum class Pages { small, huge };

class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes, Pages pages = Pages::huge) : bytes_(bytes) {
    if (bytes == 0) return;
#if defined(__unix__) || defined(__APPLE__)
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (pages == Pages::huge) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    data_ = static_cast<uint8_t*>(p);
#else
    (void)pages;
    data_ = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(4096)));
    std::memset(data_, 0, bytes);
#endif
  }
  ~Memory() { release(); }
  Memory(Memory&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr, other.bytes_ = 0;
  }
  Memory& operator=(Memory&& other) noexcept {
    if (this != &other) {
      release();
      data_ = other.data_, bytes_ = other.bytes_;
      other.data_ = nullptr, other.bytes_ = 0;
    }
    return *this;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void release() {
    if (!data_) return;
#if defined(__unix__) || defined(__APPLE__)
    munmap(data_, bytes_);
#else
    ::operator delete(data_, std::align_val_t(4096));
#endif
    data_ = nullptr;
  }

  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace miaotui
