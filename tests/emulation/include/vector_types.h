// Shadow of CUDA's vector types: names, members and alignment.
#pragma once

#define SKV_VECTOR_TYPES(type, name)                                                      \
  struct name##1 { type x; };                                                             \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                \
  struct name##3 { type x, y, z; };                                                       \
  struct alignas(sizeof(type) == 8 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; }; \
  inline name##1 make_##name##1(type x) { return {x}; }                                   \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                        \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }             \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

SKV_VECTOR_TYPES(signed char, char)
SKV_VECTOR_TYPES(unsigned char, uchar)
SKV_VECTOR_TYPES(short, short)
SKV_VECTOR_TYPES(unsigned short, ushort)
SKV_VECTOR_TYPES(int, int)
SKV_VECTOR_TYPES(unsigned int, uint)
SKV_VECTOR_TYPES(long long, longlong)
SKV_VECTOR_TYPES(unsigned long long, ulonglong)
SKV_VECTOR_TYPES(float, float)
SKV_VECTOR_TYPES(double, double)
#undef SKV_VECTOR_TYPES

struct dim3 {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;
  constexpr dim3(unsigned size_x = 1, unsigned size_y = 1, unsigned size_z = 1)
      : x(size_x), y(size_y), z(size_z) {}
};
