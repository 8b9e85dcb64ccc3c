// Attention of packed samples in fp32 on a CPU, forward and backward.
//
// A query says how many keys of its sample it sees, from the first on. Scores exist for ROWS queries
// and BLOCK keys at a time, which the first cache holds; backward computes them again from the
// softmax's sums. Method: Dao, FlashAttention-2 (2023), algorithms 1 and 2.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "exponential.h"

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
constexpr int ROWS = 8;          // queries that share each load of a key
constexpr int TILE = 2 * LANES;  // keys whose scores with ROWS queries stay in registers
constexpr int BLOCK = 512;       // keys whose scores with ROWS queries stay in the first cache
constexpr float HIDDEN = -INFINITY;

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef vec Tile[ROWS][2];

inline vec load(const float *from) { return *reinterpret_cast<const vec *>(from); }
inline void store(float *to, vec x) { *reinterpret_cast<vec *>(to) = x; }
inline vec all(float x) { return x - vec{}; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }
inline float *at(const Heads &x, int64_t token, int64_t head) {
    return x.data + token * x.token + head * x.head;
}

inline float sum_of(vec x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) x[lane] += x[lane + half];
    return x[0];
}

inline float largest_of(vec x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) x[lane] = std::max(x[lane], x[lane + half]);
    return x[0];
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
    float *per_key(int numbers) { return take(keys * numbers); }
    float *rows() { return take(ROWS * wide); }
    float *scores() { return take(ROWS * BLOCK); }
};

// Up to ROWS queries, and how many keys each sees; those past the sample's end are zeros.
struct Queries {
    int64_t first;
    int count, least = INT32_MAX, most = 1;
    int32_t visible[ROWS];

    Queries(const Row &row, const Sample &sample, int begin)
        : first(sample.query + begin), count(std::min(ROWS, sample.queries - begin)) {
        for (int r = 0; r < ROWS; r++) {
            const bool real = r < count;
            visible[r] = !real ? 1 : row.visible ? row.visible[first + r] : sample.keys;
            least = std::min(least, visible[r]);
            most = std::max(most, visible[r]);
        }
    }
};

// A head's tokens as [padded, wide], times `scale`.
void pack(float *to, const Heads &x, int64_t first, int head, int count, int padded,
          const Memory &memory, float scale = 1) {
    for (int i = 0; i < count; i++, to += memory.wide) {
        const float *from = at(x, first + i, head);
        for (int d = 0; d < memory.width; d++) to[d] = from[d] * scale;
        for (int d = memory.width; d < memory.wide; d++) to[d] = 0;
    }
    memset(to, 0, sizeof(float) * int64_t(padded - count) * memory.wide);
}

// A head's keys or values as [padded / LANES, width, LANES].
void pack_turned(float *to, const Heads &x, const Sample &sample, int head, int width) {
    for (int k = 0; k < sample.padded_keys; k++) {
        float *lane = to + int64_t(k / LANES) * LANES * width + k % LANES;
        const float *from = at(x, sample.key + k, head);
        for (int d = 0; d < width; d++) lane[d * LANES] = k < sample.keys ? from[d] : 0;
    }
}

// Products of ROWS rows with the TILE turned tokens from `first` on.
inline void multiply(Tile &out, const float *rows, const float *turned, int first,
                     const Memory &memory) {
    const float *left = turned + int64_t(first) * memory.width;
    const float *right = left + LANES * memory.width;
    for (int r = 0; r < ROWS; r++) out[r][0] = out[r][1] = vec{};
    for (int d = 0; d < memory.width; d++) {
        const vec a = load(left + d * LANES), b = load(right + d * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            out[r][0] += rows[r * memory.wide + d] * a;
            out[r][1] += rows[r * memory.wide + d] * b;
        }
    }
}

// Scores of the keys from `first` on; what a query does not see is HIDDEN.
inline void score(Tile &out, const Queries &queries, const float *rows, const float *turned_keys,
                  int first, const Memory &memory) {
    multiply(out, rows, turned_keys, first, memory);
    if (first + TILE <= queries.least) return;
    ivec key;
    for (int lane = 0; lane < LANES; lane++) key[lane] = first + lane;
    for (int r = 0; r < ROWS; r++) {
        out[r][0] = key < queries.visible[r] ? out[r][0] : all(HIDDEN);
        out[r][1] = key + LANES < queries.visible[r] ? out[r][1] : all(HIDDEN);
    }
}

// W vectors of sums[ROWS, wide] += weights[ROWS, BLOCK] times tokens[count, wide].
template <int W>
inline void add_weighted(float *sums, const float *weights, const float *tokens, int count,
                         int wide) {
    vec sum[ROWS][W];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) sum[r][w] = load(sums + r * wide + w * LANES);
    for (int k = 0; k < count; k++) {
        vec token[W];
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) token[w] = load(tokens + int64_t(k) * wide + w * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int w = 0; w < W; w++) sum[r][w] += weights[r * BLOCK + k] * token[w];
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) store(sums + r * wide + w * LANES, sum[r][w]);
}

void add_weighted(float *sums, const float *weights, const float *tokens, int count, int wide) {
    int d = 0;
    for (; d + TILE <= wide; d += TILE) add_weighted<2>(sums + d, weights, tokens + d, count, wide);
    if (d < wide) add_weighted<1>(sums + d, weights, tokens + d, count, wide);
}

// sums[count, wide] += the transpose of weights[ROWS, BLOCK] times rows[ROWS, wide].
void add_outer(float *sums, const float *weights, const float *rows, int count, int wide) {
    for (int d = 0; d < wide; d += LANES) {
        vec row[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) row[r] = load(rows + r * wide + d);
        for (int k = 0; k < count; k++) {
            float *to = sums + int64_t(k) * wide + d;
            vec sum = weights[k] * row[0];  // eight at a time: their rounding does not pile up
#pragma GCC unroll 8
            for (int r = 1; r < ROWS; r++) sum += weights[r * BLOCK + k] * row[r];
            store(to, load(to) + sum);
        }
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
    float *turned_keys = per_key(width), *values = per_key(wide);
    float *queries = rows(), *sums = rows(), *weights = scores();
    using Memory::Memory;
};

struct BackwardMemory : Memory {
    float *turned_keys = per_key(width), *turned_values = per_key(width), *keys_packed = per_key(wide);
    float *key_sums = per_key(wide), *value_sums = per_key(wide);
    float *queries = rows(), *contexts = rows(), *grads = rows(), *query_sums = rows();
    float *weights = scores(), *score_grads = scores();
    using Memory::Memory;
};

// Softmax so far of ROWS queries: each one's largest score, and the sum of its weights.
struct Softmax {
    float largest[ROWS], total[ROWS] = {};
    Softmax() { std::fill(largest, largest + ROWS, HIDDEN); }

    // Turns `count` scores of row `r` into weights; `sums` follow where its largest score grows.
    void take(int r, float *scores, int count, float found, float *sums, int wide) {
        if (found > largest[r]) {
            const float shrink = largest[r] == HIDDEN ? 0 : std::exp(largest[r] - found);
            total[r] *= shrink;
            for (int d = 0; shrink && d < wide; d++) sums[d] *= shrink;
            largest[r] = found;
        }
        vec sum{};
        for (int k = 0; k < count; k += LANES) {
            const vec weight = exp_of<vec, ivec>(load(scores + k) - largest[r]);
            sum += weight;
            store(scores + k, weight);
        }
        total[r] += sum_of(sum);
    }
};

// Context of one head's ROWS queries into memory.sums, not yet divided by the softmax's totals.
Softmax attend(const Queries &queries, const ForwardMemory &memory) {
    Softmax softmax;
    memset(memory.sums, 0, sizeof(float) * ROWS * memory.wide);
    for (int begin = 0; begin < queries.most; begin += BLOCK) {
        const int count = std::min(BLOCK, queries.most - begin);
        vec largest[ROWS];
        std::fill(largest, largest + ROWS, all(HIDDEN));
        for (int k = 0; k < count; k += TILE) {
            Tile tile;
            score(tile, queries, memory.queries, memory.turned_keys, begin + k, memory);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                largest[r] = larger(largest[r], larger(tile[r][0], tile[r][1]));
                store(memory.weights + r * BLOCK + k, tile[r][0]);
                store(memory.weights + r * BLOCK + k + LANES, tile[r][1]);
            }
        }
        for (int r = 0; r < ROWS; r++)
            softmax.take(r, memory.weights + r * BLOCK, count, largest_of(largest[r]),
                         memory.sums + r * memory.wide, memory.wide);
        add_weighted(memory.sums, memory.weights, memory.values + int64_t(begin) * memory.wide, count,
                     memory.wide);
    }
    return softmax;
}

// Adds to the sums of keys, values and these queries; `mean` is the context times its gradient.
void attend_backward(const Queries &queries, const float *log_sum, const float *mean,
                     const BackwardMemory &memory) {
    memset(memory.query_sums, 0, sizeof(float) * ROWS * memory.wide);
    for (int begin = 0; begin < queries.most; begin += BLOCK) {
        const int count = std::min(BLOCK, queries.most - begin);
        for (int k = 0; k < count; k += TILE) {
            Tile scores, grads;
            score(scores, queries, memory.queries, memory.turned_keys, begin + k, memory);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++)
                    store(memory.weights + r * BLOCK + k + half * LANES,
                          exp_of<vec, ivec>(scores[r][half] - log_sum[r]));
            multiply(grads, memory.grads, memory.turned_values, begin + k, memory);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    const int place = r * BLOCK + k + half * LANES;
                    store(memory.score_grads + place,
                          load(memory.weights + place) * (grads[r][half] - mean[r]));
                }
        }
        const int64_t from = int64_t(begin) * memory.wide;
        add_weighted(memory.query_sums, memory.score_grads, memory.keys_packed + from, count,
                     memory.wide);
        add_outer(memory.key_sums + from, memory.score_grads, memory.queries, count, memory.wide);
        add_outer(memory.value_sums + from, memory.weights, memory.grads, count, memory.wide);
    }
}

void unpack(const Heads &to, int64_t first, int head, int count, const float *from,
            const Memory &memory, float scale = 1) {
    for (int i = 0; i < count; i++, from += memory.wide)
        for (int d = 0; d < memory.width; d++) at(to, first + i, head)[d] = from[d] * scale;
}

}  // namespace

extern "C" {

// Writes context [queries, heads, width] and log_sums [heads, queries], the logarithm of each
// softmax's sum. Returns whether there was memory for it.
bool attention_forward(const Row *given, Heads context, float *log_sums) {
    const Row &row = *given;
    return for_each_head<ForwardMemory>(row, [&](const Sample &sample, int g, const auto &memory) {
        pack_turned(memory.turned_keys, row.key, sample, g, memory.width);
        pack(memory.values, row.value, sample.key, g, sample.keys, sample.padded_keys, memory);
        for (int h = g * row.queries_per_key; h < (g + 1) * row.queries_per_key; h++)
            for (int begin = 0; begin < sample.queries; begin += ROWS) {
                const Queries queries(row, sample, begin);
                pack(memory.queries, row.query, queries.first, h, queries.count, ROWS, memory,
                     row.scale);
                const Softmax softmax = attend(queries, memory);
                for (int r = 0; r < queries.count; r++) {
                    unpack(context, queries.first + r, h, 1, memory.sums + r * memory.wide, memory,
                           1 / softmax.total[r]);
                    log_sums[int64_t(h) * row.queries + queries.first + r] =
                        softmax.largest[r] + std::log(softmax.total[r]);
                }
            }
    });
}

// Writes the gradients of query, key and value, given what forward wrote and the context's gradient.
bool attention_backward(const Row *given, Heads context, const float *log_sums, Heads context_grad,
              Heads query_grad, Heads key_grad, Heads value_grad) {
    const Row &row = *given;
    return for_each_head<BackwardMemory>(row, [&](const Sample &sample, int g, const auto &memory) {
        pack_turned(memory.turned_keys, row.key, sample, g, memory.width);
        pack_turned(memory.turned_values, row.value, sample, g, memory.width);
        pack(memory.keys_packed, row.key, sample.key, g, sample.keys, sample.padded_keys, memory);
        const int64_t size = sizeof(float) * int64_t(sample.padded_keys) * memory.wide;
        memset(memory.key_sums, 0, size);
        memset(memory.value_sums, 0, size);
        for (int h = g * row.queries_per_key; h < (g + 1) * row.queries_per_key; h++)
            for (int begin = 0; begin < sample.queries; begin += ROWS) {
                const Queries queries(row, sample, begin);
                pack(memory.queries, row.query, queries.first, h, queries.count, ROWS, memory,
                     row.scale);
                pack(memory.grads, context_grad, queries.first, h, queries.count, ROWS, memory);
                pack(memory.contexts, context, queries.first, h, queries.count, ROWS, memory);
                float log_sum[ROWS] = {}, mean[ROWS] = {};
                for (int r = 0; r < queries.count; r++) {
                    vec sum{};
                    for (int d = r * memory.wide; d < (r + 1) * memory.wide; d += LANES)
                        sum += load(memory.contexts + d) * load(memory.grads + d);
                    mean[r] = sum_of(sum);
                    log_sum[r] = log_sums[int64_t(h) * row.queries + queries.first + r];
                }
                attend_backward(queries, log_sum, mean, memory);
                unpack(query_grad, queries.first, h, queries.count, memory.query_sums, memory,
                       row.scale);
            }
        unpack(key_grad, sample.key, g, sample.keys, memory.key_sums, memory);
        unpack(value_grad, sample.key, g, sample.keys, memory.value_sums, memory);
    });
}
}
