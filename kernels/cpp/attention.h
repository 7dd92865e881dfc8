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
static const int FEW = 32;  // queries of a task that is done before its tiles are read
static const int TALL = 6;  // queries that share what is loaded, as many as fit the registers

struct Pages {
    const float *query, *keys, *values, *sinks, *slopes;
    const int32_t *starts, *lengths, *table;
    i64 width, heads, kv_heads, dim, page, by_position, by_channel, window;  // of keys, in a page
    float scale, softcap;

    i64 block(i64 row, i64 head, i64 t) const {  // where the page of position t begins
        return (table[row * width + t / page] * kv_heads + head) * page * dim;
    }
    bool across() const { return by_position == 1 && page % LANES == 0; }  // registers of positions
};

struct Task {
    int32_t row, head, first, count;  // queries first … first + count of the row
    int32_t begin, end;               // positions
    i64 partial;                      // where its maxima, sums and values go
};

// The next tile is asked for while this one is worked on, a line at a time: a page lies anywhere,
// so that the core cannot guess it. Into the second cache, where more may be on their way.
struct Soon {
    const float* const* part = nullptr;  // each LANES positions
    int count = 0;

    inline __attribute__((always_inline)) void ask(i64 line) const {
        for (int i = 0; i < count; i++) __builtin_prefetch(part[i] + line, 0, 2);
    }
    Soon share(int first, int last, int of) const {  // for queries first … last
        int from = count * first / of;
        return {part + from, count * last / of - from};
    }
};

// s[m][t] = q[m] · k[t] for J · LANES positions: k[j] are channels `step` apart, of LANES positions
template <int M, int J>
static void scores(const float* const* q, const float* const* k, i64 step, i64 dim, float (*s)[KEYS],
                   Soon soon) {
    v16 sum[M][J];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) sum[m][j] = v16{};
    for (i64 d = 0; d < dim; d++) {
        v16 key[J];
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) key[j] = load16(k[j] + d * step);
        soon.ask(d * step);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int j = 0; j < J; j++) sum[m][j] += q[m][d] * key[j];
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) *(v16*)(s[m] + j * LANES) = sum[m][j];
}

// found[m] = found[m] · keep[m] + Σ share[m][t] · v[t], for J registers of channels
template <int M, int J>
static void mix(const float (*share)[KEYS], const float* const* v, int n, const float* keep,
                float* found, i64 dim, i64 d, Soon soon) {
    v16 sum[M][J];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) sum[m][j] = load16(found + m * dim + d + 16 * j) * keep[m];
    for (int t = 0; t < n; t++) {
        v16 value[J];
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) value[j] = load16(v[t] + d + 16 * j);
        soon.ask((d + t) * LANES);
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
static void score_tile(const float* const* q, const float* const* k, i64 step, i64 dim, int n,
                       float (*s)[KEYS], Soon soon) {
    if (n > KEYS - LANES) return scores<M, KEYS / LANES>(q, k, step, dim, s, soon);
    for (int j = 0; j * LANES < n; j++)
        scores<M, 1>(q, k + j, step, dim, (float(*)[KEYS])((float*)s + j * LANES), Soon{});
}
template <int M>
static void mix_tile(const float (*share)[KEYS], const float* const* v, int n, const float* keep,
                     float* found, i64 dim, Soon soon) {
    i64 d = 0;
    for (; d + 64 <= dim; d += 64) mix<M, 4>(share, v, n, keep, found, dim, d, soon);
    for (; d + 16 <= dim; d += 16) mix<M, 1>(share, v, n, keep, found, dim, d, soon);
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
    float peak = largest(peaks), keep = top == peak ? 1 : top == -INFINITY ? 0 : std::exp(top - peak);
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

// Where the n keys from `base` lie, LANES together, and how far apart their channels are. Pages
// that do not hold registers of positions are copied to `room`.
static i64 gather(const Pages& a, const Task& task, i64 base, int n, float* room, const float** k) {
    for (int j = 0; j * LANES < n; j++) {
        i64 t = base + j * LANES;
        k[j] = a.across() ? a.keys + a.block(task.row, task.head, t) + t % a.page : room + j * LANES;
    }
    if (a.across()) return a.by_channel;
    for (int t = 0; t < n; t++) {
        const float* key = a.keys + a.block(task.row, task.head, base + t) + (base + t) % a.page * a.by_position;
        for (i64 d = 0; d < a.dim; d++) room[d * KEYS + t] = key[d * a.by_channel];
    }
    return KEYS;
}

// Where the keys and values of the tile from `base` lie, LANES together; -> how many of them
static int look(const Pages& a, const Task& task, i64 base, const float* (*ahead)[KEYS / LANES]) {
    int count = 0;
    for (i64 t = base; t < std::min<i64>(base + KEYS, task.end); t += LANES, count++) {
        i64 at = a.block(task.row, task.head, t), offset = t % a.page;
        ahead[0][count] = a.keys + at + offset, ahead[1][count] = a.values + at + offset * a.dim;
    }
    return count;
}

static void attend(const Pages& a, const Task& task, const Task* after, float* partial) {
    i64 group = a.heads / a.kv_heads, dim = a.dim;
    int M = task.count * (int)group;
    i64 total = a.starts[task.row + 1] - a.starts[task.row];
    i64 before = a.lengths[task.row] - total;  // positions before this step's
    alignas(64) float room[DIM * KEYS], s[MOST][KEYS];
    const float *k[KEYS / LANES], *v[KEYS], *q[MOST], *ahead[2][KEYS / LANES];
    float *top = partial, *sum = partial + M, *found = partial + 2 * M, keep[MOST];  // found [M, dim]
    std::fill(found, found + M * dim, 0.0f);
    std::fill(top, sum, -INFINITY), std::fill(sum, found, 0.0f);
    for (int m = 0; m < M; m++) {
        i64 token = task.first + m / group, head = task.head * group + m % group;
        q[m] = a.query + ((a.starts[task.row] + token) * a.heads + head) * dim;
    }
    for (i64 base = task.begin; base < task.end; base += KEYS) {
        int n = (int)std::min<i64>(KEYS, task.end - base);
        Soon keys{ahead[0]}, values{ahead[1]};
        if (M <= FEW && a.across())
            keys.count = values.count = base + KEYS < task.end ? look(a, task, base + KEYS, ahead)
                                        : after ? look(a, *after, after->begin, ahead) : 0;
        for (int t = 0; t < n; t++)
            v[t] = a.values + a.block(task.row, task.head, base + t) + (base + t) % a.page * dim;
        i64 step = gather(a, task, base, n, room, k);
        by_tall(M, [&](int m, auto count) {
            score_tile<count>(q + m, k, step, dim, n, s + m, keys.share(m, m + count, M));
        });
        for (int m = 0; m < M; m++) {
            i64 at = before + task.first + m / group;
            i64 from = a.window ? std::max<i64>(0, at - a.window + 1) : 0;
            float slope = a.slopes ? a.slopes[task.head * group + m % group] : 0;
            keep[m] = shares(a, s[m], base, at, from, slope, top[m], sum[m]);
        }
        by_tall(M, [&](int m, auto count) {
            mix_tile<count>(s + m, v, n, keep + m, found + m * dim, dim, values.share(m, m + count, M));
        });
    }
}

extern "C" void attention_f32(const float* query, const float* keys, const float* values,
                              const int32_t* starts, const int32_t* lengths, const int32_t* table,
                              const float* sinks, const float* slopes, float* out, i64 rows,
                              i64 width, i64 heads, i64 kv_heads, i64 dim, i64 page,
                              i64 by_position, i64 by_channel, i64 window, float scale, float softcap, int threads) {
    Pages a{query, keys, values, sinks, slopes, starts, lengths, table,
            width, heads, kv_heads, dim, page, by_position, by_channel, window, scale, softcap};
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
                int begin = low / SPAN * SPAN;
                do {  // once for a row that sees nothing, too: its result is zero
                    int from = std::max(begin, low / KEYS * KEYS);
                    tasks.push_back({r, head, first, count, from, std::min(begin + SPAN, end), size});
                    size += (i64)count * group * (dim + 2);
                } while ((begin += SPAN) < end);
            }
    }
    sets.push_back(tasks.size());
    static thread_local std::vector<float> scratch;
    if ((i64)scratch.size() < size) scratch.resize(size);
    float* partial = scratch.data();
    split((i64)tasks.size(), threads, [&](i64 begin, i64 end) {
        for (i64 t = begin; t < end; t++)
            attend(a, tasks[t], t + 1 < end ? &tasks[t + 1] : nullptr, partial + tasks[t].partial);
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
                    const float* part = p + 2 * M + m * dim;
                    by16(dim, [&](auto v, i64 d) { v.put(y + d, v.get(y + d) + v.get(part + d) * weight); });
                }
                float inverse = sum == 0 ? 0 : 1 / sum;
                by16(dim, [&](auto v, i64 d) { v.put(y + d, v.get(y + d) * inverse); });
            }
        }
    });
}
