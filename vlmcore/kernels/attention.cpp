// Attention of packed samples in fp32 on a CPU, forward and backward.
//
// A query says how many keys of its sample it sees, from the first on. Scores exist for ROWS queries
// and BLOCK keys at a time, which the first cache holds; backward computes them again from each
// softmax's largest score and sum. Method: Dao, FlashAttention-2 (2023), algorithms 1 and 2.
//
// Lanes of a vector are queries, so that a softmax needs no sum across lanes, and all products are
// one loop: numbers, read one by one, times vectors. Scores are to base 2.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

extern "C" {

struct Heads {  // [tokens, heads, width], the width contiguous; strides in numbers
    float *data;
    int64_t token, head;
};

struct Row {
    Heads query, key, value;
    const int32_t *query_starts, *key_starts;  // [samples + 1]
    const int32_t *visible;                    // [queries]; null: a query sees every key
    int32_t samples, queries, key_heads, queries_per_key, width, threads;
    float scale;
};
}

namespace {

constexpr int LANES = 16;
constexpr int VECTORS = 2;             // of queries that share each load of a key
constexpr int ROWS = VECTORS * LANES;  // queries at a time
constexpr int TILE = 8;                // keys, or numbers of a head, whose sums stay in registers
constexpr int BLOCK = 128;             // keys whose scores with ROWS queries stay in the first cache
constexpr int AHEAD = 64;  // tokens fetched early; windows of 64 took 1.4 times as long without
constexpr float HIDDEN = -INFINITY;

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// TILE rows of V vectors, which stay in registers where all indices are known.
template <int V>
using Rows = vec[TILE][V];
typedef Rows<VECTORS> Tile;

// Calls work(row, vector) for each vector of them.
template <int V, class Work>
inline void for_each_vector(Work work) {
#pragma GCC unroll 8
    for (int t = 0; t < TILE; t++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) work(t, v);
}

inline vec load(const float *from) { return *reinterpret_cast<const vec *>(from); }
inline void store(float *to, vec x) { *reinterpret_cast<vec *>(to) = x; }
inline vec all(float x) { return x - vec{}; }
inline vec larger(vec a, vec b) { return _mm512_max_ps(a, b); }
inline float *at(const Heads &x, int64_t token, int64_t head) {
    return x.data + token * x.token + head * x.head;
}

// The first `count` lanes of a vector in memory; the others are zeros, or stay as they are.
inline __mmask16 first_of(int count) { return count < LANES ? (1 << count) - 1 : -1; }
inline vec load(const float *from, int count) {
    return _mm512_maskz_loadu_ps(first_of(count), from);
}
inline void store(float *to, vec x, int count) { _mm512_mask_storeu_ps(to, first_of(count), x); }

// Lane i of vector j becomes lane j of vector i: quarters off the diagonal change places, then
// their quarters, and so on.
inline void transpose(vec (&x)[LANES]) {
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2) {
        const ivec upper = (lane & half) == half;
        const ivec low = upper ? lane - half + LANES : lane;  // from LANES on: lanes of the second
        const ivec high = upper ? lane + LANES : lane + half;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & half) continue;
            const vec a = x[i], b = x[i + half];
            x[i] = _mm512_permutex2var_ps(a, (__m512i)low, b);
            x[i + half] = _mm512_permutex2var_ps(a, (__m512i)high, b);
        }
    }
}

// 2^x, by the minimax polynomial of what x has above its whole number: within 1.5e-7 of it.
inline __m512 power_of_two(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = r * 1.86713005e-3f + 9.01703071e-3f;
    p = p * r + 5.57999127e-2f;
    p = p * r + 2.40164444e-1f;
    p = p * r + 6.93151295e-1f;
    p = p * r + 1.f;
    return _mm512_scalef_ps(p, x);
}

inline int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Sample {
    int64_t query, key;             // its first ones in the row
    int queries, keys, padded_keys;

    Sample(const Row &row, int i)
        : query(row.query_starts[i]), key(row.key_starts[i]),
          queries(row.query_starts[i + 1] - row.query_starts[i]),
          keys(row.key_starts[i + 1] - row.key_starts[i]), padded_keys(rounded(keys, TILE)) {}
};

// What one thread works with, for the longest sample of a row.
struct Memory {
    const int width, wide;  // of a head, and padded with zeros to whole vectors
    int64_t keys = 0;
    std::vector<void *> taken;
    bool missing = false;

    explicit Memory(const Row &row) : width(row.width), wide(rounded(row.width, LANES)) {
        for (int i = 0; i < row.samples; i++)
            keys = std::max<int64_t>(keys, Sample(row, i).padded_keys);
    }
    Memory(const Memory &) = delete;
    ~Memory() {
        for (void *place : taken) free(place);
    }
    float *take(int64_t numbers) {
        void *place = nullptr;
        missing |= posix_memalign(&place, 64, sizeof(float) * std::max<int64_t>(numbers, 1)) != 0;
        taken.push_back(place);
        return static_cast<float *>(place);
    }
    float *per_key() { return take(keys * wide); }
    float *rows() { return take(ROWS * wide); }
    float *scores() { return take(ROWS * BLOCK); }
};

// LANES queries of one head, and how many keys each sees; those past the sample's end are zeros.
struct Part {
    int64_t first;
    int head, count;
    ivec visible;
};

// ROWS queries of the heads that share a key's: parts follow each other by head, then by position.
struct Queries {
    Part parts[VECTORS];
    int least = INT32_MAX, most = 1;

    static int parts_of(const Row &row, const Sample &sample) {
        return rounded(sample.queries, LANES) / LANES * row.queries_per_key;
    }

    Queries(const Row &row, const Sample &sample, int key_head, int index) {
        for (Part &part : parts) {
            const int skipped = index / row.queries_per_key * LANES;
            part.first = sample.query + skipped;
            part.head = key_head * row.queries_per_key + index++ % row.queries_per_key;
            part.count = std::max(0, std::min(LANES, sample.queries - skipped));
            part.visible = ivec{} + sample.keys;
            if (row.visible)
                part.visible = (ivec)_mm512_mask_loadu_epi32(
                    _mm512_set1_epi32(1), first_of(part.count), row.visible + part.first);
            least = std::min(least, _mm512_reduce_min_epi32((__m512i)part.visible));
            most = std::max(most, _mm512_reduce_max_epi32((__m512i)part.visible));
        }
    }
};

// A head's tokens as [padded, wide], times `scale`.
void pack(float *to, const Heads &x, int64_t first, int head, int count, int padded,
          const Memory &memory, float scale = 1) {
    for (int i = 0; i < count; i++, to += memory.wide) {
        const float *from = at(x, first + i, head);
        int d = 0;
        for (; d + LANES <= memory.width; d += LANES) {
            __builtin_prefetch(from + AHEAD * x.token + d);  // a hint: reads nothing past the end
            store(to + d, load(from + d) * scale);
        }
        if (d < memory.width) store(to + d, load(from + d, memory.width - d) * scale);
    }
    memset(to, 0, sizeof(float) * int64_t(padded - count) * memory.wide);
}

// A head's queries, or what belongs to them, as [ROWS, wide].
void pack(float *to, const Heads &x, const Queries &queries, const Memory &memory,
          float scale = 1) {
    for (int v = 0; v < VECTORS; v++) {
        const Part &part = queries.parts[v];
        pack(to + v * LANES * memory.wide, x, part.first, part.head, part.count, LANES, memory,
             scale);
    }
}

// [ROWS, wide] as [wide, ROWS].
void turn(float *to, const float *rows, const Memory &memory) {
    for (int row = 0; row < ROWS; row += LANES)
        for (int d = 0; d < memory.wide; d += LANES) {
            vec x[LANES];
            for (int i = 0; i < LANES; i++) x[i] = load(rows + (row + i) * memory.wide + d);
            transpose(x);
            for (int i = 0; i < LANES; i++) store(to + (d + i) * ROWS + row, x[i]);
        }
}

// Writes queries' [wide, ROWS], each query's numbers times its scale.
void unpack(const Heads &to, const Queries &queries, const float *turned, const vec *scales,
            const Memory &memory) {
    for (int v = 0; v < VECTORS; v++)
        for (int d = 0; d < memory.width; d += LANES) {
            const Part &part = queries.parts[v];
            vec x[LANES];
            for (int i = 0; i < LANES; i++)
                x[i] = load(turned + (d + i) * ROWS + v * LANES) * scales[v];
            transpose(x);
            for (int i = 0; i < part.count; i++)
                store(at(to, part.first + i, part.head) + d, x[i], memory.width - d);
        }
}

// Writes a head's [keys, wide], times `scale`.
void unpack(const Heads &to, const Sample &sample, int head, const float *from,
            const Memory &memory, float scale) {
    for (int i = 0; i < sample.keys; i++, from += memory.wide)
        for (int d = 0; d < memory.width; d += LANES)
            store(at(to, sample.key + i, head) + d, load(from + d) * scale, memory.width - d);
}

// Row t of `out`: the sum of numbers[t * apart + i * along] times the i-th of `count` vectors.
template <int V>
inline void multiply(Rows<V> &out, const float *numbers, int64_t apart, int64_t along,
                     const float *vectors, int64_t stride, int count) {
    for_each_vector<V>([&](int t, int v) { out[t][v] = vec{}; });
    for (int i = 0; i < count; i++) {
        vec x[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) x[v] = load(vectors + i * stride + v * LANES);
        for_each_vector<V>(
            [&](int t, int v) { out[t][v] += numbers[t * apart + i * along] * x[v]; });
    }
}

// Products of TILE of the packed tokens with [wide, ROWS].
inline void multiply(Tile &out, const float *tokens, const float *turned, const Memory &memory) {
    multiply(out, tokens, memory.wide, 1, turned, ROWS, memory.width);
}

// Scores of the TILE keys from `first` on; what a query does not see is HIDDEN.
inline void score(Tile &out, const Queries &queries, const float *turned, const float *keys,
                  int first, const Memory &memory) {
    multiply(out, keys + int64_t(first) * memory.wide, turned, memory);
    if (first + TILE <= queries.least) return;
    for_each_vector<VECTORS>([&](int t, int v) {
        out[t][v] = first + t < queries.parts[v].visible ? out[t][v] : all(HIDDEN);
    });
}

// sums[wide, ROWS] = sums * scales + the transpose of tokens[count, wide] times
// weights[count, ROWS].
void add_weighted(float *sums, const vec *scales, const float *weights, const float *tokens,
                  int count, const Memory &memory) {
    for (int d = 0; d < memory.width; d += TILE) {
        Tile tile;
        multiply(tile, tokens + d, 1, memory.wide, weights, ROWS, count);
        for_each_vector<VECTORS>([&](int t, int v) {
            float *to = sums + (d + t) * ROWS + v * LANES;
            store(to, load(to) * scales[v] + tile[t][v]);
        });
    }
}

// V vectors of sums[TILE, wide] += weights[TILE, ROWS] times rows[ROWS, wide].
template <int V>
inline void add_outer(float *sums, const float *weights, const float *rows, int wide) {
    Rows<V> tile;  // ROWS at a time: their rounding does not pile up
    multiply(tile, weights, ROWS, 1, rows, wide, ROWS);
    for_each_vector<V>([&](int t, int v) {
        float *to = sums + t * wide + v * LANES;
        store(to, load(to) + tile[t][v]);
    });
}

// The same for `count` keys and whole rows.
void add_outer(float *sums, const float *weights, const float *rows, int count, int wide) {
    for (int k = 0; k < count; k += TILE, sums += TILE * wide, weights += TILE * ROWS) {
        int d = 0;
        for (; d + 2 * LANES <= wide; d += 2 * LANES)
            add_outer<2>(sums + d, weights, rows + d, wide);
        if (d < wide) add_outer<1>(sums + d, weights, rows + d, wide);
    }
}

// Calls work(sample, key head, memory) for all of them, on so many threads; false without memory.
template <class OwnMemory, class Work>
bool for_each_head(const Row &row, Work work) {
    const int units = row.samples * row.key_heads;
    std::atomic<int> next{0};
    std::atomic<bool> complete{true};
    auto run = [&] {
        const OwnMemory memory(row);
        if (memory.missing) complete = false;
        for (int unit; !memory.missing && (unit = next++) < units;)
            work(Sample(row, unit / row.key_heads), unit % row.key_heads, memory);
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < std::min(row.threads, units); i++) threads.emplace_back(run);
    run();
    for (auto &thread : threads) thread.join();
    return complete;
}

struct ForwardMemory : Memory {
    float *keys_packed = per_key(), *values = per_key();
    float *queries = rows(), *turned_queries = rows(), *sums = rows(), *weights = scores();
    using Memory::Memory;
};

struct BackwardMemory : Memory {
    float *keys_packed = per_key(), *values = per_key();
    float *key_sums = per_key(), *value_sums = per_key();
    float *queries = rows(), *turned_queries = rows(), *grads = rows(), *turned_grads = rows();
    float *contexts = rows(), *query_sums = rows();
    float *weights = scores(), *score_grads = scores();
    using Memory::Memory;
};

// Softmax so far of ROWS queries: each one's largest score, and the sum of its weights.
struct Softmax {
    vec largest[VECTORS], total[VECTORS] = {};
    Softmax() { std::fill(largest, largest + VECTORS, all(HIDDEN)); }

    // Turns `count` scores of each query into weights; tells by how much those before them shrink.
    void take(float *scores, int count, const vec *found, vec *shrink) {
        Tile totals = {};  // of every TILE-th key: the rounding of one long sum would pile up
        for (int k = 0; k < count; k += TILE)
            for_each_vector<VECTORS>([&](int t, int v) {
                float *place = scores + (k + t) * ROWS + v * LANES;
                const vec weight = power_of_two(load(place) - found[v]);
                totals[t][v] += weight;
                store(place, weight);
            });
        for (int v = 0; v < VECTORS; v++) {
            shrink[v] = power_of_two(largest[v] - found[v]);
            largest[v] = found[v];
            total[v] *= shrink[v];
            for (int t = 0; t < TILE; t++) total[v] += totals[t][v];
        }
    }
};

// Context of ROWS queries into memory.sums, not yet divided by the softmax's totals.
Softmax attend(const Queries &queries, const ForwardMemory &memory) {
    Softmax softmax;
    memset(memory.sums, 0, sizeof(float) * ROWS * memory.wide);
    for (int begin = 0; begin < queries.most; begin += BLOCK) {
        const int count = std::min(BLOCK, queries.most - begin);
        vec largest[VECTORS], shrink[VECTORS];
        std::copy(softmax.largest, softmax.largest + VECTORS, largest);
        for (int k = 0; k < count; k += TILE) {
            Tile tile;
            score(tile, queries, memory.turned_queries, memory.keys_packed, begin + k, memory);
            for_each_vector<VECTORS>([&](int t, int v) {
                largest[v] = larger(largest[v], tile[t][v]);
                store(memory.weights + (k + t) * ROWS + v * LANES, tile[t][v]);
            });
        }
        softmax.take(memory.weights, count, largest, shrink);
        add_weighted(memory.sums, shrink, memory.weights,
                     memory.values + int64_t(begin) * memory.wide, count, memory);
    }
    return softmax;
}

// Divides the context's gradients by the softmax's sums, whose inverses are `shares`, so that the
// weights need not be; returns each query's context times that gradient.
vec weigh_grads(float *grads, const float *contexts, vec shares, int wide) {
    vec products[LANES] = {}, mean = {};
    for (int i = 0; i < LANES; i++)
        for (int d = i * wide; d < (i + 1) * wide; d += LANES) {
            const vec grad = load(grads + d) * shares[i];
            store(grads + d, grad);
            products[i] += load(contexts + d) * grad;
        }
    transpose(products);
    for (const vec &product : products) mean += product;
    return mean;
}

// Adds to the sums of keys, values and these queries; `mean` is the context times its gradient.
void attend_backward(const Queries &queries, const vec *largest, const vec *mean,
                     const BackwardMemory &memory) {
    const vec unchanged[VECTORS] = {all(1), all(1)};
    memset(memory.query_sums, 0, sizeof(float) * ROWS * memory.wide);
    for (int begin = 0; begin < queries.most; begin += BLOCK) {
        const int count = std::min(BLOCK, queries.most - begin);
        const int64_t from = int64_t(begin) * memory.wide;
        for (int k = 0; k < count; k += TILE) {
            Tile tile;
            score(tile, queries, memory.turned_queries, memory.keys_packed, begin + k, memory);
            for_each_vector<VECTORS>([&](int t, int v) {
                store(memory.weights + (k + t) * ROWS + v * LANES,
                      power_of_two(tile[t][v] - largest[v]));
            });
            multiply(tile, memory.values + from + k * memory.wide, memory.turned_grads, memory);
            for_each_vector<VECTORS>([&](int t, int v) {
                const int place = (k + t) * ROWS + v * LANES;
                store(memory.score_grads + place,
                      load(memory.weights + place) * (tile[t][v] - mean[v]));
            });
        }
        add_weighted(memory.query_sums, unchanged, memory.score_grads, memory.keys_packed + from,
                     count, memory);
        add_outer(memory.key_sums + from, memory.score_grads, memory.queries, count, memory.wide);
        add_outer(memory.value_sums + from, memory.weights, memory.grads, count, memory.wide);
    }
}

}  // namespace

extern "C" {

// Writes context [queries, heads, width] and softmaxes [2, heads, queries], the largest score and
// the inverse of the sum of each. Returns whether there was memory for it.
bool attention_forward(const Row *given, Heads context, float *softmaxes) {
    const Row &row = *given;
    const int64_t shares_at = int64_t(row.key_heads) * row.queries_per_key * row.queries;
    return for_each_head<ForwardMemory>(row, [&](const Sample &sample, int g, const auto &memory) {
        pack(memory.keys_packed, row.key, sample.key, g, sample.keys, sample.padded_keys, memory);
        pack(memory.values, row.value, sample.key, g, sample.keys, sample.padded_keys, memory);
        for (int i = 0; i < Queries::parts_of(row, sample); i += VECTORS) {
            const Queries queries(row, sample, g, i);
            pack(memory.queries, row.query, queries, memory, row.scale * M_LOG2E);
            turn(memory.turned_queries, memory.queries, memory);
            const Softmax softmax = attend(queries, memory);
            vec shares[VECTORS];
            for (int v = 0; v < VECTORS; v++) {
                const Part &part = queries.parts[v];
                float *to = softmaxes + int64_t(part.head) * row.queries + part.first;
                shares[v] = 1 / softmax.total[v];
                store(to, softmax.largest[v], part.count);
                store(to + shares_at, shares[v], part.count);
            }
            unpack(context, queries, memory.sums, shares, memory);
        }
    });
}

// Writes the gradients of query, key and value, given what forward wrote and the context's gradient.
bool attention_backward(const Row *given, Heads context, const float *softmaxes,
                        Heads context_grad, Heads query_grad, Heads key_grad, Heads value_grad) {
    const Row &row = *given;
    const int64_t shares_at = int64_t(row.key_heads) * row.queries_per_key * row.queries;
    return for_each_head<BackwardMemory>(row, [&](const Sample &sample, int g, const auto &memory) {
        pack(memory.keys_packed, row.key, sample.key, g, sample.keys, sample.padded_keys, memory);
        pack(memory.values, row.value, sample.key, g, sample.keys, sample.padded_keys, memory);
        const int64_t size = sizeof(float) * int64_t(sample.padded_keys) * memory.wide;
        memset(memory.key_sums, 0, size);
        memset(memory.value_sums, 0, size);
        for (int i = 0; i < Queries::parts_of(row, sample); i += VECTORS) {
            const Queries queries(row, sample, g, i);
            pack(memory.queries, row.query, queries, memory, row.scale * M_LOG2E);
            pack(memory.grads, context_grad, queries, memory);
            pack(memory.contexts, context, queries, memory);
            vec largest[VECTORS], mean[VECTORS];
            for (int v = 0; v < VECTORS; v++) {
                const Part &part = queries.parts[v];
                const float *from = softmaxes + int64_t(part.head) * row.queries + part.first;
                const int rows = v * LANES * memory.wide;
                largest[v] = load(from, part.count);
                mean[v] = weigh_grads(memory.grads + rows, memory.contexts + rows,
                                      load(from + shares_at, part.count), memory.wide);
            }
            turn(memory.turned_queries, memory.queries, memory);
            turn(memory.turned_grads, memory.grads, memory);
            attend_backward(queries, largest, mean, memory);
            const vec scales[VECTORS] = {all(row.scale), all(row.scale)};
            unpack(query_grad, queries, memory.query_sums, scales, memory);
        }
        // the packed queries are times log2(e), too
        unpack(key_grad, sample, g, memory.key_sums, memory, M_LN2);
        unpack(value_grad, sample, g, memory.value_sums, memory, 1);
    });
}
}
