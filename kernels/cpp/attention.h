// Attention over pages, where they lie.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "threads.h"
#include "vectors.h"

// A task is one row's few queries that share a key head, over one span of the context. Tiles of
// KEYS positions and spans of SPAN begin at fixed positions, so neither chunks of a prompt nor
// neighbours in the batch change the order of a sum.
//
// Pages hold floats, which are multiplied one by one; or bfloat16, which is multiplied in pairs, of
// two channels or two positions, as the processor likes it. Queries and shares are rounded like
// them then, whoever asks, so that a sum is the same in a prompt and one token at a time.

static const int KEYS = 64, LANES = 16;  // positions of a tile, and of a register
static const int SPAN = 512, QUERIES = 64, MOST = 128;  // MOST: heads of a group
static const int FEW = 32;  // queries of a task that is done before its tiles are read
static const int LINES = 8;  // that lie in a row in any page
static const int PIECES = KEYS * DIM * (int)sizeof(float) / LINE / LINES;  // of a tile's keys
static const int TALL = 6;  // queries that share what is loaded, as many as fit the registers

template <typename P> struct Factor;  // what is multiplied, of pages of P, and how many numbers it is
template <> struct Factor<float> { typedef float type; static const int COUNT = 1; };
template <> struct Factor<uint16_t> { typedef Pair type; static const int COUNT = 2; };

template <typename P>
struct Pages {
    const float* query;
    const P *keys, *values;
    const float *sinks, *slopes;
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

// The next tile is asked for while this one is worked on: a page lies anywhere, so that the core
// cannot guess it. In the order in which its lines lie, which memory gives a third faster than lines
// from several pages in turn; into the second cache, where more may be on their way.
struct Soon {
    const char* const* piece = nullptr;       // of LINES lines each
    unsigned line = 0, last = 0, each = LINES;  // of them all; so many at a step, within a piece

    inline __attribute__((always_inline)) void ask(i64 step) const {
        unsigned first = line + (unsigned)step * each;
        if (first >= last) return;
        const char* from = piece[first / LINES] + first % LINES * LINE;
        for (unsigned i = 0; i < each; i++) __builtin_prefetch(from + i * LINE, 0, 2);
    }
    Soon share(int first, int end, int of, i64 steps) const {  // for queries first … end
        Soon some{piece, last / LINES * first / of * LINES, last / LINES * end / of * LINES, 1};
        while (some.each < LINES && some.line + some.each * steps < some.last) some.each *= 2;
        return some;
    }
};

// s[m][t] = q[m] · k[t] for J · LANES positions: k[j] are factors `step` apart, of LANES positions
template <int M, int J, typename E>
static void scores(const E* const* q, const E* const* k, i64 step, i64 count, float (*s)[KEYS],
                   Soon soon) {
    v16 sum[M][J];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) sum[m][j] = v16{};
    for (i64 d = 0; d < count; d++) {
        decltype(load16(k[0])) key[J];
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) key[j] = load16(k[j] + d * step);
        soon.ask(d);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int j = 0; j < J; j++) sum[m][j] = plus(sum[m][j], q[m][d], key[j]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) *(v16*)(s[m] + j * LANES) = sum[m][j];
}

// found[m] = found[m] · keep[m] + Σ share[m][t] · v[t], for J registers of channels
template <int M, int J, typename E>
static void mix(const E (*share)[KEYS], const E* const* v, int n, const float* keep, float* found,
                i64 dim, i64 d, i64 line, Soon soon) {
    v16 sum[M][J];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) sum[m][j] = load16(found + m * dim + d + 16 * j) * keep[m];
    for (int t = 0; t < n; t++) {
        decltype(load16(v[0])) value[J];
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) value[j] = load16(v[t] + d + 16 * j);
        soon.ask(line + t);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int j = 0; j < J; j++) sum[m][j] = plus(sum[m][j], share[m][t], value[j]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) *(v16*)(found + m * dim + d + 16 * j) = sum[m][j];
}

// A tile's part of M queries: their scores, or what they take from the values.
template <int M, typename E>
static void score_tile(const E* const* q, const E* const* k, i64 step, i64 count, int n,
                       float (*s)[KEYS], Soon soon) {
    if (n > KEYS - LANES) return scores<M, KEYS / LANES>(q, k, step, count, s, soon);
    for (int j = 0; j * LANES < n; j++)
        scores<M, 1>(q, k + j, step, count, (float(*)[KEYS])((float*)s + j * LANES), Soon{});
}
template <int M, typename E>
static void mix_tile(const E (*share)[KEYS], const E* const* v, int n, const float* keep,
                     float* found, i64 dim, i64 lines, Soon soon) {
    i64 d = 0;
    for (; d + 64 <= dim; d += 64) mix<M, 4>(share, v, n, keep, found, dim, d, d / 64 * lines, soon);
    for (; d + 16 <= dim; d += 16) mix<M, 1>(share, v, n, keep, found, dim, d, d / 64 * lines, soon);
    if constexpr (std::is_same_v<E, float>)  // pairs are of whole registers
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

// A tile's scores [KEYS] of a query at position `at` that sees from `from`, as exponents of two;
// -> the largest of them and of what was before
template <typename P>
static float exponents(const Pages<P>& a, float* s, i64 base, i64 at, i64 from, float slope, float top) {
    v16 x[KEYS / LANES], peaks = all16(top);
#pragma GCC unroll 4
    for (int j = 0; j < KEYS / LANES; j++) x[j] = load16(s + j * LANES) * (a.scale * LOG2E);
    if (a.softcap > 0)
        for (v16& y : x) y = tanh16(y / (a.softcap * LOG2E)) * (a.softcap * LOG2E);
    if (slope || base < from || base + KEYS > at + 1)
        for (int j = 0; j < KEYS / LANES; j++) {
            const v16 steps = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            v16 where = steps + (float)(base + j * LANES);
            x[j] += slope * LOG2E * (where - (float)at);
            x[j] = (where <= (float)at) & (where >= (float)from) ? x[j] : all16(-INFINITY);
        }
#pragma GCC unroll 4
    for (int j = 0; j < KEYS / LANES; j++) {
        *(v16*)(s + j * LANES) = x[j];
        peaks = peaks > x[j] ? peaks : x[j];
    }
    return largest(peaks);
}

// Exponents [KEYS] become shares, as they are multiplied; -> what remains of everything before
template <typename P>
static float shares(float* s, float peak, float& top, float& sum) {
    float floor = peak == -INFINITY ? 0 : peak;  // nothing is seen yet
    v16 extra = {};
#pragma GCC unroll 4
    for (int j = 0; j < KEYS / LANES; j++)
        extra += put16((P*)s + j * LANES, exp2_16(load16(s + j * LANES) - floor));
    float keep = top == floor ? 1 : exp2_16(all16(top - floor))[0];  // as in most tiles
    sum = sum * keep + total(extra);
    top = peak;
    return keep;
}

// A tile's n keys and values from `base`, as they are multiplied.
template <typename E>
struct Tile {
    const E *k[KEYS / LANES], *v[KEYS];  // keys of LANES positions; values of a position, or of two
    i64 step;                            // from a key's factor to the next
};

// Floats are read where they lie. Keys that are not in registers of positions go to `room`.
static void gather(const Pages<float>& a, const Task& task, i64 base, int n, float* room, Tile<float>& tile) {
    for (int t = 0; t < n; t++)
        tile.v[t] = a.values + a.block(task.row, task.head, base + t) + (base + t) % a.page * a.dim;
    for (int j = 0; j * LANES < n; j++) {
        i64 t = base + j * LANES;
        tile.k[j] = a.across() ? a.keys + a.block(task.row, task.head, t) + t % a.page : room + j * LANES;
    }
    tile.step = a.across() ? a.by_channel : KEYS;
    if (a.across()) return;
    for (int t = 0; t < n; t++) {
        const float* key = a.keys + a.block(task.row, task.head, base + t) + (base + t) % a.page * a.by_position;
        for (i64 d = 0; d < a.dim; d++) room[d * KEYS + t] = key[d * a.by_channel];
    }
}

// bfloat16 goes to `room` in pairs: two channels of a position, and two positions of a channel.
static void gather(const Pages<uint16_t>& a, const Task& task, i64 base, int n, Pair* room, Tile<Pair>& tile) {
    Pair* values = room + a.dim / 2 * KEYS;
    static const uint16_t nothing[DIM] = {};
    for (int j = 0; j * LANES < n; j++) {
        i64 t = base + j * LANES, at = a.block(task.row, task.head, t), offset = t % a.page;
        const uint16_t *key = a.keys + at + offset, *value = a.values + at + offset * a.dim;
        tile.k[j] = room + j * LANES;
        for (i64 d = 0; d < a.dim; d += 2)
            pair16(room + d / 2 * KEYS + j * LANES, key + d * a.by_channel, key + (d + 1) * a.by_channel);
        for (int i = 0, left = n - j * LANES; i < LANES && i < left; i += 2) {
            Pair* to = values + (j * LANES + i) / 2 * a.dim;
            const uint16_t *one = value + i * a.dim, *two = i + 1 < left ? one + a.dim : nothing;
            tile.v[(j * LANES + i) / 2] = to;
            for (i64 d = 0; d < a.dim; d += 16) pair16(to + d, one + d, two + d);
        }
    }
    tile.step = KEYS;
}

// Where the tile from `base` lies, keys and values; -> how many lines of each
template <typename P>
static unsigned look(const Pages<P>& a, const Task& task, i64 base, const char* (*ahead)[PIECES]) {
    int count = 0;
    for (i64 t = base; t < std::min<i64>(base + KEYS, task.end); t += LANES) {
        i64 at = a.block(task.row, task.head, t) + t % a.page * a.dim;  // in pages that a tile covers
        for (i64 i = 0; i < LANES * a.dim; i += LINES * LINE / (i64)sizeof(P), count++) {
            ahead[0][count] = (const char*)(a.keys + at + i);
            ahead[1][count] = (const char*)(a.values + at + i);
        }
    }
    return LINES * count;
}

static const float* factors(const float* query, i64, float*) { return query; }
static const Pair* factors(const float* query, i64 dim, Pair* room) {
    for (i64 d = 0; d < dim; d += 16) put16((uint16_t*)room + d, load16(query + d));
    return room;
}

template <typename P>
static void attend(const Pages<P>& a, const Task& task, const Task* after, float* partial) {
    typedef typename Factor<P>::type E;
    const int COUNT = Factor<P>::COUNT;
    i64 group = a.heads / a.kv_heads, dim = a.dim;
    int M = task.count * (int)group;
    i64 total = a.starts[task.row + 1] - a.starts[task.row];
    i64 before = a.lengths[task.row] - total;  // positions before this step's
    alignas(64) E room[DIM * KEYS], asked[COUNT > 1 ? MOST * DIM / 2 : 1];
    alignas(64) float s[TALL][KEYS];
    const E* q[MOST];
    const char* ahead[2][PIECES];
    Tile<E> tile;
    float *top = partial, *sum = partial + M, *found = partial + 2 * M;  // found [M, dim]
    std::fill(found, found + M * dim, 0.0f);
    std::fill(top, sum, -INFINITY), std::fill(sum, found, 0.0f);
    for (int m = 0; m < M; m++) {
        i64 token = task.first + m / group, head = task.head * group + m % group;
        q[m] = factors(a.query + ((a.starts[task.row] + token) * a.heads + head) * dim, dim, asked + m * dim / 2);
    }
    for (i64 base = task.begin; base < task.end; base += KEYS) {
        int n = (int)std::min<i64>(KEYS, task.end - base);
        unsigned lines = 0;
        if (M <= FEW && a.across())
            lines = base + KEYS < task.end ? look(a, task, base + KEYS, ahead)
                     : after ? look(a, *after, after->begin, ahead) : 0;
        Soon keys{ahead[0], 0, lines}, values{ahead[1], 0, lines};
        gather(a, task, base, n, room, tile);
        by_tall(M, [&](int m, auto count) {
            score_tile<count>(q + m, tile.k, tile.step, dim / COUNT, n, s, keys.share(m, m + count, M, dim / COUNT));
            float peak[TALL], keep[TALL];
            for (int i = 0; i < count; i++) {
                i64 at = before + task.first + (m + i) / group;
                i64 from = a.window ? std::max<i64>(0, at - a.window + 1) : 0;
                float slope = a.slopes ? a.slopes[task.head * group + (m + i) % group] : 0;
                peak[i] = exponents(a, s[i], base, at, from, slope, top[m + i]);
            }
            for (int i = 0; i < count; i++) keep[i] = shares<P>(s[i], peak[i], top[m + i], sum[m + i]);
            mix_tile<count>((const E(*)[KEYS])s, tile.v, (n + COUNT - 1) / COUNT, keep,
                            found + m * dim, dim, KEYS / COUNT, values.share(m, m + count, M, dim / COUNT));
        });
    }
}

template <typename P>
static void attend_all(const Pages<P>& a, i64 rows, float* out, int threads) {
    const i64 dim = a.dim;
    int group = (int)(a.heads / a.kv_heads), each = std::max(1, QUERIES / group);
    std::vector<Task> tasks;
    std::vector<size_t> sets;  // the first task of each set of queries; spans follow
    i64 size = 0;
    for (int r = 0; r < rows; r++) {
        int total = a.starts[r + 1] - a.starts[r], before = a.lengths[r] - total;
        for (int first = 0; first < total; first += each)
            for (int head = 0; head < a.kv_heads; head++) {
                int count = std::min(each, total - first), end = before + first + count;
                int low = a.window ? std::max<int>(0, before + first - (int)a.window + 1) : 0;
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
                i64 token = a.starts[one.row] + one.first + m / group, head = one.head * group + m % group;
                float* y = out + (token * a.heads + head) * dim;
                float top = a.sinks ? a.sinks[head] * LOG2E : -INFINITY;
                for (size_t t = sets[s]; t < sets[s + 1]; t++)
                    top = std::max(top, partial[tasks[t].partial + m]);
                float sum = a.sinks ? std::exp2(a.sinks[head] * LOG2E - top) : 0;
                std::fill(y, y + dim, 0.0f);
                for (size_t t = sets[s]; t < sets[s + 1]; t++) {
                    const float* p = partial + tasks[t].partial;
                    float weight = p[m] == -INFINITY ? 0 : std::exp2(p[m] - top);
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

extern "C" void attention_f32(const float* query, const void* keys, const void* values,
                              const int32_t* starts, const int32_t* lengths, const int32_t* table,
                              const float* sinks, const float* slopes, float* out, i64 rows,
                              i64 width, i64 heads, i64 kv_heads, i64 dim, i64 page, i64 by_position,
                              i64 by_channel, i64 window, i64 bytes, float scale, float softcap, int threads) {
    auto over = [&](auto kind) {
        typedef decltype(kind) P;
        Pages<P> a{query, (const P*)keys, (const P*)values, sinks, slopes, starts, lengths, table, width,
                   heads, kv_heads, dim, page, by_position, by_channel, window, scale, softcap};
        attend_all(a, rows, out, threads);
    };
    bytes == 4 ? over(0.0f) : over(uint16_t());
}
