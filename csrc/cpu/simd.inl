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

// Lanes of two vectors: those of `b` are numbered on from those of `a`.
template <int... I, class V>
inline V lanes_of(V a, V b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else  // GCC has that from 12 on
  return __builtin_shuffle(a, b, decltype(a < b){I...});
#endif
}

// To memory, past the caches: `p` is aligned to the vector, and finish_stores() comes before others may look.
template <class T>
inline void store_past_caches(typename Vector<T>::type v, T* p) {
#if SAGE_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif SAGE_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
  store<T>(v, p);
#endif
}
inline void finish_stores() {
#if SAGE_VECTOR_BYTES > 16
  _mm_sfence();
#endif
}

// A value that several products take: GCC would rather load it again in each.
template <class V>
inline V in_register(V v) {
#if SAGE_VECTOR_BYTES == 64
  asm("" : "+v"(v));
#elif SAGE_VECTOR_BYTES == 32
  asm("" : "+x"(v));
#endif
  return v;
}

// Numbers of 16 bits: loaded to float, stored rounded to the nearest (ties to even); no arithmetic of their own.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What sums of T are made in.
template <class T>
struct Accumulator {
  typedef float type;
};
template <>
struct Accumulator<double> {
  typedef double type;
};

// Calls f(T()) for the scalar type named by dtype.
template <class F>
inline void with_type(Dtype dtype, F&& f) {
  if (dtype == Dtype::float32) f(float());
  if (dtype == Dtype::float64) f(double());
  if (dtype == Dtype::bfloat16) f(BFloat16());
  if (dtype == Dtype::float16) f(Float16());
}

typedef Vector<float>::type Floats;
typedef Vector<uint32_t>::type Words;
typedef uint16_t Halves __attribute__((vector_size(SAGE_VECTOR_BYTES / 2)));  // as many as Floats has

inline Floats widen(Halves h, BFloat16) { return (Floats)(__builtin_convertvector(h, Words) << 16); }
#ifdef SAGE_BF16
inline Halves narrow(Floats v, BFloat16) { return (Halves)_mm512_cvtneps_pbh((__m512)v); }  // subnormal: zero
#else
inline Halves narrow(Floats v, BFloat16) {
  const Words u = (Words)v, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector((v != v) ? u * 0 + 0x7fc0 : rounded, Halves);
}
#endif

#if SAGE_VECTOR_BYTES == 64
// all lanes of the masked forms: GCC 12 warns of the others
inline Floats widen(Halves h, Float16) { return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h); }
inline Halves narrow(Floats v, Float16) {
  return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
inline Floats widen(Halves h, Float16) {
  const Words u = __builtin_convertvector(h, Words), size = (u & 0x7fff) << 13;
  const Words scaled = (Words)((Floats)size * 0x1p112f);  // moves the exponent's bias, subnormal numbers included
  return (Floats)(((size >= 0x0f800000) ? scaled | 0x7f800000 : scaled) | (u & 0x8000) << 16);
}
inline Halves narrow(Floats v, Float16) {
  const Words u = (Words)v & 0x7fffffff;
  Words rounded = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
  rounded = (u < 0x38800000) ? (Words)((Floats)u + 0.5f) - 0x3f000000 : rounded;  // subnormal: the adder rounds
  rounded = (u >= 0x47800000) ? ((u > 0x7f800000) ? u * 0 + 0x7e00 : u * 0 + 0x7c00) : rounded;
  return __builtin_convertvector(rounded | ((Words)v >> 16 & 0x8000), Halves);
}
#endif

// A vector of A, float or double, from or to memory of T: all lanes, or the first n of them (the others read as 0).
template <class A, class T>
inline typename Vector<A>::type load_as(const T* p) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return load<A>(p);
  } else {
    Halves h;
    std::memcpy(&h, p, sizeof(h));
    return widen(h, T());
  }
}

template <class A, class T>
inline void store_as(typename Vector<A>::type v, T* p) {
  if constexpr (sizeof(T) == sizeof(A)) {
    store<A>(v, p);
  } else {
    const Halves h = narrow(v, T());
    std::memcpy(p, &h, sizeof(h));
  }
}

template <class A, class T>
inline typename Vector<A>::type load_first(const T* p, int64_t n) {
#if SAGE_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 8) return _mm512_maskz_loadu_pd((1u << n) - 1, p);
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps((1u << n) - 1, p);
  if constexpr (sizeof(T) == 2) return widen((Halves)_mm256_maskz_loadu_epi16((1u << n) - 1, p), T());
#else
  T some[Vector<A>::lanes] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  return load_as<A>(some);
#endif
}

template <class A, class T>
inline void store_first(typename Vector<A>::type v, T* p, int64_t n) {
#if SAGE_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, (1u << n) - 1, v);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, (1u << n) - 1, v);
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, (1u << n) - 1, (__m256i)narrow(v, T()));
#else
  T some[Vector<A>::lanes];
  store_as<A>(v, some);
  for (int64_t i = 0; i < n; ++i) p[i] = some[i];
#endif
}

// Memory that is written before it is read.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) / 64 + 1) * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

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
