// Building blocks of the CPU kernel: dtypes, panels, matrix products, one row of the online softmax.
//
// T is the element type of the tensors, C that of the matrix products: float, or bfloat16 on CPUs with AMX. On other
// CPUs bfloat16 tensors are converted to float while they are packed.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace {

using at::BFloat16;
using at::Tensor;

// Tokens and channels are padded to multiples of the vector width, so inner loops have no tail.
constexpr int64_t kLanes = 16;
// Score columns of one softmax pass: the tile of scores fits in the L2 cache, and rescaling is rare.
constexpr int64_t kPassColumns = 512;
// Extra columns that keep the rows of a score tile from mapping to the same cache sets.
constexpr int64_t kRowSkew = 16;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }

template <typename T>
inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  else {
    const uint32_t bits = std::bit_cast<uint32_t>(x), to_nearest_even = 0x7fffu + ((bits >> 16) & 1u);
    return BFloat16(static_cast<uint16_t>((bits + to_nearest_even) >> 16), BFloat16::from_bits());
  }
}

// Copies source [dim] to target [padded], padded with zeros. A null source gives zeros.
template <typename T, typename C>
void copy_row(const T* source, int64_t dim, C* target, int64_t padded) {
  if (!source) dim = 0;
  for (int64_t d = 0; d < dim; ++d) target[d] = from_float<C>(to_float(source[d]));
  std::fill(target + dim, target + padded, C(0.0f));
}

// Returns 2^x for x <= 0, at least the smallest normal number, which is negligible relative to the row's maximum.
inline float exp2_nonpositive(float x) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  x = std::max(x, -126.0f);
  const float shifted = x + kToInteger;
  const float f = x - (shifted - kToInteger);
  float power = ((1.326472725e-3f * f + 9.671512786e-3f) * f + 5.550733744e-2f) * f + 2.402224208e-1f;
  power = (power * f + 6.931469776e-1f) * f + 1.0f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(power) + (std::bit_cast<uint32_t>(shifted) << 23));
}

// Uninitialized memory aligned to a cache line.
template <typename T>
struct AlignedBuffer {
  Tensor storage;
  T* data;

  explicit AlignedBuffer(int64_t size)
      : storage(at::empty({size}, c10::CppTypeToScalarType<T>::value)), data(static_cast<T*>(storage.data_ptr())) {}
};

// A tensor [B, H, N, ...] with strides; a row holds the elements of one token.
template <typename T>
struct StridedTensor {
  T* data;
  int64_t batch_stride, head_stride, token_stride;
  explicit StridedTensor(const Tensor& x)
      : data(static_cast<T*>(x.data_ptr())), batch_stride(x.stride(0)), head_stride(x.stride(1)),
        token_stride(x.stride(2)) {}

  T* row(int64_t b, int64_t h, int64_t i) const { return data + b * batch_stride + h * head_stride + i * token_stride; }
};

// Returns the offset of element (depth, column) in the right-hand side of a product. For bfloat16, brgemm requires the
// VNNI layout, where pairs of consecutive depths are adjacent.
template <typename C>
int64_t panel_offset(int64_t depth, int64_t column, int64_t columns) {
  if constexpr (std::is_same_v<C, BFloat16>) return (depth / 2 * columns + column) * 2 + depth % 2;
  else return depth * columns + column;
}

// Computes c [m, columns] = a [m, depth] @ b [depth, columns], or adds to c; b has the layout of panel_offset.
template <typename C>
void multiply(int64_t m, int64_t columns, int64_t depth, const C* a, int64_t a_stride, const C* b, int64_t b_stride,
              float* c, int64_t c_stride, bool accumulate) {
  at::native::cpublas::brgemm(m, columns, depth, a_stride, b_stride, c_stride, accumulate, a, b, c,
                              std::is_same_v<C, BFloat16>);
}

// State of the online softmax of one query.
struct SoftmaxState {
  float maximum = -INFINITY, sum = 0.0f;
};

// Converts a row of scores to weights 2^(score * scale + bias - maximum), updates the state, and returns the factor that
// rescales the output accumulated so far to the new maximum. Without kBiased, the bias is 0 and not read.
template <bool kBiased, typename C>
float softmax_row(const float* scores, C* weights, int64_t columns, float scale, const float* bias,
                  SoftmaxState& state) {
  auto score = [&](int64_t i) {
    if constexpr (kBiased) return scores[i] * scale + bias[i];
    else return scores[i];
  };
  float row_max = -INFINITY;  // GCC vectorizes ?: but not std::max
#pragma omp simd reduction(max : row_max)
  for (int64_t i = 0; i < columns; ++i) row_max = score(i) > row_max ? score(i) : row_max;
  const float maximum = std::max(state.maximum, kBiased ? row_max : row_max * scale);
  const float rescale = exp2_nonpositive(state.maximum - maximum);
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < columns; ++i) {
    const float weight = exp2_nonpositive((kBiased ? score(i) : scores[i] * scale) - maximum);
    total += weight;
    weights[i] = from_float<C>(weight);
  }
  state = {maximum, state.sum * rescale + total};
  return rescale;
}

}  // namespace
