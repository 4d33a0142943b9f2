// Zeroed, page-aligned memory that costs nothing until it is touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

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
    mapped_ = bytes + (pages == Pages::huge ? kHugePage : 0);
    void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = data_ = static_cast<uint8_t*>(p);
    if (pages == Pages::huge) {
      data_ += (kHugePage - reinterpret_cast<uintptr_t>(p) % kHugePage) % kHugePage;
#ifdef MADV_HUGEPAGE
      madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
#else
    (void)pages;
    data_ = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(4096)));
    std::memset(data_, 0, bytes);
#endif
  }
  ~Memory() { release(); }
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    Memory(std::move(other)).swap(*this);
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
    munmap(base_, mapped_);
#else
    ::operator delete(data_, std::align_val_t(4096));
#endif
    data_ = nullptr;
  }

  void swap(Memory& other) noexcept {
    std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
    std::swap(base_, other.base_), std::swap(mapped_, other.mapped_);
  }

  static constexpr size_t kHugePage = 2 << 20;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  uint8_t* base_ = nullptr;  // of the mapping, where data_ begins at the first border of a huge page
  size_t mapped_ = 0;
};

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Where weights lie one after another, in the order in which they are packed and read: on huge pages throughout, which
// matrices of less than 2 MB could not have alone.
class Heap {
 public:
  struct Part {
    uint8_t* data;
    std::shared_ptr<void> owner;
  };

  Part take(size_t bytes) {
    bytes = round_up(bytes, 64);
    if (!slab_ || used_ + bytes > slab_->bytes()) {
      slab_ = std::make_shared<Memory>(bytes > kSlab ? bytes : kSlab);
      used_ = 0;
    }
    used_ += bytes;
    return {slab_->data() + used_ - bytes, slab_};
  }

 private:
  static constexpr size_t kSlab = 64 << 20;
  std::shared_ptr<Memory> slab_;
  size_t used_ = 0;
};

}  // namespace miaotui
