// Sixteen floats at a time, on any processor: one register where there is AVX-512.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef int64_t i64;
typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t u16x __attribute__((vector_size(64), aligned(4), may_alias));

static const int DIM = 256;  // the widest head
static const int LINE = 64;  // bytes that come from memory together

static inline v16 load16(const float* p) { return *(const v16*)p; }
static inline u16x wide16(h16 x) {
#if defined(__AVX512F__)
    return (u16x)_mm512_cvtepu16_epi32((__m256i)x);  // the line below is six instructions to GCC 12
#else
    return __builtin_convertvector(x, u16x);
#endif
}
static inline v16 load16(const uint16_t* p) {  // bfloat16: the upper half of a float
    return (v16)(wide16(*(const h16*)p) << 16);
}
static inline float number(float x) {
    return x;
}
static inline float number(int8_t x) {
    return x;
}
static inline float number(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

struct __attribute__((may_alias)) Half {  // a float16
    uint16_t bits;
};
static inline v16 load16(const Half* p) {
#if defined(__AVX512F__)
    return (v16)_mm512_cvtph_ps((__m256i)*(const h16*)p);
#else  // its exponent is 112 less, and so subnormal numbers come out right too
    u16x wide = wide16(*(const h16*)p);
    v16 size = (v16)((wide & 0x7fff) << 13) * 0x1p112f;
    return (v16)((u16x)size | (wide & 0x8000) << 16);
#endif
}
static inline float number(const Half& x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    Half some[16] = {x};
    return load16(some)[0];
#endif
}
static inline v16 all16(float x) { return x - v16{}; }

// Numbers are written as floats or as the nearest bfloat16; -> what they are now
static inline v16 put16(float* p, v16 x) { return *(v16*)p = x; }
static inline v16 put16(uint16_t* p, v16 x) {
#if defined(__AVX512BF16__)
    h16 kept = (h16)_mm512_cvtneps_pbh((__m512)x);
#else
    u16x bits = (u16x)x, up = 0x7fff + (bits >> 16 & 1);
    h16 kept = __builtin_convertvector((x == x ? bits + up : bits | 1 << 22) >> 16, h16);
#endif
    *(h16*)p = kept;
    return (v16)(wide16(kept) << 16);
}

// Two bfloat16 that are multiplied with two others, and both products added.
struct __attribute__((may_alias)) Pair {
    uint32_t both;
};
static inline u16x load16(const Pair* p) { return *(const u16x*)p; }
static inline void pair16(Pair* p, const uint16_t* one, const uint16_t* two) {
    *(u16x*)p = wide16(*(const h16*)one) | wide16(*(const h16*)two) << 16;
}

static inline v16 plus(v16 sum, float x, v16 y) { return sum + x * y; }
static inline v16 plus(v16 sum, Pair x, u16x y) {
    u16x all = x.both - u16x{};
#if defined(__AVX512BF16__)
    return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)all, (__m512bh)y);
#else
    sum += (v16)(all << 16) * (v16)(y << 16);
    return sum + (v16)(all & 0xffff0000) * (v16)(y & 0xffff0000);
#endif
}

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

typedef int32_t i16x __attribute__((vector_size(64)));

// 2^(whole + r), r within half a unit: a polynomial of degree 6, 1 ulp. 0 below 2^-126.
static inline v16 power16(v16 whole, v16 r) {
    v16 p = all16(1.5353362e-4f);
    p = p * r + 1.3398874e-3f;
    p = p * r + 9.6184369e-3f;
    p = p * r + 5.5503324e-2f;
    p = p * r + 2.4022648e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (v16)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    v16 y = (v16)((i16x)p + (__builtin_convertvector(whole, i16x) << 23));
    return whole < -126 ? v16{} : y != y || p == p ? y : p;
#endif
}
static inline v16 nearest16(v16 x) { return x + 12582912.0f - 12582912.0f; }

static const float LOG2E = 1.4426950408889634f, LOG2E_REST = 1.925963033500e-8f;  // their sum is exact

static inline v16 exp2_16(v16 x) {  // of at most 127; nothing of -∞
    x = x < -150.0f ? all16(-150.0f) : x;
    v16 whole = nearest16(x);
    return power16(whole, x - whole);
}
static inline v16 exp16(v16 x) {
    x = x < -104.0f ? all16(-104.0f) : x > 88.7f ? all16(88.7f) : x;
    v16 whole = nearest16(x * LOG2E);
    return power16(whole, x * LOG2E - whole + x * LOG2E_REST);
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
