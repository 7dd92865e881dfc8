// Attention over pages, where they lie.
#pragma once

#include <cstring>
#include <vector>

#include "threads.h"
#include "vectors.h"

// A task is one row's few queries that share a key head, over one span of the context. Tiles of
// KEYS positions and spans of SPAN begin at fixed positions, so neither chunks of a prompt nor
// neighbours in the batch change the order of a sum.

static const int KEYS = 64, LANES = 16;  // positions of a tile, and of a register
static const int SPAN = 512, QUERIES = 64, MOST = 128;  // MOST: heads of a group
static const int TALL = 6;  // queries that share what is loaded, as many as fit the registers

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
        if (a.softcap > 0) x[j] = tanh16(x[j] / a.softcap) * a.softcap;
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
