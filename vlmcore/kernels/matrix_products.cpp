// Products of fp32 matrices that both come rows first and are summed over their rows, as for a
// weight's gradient. Others transpose one of them first, in a pass over memory of its own.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int WIDE = 4;            // vectors of a row of the result that stay in registers
constexpr int HIGH = 6;            // rows of it
constexpr int64_t TOGETHER = 256;  // rows of both factors; so many fit the second cache

struct Factor {
    const float *data;
    int64_t row;  // numbers from one row to the next
};

// H rows and W vectors of out += the sum over `count` rows of left[row] times right[row]; `last` are
// the lanes of the last vector that are there.
template <int H, int W>
void add_tile(float *out, int64_t width, Factor left, Factor right, int64_t count, __mmask16 last) {
    const auto lanes = [=](int w) -> __mmask16 { return w == W - 1 ? last : 0xffff; };
    __m512 sum[H][W] = {};  // from nothing: what comes from many rows would round what these add
    for (int64_t row = 0; row < count; row++) {
        const float *a = left.data + row * left.row, *b = right.data + row * right.row;
        __m512 of[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) of[w] = _mm512_maskz_loadu_ps(lanes(w), b + w * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < H; i++)
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) sum[i][w] += a[i] * of[w];
    }
#pragma GCC unroll 6
    for (int i = 0; i < H; i++)
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) {
            float *to = out + i * width + w * LANES;
            _mm512_mask_storeu_ps(to, lanes(w), _mm512_maskz_loadu_ps(lanes(w), to) + sum[i][w]);
        }
}

// The tile of so many rows and vectors.
typedef void (*Tile)(float *, int64_t, Factor, Factor, int64_t, __mmask16);

template <int H = HIGH, int W = WIDE>
Tile tile_of(int high, int wide) {
    if constexpr (H > 1)
        if (high < H) return tile_of<H - 1, W>(high, wide);
    if constexpr (W > 1)
        if (wide < W) return tile_of<H, W - 1>(high, wide);
    return add_tile<H, W>;
}

// Rows [first, last) of the result.
void product_of_part(Factor left, Factor right, int64_t rows, int64_t first, int64_t last,
                     int64_t width, float *out) {
    memset(out + first * width, 0, sizeof(float) * (last - first) * width);
    for (int64_t begin = 0; begin < rows; begin += TOGETHER) {
        const int64_t count = std::min(TOGETHER, rows - begin);
        for (int64_t k = 0; k < width; k += WIDE * LANES)
            for (int64_t m = first; m < last; m += HIGH) {
                const int64_t numbers = std::min<int64_t>(WIDE * LANES, width - k);
                const int64_t wide = (numbers + LANES - 1) / LANES;
                const Tile add = tile_of(std::min<int64_t>(HIGH, last - m), wide);
                add(out + m * width + k, width, {left.data + begin * left.row + m, left.row},
                    {right.data + begin * right.row + k, right.row}, count,
                    0xffff >> (wide * LANES - numbers));
            }
    }
}

}  // namespace

extern "C" {

// out [height, width] = the transpose of left [rows, height] times right [rows, width]; the two
// strides are in numbers.
void transposed_product(const float *left, int64_t left_row, const float *right, int64_t right_row,
                        int64_t rows, int64_t height, int64_t width, float *out, int parts) {
    auto work = [=](int64_t first, int64_t last) {
        product_of_part({left, left_row}, {right, right_row}, rows, first, last, width, out);
    };
    std::vector<std::thread> threads;
    for (int part = 1; part < parts; part++)
        threads.emplace_back(work, height * part / parts, height * (part + 1) / parts);
    work(0, height / parts);
    for (auto &thread : threads) thread.join();
}
}
