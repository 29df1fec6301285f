// Block-sparse attention forward for x86 CPUs.
//
// K and V are packed once per call: every key block becomes a panel K^T [D, columns] and a panel V [columns, D]. Then
// each worker takes (batch item, head, query block) items from a shared counter, fullest rows first, and runs the
// online softmax over that row's key blocks, a pass of several blocks at a time. Both products are oneDNN's brgemm,
// which torch exports. The plan's token order is applied while tokens are packed, read and written.
//
// T is the element type of the tensors, C the one the products run in: float, or bfloat16 where the CPU multiplies it
// in tiles (AMX). Elsewhere bfloat16 tensors are widened as they are packed.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;

// Tokens and channels are padded to whole vectors, so that no inner loop has a tail.
constexpr int64_t kLanes = 16;
// Score columns of a softmax pass: the tile of scores stays in the L2 cache, and rescaling becomes rare.
constexpr int64_t kPassColumns = 512;
// Extra columns keep the rows of a score tile from falling onto the same cache sets.
constexpr int64_t kRowSkew = 16;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }

template <typename T>
inline T narrow(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  else {
    const uint32_t bits = std::bit_cast<uint32_t>(x), to_nearest_even = 0x7fffu + ((bits >> 16) & 1u);
    return BFloat16(static_cast<uint16_t>((bits + to_nearest_even) >> 16), BFloat16::from_bits());
  }
}

// target [padded] = source [dim] and zeros; without a source, zeros.
template <typename T, typename C>
void copy_row(const T* source, int64_t dim, C* target, int64_t padded) {
  if (!source) dim = 0;
  for (int64_t d = 0; d < dim; ++d) target[d] = narrow<C>(widen(source[d]));
  std::fill(target + dim, target + padded, C(0.0f));
}

// 2^x for x <= 0. Below the normal range it gives the smallest normal number, which vanishes beside the row's maximum.
inline float exp2_nonpositive(float x) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  x = std::max(x, -126.0f);
  const float shifted = x + kToInteger;
  const float f = x - (shifted - kToInteger);
  float power = ((1.326472725e-3f * f + 9.671512786e-3f) * f + 5.550733744e-2f) * f + 2.402224208e-1f;
  power = (power * f + 6.931469776e-1f) * f + 1.0f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(power) + (std::bit_cast<uint32_t>(shifted) << 23));
}

// Uninitialised memory on a cache line's boundary.
template <typename T>
struct Scratch {
  Tensor storage;
  T* data;

  explicit Scratch(int64_t size)
      : storage(at::empty({size}, c10::CppTypeToScalarType<T>::value)), data(static_cast<T*>(storage.data_ptr())) {}
};

// A tensor [B, H, N, ...] by its strides; a row is what belongs to one token.
template <typename T>
struct Heads {
  T* data;
  int64_t batch_stride, head_stride, token_stride;
  explicit Heads(const Tensor& x)
      : data(static_cast<T*>(x.data_ptr())), batch_stride(x.stride(0)), head_stride(x.stride(1)),
        token_stride(x.stride(2)) {}

  T* row(int64_t b, int64_t h, int64_t i) const { return data + b * batch_stride + h * head_stride + i * token_stride; }
};

struct Sizes {
  int64_t batch, heads, kv_heads, tokens, dim, block, blocks;
  int64_t packed_heads;  // kv_heads, or heads where every query head orders its tokens its own way
  int64_t panel_dim, panel_columns;

  int64_t tokens_in(int64_t block_number) const { return std::min(block, tokens - block_number * block); }
};

struct Plan {
  Heads<const int32_t> index;  // [B, H, Qb, K]
  Heads<const int32_t> count;  // [B, H, Qb]
  int64_t width;
  std::optional<Heads<const int64_t>> order;  // [B, H, N]
  const int32_t* lengths;                     // [B] or null

  // The token at a place of the blocked sequence.
  int64_t token(int64_t b, int64_t h, int64_t place) const { return order ? *order->row(b, h, place) : place; }

  int64_t valid_keys(const Sizes& sizes, int64_t b, int64_t block) const {
    const int64_t present = sizes.tokens_in(block);
    return lengths ? std::clamp<int64_t>(lengths[b] - block * sizes.block, 0, present) : present;
  }
};

template <typename T>
struct Problem {
  Sizes sizes;
  Plan plan;
  Heads<const T> q, k, v;  // [B, H, N, D], [B, Hkv, N, D] twice
  Heads<T> out;            // [B, H, N, D]
  Heads<float> lse;        // [B, H, N]
  float scale;             // of scores, to base-2 logarithms
};

// Where a product's right-hand side keeps element (depth, column). brgemm multiplies bfloat16 in pairs of depth, and
// wants the two of a pair side by side ("VNNI" layout).
template <typename C>
int64_t place_in_panel(int64_t depth, int64_t column, int64_t columns) {
  if constexpr (std::is_same_v<C, BFloat16>) return (depth / 2 * columns + column) * 2 + depth % 2;
  else return depth * columns + column;
}

// c [m, columns] (+)= a [m, depth] @ b [depth, columns], b laid out by place_in_panel.
template <typename C>
void multiply(int64_t m, int64_t columns, int64_t depth, const C* a, int64_t a_stride, const C* b, int64_t b_stride,
              float* c, int64_t c_stride, bool accumulate) {
  at::native::cpublas::brgemm(m, columns, depth, a_stride, b_stride, c_stride, accumulate, a, b, c,
                              std::is_same_v<C, BFloat16>);
}

// K^T and V of every block, panel after panel; padding is zero.
template <typename C>
struct Packed {
  const Sizes& sizes;
  int64_t panel;
  Scratch<C> keys, values;

  explicit Packed(const Sizes& sizes)
      : sizes(sizes), panel(sizes.panel_dim * sizes.panel_columns), keys(panels() * panel), values(panels() * panel) {}

  int64_t panels() const { return sizes.batch * sizes.packed_heads * sizes.blocks; }

  C* panel_of(const Scratch<C>& panels, int64_t b, int64_t packed_head, int64_t block) const {
    return panels.data + ((b * sizes.packed_heads + packed_head) * sizes.blocks + block) * panel;
  }

  template <typename T>
  void pack_block(const Problem<T>& problem, int64_t b, int64_t packed_head, int64_t block, C* staged) {
    const int64_t head = packed_head / (sizes.packed_heads / sizes.kv_heads);
    const int64_t valid = problem.plan.valid_keys(sizes, b, block);
    const int64_t dim = sizes.panel_dim, columns = sizes.panel_columns;
    C* key_panel = panel_of(keys, b, packed_head, block);
    C* value_panel = panel_of(values, b, packed_head, block);
    auto stage = [&](const Heads<const T>& x, int64_t place, C* row) {
      const int64_t token = place < valid ? problem.plan.token(b, packed_head, block * sizes.block + place) : -1;
      copy_row(token < 0 ? nullptr : x.row(b, head, token), sizes.dim, row, dim);
    };
    for (int64_t first = 0; first < round_up(valid, kLanes); first += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) stage(problem.k, first + lane, staged + lane * dim);
      for (int64_t d = 0; d < dim; ++d)
        for (int64_t lane = 0; lane < kLanes; ++lane)
          key_panel[place_in_panel<C>(d, first + lane, columns)] = staged[lane * dim + d];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        stage(problem.v, first + lane, staged);
        for (int64_t d = 0; d < dim; ++d) value_panel[place_in_panel<C>(first + lane, d, dim)] = staged[d];
      }
    }
  }

  template <typename T>
  void pack(const Problem<T>& problem) {
    at::parallel_for(0, panels(), 1, [&](int64_t begin, int64_t end) {
      Scratch<C> staged(kLanes * sizes.panel_dim);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = i % sizes.blocks, head = i / sizes.blocks % sizes.packed_heads;
        pack_block(problem, i / sizes.blocks / sizes.packed_heads, head, block, staged.data);
      }
    });
  }
};

// What the online softmax knows of a query after some passes.
struct Running {
  float maximum = -INFINITY, sum = 0.0f;
};

// Turns a row of scores into weights 2^(score * scale - maximum). Returns the factor that brings what was accumulated
// before to the new maximum.
template <typename C>
float softmax_row(const float* scores, C* weights, int64_t columns, float scale, Running& running) {
  float highest = -INFINITY;  // by ?:, as GCC leaves std::max scalar
#pragma omp simd reduction(max : highest)
  for (int64_t i = 0; i < columns; ++i) highest = scores[i] > highest ? scores[i] : highest;
  const float maximum = std::max(running.maximum, highest * scale);
  const float rescale = exp2_nonpositive(running.maximum - maximum);
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < columns; ++i) {
    const float weight = exp2_nonpositive(scores[i] * scale - maximum);
    total += weight;
    weights[i] = narrow<C>(weight);
  }
  running = {maximum, running.sum * rescale + total};
  return rescale;
}

// A key block's place in the score tile: ``valid`` of its ``columns`` hold keys.
struct Span {
  int64_t block, column, valid, columns;
};

template <typename T, typename C>
class Worker {
 public:
  Worker(const Problem<T>& problem, const Packed<C>& packed)
      : problem_(problem), packed_(packed), pass_columns_(std::max(kPassColumns, sizes_.panel_columns)),
        queries_(sizes_.block * sizes_.panel_dim), scores_(sizes_.block * row_stride_),
        narrow_weights_(kInPlace ? 0 : sizes_.block * row_stride_), output_(sizes_.block * sizes_.panel_dim) {}

  void attend(int64_t b, int64_t h, int64_t query_block) {
    b_ = b, h_ = h, first_ = query_block * sizes_.block, rows_ = sizes_.tokens_in(query_block);
    packed_head_ = h / (sizes_.heads / sizes_.packed_heads);
    running_.assign(rows_, Running{});
    load_queries();
    const int32_t* next = plan_.index.row(b, h, query_block);
    const int32_t* end = next + std::min<int64_t>(*plan_.count.row(b, h, query_block), plan_.width);
    for (bool first_pass = true;; first_pass = false) {
      next = gather_pass(next, end);
      if (spans_.empty()) break;
      const int64_t columns = score();
      for (int64_t i = 0; i < rows_; ++i) {
        const float rescale = softmax_row(scores(i), weights(i), columns, problem_.scale, running_[i]);
        if (first_pass || rescale == 1.0f) continue;
        float* output = output_.data + i * sizes_.panel_dim;
        for (int64_t d = 0; d < sizes_.panel_dim; ++d) output[d] *= rescale;
      }
      accumulate(!first_pass);
    }
    store();
  }

 private:
  static constexpr bool kInPlace = std::is_same_v<C, float>;

  float* scores(int64_t i) { return scores_.data + i * row_stride_; }

  C* weights(int64_t i) {
    if constexpr (kInPlace) return scores(i);
    else return narrow_weights_.data + i * row_stride_;
  }

  void load_queries() {
    for (int64_t i = 0; i < rows_; ++i) {
      const int64_t token = plan_.token(b_, h_, first_ + i);
      copy_row(problem_.q.row(b_, h_, token), sizes_.dim, queries_.data + i * sizes_.panel_dim, sizes_.panel_dim);
    }
  }

  // Fills spans_ with as many of the row's key blocks as a pass holds; blocks without a valid key are left out.
  const int32_t* gather_pass(const int32_t* next, const int32_t* end) {
    spans_.clear();
    for (int64_t column = 0; next != end; ++next) {
      TORCH_CHECK_INDEX(0 <= *next && *next < sizes_.blocks, "the plan names key block ", *next, " of ", sizes_.blocks);
      const int64_t valid = plan_.valid_keys(sizes_, b_, *next), columns = round_up(valid, kLanes);
      if (valid == 0) continue;
      if (column + columns > pass_columns_) break;
      spans_.push_back({*next, column, valid, columns});
      column += columns;
    }
    return next;
  }

  // Scores of the pass, with -inf in the columns that pad a block. Returns their number.
  int64_t score() {
    for (const Span& span : spans_) {
      multiply<C>(rows_, span.columns, sizes_.panel_dim, queries_.data, sizes_.panel_dim,
                  packed_.panel_of(packed_.keys, b_, packed_head_, span.block), sizes_.panel_columns,
                  scores_.data + span.column, row_stride_, false);
      for (int64_t i = 0; i < rows_; ++i)
        std::fill(scores(i) + span.column + span.valid, scores(i) + span.column + span.columns, -INFINITY);
    }
    return spans_.back().column + spans_.back().columns;
  }

  // output (+)= weights @ V, with blocks that lie one after another in memory in one product.
  void accumulate(bool onto_output) {
    for (size_t i = 0; i < spans_.size();) {
      const Span& first = spans_[i];
      int64_t depth = spans_[i].columns;
      while (++i < spans_.size() && spans_[i].block == spans_[i - 1].block + 1 &&
             spans_[i - 1].columns == sizes_.panel_columns)
        depth += spans_[i].columns;
      multiply<C>(rows_, sizes_.panel_dim, depth, weights(0) + first.column, row_stride_,
                  packed_.panel_of(packed_.values, b_, packed_head_, first.block), sizes_.panel_dim, output_.data,
                  sizes_.panel_dim, onto_output);
      onto_output = true;
    }
  }

  void store() {
    for (int64_t i = 0; i < rows_; ++i) {
      const auto [maximum, sum] = running_[i];
      const bool seen = sum > 0.0f;
      const int64_t token = plan_.token(b_, h_, first_ + i);
      const float* output = output_.data + i * sizes_.panel_dim;
      T* target = problem_.out.row(b_, h_, token);
      for (int64_t d = 0; d < sizes_.dim; ++d) target[d] = narrow<T>(seen ? output[d] / sum : 0.0f);
      *problem_.lse.row(b_, h_, token) = seen ? (maximum + std::log2(sum)) * kLn2 : -INFINITY;
    }
  }

  const Problem<T>& problem_;
  const Sizes& sizes_ = problem_.sizes;
  const Plan& plan_ = problem_.plan;
  const Packed<C>& packed_;
  const int64_t pass_columns_, row_stride_ = pass_columns_ + kRowSkew;
  Scratch<C> queries_;            // [block, panel_dim]
  Scratch<float> scores_;         // [block, row_stride]
  Scratch<C> narrow_weights_;     // [block, row_stride], empty where weights replace scores
  Scratch<float> output_;         // [block, panel_dim]
  std::vector<Running> running_;  // [block]
  std::vector<Span> spans_;
  int64_t b_, h_, packed_head_, first_, rows_;
};

// Item numbers of all (batch item, head, query block), those with the most key blocks first.
std::vector<int64_t> fullest_first(const Sizes& sizes, const Plan& plan) {
  std::vector<int64_t> items(sizes.batch * sizes.heads * sizes.blocks);
  std::iota(items.begin(), items.end(), 0);
  auto keys = [&](int64_t item) {
    const int64_t head = item / sizes.blocks;
    return *plan.count.row(head / sizes.heads, head % sizes.heads, item % sizes.blocks);
  };
  std::stable_sort(items.begin(), items.end(), [&](int64_t a, int64_t b) { return keys(a) > keys(b); });
  return items;
}

template <typename T, typename C>
void run(const Problem<T>& problem) {
  const Sizes& sizes = problem.sizes;
  Packed<C> packed(sizes);
  packed.pack(problem);
  const std::vector<int64_t> items = fullest_first(sizes, problem.plan);
  std::atomic<size_t> taken{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    Worker<T, C> worker(problem, packed);
    for (size_t i; (i = taken.fetch_add(1)) < items.size();) {
      const int64_t head = items[i] / sizes.blocks;
      worker.attend(head / sizes.heads, head % sizes.heads, items[i] % sizes.blocks);
    }
    at::native::cpublas::brgemm_release(std::is_same_v<C, BFloat16>);
  });
}

// q, out [B, H, N, D]; k, v [B, Hkv, N, D]; index [B, H, Qb, K] and count [B, H, Qb] int32; order [B, H, N] int64;
// lengths [B] int32; lse [B, H, N]. The last dimension of each is contiguous.
void attend_into(const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Tensor& index, const Tensor& count, const std::optional<Tensor>& order, bool order_per_head,
                 const std::optional<Tensor>& lengths, int64_t block, double scale) {
  TORCH_CHECK_VALUE(scale > 0, "scale must be positive, not ", scale);
  Sizes sizes{q.size(0), q.size(1), k.size(1), q.size(2), q.size(3), block, count.size(2)};
  sizes.packed_heads = order_per_head ? sizes.heads : sizes.kv_heads;
  sizes.panel_dim = round_up(sizes.dim, kLanes);
  sizes.panel_columns = round_up(block, kLanes);
  Plan plan{Heads<const int32_t>(index), Heads<const int32_t>(count), index.size(3)};
  if (order) plan.order.emplace(*order);
  plan.lengths = lengths ? lengths->const_data_ptr<int32_t>() : nullptr;
  auto problem = [&]<typename T>(T) {
    using In = Heads<const T>;
    const float to_log2 = static_cast<float>(scale) * kLog2E;
    return Problem<T>{sizes, plan, In(q), In(k), In(v), Heads<T>(out), Heads<float>(lse), to_log2};
  };
  if (q.scalar_type() == at::kFloat) run<float, float>(problem(float()));
  else if (at::native::cpublas::could_pack(at::kBFloat16)) run<BFloat16, BFloat16>(problem(BFloat16()));
  else run<BFloat16, float>(problem(BFloat16()));
}

}  // namespace

TORCH_LIBRARY(dit_sparse_cpu, library) {
  library.def(
      "attend_into(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor index, Tensor count, "
      "Tensor? order, bool order_per_head, Tensor? lengths, int block, float scale) -> ()",
      torch::dispatch(c10::DispatchKey::CPU, &attend_into));
}
