// Short vectors of 32 bytes, whatever the processor: the compiler splits them where its registers are shorter.
#pragma once

#include <cstdint>
#include <cstring>

namespace sage_fast {

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(32)));
  static constexpr int64_t lanes = 32 / sizeof(T);
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

}  // namespace sage_fast
