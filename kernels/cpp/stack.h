// A plain decoder's layers in one call.
#pragma once

#include <vector>

#include "pointwise.h"
#include "products.h"

// The functions above in the order of model/decoder.py's Layer, so that nothing is paid between
// them, and what passes between them stays where the last layer left it. stack.py fills these in.

extern "C" void attention_f32(const float* query, const void* keys, const void* values,
                              const int32_t* starts, const int32_t* lengths, const int32_t* table,
                              const float* sinks, const float* slopes, float* out, i64 rows,
                              i64 width, i64 heads, i64 kv_heads, i64 dim, i64 page,
                              i64 by_position, i64 by_channel, i64 window, i64 bytes, float scale,
                              float softcap, int threads);

struct Product {
    const void* values;
    const float* scales;
    const int32_t* sums;
    const float* bias;
    i64 in, out, groups, kind;
};

struct Layer {
    Product qkv, out, up, down;
    const float *norm, *norm_bias, *mlp_norm, *mlp_norm_bias;
    const float *out_norm, *mlp_out_norm;  // of what a branch adds, in Gemma
    const float *query_norm, *key_norm, *sinks, *angles;
    void *keys, *values;
    i64 pairs, interleaved, window;
};

struct Stack {
    const Layer* layers;
    const float *slopes, *norm, *norm_bias;  // the norms are those after the last layer
    i64 count, hidden, heads, kv_heads, dim, page, by_position, by_channel;
    i64 bytes;  // of a number in pages: 4 for float32, 2 for bfloat16
    i64 rms, gated, gelu, grain, reading;
    float eps, scale, softcap;
};

struct Step {
    const i64 *slots, *at;
    const int32_t *starts, *lengths, *table;
    const i64* wanted;  // tokens whose result is read, rising; not looked at where it is all
    i64 tokens, rows, width, longest, wants;
};

// Rows that are wanted to the front, and back to their places: a row never passes another.
static void gather_rows(float* x, const i64* wanted, i64 wants, i64 width) {
    for (i64 i = 0; i < wants; i++) std::memmove(x + i * width, x + wanted[i] * width, width * sizeof(float));
}
static void scatter_rows(float* x, const i64* wanted, i64 wants, i64 width) {
    for (i64 i = wants; i--;) std::memmove(x + wanted[i] * width, x + i * width, width * sizeof(float));
}

struct Room {  // what grows to the largest step and stays
    std::vector<float> floats;
    std::vector<uint8_t> bytes;
};

// The stream x is written over; `added` ends as what the head reads.
extern "C" void stack_f32(const Stack* stack, const Step* step, float* x, float* added) {
    const Stack& a = *stack;
    i64 n = step->tokens;  // rows that are worked on
    const i64 inner = a.layers[0].down.in, wide = a.layers[0].up.out;
    const i64 queries = a.heads * a.dim, keys = a.kv_heads * a.dim, widest = std::max(queries, inner);
    const i64 sizes[] = {n * a.hidden, n * (queries + 2 * keys), n * queries, n * wide, n * inner, n};
    float* part[6];
    static thread_local Room room;
    i64 total = 0;
    for (i64 size : sizes) total += size;
    if ((i64)room.floats.size() < total) room.floats.resize(total);
    i64 most = 2 * n * (std::max(widest, a.hidden) + 4);  // int4 has sums behind its rows
    if ((i64)room.bytes.size() < most) room.bytes.resize(most);
    part[0] = room.floats.data();
    for (int i = 1; i < 6; i++) part[i] = part[i - 1] + sizes[i - 1];
    float *h = part[0], *qkv = part[1], *query = part[2], *up = part[3], *fed = part[4], *scales = part[5];
    const int all = EVERYBODY;

    auto worth = [&](const Product& w) {
        return (int)std::min<i64>(all, 1 + std::max(n, a.reading) * w.in * w.out / a.grain);
    };
    auto product = [&](const Product& w, const float* from, float* to) {
        const int threads = worth(w);
        if (w.kind == INT8)
            linear_int8(from, (const int8_t*)w.values, w.scales, w.sums, w.bias, to,
                        room.bytes.data(), scales, n, w.in, w.out, threads);
        else if (w.kind == INT4)
            linear_int4(from, (const uint8_t*)w.values, w.scales, w.bias, to,
                        (int8_t*)room.bytes.data(), scales, n, w.in, w.groups, w.out, threads);
        else if (w.kind == BFLOAT16)
            linear_bf16(from, (const uint16_t*)w.values, w.bias, to, n, w.in, w.out, threads);
        else if (w.kind == FLOAT16)
            linear_f16(from, (const Half*)w.values, w.bias, to, n, w.in, w.out, threads);
        else
            linear_f32(from, (const float*)w.values, w.bias, to, n, w.in, w.out, threads);
    };
    auto gated = [&](const Product& w, auto act) {  // h -> fed
        if (w.out / 2 % TILE) {  // halves that begin within a tile
            product(w, h, up);
            gate_rows(up, fed, n, inner, all, act);
        } else if (w.kind == INT8)
            gated_int8(h, (const int8_t*)w.values, w.scales, w.sums, w.bias, fed, room.bytes.data(),
                       scales, n, w.in, inner, worth(w), act);
        else if (w.kind == INT4)
            gated_int4(h, (const uint8_t*)w.values, w.scales, w.bias, fed, (int8_t*)room.bytes.data(),
                       scales, n, w.in, w.groups, inner, worth(w), act);
        else if (w.kind == BFLOAT16)
            gated_linear(h, (const uint16_t*)w.values, w.bias, fed, n, w.in, inner, worth(w), act);
        else if (w.kind == FLOAT16)
            gated_linear(h, (const Half*)w.values, w.bias, fed, n, w.in, inner, worth(w), act);
        else
            gated_linear(h, (const float*)w.values, w.bias, fed, n, w.in, inner, worth(w), act);
    };
    auto renorm = [&](const float* weight) {
        if (weight) norm_f32(added, nullptr, weight, nullptr, added, nullptr, n, a.hidden, a.eps, 1, all);
    };
    int reading = (int)std::min<i64>(all, 1 + 16 * step->longest * n * queries / a.grain);
    for (i64 i = 0; i < a.count; i++) {
        const Layer& l = a.layers[i];
        norm_f32(x, i ? added : nullptr, l.norm, l.norm_bias, h, x, n, a.hidden, a.eps, (int)a.rms, all);
        product(l.qkv, h, qkv);
        const i64 row = queries + 2 * keys;
        store_f32(qkv, qkv + queries, qkv + queries + keys, l.keys, l.values, step->slots, l.angles,
                  step->at, l.query_norm, l.key_norm, query, n, row, row, row, a.heads, a.kv_heads,
                  a.dim, a.page, a.by_position, a.by_channel, a.bytes, l.pairs, a.eps, (int)l.interleaved, all);
        attention_f32(query, l.keys, l.values, step->starts, step->lengths, step->table, l.sinks,
                      a.slopes, qkv, step->rows, step->width, a.heads, a.kv_heads, a.dim, a.page,
                      a.by_position, a.by_channel, l.window, a.bytes, a.scale, a.softcap, reading);
        if (i == a.count - 1 && step->wants < n) {  // after this nobody looks at the others
            n = step->wants;
            gather_rows(qkv, step->wanted, n, queries);
            gather_rows(x, step->wanted, n, a.hidden);
        }
        product(l.out, qkv, added);
        renorm(l.out_norm);
        norm_f32(x, added, l.mlp_norm, l.mlp_norm_bias, h, x, n, a.hidden, a.eps, (int)a.rms, all);
        if (a.gated)
            a.gelu ? gated(l.up, Gelu()) : gated(l.up, Silu());
        else {
            product(l.up, h, up);
            (a.gelu ? gelu_tanh_f32 : silu_f32)(up, fed, n * inner, all);
        }
        product(l.down, fed, added);
        renorm(l.mlp_out_norm);
    }
    norm_f32(x, added, a.norm, a.norm_bias, added, x, n, a.hidden, a.eps, (int)a.rms, all);
    if (n < step->tokens) scatter_rows(added, step->wanted, n, a.hidden);
}
