// Sixteen floats at a time, on any processor: one register where there is AVX-512.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef int64_t i64;
typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t u16x __attribute__((vector_size(64), aligned(4), may_alias));

static const int DIM = 256;  // the widest head

static inline v16 load16(const float* p) { return *(const v16*)p; }
static inline v16 load16(const uint16_t* p) {  // bfloat16: the upper half of a float
    u16x wide = __builtin_convertvector(*(const h16*)p, u16x) << 16;
    return (v16)wide;
}
static inline v16 all16(float x) { return x - v16{}; }

// f(v, i): sixteen numbers from i, or one of those left; v.get and v.put read and write them.
struct Sixteen {
    v16 get(const float* p) const { return load16(p); }
    void put(float* p, v16 x) const { *(v16*)p = x; }
};
struct One {
    float get(const float* p) const { return *p; }
    void put(float* p, float x) const { *p = x; }
};
template <typename F>
static inline void by16(i64 count, F f) {
    i64 i = 0;
    for (; i + 16 <= count; i += 16) f(Sixteen(), i);
    for (; i < count; i++) f(One(), i);
}

static inline v16 exp16(v16 x) {  // Cody and Waite's reduction, a polynomial of degree 6; 2 ulp
    typedef int32_t i16x __attribute__((vector_size(64)));
    v16 floor_ = all16(-87.0f);
    i16x low = x < floor_;
    x = low ? floor_ : x;
    v16 whole = x * 1.44269504088896341f + 12582912.0f;
    i16x power = (i16x)whole;
    whole -= 12582912.0f;
    v16 r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    v16 p = all16(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    v16 y = (v16)((i16x)p + (power << 23));
    y = x == x ? y : x;
    return low ? v16{} : y;
}

#if defined(__AVX512F__)
static inline float largest(v16 x) { return _mm512_reduce_max_ps((__m512)x); }
static inline float total(v16 x) { return _mm512_reduce_add_ps((__m512)x); }
#else
static inline float largest(v16 x) {
    float top = x[0];
    for (int i = 1; i < 16; i++) top = x[i] > top ? x[i] : top;
    return top;
}
static inline float total(v16 x) {  // in a fixed order
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += x[i];
    return sum;
}
#endif

static inline v16 tanh16(v16 x) {
    v16 e = exp16(-2 * (x < 0 ? -x : x));
    v16 y = (1 - e) / (1 + e);
    return x < 0 ? -y : y;
}
