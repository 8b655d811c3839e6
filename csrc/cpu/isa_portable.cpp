// The kernels for any processor: the compiler splits vectors where registers are shorter.
#define SAGE_ISA portable
#define SAGE_VECTOR_BYTES 16
#include "kernels.inl"
