// Norms, rotation and store, activations and gates: a few reads and writes, so one pass each.
#pragma once

#include <cstring>

#include "threads.h"
#include "vectors.h"

static void norm_row(const float* x, const float* added, const float* weight, const float* bias,
                     float* y, float* both, i64 width, float eps, int rms) {
    if (added) {
        by16(width, [&](auto v, i64 i) { v.put(both + i, v.get(x + i) + v.get(added + i)); });
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
    by16(width, [&](auto v, i64 i) {
        auto found = (v.get(x + i) - mean) * scale * v.get(weight + i);
        v.put(y + i, bias ? found + v.get(bias + i) : found);
    });
}

extern "C" void norm_f32(const float* x, const float* added, const float* weight, const float* bias,
                         float* y, float* both, i64 rows, i64 width, float eps, int rms, int threads) {
    split(rows, at_most(threads, rows * width), [=](i64 begin, i64 end) {
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

// x [dim] to where its channels lie, as floats or bfloat16
template <typename P>
static void write(const float* x, P* place, i64 dim, i64 by_channel) {
    P kept[DIM];
    if (by_channel == 1 && dim % 16 == 0) {
        for (i64 d = 0; d < dim; d += 16) put16(place + d, load16(x + d));
        return;
    }
    float room[DIM] = {};
    memcpy(room, x, dim * sizeof(float));
    for (i64 d = 0; d < dim; d += 16) put16(kept + d, load16(room + d));
    for (i64 d = 0; d < dim; d++) place[d * by_channel] = kept[d];
}

extern "C" void store_f32(const float* query, const float* key, const float* value, void* keys,
                          void* values, const i64* slots, const float* table, const i64* at,
                          const float* query_norm, const float* key_norm, float* out, i64 tokens,
                          i64 q_step, i64 k_step, i64 v_step, i64 heads, i64 kv_heads, i64 dim, i64 page,
                          i64 by_position, i64 by_channel, i64 bytes, i64 pairs, float eps,
                          int interleaved, int threads) {
    auto put = [=](const float* x, void* pages, i64 head, i64 slot, i64 by_position, i64 by_channel) {
        i64 place = (slot / page * kv_heads + head) * page * dim + slot % page * by_position;
        bytes == 4 ? write(x, (float*)pages + place, dim, by_channel)
                   : write(x, (uint16_t*)pages + place, dim, by_channel);
    };
    split(tokens, at_most(threads, tokens * heads * dim), [=](i64 begin, i64 end) {
      for (i64 t = begin; t < end; t++) {
        const float* angles = table ? table + at[t] * 2 * pairs : nullptr;
        float normed[DIM], turned[DIM];
        for (i64 h = 0; h < heads + kv_heads; h++) {
            bool q = h < heads;
            const float* x = q ? query + t * q_step + h * dim : key + t * k_step + (h - heads) * dim;
            const float* weight = q ? query_norm : key_norm;
            if (weight) norm_row(x, nullptr, weight, nullptr, normed, nullptr, dim, eps, 1), x = normed;
            float* to = q ? out + (t * heads + h) * dim : turned;
            turn(x, to, angles, angles ? pairs : 0, dim, interleaved);
            if (!q && slots[t] >= 0) put(turned, keys, h - heads, slots[t], by_position, by_channel);
        }
        for (i64 h = 0; h < kv_heads && slots[t] >= 0; h++)
            put(value + t * v_step + h * dim, values, h, slots[t], dim, 1);
      }
    });
}

template <typename F>
static void gate_rows(const float* x, float* y, i64 rows, i64 width, int threads, F f) {
    i64 whole = width / 16 * 16;
    split(rows, at_most(threads, rows * width), [=](i64 begin, i64 end) {
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

// Types, not functions, so that they are compiled into the loops.
struct Silu {
    v16 operator()(v16 g) const { return g / (1 + exp16(-g)); }
};
struct Gelu {
    v16 operator()(v16 g) const {
        return 0.5f * g * (1 + tanh16(0.7978845608028654f * (g + 0.044715f * g * g * g)));
    }
};

extern "C" void silu_gate_f32(const float* x, float* y, i64 rows, i64 width, int threads) {
    gate_rows(x, y, rows, width, threads, Silu());
}
extern "C" void gelu_tanh_gate_f32(const float* x, float* y, i64 rows, i64 width, int threads) {
    gate_rows(x, y, rows, width, threads, Gelu());
}

template <typename F>
static void each(const float* x, float* y, i64 count, int threads, F f) {
    i64 tiles = (count + 15) / 16;
    split(tiles, at_most(threads, count), [=](i64 begin, i64 end) {
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
    each(x, y, count, threads, Silu());
}
extern "C" void gelu_tanh_f32(const float* x, float* y, i64 count, int threads) {
    each(x, y, count, threads, Gelu());
}
