// What is drawn from a row of logits: its best, its k best, or a token by chance.
#pragma once

#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#include "threads.h"
#include "vectors.h"

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

static float shift_of(const float* x, i64 width, float top) {  // what a score is above its logarithm
    double sum = 0;
    for (i64 block = 0; block < width; block += BLOCK) {
        v16 part = {};
        for (i64 i = block; i < std::min(width, block + BLOCK); i += 16) {
            v16 a = all16(-INFINITY);
            memcpy(&a, x + i, std::min<i64>(width - i, 16) * sizeof(float));
            part += exp16(a - top);
        }
        sum += total(part);
    }
    return top + (float)std::log(sum);
}

extern "C" void log_softmax_f32(const float* x, float* y, i64 rows, i64 width, int threads) {
    split(rows, threads, [=](i64 begin, i64 end) {
        for (i64 r = begin; r < end; r++) {
            const float* from = x + r * width;
            v16 tops = all16(-INFINITY);
            float top = -INFINITY;
            by16(width, [&](auto v, i64 i) {
                auto a = v.get(from + i);
                if constexpr (std::is_same_v<decltype(a), float>)
                    top = std::max(top, a);
                else
                    tops = a > tops ? a : tops;
            });
            const float shift = shift_of(from, width, std::max(top, largest(tops)));
            by16(width, [=](auto v, i64 i) { v.put(y + r * width + i, v.get(from + i) - shift); });
        }
    });
}

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
    float shift = normalise ? shift_of(x, width, top) : 0;
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
