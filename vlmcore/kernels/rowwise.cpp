// Norms, gated units and rotations in fp32 on a CPU: each reads its input once and writes its output
// once, where torch's operations write what lies between.

#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

// Calls work(part, first row, row after the last) for each part, on a thread each.
template <class Work>
void for_each_part(int parts, int64_t rows, Work work) {
    std::vector<std::thread> threads;
    for (int part = 1; part < parts; part++)
        threads.emplace_back(work, part, rows * part / parts, rows * (part + 1) / parts);
    work(0, 0, rows / parts);
    for (auto &thread : threads) thread.join();
}

// e^x of x <= 0, and 0 below -87: 2^n times Cephes' polynomial (expf) of what is left of x.
inline float exp_of(float x) {
    const float turns = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the last bits are then n
    const float n = turns - 12582912.f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.f);
    const int32_t power = __builtin_bit_cast(int32_t, turns) << 23;
    const float result = __builtin_bit_cast(float, __builtin_bit_cast(int32_t, p) + power);
    return x < -87.f ? 0 : result;
}

inline float sigmoid(float x) {
    const float small = exp_of(-std::fabs(x));
    return (x < 0 ? small : 1) / (1 + small);
}

}  // namespace

extern "C" {

// out = weight * x * scale, scale = 1 / sqrt(mean(x^2) + eps), [rows, width]; scale [rows].
void rms_norm_forward(const float *x, const float *weight, int64_t rows, int64_t width, float eps,
                      float *out, float *scale, int parts) {
    for_each_part(parts, rows, [=](int, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const float *from = x + row * width;
            float *to = out + row * width;
            float squares = 0;
#pragma omp simd reduction(+ : squares)
            for (int64_t d = 0; d < width; d++) squares += from[d] * from[d];
            const float by = 1 / std::sqrt(squares / width + eps);
#pragma omp simd
            for (int64_t d = 0; d < width; d++) to[d] = weight[d] * (from[d] * by);
            scale[row] = by;
        }
    });
}

// x_grad [rows, width], or null, and what each part adds to the weight's gradient [parts, width].
void rms_norm_backward(const float *grad, const float *x, const float *weight, const float *scale,
                       int64_t rows, int64_t width, float *x_grad, float *weight_grads, int parts) {
    for_each_part(parts, rows, [=](int part, int64_t first, int64_t last) {
        float *sums = weight_grads + part * width;
        for (int64_t d = 0; d < width; d++) sums[d] = 0;
        for (int64_t row = first; row < last; row++) {
            const float *from = x + row * width, *of = grad + row * width;
            const float by = scale[row];
            float along = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t d = 0; d < width; d++) {
                const float product = of[d] * (from[d] * by);
                sums[d] += product;
                along += product * weight[d];
            }
            if (!x_grad) continue;
            along /= width;
            float *to = x_grad + row * width;
#pragma omp simd
            for (int64_t d = 0; d < width; d++)
                to[d] = (of[d] * weight[d] - from[d] * by * along) * by;
        }
    });
}

// out = silu(gate) * up, [rows, width]; `stride` numbers from one row of gate, and of up, to the next.
void swiglu_forward(const float *gates, const float *ups, int64_t stride, int64_t rows,
                    int64_t width, float *out, int parts) {
    for_each_part(parts, rows, [=](int, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const float *gate = gates + row * stride, *up = ups + row * stride;
            float *to = out + row * width;
#pragma omp simd
            for (int64_t d = 0; d < width; d++) to[d] = gate[d] * sigmoid(gate[d]) * up[d];
        }
    });
}

// The gradients, at the same places.
void swiglu_backward(const float *grad, const float *gates, const float *ups, int64_t stride,
                     int64_t rows, int64_t width, float *gate_grads, float *up_grads, int parts) {
    for_each_part(parts, rows, [=](int, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const float *of = grad + row * width, *gate = gates + row * stride;
            const float *up = ups + row * stride;
            float *to_gate = gate_grads + row * stride, *to_up = up_grads + row * stride;
#pragma omp simd
            for (int64_t d = 0; d < width; d++) {
                const float share = sigmoid(gate[d]), silu = gate[d] * share;
                to_up[d] = of[d] * silu;
                to_gate[d] = of[d] * up[d] * (share + silu * (1 - share));
            }
        }
    });
}

// Turns pairs (d, d + width / 2) of x [tokens, heads, width] by the angles of their token, forward
// or, with direction -1, back; the two strides of x and waves [tokens, width] are in numbers.
void turn(const float *x, int64_t token, int64_t head, const float *cosines, const float *sines,
          int64_t wave, int64_t tokens, int64_t heads, int64_t width, float direction, float *out,
          int parts) {
    const int64_t half = width / 2;
    for_each_part(parts, tokens, [=](int, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
            for (int64_t h = 0; h < heads; h++) {
                const float *from = x + i * token + h * head;
                const float *cosine = cosines + i * wave, *sine = sines + i * wave;
                float *to = out + (i * heads + h) * width;
#pragma omp simd
                for (int64_t d = 0; d < half; d++) {
                    const float a = from[d], b = from[half + d];
                    to[d] = a * cosine[d] - direction * b * sine[d];
                    to[half + d] = b * cosine[half + d] + direction * a * sine[half + d];
                }
            }
    });
}
}
