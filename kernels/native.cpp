// The CPU's own way for the kernels that torch leaves time in: products with packed weights,
// attention that reads pages where they lie, norms, rotation and store, gates.
//
// Every row is summed in an order that does not depend on the other rows: what a request gets on
// a CPU is the same bit for bit alone and in a crowd. Compiled once by native.py.

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef int64_t i64;
typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t u16x __attribute__((vector_size(64), aligned(4), may_alias));

static const i64 SMALL = 1 << 15;  // fewer numbers than these are not worth a second thread
static const i64 CACHE = 256 << 10;  // bytes of rows that a core keeps near
static const int TILE = 32;  // outputs of a tile: two registers of 16 floats
static const int ROWS = 12;  // rows of a block: 24 accumulators, the rest holds weights

static inline v16 load16(const float* p) { return *(const v16*)p; }
static inline v16 load16(const uint16_t* p) {  // bfloat16: the upper half of a float
    u16x wide = __builtin_convertvector(*(const h16*)p, u16x) << 16;
    return (v16)wide;
}
static inline v16 all16(float x) { return x - v16{}; }

// ── threads ──────────────────────────────────────────────────────────────────────────────────
// A job is cut into chunks, which whoever is free takes. The caller takes them too, and waits for
// nobody who has not begun: on a busy machine a thread's turn may come many milliseconds late.

struct Pool {
    std::atomic<uint64_t> ticket{0};  // job's number << 32 | chunks not taken yet
    std::atomic<uint32_t> done{0};
    std::atomic<int> asleep{0};
    void (*run)(const void*, i64) = nullptr;  // these three stand still while a chunk is taken
    const void* what = nullptr;
    uint32_t chunks = 0;
    std::mutex caller, bed;
    std::condition_variable alarm;
    int workers = 0;

    bool left() { return (uint32_t)ticket.load(); }

    bool take() {  // one chunk; a ticket of an earlier job cannot be taken for one of this
        uint64_t mine = ticket.load();
        while ((uint32_t)mine)
            if (ticket.compare_exchange_weak(mine, mine - 1)) {
                run(what, chunks - (uint32_t)mine);
                done.fetch_add(1);
                return true;
            }
        return false;
    }

    void work() {  // awake for a while after a job, since within a step the next one is near
        for (;;) {
            auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
            while (!left() && std::chrono::steady_clock::now() < until) pause();
            if (!left()) {
                std::unique_lock<std::mutex> lying(bed);
                asleep++;
                alarm.wait(lying, [this] { return left(); });
                asleep--;
            }
            while (take()) {}
        }
    }

    void share(uint32_t count, int threads, void (*f)(const void*, i64), const void* with) {
        for (; workers < threads - 1; workers++) std::thread([this] { work(); }).detach();
        run = f, what = with, chunks = count, done = 0;
        ticket = ((ticket.load() >> 32) + 1) << 32 | count;
        if (asleep) {
            std::lock_guard<std::mutex> lying(bed);
            alarm.notify_all();
        }
        while (take()) {}
        for (int i = 0; done < count; i++) i < 1000 ? pause() : (void)sched_yield();
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
};

static Pool& pool() {
    static Pool* one = new Pool;  // never destroyed: its threads outlive everything
    return *one;
}

// f(first, last) over parts of 0 … count. Calls from two threads at once: one works alone.
template <typename F>
static void split(i64 count, int threads, F f) {
    i64 parts = std::min<i64>(count, threads * 6);
    std::unique_lock<std::mutex> mine(pool().caller, std::defer_lock);
    if (threads < 2 || parts < 2 || !mine.try_lock()) return f(0, count);
    auto part = [&](i64 i) { f(count * i / parts, count * (i + 1) / parts); };
    pool().share((uint32_t)parts, threads,
                 [](const void* with, i64 i) { (*(const decltype(part)*)with)(i); }, &part);
}

// ── y = x Wᵀ + b ─────────────────────────────────────────────────────────────────────────────
// packed [out / TILE][in][TILE]: a tile's weights are read once, in order.

template <int M, typename W>
static void block(const float* x, const W* w, const float* bias, float* y, i64 in, i64 out, int n) {
    v16 sum[M][2];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = v16{};
    for (i64 k = 0; k < in; k++, w += TILE) {
        v16 a = load16(w), b = load16(w + 16);
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

extern "C" void linear_int8(const float* x, const int8_t* packed, const float* scales,
                            const int32_t* wsum, const float* bias, float* y, uint8_t* q, float* xs,
                            i64 rows, i64 in, i64 out, int threads) {
    i64 padded = (in + 3) / 4 * 4;
    split(rows, rows * in > SMALL ? threads : 1, [=](i64 begin, i64 end) {
        for (i64 r = begin; r < end; r++) round_row(x + r * in, q + r * padded, xs + r, in, padded);
    });
    by_tiles(rows, padded, out, threads, [=](i64 row, i64 count, i64 first, int n) {
        const float* b = bias ? bias + first : nullptr;
        rows_of8(q + row * padded, xs + row, packed + first * padded, scales + first, wsum + first,
                 b, y + row * out + first, count, padded, out, n);
    });
}
#else
extern "C" int has_int8() { return 0; }
extern "C" void linear_int8(const float*, const int8_t*, const float*, const int32_t*, const float*,
                            float*, uint8_t*, float*, i64, i64, i64, int) {}
#endif

// ── attention over pages, where they lie ─────────────────────────────────────────────────────
// A task is one row's few queries that share a key head, over one span of the context. Tiles of
// KEYS positions and spans of SPAN begin at fixed positions, so neither chunks of a prompt nor
// neighbours in the batch change the order of a sum.

static const int KEYS = 64, LANES = 16;  // positions of a tile, and of a register
static const int SPAN = 512, QUERIES = 64, MOST = 128, DIM = 256;  // MOST: heads of a group
static const int TALL = 6;  // queries that share what is loaded, as many as fit the registers

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

struct Pages {
    const float *query, *keys, *values, *sinks, *slopes;
    const int32_t *starts, *lengths, *table;
    i64 width, heads, kv_heads, dim, page, window;
    float scale, softcap;
};

struct Task {
    int32_t row, head, first, count;  // queries first … first + count of the row
    int32_t begin, end;               // positions
    i64 partial;                      // where its maxima, sums and values go
};

// to[d][t] = k[t][d] for LANES positions t; to's rows are KEYS apart.
static void transpose(const float* const* k, i64 dim, float* to) {
    i64 d = 0;
#if defined(__AVX512F__)
    for (; d + 16 <= dim; d += 16) {  // pairs, fours, eights, sixteens change places
        __m512 a[16], b[16];
#pragma GCC unroll 16
        for (int t = 0; t < 16; t++) a[t] = _mm512_loadu_ps(k[t] + d);
#pragma GCC unroll 8
        for (int t = 0; t < 16; t += 2) {
            b[t] = _mm512_unpacklo_ps(a[t], a[t + 1]);
            b[t + 1] = _mm512_unpackhi_ps(a[t], a[t + 1]);
        }
#pragma GCC unroll 4
        for (int t = 0; t < 16; t += 4)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                __m512d low = (__m512d)b[t + j], high = (__m512d)b[t + 2 + j];
                a[t + 2 * j] = (__m512)_mm512_unpacklo_pd(low, high);
                a[t + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(low, high);
            }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {  // a[4i + j] has channels j, 4 + j, 8 + j, 12 + j of rows 4i …
            __m512 even = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
            __m512 odd = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
            __m512 even2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
            __m512 odd2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
            _mm512_storeu_ps(to + (d + j) * KEYS, _mm512_shuffle_f32x4(even, even2, 0x88));
            _mm512_storeu_ps(to + (d + 4 + j) * KEYS, _mm512_shuffle_f32x4(odd, odd2, 0x88));
            _mm512_storeu_ps(to + (d + 8 + j) * KEYS, _mm512_shuffle_f32x4(even, even2, 0xdd));
            _mm512_storeu_ps(to + (d + 12 + j) * KEYS, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
        }
    }
#endif
    for (; d < dim; d++)
        for (int t = 0; t < LANES; t++) to[d * KEYS + t] = k[t][d];
}

// s[m][t] = q[m] · k[t] for 2 · LANES positions
template <int M>
static void scores(const float* const* q, const float* kT, i64 dim, float (*s)[KEYS]) {
    v16 sum[M][2];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = v16{};
    for (i64 d = 0; d < dim; d++) {
        v16 a = load16(kT + d * KEYS), b = load16(kT + d * KEYS + LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            v16 one = all16(q[m][d]);
            sum[m][0] += one * a;
            sum[m][1] += one * b;
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) *(v16*)s[m] = sum[m][0], *(v16*)(s[m] + LANES) = sum[m][1];
}

// found[m] = found[m] · keep[m] + Σ share[m][t] · v[t], for J registers of channels
template <int M, int J>
static void mix(const float (*share)[KEYS], const float* const* v, int n, const float* keep,
                float* found, i64 dim, i64 d) {
    v16 sum[M][J];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) sum[m][j] = load16(found + m * dim + d + 16 * j) * keep[m];
    for (int t = 0; t < n; t++) {
        v16 value[J];
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) value[j] = load16(v[t] + d + 16 * j);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int j = 0; j < J; j++) sum[m][j] += share[m][t] * value[j];
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) *(v16*)(found + m * dim + d + 16 * j) = sum[m][j];
}

// A tile's part of M queries: their scores, or what they take from the values.
template <int M>
static void score_tile(const float* const* q, const float* kT, i64 dim, int n, float (*s)[KEYS]) {
    for (int t = 0; t < n; t += 2 * LANES)
        scores<M>(q, kT + t, dim, (float(*)[KEYS])((float*)s + t));
}
template <int M>
static void mix_tile(const float (*share)[KEYS], const float* const* v, int n, const float* keep,
                     float* found, i64 dim) {
    i64 d = 0;
    for (; d + 64 <= dim; d += 64) mix<M, 4>(share, v, n, keep, found, dim, d);
    for (; d + 16 <= dim; d += 16) mix<M, 1>(share, v, n, keep, found, dim, d);
    for (; d < dim; d++)
        for (int m = 0; m < M; m++) {
            float sum = found[m * dim + d] * keep[m];
            for (int t = 0; t < n; t++) sum += share[m][t] * v[t][d];
            found[m * dim + d] = sum;
        }
}

// f(first, how many) over M queries, a constant number at a time
template <typename F>
static void by_tall(int M, F f) {
    for (int m = 0, parts = (M + TALL - 1) / TALL; parts; parts--) {
        int count = (M - m) / parts;
        switch (count) {
#define CASE(N) case N: f(m, std::integral_constant<int, N>()); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
        }
        m += count;
    }
}

// Softmax of a tile's scores [KEYS], against the largest so far: shares in their place, and what
// remains of everything before.
static float shares(const Pages& a, float* s, i64 base, i64 at, i64 from, float slope, float& top,
                    float& sum) {
    const v16 steps = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    v16 x[KEYS / LANES], peaks = all16(top);
    for (int j = 0; j < KEYS / LANES; j++) {
        v16 where = steps + (float)(base + j * LANES);
        x[j] = load16(s + j * LANES) * a.scale;
        if (a.softcap > 0)
            for (int t = 0; t < LANES; t++) x[j][t] = std::tanh(x[j][t] / a.softcap) * a.softcap;
        x[j] += slope * (where - (float)at);
        x[j] = (where <= (float)at) & (where >= (float)from) ? x[j] : all16(-INFINITY);
        peaks = peaks > x[j] ? peaks : x[j];
    }
    float peak = largest(peaks), keep = top == -INFINITY ? 0 : std::exp(top - peak);
    v16 extra = {};
    for (int j = 0; j < KEYS / LANES; j++) {
        v16 share = peak == -INFINITY ? v16{} : exp16(x[j] - peak);  // else nothing is seen yet
        *(v16*)(s + j * LANES) = share;
        extra += share;
    }
    sum = sum * keep + total(extra);
    top = peak;
    return keep;
}

static void attend(const Pages& a, const Task& task, float* partial) {
    i64 group = a.heads / a.kv_heads, dim = a.dim;
    int M = task.count * (int)group;
    i64 total = a.starts[task.row + 1] - a.starts[task.row];
    i64 before = a.lengths[task.row] - total;  // positions before this step's
    const int32_t* table = a.table + task.row * a.width;
    alignas(64) float kT[DIM * KEYS], s[MOST][KEYS];
    const float *k[KEYS], *v[KEYS], *q[MOST];
    float *top = partial, *sum = partial + M, *found = partial + 2 * M, keep[MOST];  // found [M, dim]
    std::fill(found, found + M * dim, 0.0f);
    std::fill(top, sum, -INFINITY), std::fill(sum, found, 0.0f);
    for (int m = 0; m < M; m++) {
        i64 token = task.first + m / group, head = task.head * group + m % group;
        q[m] = a.query + ((a.starts[task.row] + token) * a.heads + head) * dim;
    }
    for (i64 base = task.begin; base < task.end; base += KEYS) {
        int n = (int)std::min<i64>(KEYS, task.end - base);
        for (int t = 0; t < n;) {
            i64 offset = (base + t) % a.page, page = table[(base + t) / a.page];
            i64 at = ((page * a.kv_heads + task.head) * a.page + offset) * dim;
            for (i64 left = a.page - offset; left && t < n; left--, t++, at += dim)
                k[t] = a.keys + at, v[t] = a.values + at;
        }
        std::fill(k + n, k + KEYS, k[0]);  // any key will do: nobody sees these
        for (int t = 0; t < (n > 2 * LANES ? KEYS : 2 * LANES); t += LANES)
            transpose(k + t, dim, kT + t);
        by_tall(M, [&](int m, auto count) { score_tile<count>(q + m, kT, dim, n, s + m); });
        for (int m = 0; m < M; m++) {
            i64 at = before + task.first + m / group;
            i64 from = a.window ? std::max<i64>(0, at - a.window + 1) : 0;
            float slope = a.slopes ? a.slopes[task.head * group + m % group] : 0;
            keep[m] = shares(a, s[m], base, at, from, slope, top[m], sum[m]);
        }
        by_tall(M, [&](int m, auto count) {
            mix_tile<count>(s + m, v, n, keep + m, found + m * dim, dim);
        });
    }
}

extern "C" void attention_f32(const float* query, const float* keys, const float* values,
                              const int32_t* starts, const int32_t* lengths, const int32_t* table,
                              const float* sinks, const float* slopes, float* out, i64 rows,
                              i64 width, i64 heads, i64 kv_heads, i64 dim, i64 page, i64 window,
                              float scale, float softcap, int threads) {
    Pages a{query, keys, values, sinks, slopes, starts, lengths, table,
            width, heads, kv_heads, dim, page, window, scale, softcap};
    int group = (int)(heads / kv_heads), each = std::max(1, QUERIES / group);
    std::vector<Task> tasks;
    std::vector<size_t> sets;  // the first task of each set of queries; spans follow
    i64 size = 0;
    for (int r = 0; r < rows; r++) {
        int total = starts[r + 1] - starts[r], before = lengths[r] - total;
        for (int first = 0; first < total; first += each)
            for (int head = 0; head < kv_heads; head++) {
                int count = std::min(each, total - first), end = before + first + count;
                int low = window ? std::max<int>(0, before + first - (int)window + 1) : 0;
                sets.push_back(tasks.size());
                for (int begin = low / SPAN * SPAN; begin < end; begin += SPAN) {
                    int from = std::max(begin, low / KEYS * KEYS);
                    tasks.push_back({r, head, first, count, from, std::min(begin + SPAN, end), size});
                    size += (i64)count * group * (dim + 2);
                }
            }
    }
    sets.push_back(tasks.size());
    static thread_local std::vector<float> scratch;
    if ((i64)scratch.size() < size) scratch.resize(size);
    float* partial = scratch.data();
    split((i64)tasks.size(), threads, [&](i64 begin, i64 end) {
        for (i64 t = begin; t < end; t++) attend(a, tasks[t], partial + tasks[t].partial);
    });
    split((i64)sets.size() - 1, threads, [&](i64 begin, i64 end) {
        for (i64 s = begin; s < end; s++) {
            const Task& one = tasks[sets[s]];
            int M = one.count * group;
            for (int m = 0; m < M; m++) {
                i64 token = starts[one.row] + one.first + m / group, head = one.head * group + m % group;
                float* y = out + (token * heads + head) * dim;
                float top = sinks ? sinks[head] : -INFINITY;
                for (size_t t = sets[s]; t < sets[s + 1]; t++)
                    top = std::max(top, partial[tasks[t].partial + m]);
                float sum = sinks ? std::exp(sinks[head] - top) : 0;
                std::fill(y, y + dim, 0.0f);
                for (size_t t = sets[s]; t < sets[s + 1]; t++) {
                    const float* p = partial + tasks[t].partial;
                    float weight = p[m] == -INFINITY ? 0 : std::exp(p[m] - top);
                    sum += p[M + m] * weight;
                    for (i64 d = 0; d < dim; d++) y[d] += p[2 * M + m * dim + d] * weight;
                }
                for (i64 d = 0; d < dim; d++) y[d] /= sum;
            }
        }
    });
}

// ── norms, rotation and store, gates: a few reads and writes, so one pass each ───────────────

static void norm_row(const float* x, const float* added, const float* weight, const float* bias,
                     float* y, float* both, i64 width, float eps, int rms) {
    if (added) {
        for (i64 i = 0; i < width; i++) both[i] = x[i] + added[i];
        x = both;
    }
    v16 squares = {}, sums = {};
    i64 i = 0;
    float mean = 0;
    if (!rms) {
        for (; i + 16 <= width; i += 16) sums += load16(x + i);
        mean = total(sums);
        for (; i < width; i++) mean += x[i];
        mean /= (float)width;
    }
    for (i = 0; i + 16 <= width; i += 16) {
        v16 d = load16(x + i) - mean;
        squares += d * d;
    }
    float square = total(squares);
    for (; i < width; i++) square += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / std::sqrt(square / (float)width + eps);
    if (bias)
        for (i = 0; i < width; i++) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
    else
        for (i = 0; i < width; i++) y[i] = (x[i] - mean) * scale * weight[i];
}

extern "C" void norm_f32(const float* x, const float* added, const float* weight, const float* bias,
                         float* y, float* both, i64 rows, i64 width, float eps, int rms, int threads) {
    split(rows, rows * width > SMALL ? threads : 1, [=](i64 begin, i64 end) {
        for (i64 r = begin; r < end; r++)
            norm_row(x + r * width, added ? added + r * width : nullptr, weight, bias,
                     y + r * width, both ? both + r * width : nullptr, width, eps, rms);
    });
}

// Turns one head's first 2 · pairs channels by the angles of its position.
static void turn(const float* x, float* y, const float* cos_, i64 pairs, i64 dim, int interleaved) {
    const float* sin_ = cos_ + pairs;
    if (interleaved)
        for (i64 i = 0; i < pairs; i++) {
            float a = x[2 * i], b = x[2 * i + 1];
            y[2 * i] = a * cos_[i] - b * sin_[i];
            y[2 * i + 1] = b * cos_[i] + a * sin_[i];
        }
    else
        for (i64 i = 0; i < pairs; i++) {
            float a = x[i], b = x[pairs + i];
            y[i] = a * cos_[i] - b * sin_[i];
            y[pairs + i] = b * cos_[i] + a * sin_[i];
        }
    for (i64 i = 2 * pairs; i < dim; i++) y[i] = x[i];
}

extern "C" void store_f32(const float* query, const float* key, const float* value, float* keys,
                          float* values, const i64* slots, const float* table, const i64* at,
                          const float* query_norm, const float* key_norm, float* out, i64 tokens,
                          i64 q_step, i64 k_step, i64 v_step, i64 heads, i64 kv_heads, i64 dim,
                          i64 page, i64 pairs, float eps, int interleaved, int threads) {
    split(tokens, tokens * heads * dim > SMALL ? threads : 1, [=](i64 begin, i64 end) {
      for (i64 t = begin; t < end; t++) {
        const float* angles = table ? table + at[t] * 2 * pairs : nullptr;
        float normed[DIM], *place;
        for (i64 h = 0; h < heads + kv_heads; h++) {
            bool q = h < heads;
            const float* x = q ? query + t * q_step + h * dim : key + t * k_step + (h - heads) * dim;
            const float* weight = q ? query_norm : key_norm;
            if (weight) norm_row(x, nullptr, weight, nullptr, normed, nullptr, dim, eps, 1), x = normed;
            if (q)
                place = out + (t * heads + h) * dim;
            else if (slots[t] < 0)
                continue;
            else
                place = keys + ((slots[t] / page * kv_heads + h - heads) * page + slots[t] % page) * dim;
            turn(x, place, angles, angles ? pairs : 0, dim, interleaved);
        }
        if (slots[t] >= 0)
            for (i64 h = 0; h < kv_heads; h++)
                memcpy(values + ((slots[t] / page * kv_heads + h) * page + slots[t] % page) * dim,
                       value + t * v_step + h * dim, dim * sizeof(float));
      }
    });
}

static v16 tanh16(v16 x) {
    v16 e = exp16(-2 * (x < 0 ? -x : x));
    v16 y = (1 - e) / (1 + e);
    return x < 0 ? -y : y;
}

template <typename F>
static void gated(const float* x, float* y, i64 rows, i64 width, int threads, F f) {
    i64 whole = width / 16 * 16;
    split(rows, rows * width > SMALL ? threads : 1, [=](i64 begin, i64 end) {
      for (i64 r = begin; r < end; r++) {
        const float *gate = x + r * 2 * width, *up = gate + width;
        for (i64 i = 0; i < whole; i += 16)
            *(v16*)(y + r * width + i) = f(load16(gate + i)) * load16(up + i);
        if (whole < width) {
            v16 a = {}, b = {};
            for (i64 i = whole; i < width; i++) a[i - whole] = gate[i], b[i - whole] = up[i];
            a = f(a) * b;
            for (i64 i = whole; i < width; i++) y[r * width + i] = a[i - whole];
        }
      }
    });
}

static v16 silu16(v16 g) { return g / (1 + exp16(-g)); }
static v16 gelu16(v16 g) {
    return 0.5f * g * (1 + tanh16(0.7978845608028654f * (g + 0.044715f * g * g * g)));
}

extern "C" void silu_gate_f32(const float* x, float* y, i64 rows, i64 width, int threads) {
    gated(x, y, rows, width, threads, silu16);
}
extern "C" void gelu_tanh_gate_f32(const float* x, float* y, i64 rows, i64 width, int threads) {
    gated(x, y, rows, width, threads, gelu16);
}

template <typename F>
static void each(const float* x, float* y, i64 count, int threads, F f) {
    i64 tiles = (count + 15) / 16;
    split(tiles, count > SMALL ? threads : 1, [=](i64 begin, i64 end) {
        for (i64 i = begin * 16; i < end * 16; i += 16) {
            v16 a = {};
            i64 n = std::min<i64>(16, count - i);
            memcpy(&a, x + i, n * sizeof(float));
            a = f(a);
            memcpy(y + i, &a, n * sizeof(float));
        }
    });
}

extern "C" void silu_f32(const float* x, float* y, i64 count, int threads) {
    each(x, y, count, threads, silu16);
}
extern "C" void gelu_tanh_f32(const float* x, float* y, i64 count, int threads) {
    each(x, y, count, threads, gelu16);
}

// ── the best of a row ────────────────────────────────────────────────────────────────────────
// Rows `at` of x; the first of equals; −1 where the largest is infinite, or one is not a number.

static i64 best_of(const float* x, i64 width) {
    v16 tops = all16(-INFINITY);
    auto odd = tops != tops;
    i64 i = 0;
    for (; i + 16 <= width; i += 16) {
        v16 a = load16(x + i);
        odd |= a != a;
        tops = a > tops ? a : tops;
    }
    float top = largest(tops);
    bool strange = false;
    for (int j = 0; j < 16; j++) strange |= odd[j] != 0;
    for (; i < width; i++) strange |= x[i] != x[i], top = std::max(top, x[i]);
    if (strange || !std::isfinite(top)) return -1;
    for (i = 0; x[i] != top;) i++;
    return i;
}

extern "C" void best_f32(const float* x, const i64* at, i64* best, i64 rows, i64 width, int threads) {
    split(rows, threads, [=](i64 begin, i64 end) {
        for (i64 r = begin; r < end; r++) best[r] = best_of(x + at[r] * width, width);
    });
}

// A draw from a row's whole distribution, as in sampling.py: weights are whole, so their sums are
// exact; the running sum is taken by blocks, and walked only within the one that matters.

static const i64 BLOCK = 4096;
typedef i64 l16 __attribute__((vector_size(128)));

static l16 weights16(const float* x, i64 left, float top, float inverse) {
    v16 a = all16(-INFINITY);
    memcpy(&a, x, std::min<i64>(left, 16) * sizeof(float));
    return __builtin_convertvector(exp16((a - top) * inverse) * 0x1p40f, l16);
}

static i64 draw_of(const float* x, i64 width, float inverse, i64 bits, std::vector<i64>& sums) {
    i64 best = best_of(x, width), total = 0;
    if (best < 0) return -1;
    sums.clear();
    for (i64 block = 0; block < width; block += BLOCK) {
        l16 sum = {};
        for (i64 i = block; i < std::min(width, block + BLOCK); i += 16)
            sum += weights16(x + i, width - i, x[best], inverse);
        for (int j = 0; j < 16; j++) total += sum[j];
        sums.push_back(total);
    }
    double share = (double)((uint64_t)bits >> 11) * 0x1p-53;
    i64 at = std::min((i64)(share * (double)total), total - 1);
    i64 block = std::upper_bound(sums.begin(), sums.end(), at) - sums.begin();
    i64 sum = block ? sums[block - 1] : 0;
    for (i64 i = block * BLOCK;; i += 16) {
        l16 weight = weights16(x + i, width - i, x[best], inverse);
        for (int j = 0; j < 16; j++)
            if ((sum += weight[j]) > at) return i + j;
    }
}

extern "C" void draw_f32(const float* x, const i64* at, const float* inverse, const i64* bits,
                         i64* drawn, i64 rows, i64 width, int threads) {
    split(rows, threads, [=](i64 begin, i64 end) {
        std::vector<i64> sums;
        for (i64 r = begin; r < end; r++)
            drawn[r] = draw_of(x + at[r] * width, width, inverse[r], bits[r], sums);
    });
}

// A row's k best, of equals the smaller ids first; their log-probabilities and a chosen one's, with
// its rank. The k-th largest of the maxima of 64 bounds the k-th best from below.

struct Scored {
    float score;
    i64 id;
};

static void top_of(const float* x, i64 width, i64 k, i64 chosen, bool normalise, float* best,
                   i64* ids, float* at, i64* rank) {
    std::vector<float> maxima;
    std::vector<Scored> found;
    v16 tops, edge = all16(-INFINITY);
    auto odd = edge != edge;
    for (i64 i = 0; i < width; i += 64) {
        tops = edge;
        for (i64 j = i; j < std::min(width, i + 64); j += 16) {
            v16 a = edge;
            memcpy(&a, x + j, std::min<i64>(width - j, 16) * sizeof(float));
            odd |= a != a;
            tops = a > tops ? a : tops;
        }
        maxima.push_back(largest(tops));
    }
    float top = *std::max_element(maxima.begin(), maxima.end()), bound = -INFINITY;
    if (k && k <= (i64)maxima.size()) {
        std::vector<float> falling = maxima;
        std::nth_element(falling.begin(), falling.begin() + k - 1, falling.end(), std::greater<float>());
        bound = falling[k - 1];
    }
    double sum = 0;
    for (i64 block = 0; normalise && block < width; block += BLOCK) {
        v16 part = {};
        for (i64 i = block; i < std::min(width, block + BLOCK); i += 16) {
            v16 a = all16(-INFINITY);
            memcpy(&a, x + i, std::min<i64>(width - i, 16) * sizeof(float));
            part += exp16(a - top);
        }
        sum += total(part);
    }
    float shift = normalise ? top + (float)std::log(sum) : 0;
    for (int j = 0; j < 16; j++)
        if (odd[j]) shift = NAN;
    for (i64 i = 0; k && i < width; i += 64)
        for (i64 j = i; !(maxima[i / 64] < bound) && j < std::min(width, i + 64); j++)
            if (!(x[j] < bound)) found.push_back({x[j] == x[j] ? x[j] : -INFINITY, j});
    auto before = [](const Scored& a, const Scored& b) {
        return a.score > b.score || (a.score == b.score && a.id < b.id);
    };
    std::partial_sort(found.begin(), found.begin() + k, found.end(), before);
    for (i64 i = 0; i < k; i++) best[i] = found[i].score - shift, ids[i] = found[i].id;
    chosen = chosen < 0 ? ids[0] : chosen;
    i64 above = 0, last = 0;
    auto beaten = odd ^ odd;
    for (; last + 16 <= width; last += 16) beaten -= load16(x + last) > all16(x[chosen]);
    for (int j = 0; j < 16; j++) above += beaten[j];
    for (; last < width; last++) above += x[last] > x[chosen];
    *at = x[chosen] - shift, *rank = 1 + above;
}

extern "C" void top_f32(const float* x, const i64* chosen, float* best, i64* ids, float* at,
                        i64* rank, i64 rows, i64 width, i64 k, i64 normalise, int threads) {
    split(rows, threads, [=](i64 begin, i64 end) {
        for (i64 r = begin; r < end; r++)
            top_of(x + r * width, width, k, chosen ? chosen[r] : -1, normalise, best + r * k,
                   ids + r * k, at + r, rank + r);
    });
}

// ── a plain decoder's layers in one call ─────────────────────────────────────────────────────
// The functions above in the order of model/decoder.py's Layer, so that nothing is paid between
// them, and what passes between them stays where the last layer left it. stack.py fills these in.

struct Product {
    const void* values;
    const float* scales;
    const int32_t* sums;
    const float* bias;
    i64 in, out, kind;  // kind 0: float32, 1: bfloat16, 2: int8
};

struct Layer {
    Product qkv, out, up, down;
    const float *norm, *norm_bias, *mlp_norm, *mlp_norm_bias, *query_norm, *key_norm, *sinks, *angles;
    float *keys, *values;
    i64 pairs, interleaved, window;
};

struct Stack {
    const Layer* layers;
    const float* slopes;
    i64 count, hidden, heads, kv_heads, dim, page, rms, gated, gelu, threads, grain, reading;
    float eps, scale, softcap;
};

struct Step {
    const i64 *slots, *at;
    const int32_t *starts, *lengths, *table;
    i64 tokens, rows, width, longest;
};

struct Room {  // what grows to the largest step and stays
    std::vector<float> floats;
    std::vector<uint8_t> bytes;
};

extern "C" void stack_f32(const Stack* stack, const Step* step, float* x, float* added) {
    const Stack& a = *stack;
    const i64 n = step->tokens, inner = a.layers[0].down.in, wide = a.layers[0].up.out;
    const i64 queries = a.heads * a.dim, keys = a.kv_heads * a.dim, widest = std::max(queries, inner);
    const i64 sizes[] = {n * a.hidden, n * (queries + 2 * keys), n * queries, n * wide, n * inner, n};
    float* part[6];
    static thread_local Room room;
    i64 total = 0;
    for (i64 size : sizes) total += size;
    if ((i64)room.floats.size() < total) room.floats.resize(total);
    i64 most = n * (std::max(widest, a.hidden) + 4);
    if ((i64)room.bytes.size() < most) room.bytes.resize(most);
    part[0] = room.floats.data();
    for (int i = 1; i < 6; i++) part[i] = part[i - 1] + sizes[i - 1];
    float *h = part[0], *qkv = part[1], *query = part[2], *up = part[3], *fed = part[4], *scales = part[5];
    const int all = (int)a.threads;

    auto product = [&](const Product& w, const float* from, float* to) {
        i64 work = std::max(n, a.reading) * w.in * w.out;
        int threads = (int)std::min<i64>(all, 1 + work / a.grain);
        if (w.kind == 2)
            linear_int8(from, (const int8_t*)w.values, w.scales, w.sums, w.bias, to,
                        room.bytes.data(), scales, n, w.in, w.out, threads);
        else if (w.kind == 1)
            linear_bf16(from, (const uint16_t*)w.values, w.bias, to, n, w.in, w.out, threads);
        else
            linear_f32(from, (const float*)w.values, w.bias, to, n, w.in, w.out, threads);
    };
    int reading = (int)std::min<i64>(all, 1 + 16 * step->longest * n * queries / a.grain);
    for (i64 i = 0; i < a.count; i++) {
        const Layer& l = a.layers[i];
        norm_f32(x, i ? added : nullptr, l.norm, l.norm_bias, h, x, n, a.hidden, a.eps, (int)a.rms, all);
        product(l.qkv, h, qkv);
        const i64 row = queries + 2 * keys;
        store_f32(qkv, qkv + queries, qkv + queries + keys, l.keys, l.values, step->slots, l.angles,
                  step->at, l.query_norm, l.key_norm, query, n, row, row, row, a.heads, a.kv_heads,
                  a.dim, a.page, l.pairs, a.eps, (int)l.interleaved, all);
        attention_f32(query, l.keys, l.values, step->starts, step->lengths, step->table, l.sinks,
                      a.slopes, qkv, step->rows, step->width, a.heads, a.kv_heads, a.dim, a.page,
                      l.window, a.scale, a.softcap, reading);
        product(l.out, qkv, added);
        norm_f32(x, added, l.mlp_norm, l.mlp_norm_bias, h, x, n, a.hidden, a.eps, (int)a.rms, all);
        product(l.up, h, up);
        if (a.gated)
            (a.gelu ? gelu_tanh_gate_f32 : silu_gate_f32)(up, fed, n, inner, all);
        else
            (a.gelu ? gelu_tanh_f32 : silu_f32)(up, fed, n * inner, all);
        product(l.down, fed, added);
    }
}
