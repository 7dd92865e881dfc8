// y = x Wᵀ + b, with weights that were packed for it.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "threads.h"
#include "vectors.h"

enum Kind { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 };  // of a weight

static const i64 CACHE = 256 << 10;  // bytes of rows that a core keeps near
static const int TILE = 32;  // outputs of a tile: two registers of 16 floats
static const i64 AHEAD = 4096;  // bytes of weights asked for early: a page, where the core's own guess ends
static const int RUN = 8;  // tiles read in a row before those of another place
static const int ROWS = 12;  // rows of a block: 24 accumulators, the rest holds weights
static const int GROUP = 48;  // rows that pass a part of a tile before the next is read
static const i64 PART = 512;  // channels of it: in bytes, half of a core's first cache


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

// Rows `at` of a packed weight as they were, [rows, in]; `few` numbers of each lie together.
template <int few, typename W>
static void looked_up(const W* packed, const float* scales, const i64* at, float* y, i64 rows, i64 in) {
    const i64 units = (in + few - 1) / few;
    for (i64 r = 0; r < rows; r++) {
        const W* row = packed + (at[r] / TILE * TILE * units + at[r] % TILE) * few;
        const float scale = scales ? scales[at[r]] : 1;
        for (i64 k = 0; k < in; k++) y[r * in + k] = scale * number(row[k / few * TILE * few + k % few]);
    }
}

extern "C" void lookup(const void* packed, const float* scales, const i64* at, float* y, i64 rows,
                       i64 in, i64 kind) {
    if (kind == INT8) looked_up<4>((const int8_t*)packed, scales, at, y, rows, in);
    else if (kind == BFLOAT16) looked_up<1>((const uint16_t*)packed, scales, at, y, rows, in);
    else if (kind == FLOAT16) looked_up<1>((const Half*)packed, scales, at, y, rows, in);
    else looked_up<1>((const float*)packed, scales, at, y, rows, in);
}

// Two registers of a tile's weights. Those of bfloat16 come as even and odd outputs, which takes no
// widening, and `ordered` turns what they became back.
struct Two {
    v16 a, b;
};
template <typename W>
static inline Two two(const W* w) {
    return {load16(w), load16(w + 16)};
}
static inline Two two(const uint16_t* w) {
    u16x pairs = *(const u16x*)w;
    return {(v16)(pairs << 16), (v16)(pairs & 0xffff0000)};
}
template <typename W>
static inline void ordered(const Two& t, float* to, const W*) {
    *(v16*)to = t.a, *(v16*)(to + 16) = t.b;
}
static inline void ordered(const Two& t, float* to, const uint16_t*) {
    for (int j = 0; j < 16; j++) to[2 * j] = t.a[j], to[2 * j + 1] = t.b[j];
}

template <int M, typename W>
static void block(const float* x, const W* w, const float* bias, float* y, i64 in, i64 out, int n) {
    v16 sum[M][2];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = v16{};
    for (i64 k = 0; k < in; k++, w += TILE) {
        const Two weights = two(w);
        for (int i = 0; i < TILE * (int)sizeof(W); i += 64) __builtin_prefetch((const char*)w + AHEAD + i);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            v16 s = all16(x[m * in + k]);
            sum[m][0] += s * weights.a;
            sum[m][1] += s * weights.b;
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
        float found[TILE];
        ordered({sum[m][0], sum[m][1]}, found, w);
        for (int j = 0; j < n; j++) y[m * out + j] = found[j] + (bias ? bias[j] : 0);
    }
}

// f(first, how many) over the rows, a constant number at a time, and about as many each time
template <int MOST = ROWS, typename F>
static void by_rows(i64 rows, F f) {
    i64 r = 0;
    for (i64 parts = (rows + MOST - 1) / MOST; parts; parts--) {
        i64 count = (rows - r) / parts;
        switch (count) {
#define CASE(M) case M: if constexpr (M <= MOST) f(r, std::integral_constant<int, M>()); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
        }
        r += count;
    }
}

template <typename W>
static void rows_of(const float* x, const W* w, const float* b, float* y, i64 rows, i64 in, i64 out,
                    int n) {
    by_rows(rows, [=](i64 r, auto count) { block<count>(x + r * in, w, b, y + r * out, in, out, n); });
}

// f(row, rows, first output, outputs): as many rows at a time as stay in a core's second cache.
template <typename F>
static void by_tiles(i64 rows, i64 bytes, i64 out, int threads, F f, i64 run = 1) {
    i64 some = std::max<i64>(ROWS, CACHE / bytes / ROWS * ROWS);
    split((out + TILE - 1) / TILE, threads, [=](i64 begin, i64 end) {
        i64 last = std::min(out, end * TILE);
        for (i64 row = 0; row < rows; row += some)
            for (i64 first = begin * TILE; first < last; first += run * TILE)
                f(row, std::min(some, rows - row), first, (int)std::min(run * TILE, last - first));
    });
}

// act(x Gᵀ) · x Uᵀ with W = G | U, some tiles of both at a time: what is between them stays near.
// With few rows it is the weights' reading that counts, and changing between G and U disturbs it.
template <int MOST = ROWS, typename A, typename P>
static void gated_tiles(i64 rows, i64 bytes, i64 half, int threads, float* y, A act, P product) {
    const bool few = rows <= MOST;
    auto tiles = [=](i64 row, i64 count, i64 first, int n) {
        float gate[RUN * MOST * TILE], up[GROUP * TILE];
        for (i64 r = row; r < row + count; r += few ? MOST : GROUP) {
            i64 some = std::min<i64>(few ? MOST : GROUP, row + count - r);
            for (int j = 0; j < n; j += TILE) product(r, some, first + j, gate + j * MOST);
            for (int j = 0; j < n; j += TILE) {
                product(r, some, half + first + j, up);
                for (i64 m = 0; m < some; m++)
                    for (int k = 0; k < TILE; k += 16)
                        *(v16*)(y + (r + m) * half + first + j + k) =
                            act(load16(gate + j * MOST + m * TILE + k)) * load16(up + m * TILE + k);
            }
        }
    };
    by_tiles(rows, bytes, half, threads, tiles, few ? RUN : 1);
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
extern "C" void linear_f16(const float* x, const Half* w, const float* b, float* y, i64 rows, i64 in,
                           i64 out, int threads) {
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

struct Sums {  // of a block, when not all of its channels are there yet
    int32_t (*kept)[TILE];
    bool begins, ends;
};

// `soon`: what is asked for meanwhile, two lines a step and `hop` bytes on
template <int M>
static void block8(const uint8_t* x, const float* xs, const int8_t* w, const float* ws,
                   const int32_t* wsum, const float* bias, float* y, i64 in, i64 channels, i64 out, int n,
                   Sums sums, const int8_t* soon, i64 hop) {
    __m512i sum[M][2];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
        sum[m][0] = sums.begins ? _mm512_setzero_si512() : _mm512_loadu_si512(sums.kept[m]);
        sum[m][1] = sums.begins ? _mm512_setzero_si512() : _mm512_loadu_si512(sums.kept[m] + 16);
    }
    for (i64 k = 0; k < channels; k += 4, w += TILE * 4, soon += hop) {
        __m512i a = _mm512_loadu_si512(w), b = _mm512_loadu_si512(w + 64);
        __builtin_prefetch(soon, 0, 2), __builtin_prefetch(soon + 64, 0, 2);
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
        if (!sums.ends) {
            _mm512_storeu_si512(sums.kept[m], sum[m][0]);
            _mm512_storeu_si512(sums.kept[m] + 16, sum[m][1]);
            continue;
        }
        finish8(sum[m][0], xs[m], ws, wsum, bias, y + m * out, n);
        if (n > 16) finish8(sum[m][1], xs[m], ws + 16, wsum + 16, bias ? bias + 16 : bias, y + m * out + 16, n - 16);
    }
}

// A few blocks of rows pass the tile part by part, and the next part comes while they do, a line a
// step: else memory would rest while the second block works, and the first would wait for it.
static void rows_of8(const uint8_t* x, const float* xs, const int8_t* w, const float* ws,
                     const int32_t* wsum, const float* b, float* y, i64 rows, i64 in, i64 out, int n) {
    const i64 part = rows > ROWS && rows <= GROUP ? PART : in;
    int32_t kept[GROUP][TILE];
    for (i64 k = 0; k < in; k += part) {
        const i64 channels = std::min(part, in - k);
        const int8_t* from = w + k * TILE;
        by_rows(rows, [&](i64 r, auto count) {
            Sums sums{kept + r % GROUP, !k, k + channels == in};
            const i64 size = channels * TILE, hop = part < in ? LINE : 2 * LINE;
            const int8_t* soon = from + (part == in ? AHEAD : r ? size + size / 2 : size);
            block8<count>(x + r * in + k, xs + r, from, ws, wsum, b, y + r * out, in, channels, out, n, sums, soon, hop);
        });
    }
}

// ZERO: what 0 becomes
template <int ZERO>
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
        whole = _mm512_add_epi32(whole, _mm512_set1_epi32(ZERO));
        _mm_storeu_si128((__m128i*)(q + k), _mm512_cvtepi32_epi8(whole));
    }
    for (; k < in; k++) q[k] = (uint8_t)((int)std::nearbyint(x[k] * back) + ZERO);
    for (; k < padded; k++) q[k] = ZERO;
}

static i64 round_rows(const float* x, uint8_t* q, float* xs, i64 rows, i64 in, int threads) {
    i64 padded = (in + 3) / 4 * 4;
    split(rows, at_most(threads, rows * in), [=](i64 begin, i64 end) {
        for (i64 r = begin; r < end; r++) round_row<128>(x + r * in, q + r * padded, xs + r, in, padded);
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

// ── and with int4 weights, which have a scale for each group of a row ──────────────────────────
// packed [out / TILE][in / 8][TILE][4]: a byte holds w + 8 of two channels half a group apart.
// scales [out / TILE][groups][TILE]. Here the weights are unsigned and rows of x are not; behind a
// row lies −8 · Σ x of each group, where its sums begin.

static const int FEWER = 8;  // rows of a block, as both halves of a byte take registers too

template <int M>
static void block4(const int8_t* x, i64 step, const float* xs, const uint8_t* w, const float* ws,
                   const float* bias, float* y, i64 in, i64 groups, i64 out, int n) {
    const __m512i low = _mm512_set1_epi8(15);
    const i64 half = in / groups / 2;
    float total[M][TILE] = {};
    for (i64 g = 0; g < groups; g++, ws += TILE) {
        __m512i sum[M][2];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
            sum[m][0] = sum[m][1] = _mm512_set1_epi32(((const int32_t*)(x + m * step + in))[g]);
        for (i64 k = 0; k < half; k += 4, w += TILE * 4) {
            __builtin_prefetch(w + AHEAD, 0, 2), __builtin_prefetch(w + AHEAD + 64, 0, 2);
#pragma GCC unroll 1
            for (int high = 0; high < 2; high++) {
                __m128i by = _mm_cvtsi32_si128(4 * high);
                __m512i a = _mm512_srl_epi16(_mm512_loadu_si512(w), by);
                __m512i b = _mm512_srl_epi16(_mm512_loadu_si512(w + 64), by);
                a = _mm512_and_si512(a, low), b = _mm512_and_si512(b, low);
#pragma GCC unroll 16
                for (int m = 0; m < M; m++) {
                    int32_t four;
                    memcpy(&four, x + m * step + (2 * g + high) * half + k, 4);
                    __m512i s = _mm512_set1_epi32(four);
                    sum[m][0] = _mm512_dpbusd_epi32(sum[m][0], a, s);
                    sum[m][1] = _mm512_dpbusd_epi32(sum[m][1], b, s);
                }
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            *(v16*)total[m] += (v16)_mm512_cvtepi32_ps(sum[m][0]) * load16(ws);
            *(v16*)(total[m] + 16) += (v16)_mm512_cvtepi32_ps(sum[m][1]) * load16(ws + 16);
        }
        asm volatile("" ::"r"(total) : "memory");  // they would take the registers of the sums
    }
    for (int m = 0; m < M; m++)
        for (int j = 0; j < n; j++) y[m * out + j] = total[m][j] * xs[m] + (bias ? bias[j] : 0);
}

static void rows_of4(const int8_t* x, i64 step, const float* xs, const uint8_t* w, const float* ws,
                     const float* b, float* y, i64 rows, i64 in, i64 groups, i64 out, int n) {
    by_rows<FEWER>(rows, [=](i64 r, auto count) {
        block4<count>(x + r * step, step, xs + r, w, ws, b, y + r * out, in, groups, out, n);
    });
}

static i64 round_rows_by_group(const float* x, int8_t* q, float* xs, i64 rows, i64 in, i64 groups, int threads) {
    i64 step = in + groups * sizeof(int32_t);
    split(rows, at_most(threads, rows * in), [=](i64 begin, i64 end) {
        for (i64 r = begin; r < end; r++) {
            int8_t* row = q + r * step;
            round_row<0>(x + r * in, (uint8_t*)row, xs + r, in, in);
            for (i64 g = 0, each = in / groups; g < groups; g++) {
                int32_t sum = 0;
                for (i64 k = 0; k < each; k++) sum += row[g * each + k];
                ((int32_t*)(row + in))[g] = -8 * sum;
            }
        }
    });
    return step;
}

template <typename A>
static void gated_int4(const float* x, const uint8_t* packed, const float* scales, const float* bias,
                       float* y, int8_t* q, float* xs, i64 rows, i64 in, i64 groups, i64 half,
                       int threads, A act) {
    i64 step = round_rows_by_group(x, q, xs, rows, in, groups, threads);
    gated_tiles<FEWER>(rows, step, half, threads, y, act, [=](i64 r, i64 some, i64 first, float* to) {
        rows_of4(q + r * step, step, xs + r, packed + first * in / 2, scales + first * groups,
                 bias ? bias + first : bias, to, some, in, groups, TILE, TILE);
    });
}

extern "C" void linear_int4(const float* x, const uint8_t* packed, const float* scales, const float* bias,
                            float* y, int8_t* q, float* xs, i64 rows, i64 in, i64 groups, i64 out, int threads) {
    i64 step = round_rows_by_group(x, q, xs, rows, in, groups, threads);
    by_tiles(rows, step, out, threads, [=](i64 row, i64 count, i64 first, int n) {
        rows_of4(q + row * step, step, xs + row, packed + first * in / 2, scales + first * groups,
                 bias ? bias + first : bias, y + row * out + first, count, in, groups, out, n);
    });
}
#else
extern "C" int has_int8() { return 0; }
template <typename A>
static void gated_int4(const float*, const uint8_t*, const float*, const float*, float*, int8_t*, float*,
                       i64, i64, i64, i64, int, A) {}
extern "C" void linear_int4(const float*, const uint8_t*, const float*, const float*, float*, int8_t*, float*,
                            i64, i64, i64, i64, int) {}
template <typename A>
static void gated_int8(const float*, const int8_t*, const float*, const int32_t*, const float*, float*,
                       uint8_t*, float*, i64, i64, i64, int, A) {}
extern "C" void linear_int8(const float*, const int8_t*, const float*, const int32_t*, const float*,
                            float*, uint8_t*, float*, i64, i64, i64, int) {}
#endif
