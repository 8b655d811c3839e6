// Short vectors of SAGE_VECTOR_BYTES, and memory for kernels.

namespace sage_fast::SAGE_ISA {

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(SAGE_VECTOR_BYTES)));
  static constexpr int64_t lanes = SAGE_VECTOR_BYTES / sizeof(T);
};

template <class T>
inline typename Vector<T>::type load(const T* p) {
  typename Vector<T>::type v;
  std::memcpy(&v, p, sizeof(v));  // no alignment asked for
  return v;
}

template <class T>
inline void store(typename Vector<T>::type v, T* p) {
  std::memcpy(p, &v, sizeof(v));
}

// n zeros, aligned to a cache line.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n, T value = T()) { assign(n, value); }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void assign(int64_t n, T value = T()) {
    std::free(data_);
    data_ = static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) / 64 + 1) * 64));
    if (data_ == nullptr) throw std::bad_alloc();
    for (int64_t i = 0; i < n; ++i) data_[i] = value;
    size_ = n;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace sage_fast::SAGE_ISA
