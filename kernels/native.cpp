// The CPU's own way for the kernels that torch leaves time in: products with packed weights,
// attention that reads pages where they lie, norms, rotation and store, gates.
//
// Every row is summed in an order that does not depend on the other rows: what a request gets on
// a CPU is the same bit for bit alone and in a crowd. Compiled once by native.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef int64_t i64;
typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t u16x __attribute__((vector_size(64), aligned(4), may_alias));

static const int TILE = 32;  // outputs of a tile: two registers of 16 floats
static const int ROWS = 12;  // rows of a block: 24 accumulators, the rest holds weights

static inline v16 load16(const float* p) { return *(const v16*)p; }
static inline v16 load16(const uint16_t* p) {  // bfloat16: the upper half of a float
    u16x wide = __builtin_convertvector(*(const h16*)p, u16x) << 16;
    return (v16)wide;
}
static inline v16 all16(float x) { return x - v16{}; }

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

template <typename W>
static void linear(const float* x, const W* packed, const float* bias, float* y, i64 rows, i64 in,
                   i64 out, int threads) {
    i64 tiles = (out + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 t = 0; t < tiles; t++) {
        i64 first = t * TILE;
        int n = (int)std::min<i64>(TILE, out - first);
        rows_of(x, packed + first * in, bias ? bias + first : nullptr, y + first, rows, in, out, n);
    }
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
    i64 tiles = (out + TILE - 1) / TILE, padded = (in + 3) / 4 * 4;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (i64 r = 0; r < rows; r++) round_row(x + r * in, q + r * padded, xs + r, in, padded);
#pragma omp for schedule(static)
        for (i64 t = 0; t < tiles; t++) {
            i64 first = t * TILE;
            int n = (int)std::min<i64>(TILE, out - first);
            rows_of8(q, xs, packed + first * padded, scales + first, wsum + first,
                     bias ? bias + first : nullptr, y + first, rows, padded, out, n);
        }
    }
}
#else
extern "C" int has_int8() { return 0; }
extern "C" void linear_int8(const float*, const int8_t*, const float*, const int32_t*, const float*,
                            float*, uint8_t*, float*, i64, i64, i64, int) {}
#endif

// ── attention over pages, where they lie ─────────────────────────────────────────────────────
// A task is one row's few queries that share a key head, over one span of the context. Tiles of
// 16 positions and spans of SPAN begin at fixed positions, so neither chunks of a prompt nor
// neighbours in the batch change the order of a sum.

static const int KEYS = 16, SPAN = 512, QUERIES = 16, MOST = 128, DIM = 256;  // MOST: heads of a group

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
    return low ? v16{} : y;
}

static inline float largest(v16 x) {
    float top = x[0];
    for (int i = 1; i < 16; i++) top = x[i] > top ? x[i] : top;
    return top;
}

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

// kT[d][t] = k[t][d] for 16 positions; a position that is not there repeats the first.
static void transpose(const float* const* k, i64 dim, float* kT) {
    for (i64 d = 0; d + 4 <= dim; d += 4)
        for (int t = 0; t < KEYS; t++)
            for (int j = 0; j < 4; j++) kT[(d + j) * KEYS + t] = k[t][d + j];
    for (i64 d = dim / 4 * 4; d < dim; d++)
        for (int t = 0; t < KEYS; t++) kT[d * KEYS + t] = k[t][d];
}

template <int M>
static void scores(const float* const* q, const float* kT, i64 dim, v16* s) {
    v16 sum[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sum[m] = v16{};
    for (i64 d = 0; d < dim; d++) {
        v16 k = load16(kT + d * KEYS);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) sum[m] += q[m][d] * k;
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) s[m] = sum[m];
}

static void attend(const Pages& a, const Task& task, float* partial) {
    i64 group = a.heads / a.kv_heads, dim = a.dim;
    int M = task.count * (int)group;
    i64 total = a.starts[task.row + 1] - a.starts[task.row];
    i64 before = a.lengths[task.row] - total;  // positions before this step's
    const int32_t* table = a.table + task.row * a.width;
    alignas(64) float kT[DIM * KEYS];
    const float *k[KEYS], *v[KEYS], *q[MOST];
    float top[MOST], sum[MOST], slope[MOST];
    i64 at[MOST], from[MOST];
    float* found = partial + 2 * M;  // [M, dim]
    std::fill(found, found + M * dim, 0.0f);
    for (int m = 0; m < M; m++) {
        i64 token = task.first + m / group, head = task.head * group + m % group;
        q[m] = a.query + ((a.starts[task.row] + token) * a.heads + head) * dim;
        at[m] = before + token;
        from[m] = a.window ? std::max<i64>(0, at[m] - a.window + 1) : 0;
        slope[m] = a.slopes ? a.slopes[head] : 0;
        top[m] = -INFINITY, sum[m] = 0;
    }
    const v16 steps = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (i64 base = task.begin; base < task.end; base += KEYS) {
        int n = (int)std::min<i64>(KEYS, task.end - base);
        for (int t = 0; t < KEYS; t++) {
            i64 p = base + (t < n ? t : 0);
            i64 slot = (table[p / a.page] * a.kv_heads + task.head) * a.page + p % a.page;
            k[t] = a.keys + slot * dim, v[t] = a.values + slot * dim;
        }
        transpose(k, dim, kT);
        v16 s[MOST];
        int m = 0;
        for (; m + 8 <= M; m += 8) scores<8>(q + m, kT, dim, s + m);
        for (; m + 4 <= M; m += 4) scores<4>(q + m, kT, dim, s + m);
        for (; m < M; m++) scores<1>(q + m, kT, dim, s + m);
        for (m = 0; m < M; m++) {
            v16 where = steps + (float)base;
            v16 x = s[m] * a.scale;
            if (a.softcap > 0)
                for (int t = 0; t < KEYS; t++) x[t] = std::tanh(x[t] / a.softcap) * a.softcap;
            x += slope[m] * (where - (float)at[m]);
            auto seen = (where <= (float)at[m]) & (where >= (float)from[m]);
            x = seen ? x : all16(-INFINITY);
            float peak = std::max(top[m], largest(x));
            if (peak == -INFINITY) continue;  // nothing seen yet
            float keep = top[m] == -INFINITY ? 0 : std::exp(top[m] - peak);
            v16 share = seen ? exp16(x - peak) : v16{};
            float* mine = found + m * dim;
            float extra = 0;
            for (int t = 0; t < KEYS; t++) extra += share[t];
            sum[m] = sum[m] * keep + extra;
            top[m] = peak;
            i64 d = 0;
            for (; d + 64 <= dim; d += 64) {
                v16 acc[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) acc[j] = load16(mine + d + 16 * j) * keep;
                for (int t = 0; t < n; t++)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) acc[j] += share[t] * load16(v[t] + d + 16 * j);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) *(v16*)(mine + d + 16 * j) = acc[j];
            }
            for (; d + 16 <= dim; d += 16) {
                v16 acc = load16(mine + d) * keep;
                for (int t = 0; t < n; t++) acc += share[t] * load16(v[t] + d);
                *(v16*)(mine + d) = acc;
            }
            for (; d < dim; d++) {
                float acc = mine[d] * keep;
                for (int t = 0; t < n; t++) acc += share[t] * v[t][d];
                mine[d] = acc;
            }
        }
    }
    for (int m = 0; m < M; m++) partial[m] = top[m], partial[M + m] = sum[m];
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
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (size_t t = 0; t < tasks.size(); t++) attend(a, tasks[t], partial + tasks[t].partial);
#pragma omp for schedule(static)
        for (size_t s = 0; s < sets.size() - 1; s++) {
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
    }
}

// ── norms, rotation and store, gates: a few reads and writes, so one pass each ───────────────

static const i64 SMALL = 1 << 15;  // below this many numbers, a second thread costs more than it does

static float sum16(v16 x) {  // in a fixed order
    float total = 0;
    for (int i = 0; i < 16; i++) total += x[i];
    return total;
}

static void norm_row(const float* x, const float* added, const float* weight, const float* bias,
                     float* y, float* total, i64 width, float eps, int rms) {
    if (added) {
        for (i64 i = 0; i < width; i++) total[i] = x[i] + added[i];
        x = total;
    }
    v16 squares = {}, sums = {};
    i64 i = 0;
    float mean = 0;
    if (!rms) {
        for (; i + 16 <= width; i += 16) sums += load16(x + i);
        mean = sum16(sums);
        for (; i < width; i++) mean += x[i];
        mean /= (float)width;
    }
    for (i = 0; i + 16 <= width; i += 16) {
        v16 d = load16(x + i) - mean;
        squares += d * d;
    }
    float square = sum16(squares);
    for (; i < width; i++) square += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / std::sqrt(square / (float)width + eps);
    if (bias)
        for (i = 0; i < width; i++) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
    else
        for (i = 0; i < width; i++) y[i] = (x[i] - mean) * scale * weight[i];
}

extern "C" void norm_f32(const float* x, const float* added, const float* weight, const float* bias,
                         float* y, float* total, i64 rows, i64 width, float eps, int rms, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1 && rows * width > SMALL)
    for (i64 r = 0; r < rows; r++)
        norm_row(x + r * width, added ? added + r * width : nullptr, weight, bias, y + r * width,
                 total ? total + r * width : nullptr, width, eps, rms);
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
#pragma omp parallel for num_threads(threads) if (tokens > 1 && tokens * heads * dim > SMALL)
    for (i64 t = 0; t < tokens; t++) {
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
}

static v16 tanh16(v16 x) {
    v16 e = exp16(-2 * (x < 0 ? -x : x));
    v16 y = (1 - e) / (1 + e);
    return x < 0 ? -y : y;
}

template <typename F>
static void gated(const float* x, float* y, i64 rows, i64 width, int threads, F f) {
    i64 whole = width / 16 * 16;
#pragma omp parallel for num_threads(threads) if (rows * width > SMALL)
    for (i64 r = 0; r < rows; r++) {
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
}

extern "C" void silu_gate_f32(const float* x, float* y, i64 rows, i64 width, int threads) {
    gated(x, y, rows, width, threads, [](v16 g) { return g / (1 + exp16(-g)); });
}
extern "C" void gelu_tanh_gate_f32(const float* x, float* y, i64 rows, i64 width, int threads) {
    gated(x, y, rows, width, threads, [](v16 g) {
        return 0.5f * g * (1 + tanh16(0.7978845608028654f * (g + 0.044715f * g * g * g)));
    });
}
