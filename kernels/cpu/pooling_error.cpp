// Scores of key tiles by the error of their pooled terms, for x86 CPUs (kernels/planning/pooling_error.py).
//
// Products are computed transposed: keys or terms are rows and queries are lanes, so that keys are read in place
// and softmax runs over rows without sums across lanes. A pass holds up to kPassRows rows; its exponentials are relative
// to the running maximum of the pass, and the last step multiplies them by 2^(maximum of the pass - log-sum-exp).

#include "tiles.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <vector>

namespace {

constexpr int64_t kPassRows = 512;
constexpr int64_t kMaxLanes = 64;

using Input = StridedTensor<const float>;

// Sizes of a call: queries [B, H, N, D] in blocks, keys [B, Hkv, N, D] in tiles.
struct Shape {
  int64_t batch, heads, kv_heads, tokens, dim, block, tile;
  int64_t blocks = (tokens + block - 1) / block, tiles = (tokens + tile - 1) / tile;

  Shape(const Tensor& q, const Tensor& k, int64_t block, int64_t tile)
      : batch(q.size(0)), heads(q.size(1)), kv_heads(k.size(1)), tokens(q.size(2)), dim(q.size(3)), block(block),
        tile(tile) {}

  int64_t tile_size(int64_t j) const { return std::min(tile, tokens - j * tile); }

  // Returns the number of the first tile of the keys of a query head among those of all key heads.
  int64_t first_tile(int64_t b, int64_t h) const { return (b * kv_heads + h / (heads / kv_heads)) * tiles; }
};

// Running softmax of the queries in the lanes: maximum and sum, and the maximum that each pass was relative to.
struct Lanes {
  int64_t count;  // a multiple of kLanes
  std::vector<float> maximum, sum, pass_maximum;

  explicit Lanes(int64_t count) : count(count) {}

  void reset() {
    maximum.assign(count, -INFINITY), sum.assign(count, 0.0f);
    pass_maximum.clear();
  }

  // Raises the maximum to those of rows [num_rows, count], plus a bias of each row if there is one, and makes the sum
  // relative to it.
  void begin_pass(const float* rows, int64_t num_rows, const float* bias) {
    float* m = maximum.data();
    std::vector<float> before(maximum);
    for (int64_t i = 0; i < num_rows; ++i) {
      const float added = bias ? bias[i] : 0.0f;
#pragma omp simd
      for (int64_t lane = 0; lane < count; ++lane) {
        const float logit = rows[i * count + lane] + added;
        m[lane] = logit > m[lane] ? logit : m[lane];  // GCC vectorizes ?: but not std::max
      }
    }
    for (int64_t lane = 0; lane < count; ++lane) sum[lane] *= exp2_nonpositive(before[lane] - m[lane]);
    pass_maximum.insert(pass_maximum.end(), maximum.begin(), maximum.end());
  }

  // Returns the factors of a pass that turn its exponentials into weights.
  void factors(int64_t pass, float* factor) const {
    for (int64_t lane = 0; lane < count; ++lane)
      factor[lane] = exp2_nonpositive(pass_maximum[pass * count + lane] - maximum[lane]) / sum[lane];
  }
};

// Copies rows of queries, multiplied by a factor, to columns of target [dim, lanes].
void transpose_queries(const Input& q, int64_t b, int64_t h, const std::vector<int64_t>& tokens, int64_t dim,
                       int64_t lanes, float factor, float* target) {
  std::fill(target, target + dim * lanes, 0.0f);
  for (size_t lane = 0; lane < tokens.size(); ++lane) {
    const float* row = q.row(b, h, tokens[lane]);
    for (int64_t d = 0; d < dim; ++d) target[d * lanes + lane] = factor * row[d];
  }
}

// The mean and the channel variance of the keys of every tile, [B, Hkv, tiles, D].
struct TileStatistics {
  AlignedBuffer<float> mean, variance;

  TileStatistics(const Input& k, const Shape& shape)
      : mean(shape.batch * shape.kv_heads * shape.tiles * shape.dim),
        variance(shape.batch * shape.kv_heads * shape.tiles * shape.dim) {
    at::parallel_for(0, shape.batch * shape.kv_heads * shape.tiles, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = i % shape.tiles, head = i / shape.tiles % shape.kv_heads, b = i / shape.tiles / shape.kv_heads;
        const int64_t size = shape.tile_size(j);
        float *m = mean.data + i * shape.dim, *s = variance.data + i * shape.dim;
        std::fill(m, m + shape.dim, 0.0f), std::fill(s, s + shape.dim, 0.0f);
        const float share = 1.0f / size;
        for (int64_t n = 0; n < size; ++n) {
          const float* row = k.row(b, head, j * shape.tile + n);
#pragma omp simd
          for (int64_t d = 0; d < shape.dim; ++d) m[d] += row[d] * share;
        }
        for (int64_t n = 0; n < size; ++n) {
          const float* row = k.row(b, head, j * shape.tile + n);
#pragma omp simd
          for (int64_t d = 0; d < shape.dim; ++d) s[d] += (row[d] - m[d]) * (row[d] - m[d]) * share;
        }
      }
    });
  }
};

// Scores of query blocks: the mean of their softmax over pooled terms, times the variance of the logits of each tile with
// ``spread``. A long block is computed in parts of kMaxLanes queries.
class SpreadWorker {
 public:
  SpreadWorker(const Shape& shape, const Input& q, const TileStatistics& statistics, bool spread, float scale)
      : shape_(shape), q_(q), statistics_(statistics), spread_(spread), scale_(scale),
        lanes_(round_up(std::min(shape.block, kMaxLanes), kLanes)), queries_(shape.dim * lanes_),
        squares_(shape.dim * lanes_), terms_(shape.tiles * lanes_), variances_(kPassRows * lanes_), factor_(lanes_),
        softmax_(lanes_), log_sizes_(shape.tiles) {
    for (int64_t j = 0; j < shape.tiles; ++j) log_sizes_[j] = std::log2(static_cast<float>(shape.tile_size(j)));
  }

  // Adds the scores of a block to scores [tiles].
  void score(int64_t b, int64_t h, int64_t block, float* scores) {
    const int64_t begin = block * shape_.block, end = std::min(begin + shape_.block, shape_.tokens);
    for (int64_t first = begin; first < end; first += lanes_) {
      tokens_.clear();
      for (int64_t token = first; token < std::min(first + lanes_, end); ++token) tokens_.push_back(token);
      transpose_queries(q_, b, h, tokens_, shape_.dim, lanes_, scale_ * kLog2E, queries_.data);
#pragma omp simd
      for (int64_t i = 0; i < shape_.dim * lanes_; ++i)
        squares_.data[i] = queries_.data[i] * queries_.data[i] * (kLn2 * kLn2);  // variances are of natural logits
      softmax_.reset();
      for (int64_t from = 0; from < shape_.tiles; from += kPassRows)
        compute_pass(shape_.first_tile(b, h) + from, from, std::min(kPassRows, shape_.tiles - from));
      add_weights(scores, 1.0f / (end - begin));
    }
  }

 private:
  // Writes weights, times variances, of the terms from a row on, relative to the maximum of the pass.
  void compute_pass(int64_t statistics_row, int64_t from, int64_t rows) {
    float* pass = terms_.data + from * lanes_;
    multiply<float>(rows, lanes_, shape_.dim, statistics_.mean.data + statistics_row * shape_.dim, shape_.dim,
                    queries_.data, lanes_, pass, lanes_, false);
    softmax_.begin_pass(pass, rows, log_sizes_.data() + from);
    if (spread_)
      multiply<float>(rows, lanes_, shape_.dim, statistics_.variance.data + statistics_row * shape_.dim, shape_.dim,
                      squares_.data, lanes_, variances_.data, lanes_, false);
    for (int64_t j = 0; j < rows; ++j) compute_weights(pass + j * lanes_, log_sizes_[from + j]);
    if (spread_)
      for (int64_t i = 0; i < rows * lanes_; ++i) pass[i] *= variances_.data[i];
  }

  void compute_weights(float* row, float log_size) {
    const float* maximum = softmax_.maximum.data();
    float* sum = softmax_.sum.data();
#pragma omp simd
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      row[lane] = exp2_nonpositive(row[lane] + log_size - maximum[lane]);
      sum[lane] += row[lane];
    }
  }

  void add_weights(float* scores, float share) {
    for (int64_t j = 0; j < shape_.tiles; ++j) {
      if (j % kPassRows == 0) softmax_.factors(j / kPassRows, factor_.data);
      const float *row = terms_.data + j * lanes_, *factor = factor_.data;
      float total = 0.0f;
#pragma omp simd reduction(+ : total)
      for (int64_t lane = 0; lane < static_cast<int64_t>(tokens_.size()); ++lane) total += row[lane] * factor[lane];
      scores[j] += total * share;
    }
  }

  const Shape& shape_;
  const Input& q_;
  const TileStatistics& statistics_;
  const bool spread_;
  const float scale_;
  const int64_t lanes_;
  AlignedBuffer<float> queries_, squares_;  // [D, lanes]
  AlignedBuffer<float> terms_, variances_;  // [tiles, lanes], [kPassRows, lanes]
  AlignedBuffer<float> factor_;             // [lanes]
  Lanes softmax_;
  std::vector<float> log_sizes_;  // [tiles]
  std::vector<int64_t> tokens_;   // of the lanes
};

// Scores of groups of query blocks: the mean over sampled queries of the distance between the exact weights of the keys
// of a tile and the weight of its mean key, whose logit is the mean of their logits.
class ErrorWorker {
 public:
  ErrorWorker(const Shape& shape, const Input& q, const Input& k, const Tensor& sampled, float scale)
      : group(std::max<int64_t>(1, kMaxLanes / sampled.size(0))), shape_(shape), q_(q), k_(k),
        positions_(sampled.const_data_ptr<int64_t>()), samples_(sampled.size(0)),
        lanes_(round_up(group * samples_, kLanes)), pass_tiles_(std::max<int64_t>(1, kPassRows / shape.tile)),
        to_log2_(scale * kLog2E), queries_(shape.dim * lanes_), pass_(pass_tiles_ * shape.tile * lanes_),
        distances_(shape.tiles * lanes_), pooled_(lanes_), squares_(lanes_), factor_(lanes_), softmax_(lanes_) {}

  const int64_t group;  // blocks at once

  // Writes the scores of the blocks from a block on to scores [blocks, tiles].
  void score(int64_t b, int64_t h, int64_t first, float* scores) {
    const int64_t stop = std::min(first + group, shape_.blocks), kv_head = h / (shape_.heads / shape_.kv_heads);
    tokens_.clear();
    for (int64_t block = first; block < stop; ++block)
      for (int64_t i = 0; i < samples_; ++i)
        tokens_.push_back(std::min(block * shape_.block + positions_[i], shape_.tokens - 1));
    transpose_queries(q_, b, h, tokens_, shape_.dim, lanes_, to_log2_, queries_.data);
    softmax_.reset();
    for (int64_t from = 0; from < shape_.tiles; from += pass_tiles_) {
      const int64_t begin = from * shape_.tile, rows = std::min(pass_tiles_ * shape_.tile, shape_.tokens - begin);
      multiply<float>(rows, lanes_, shape_.dim, k_.row(b, kv_head, begin), k_.token_stride, queries_.data, lanes_,
                      pass_.data, lanes_, false);
      softmax_.begin_pass(pass_.data, rows, nullptr);
      for (int64_t j = from; j < std::min(from + pass_tiles_, shape_.tiles); ++j)
        compute_distance(pass_.data + (j - from) * shape_.tile * lanes_, shape_.tile_size(j),
                         distances_.data + j * lanes_);
    }
    write_means(first, stop, scores);
  }

 private:
  // Writes the distance of the weights of a tile to that of its mean, relative to the maximum of the pass.
  void compute_distance(const float* logits, int64_t size, float* distance) {
    const float* maximum = softmax_.maximum.data();
    float *sum = softmax_.sum.data(), *pooled = pooled_.data, *squares = squares_.data;
    std::fill(pooled, pooled + lanes_, 0.0f), std::fill(squares, squares + lanes_, 0.0f);
    for (int64_t n = 0; n < size; ++n)
      for (int64_t lane = 0; lane < lanes_; ++lane) pooled[lane] += logits[n * lanes_ + lane];
    for (int64_t lane = 0; lane < lanes_; ++lane) pooled[lane] = exp2_nonpositive(pooled[lane] / size - maximum[lane]);
    for (int64_t n = 0; n < size; ++n)
#pragma omp simd
      for (int64_t lane = 0; lane < lanes_; ++lane) {
        const float weight = exp2_nonpositive(logits[n * lanes_ + lane] - maximum[lane]);
        sum[lane] += weight;
        squares[lane] += (weight - pooled[lane]) * (weight - pooled[lane]);
      }
    for (int64_t lane = 0; lane < lanes_; ++lane) distance[lane] = std::sqrt(squares[lane]);
  }

  void write_means(int64_t first, int64_t stop, float* scores) {
    for (int64_t j = 0; j < shape_.tiles; ++j) {
      if (j % pass_tiles_ == 0) softmax_.factors(j / pass_tiles_, factor_.data);
      const float *distance = distances_.data + j * lanes_, *factor = factor_.data;
      for (int64_t block = first; block < stop; ++block) {
        float total = 0.0f;
        for (int64_t i = 0; i < samples_; ++i, ++distance, ++factor) total += *distance * *factor;
        scores[block * shape_.tiles + j] = total / samples_;
      }
    }
  }

  const Shape& shape_;
  const Input &q_, &k_;
  const int64_t *positions_, samples_;  // in a block
  const int64_t lanes_, pass_tiles_;
  const float to_log2_;
  AlignedBuffer<float> queries_;                     // [D, lanes]
  AlignedBuffer<float> pass_, distances_;            // [keys of a pass, lanes], [tiles, lanes]
  AlignedBuffer<float> pooled_, squares_, factor_;   // [lanes]
  Lanes softmax_;
  std::vector<int64_t> tokens_;  // of the lanes
};

// Returns float32 [B, H, blocks, tiles]. q [B, H, N, D] and k [B, Hkv, N, D] are float32 with contiguous rows; ``scale``
// is that of natural logits.
Tensor mass_and_spread(const Tensor& q_tensor, const Tensor& k_tensor, int64_t block, int64_t tile, bool spread,
                       double scale) {
  const Shape shape(q_tensor, k_tensor, block, tile);
  const Input q(q_tensor), k(k_tensor);
  const TileStatistics statistics(k, shape);
  Tensor out = at::zeros({shape.batch, shape.heads, shape.blocks, shape.tiles});
  float* scores = out.data_ptr<float>();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    SpreadWorker worker(shape, q, statistics, spread, scale);
    for (int64_t i; (i = next.fetch_add(1)) < shape.batch * shape.heads * shape.blocks;)
      worker.score(i / shape.blocks / shape.heads, i / shape.blocks % shape.heads, i % shape.blocks,
                   scores + i * shape.tiles);
    at::native::cpublas::brgemm_release(false);
  });
  return out;
}

// As mass_and_spread; ``sampled`` are int64 positions in a block, and those after the last token are the last token.
Tensor pooling_error(const Tensor& q_tensor, const Tensor& k_tensor, int64_t block, int64_t tile, const Tensor& sampled,
                     double scale) {
  const Shape shape(q_tensor, k_tensor, block, tile);
  const Input q(q_tensor), k(k_tensor);
  Tensor out = at::empty({shape.batch, shape.heads, shape.blocks, shape.tiles});
  float* scores = out.data_ptr<float>();
  const int64_t group = ErrorWorker(shape, q, k, sampled, scale).group, groups = (shape.blocks + group - 1) / group;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    ErrorWorker worker(shape, q, k, sampled, scale);
    for (int64_t i; (i = next.fetch_add(1)) < shape.batch * shape.heads * groups;)
      worker.score(i / groups / shape.heads, i / groups % shape.heads, i % groups * group,
                   scores + i / groups * shape.blocks * shape.tiles);
    at::native::cpublas::brgemm_release(false);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(dit_sparse_pooling_error, library) {
  library.def("mass_and_spread(Tensor q, Tensor k, int block, int tile, bool spread, float scale) -> Tensor",
              torch::dispatch(c10::DispatchKey::CPU, &mass_and_spread));
  library.def("pooling_error(Tensor q, Tensor k, int block, int tile, Tensor sampled, float scale) -> Tensor",
              torch::dispatch(c10::DispatchKey::CPU, &pooling_error));
}
