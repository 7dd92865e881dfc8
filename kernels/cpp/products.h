// y = x Wᵀ + b, with weights that were packed for it.
#pragma once

#include <cstring>
#include <vector>

#include "threads.h"
#include "vectors.h"

static const i64 CACHE = 256 << 10;  // bytes of rows that a core keeps near
static const int TILE = 32;  // outputs of a tile: two registers of 16 floats
static const i64 AHEAD = 4096;  // bytes of weights asked for early: a page, where the core's own guess ends
static const int ROWS = 12;  // rows of a block: 24 accumulators, the rest holds weights


// packed [out / TILE][in][TILE]: a tile's weights are read once, in order.

// [out][in] -> [out / TILE][in][TILE], which may be the same memory; `sums` of each output's bytes.
template <typename U>
static void tiles(const U* from, U* to, int32_t* sums, i64 out, i64 in, int threads) {
    split((out + TILE - 1) / TILE, threads, [=](i64 begin, i64 end) {
        std::vector<U> room(TILE * in);
        for (i64 tile = begin; tile < end; tile++) {
            i64 rows = std::min<i64>(TILE, out - tile * TILE);
            std::copy_n(from + tile * TILE * in, rows * in, room.data());
            std::fill(room.begin() + rows * in, room.end(), U());
            for (i64 j = 0; sums && j < rows; j++) {
                const int8_t* bytes = (const int8_t*)(room.data() + j * in);
                int32_t sum = 0;
                for (i64 k = 0; k < in * (i64)sizeof(U); k++) sum += bytes[k];
                sums[tile * TILE + j] = sum;
            }
            U* place = to + tile * TILE * in;
            for (i64 k = 0; k < in; k += 16)  // a few channels at a time: their places stay near
                for (int j = 0; j < TILE; j++)
                    for (i64 i = k; i < std::min(k + 16, in); i++) place[i * TILE + j] = room[j * in + i];
        }
    });
}

extern "C" void pack_4(const uint32_t* from, uint32_t* to, int32_t* sums, i64 out, i64 in, int threads) {
    tiles(from, to, sums, out, in, threads);
}
extern "C" void pack_2(const uint16_t* from, uint16_t* to, int32_t* sums, i64 out, i64 in, int threads) {
    tiles(from, to, sums, out, in, threads);
}

template <int M, typename W>
static void block(const float* x, const W* w, const float* bias, float* y, i64 in, i64 out, int n) {
    v16 sum[M][2];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = v16{};
    for (i64 k = 0; k < in; k++, w += TILE) {
        v16 a = load16(w), b = load16(w + 16);
        for (int i = 0; i < TILE * (int)sizeof(W); i += 64) __builtin_prefetch((const char*)w + AHEAD + i);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            v16 s = all16(x[m * in + k]);
            sum[m][0] += s * a;
            sum[m][1] += s * b;
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
        float found[TILE];
        *(v16*)found = sum[m][0];
        *(v16*)(found + 16) = sum[m][1];
        for (int j = 0; j < n; j++) y[m * out + j] = found[j] + (bias ? bias[j] : 0);
    }
}

template <typename W>
static void rows_of(const float* x, const W* w, const float* b, float* y, i64 rows, i64 in, i64 out,
                    int n) {
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * in, y += ROWS * out)
        block<ROWS>(x, w, b, y, in, out, n);
    switch (rows) {
#define CASE(M) case M: return block<M>(x, w, b, y, in, out, n);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
#undef CASE
    }
}

// f(row, rows, first output, outputs): as many rows at a time as stay in a core's second cache.
template <typename F>
static void by_tiles(i64 rows, i64 bytes, i64 out, int threads, F f) {
    i64 some = std::max<i64>(ROWS, CACHE / bytes / ROWS * ROWS);
    split((out + TILE - 1) / TILE, threads, [=](i64 begin, i64 end) {
        for (i64 row = 0; row < rows; row += some)
            for (i64 first = begin * TILE; first < end * TILE; first += TILE)
                f(row, std::min(some, rows - row), first, (int)std::min<i64>(TILE, out - first));
    });
}

// act(x Gᵀ) · x Uᵀ with W = G | U, a tile of both at a time: what is between them stays near.
template <typename A, typename P>
static void gated_tiles(i64 rows, i64 bytes, i64 half, int threads, float* y, A act, P product) {
    by_tiles(rows, bytes, half, threads, [=](i64 row, i64 count, i64 first, int) {
        float gate[ROWS * TILE], up[ROWS * TILE];
        for (i64 r = row; r < row + count; r += ROWS) {
            i64 some = std::min<i64>(ROWS, row + count - r);
            product(r, some, first, gate);
            product(r, some, half + first, up);
            for (i64 m = 0; m < some; m++)
                for (int j = 0; j < TILE; j += 16)
                    *(v16*)(y + (r + m) * half + first + j) =
                        act(load16(gate + m * TILE + j)) * load16(up + m * TILE + j);
        }
    });
}

template <typename W, typename A>
static void gated_linear(const float* x, const W* packed, const float* bias, float* y, i64 rows,
                         i64 in, i64 half, int threads, A act) {
    gated_tiles(rows, in * sizeof(float), half, threads, y, act, [=](i64 r, i64 some, i64 first, float* to) {
        rows_of(x + r * in, packed + first * in, bias ? bias + first : bias, to, some, in, TILE, TILE);
    });
}

template <typename W>
static void linear(const float* x, const W* packed, const float* bias, float* y, i64 rows, i64 in,
                   i64 out, int threads) {
    by_tiles(rows, in * sizeof(float), out, threads, [=](i64 row, i64 count, i64 first, int n) {
        const float* b = bias ? bias + first : nullptr;
        rows_of(x + row * in, packed + first * in, b, y + row * out + first, count, in, out, n);
    });
}

extern "C" void linear_f32(const float* x, const float* w, const float* b, float* y, i64 rows,
                           i64 in, i64 out, int threads) {
    linear(x, w, b, y, rows, in, out, threads);
}
extern "C" void linear_bf16(const float* x, const uint16_t* w, const float* b, float* y, i64 rows,
                            i64 in, i64 out, int threads) {
    linear(x, w, b, y, rows, in, out, threads);
}

// ── the same with int8 weights: rows of x rounded to 8 bits by their own largest value ────────
// packed [out / TILE][in / 4][TILE][4]; sums are exact integers. x is stored as x + 128, since
// the instruction wants one side unsigned; 128 · Σ w is taken off again.

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
extern "C" int has_int8() { return 1; }

static inline void finish8(__m512i sum, float xs, const float* ws, const int32_t* wsum,
                           const float* bias, float* y, int n) {
    __mmask16 some = n >= 16 ? 0xffff : (__mmask16)((1 << n) - 1);
    sum = _mm512_sub_epi32(sum, _mm512_slli_epi32(_mm512_maskz_loadu_epi32(some, wsum), 7));
    __m512 scale = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, ws), _mm512_set1_ps(xs));
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
    if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(some, bias));
    _mm512_mask_storeu_ps(y, some, value);
}

template <int M>
static void block8(const uint8_t* x, const float* xs, const int8_t* w, const float* ws,
                   const int32_t* wsum, const float* bias, float* y, i64 in, i64 out, int n) {
    __m512i sum[M][2];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_si512();
    for (i64 k = 0; k < in; k += 4, w += TILE * 4) {
        __m512i a = _mm512_loadu_si512(w), b = _mm512_loadu_si512(w + 64);
        __builtin_prefetch(w + AHEAD), __builtin_prefetch(w + AHEAD + 64);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            int32_t four;
            memcpy(&four, x + m * in + k, 4);
            __m512i s = _mm512_set1_epi32(four);
            sum[m][0] = _mm512_dpbusd_epi32(sum[m][0], s, a);
            sum[m][1] = _mm512_dpbusd_epi32(sum[m][1], s, b);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
        finish8(sum[m][0], xs[m], ws, wsum, bias, y + m * out, n);
        if (n > 16) finish8(sum[m][1], xs[m], ws + 16, wsum + 16, bias ? bias + 16 : bias, y + m * out + 16, n - 16);
    }
}

static void rows_of8(const uint8_t* x, const float* xs, const int8_t* w, const float* ws,
                     const int32_t* wsum, const float* b, float* y, i64 rows, i64 in, i64 out, int n) {
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * in, xs += ROWS, y += ROWS * out)
        block8<ROWS>(x, xs, w, ws, wsum, b, y, in, out, n);
    switch (rows) {
#define CASE(M) case M: return block8<M>(x, xs, w, ws, wsum, b, y, in, out, n);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
#undef CASE
    }
}

static void round_row(const float* x, uint8_t* q, float* scale, i64 in, i64 padded) {
    __m512 top = _mm512_setzero_ps();
    i64 k = 0;
    for (; k + 16 <= in; k += 16) top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_loadu_ps(x + k)));
    float largest = _mm512_reduce_max_ps(top);
    for (; k < in; k++) largest = std::max(largest, std::fabs(x[k]));
    if (!(largest > 1e-30f)) largest = largest == largest ? 1e-30f : largest;  // NaN stays NaN
    *scale = largest / 127;
    float back = 127 / largest;
    __m512 times = _mm512_set1_ps(back);
    for (k = 0; k + 16 <= in; k += 16) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), times));
        whole = _mm512_add_epi32(whole, _mm512_set1_epi32(128));
        _mm_storeu_si128((__m128i*)(q + k), _mm512_cvtepi32_epi8(whole));
    }
    for (; k < in; k++) q[k] = (uint8_t)(std::nearbyint(x[k] * back) + 128);
    for (; k < padded; k++) q[k] = 128;
}

static i64 round_rows(const float* x, uint8_t* q, float* xs, i64 rows, i64 in, int threads) {
    i64 padded = (in + 3) / 4 * 4;
    split(rows, rows * in > SMALL ? threads : 1, [=](i64 begin, i64 end) {
        for (i64 r = begin; r < end; r++) round_row(x + r * in, q + r * padded, xs + r, in, padded);
    });
    return padded;
}

template <typename A>
static void gated_int8(const float* x, const int8_t* packed, const float* scales, const int32_t* wsum,
                       const float* bias, float* y, uint8_t* q, float* xs, i64 rows, i64 in, i64 half,
                       int threads, A act) {
    i64 padded = round_rows(x, q, xs, rows, in, threads);
    gated_tiles(rows, padded, half, threads, y, act, [=](i64 r, i64 some, i64 first, float* to) {
        rows_of8(q + r * padded, xs + r, packed + first * padded, scales + first, wsum + first,
                 bias ? bias + first : bias, to, some, padded, TILE, TILE);
    });
}

extern "C" void linear_int8(const float* x, const int8_t* packed, const float* scales,
                            const int32_t* wsum, const float* bias, float* y, uint8_t* q, float* xs,
                            i64 rows, i64 in, i64 out, int threads) {
    i64 padded = round_rows(x, q, xs, rows, in, threads);
    by_tiles(rows, padded, out, threads, [=](i64 row, i64 count, i64 first, int n) {
        const float* b = bias ? bias + first : nullptr;
        rows_of8(q + row * padded, xs + row, packed + first * padded, scales + first, wsum + first,
                 b, y + row * out + first, count, padded, out, n);
    });
}
#else
extern "C" int has_int8() { return 0; }
template <typename A>
static void gated_int8(const float*, const int8_t*, const float*, const int32_t*, const float*, float*,
                       uint8_t*, float*, i64, i64, i64, int, A) {}
extern "C" void linear_int8(const float*, const int8_t*, const float*, const int32_t*, const float*,
                            float*, uint8_t*, float*, i64, i64, i64, int) {}
#endif
