// Forward pass of block-sparse attention for x86 CPUs, with equal blocks or clusters of any size.
//
// Keys and values are packed once per call: every group of keys is split into pieces with a panel K^T [D, columns] and
// a panel V [columns, D]. Each worker takes query tiles from a shared counter, those with the most keys first, and runs
// the online softmax over the pieces of the key groups that the tile keeps, several pieces per pass. Both matrix
// products use oneDNN's brgemm, which PyTorch exports. Token orders are applied on packing, reading and writing. A second
// loop of the same softmax runs over the pooled terms of a plan with a tail, with those of kept key groups masked.

#include "plan.h"
#include "tail.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <vector>

namespace {

// Clusters are split into pieces and tiles of few sizes, because brgemm compiles a kernel for every shape.
constexpr int64_t kPiece = 64;
constexpr int64_t kTileRows = 128;

// K^T and V of every piece, panel after panel, padded with zeros.
template <typename C>
struct PackedKeysValues {
  const Sizes& sizes;
  AlignedBuffer<C> keys, values;

  explicit PackedKeysValues(const Sizes& sizes) : sizes(sizes), keys(elements()), values(elements()) {}

  int64_t elements() const { return sizes.batch * sizes.packed_heads * sizes.columns * sizes.panel_dim; }

  C* panel(const AlignedBuffer<C>& panels, int64_t b, int64_t packed_head, int64_t column) const {
    return panels.data + ((b * sizes.packed_heads + packed_head) * sizes.columns + column) * sizes.panel_dim;
  }

  template <typename T>
  void pack_group(const Problem<T>& problem, int64_t b, int64_t packed_head, int64_t group, C* staged) {
    const int64_t valid = problem.plan.valid_keys(b, packed_head, group);
    const int64_t column = problem.first_column(b, packed_head, group);
    for (int64_t done = 0; done < valid; done += sizes.piece)
      pack_piece(problem, b, packed_head, problem.plan.keys.first(b, packed_head, group) + done,
                 std::min(valid - done, sizes.piece), column + done, staged);
  }

  template <typename T>
  void pack_piece(const Problem<T>& problem, int64_t b, int64_t packed_head, int64_t first, int64_t valid,
                  int64_t column, C* staged) {
    const int64_t head = packed_head / (sizes.packed_heads / sizes.kv_heads);
    const int64_t dim = sizes.panel_dim, columns = round_up(valid, kLanes);
    C* key_panel = panel(keys, b, packed_head, column);
    C* value_panel = panel(values, b, packed_head, column);
    auto stage = [&](const StridedTensor<const T>& x, int64_t i, C* row) {
      const int64_t token = i < valid ? problem.plan.keys.token(b, packed_head, first + i) : -1;
      copy_row(token < 0 ? nullptr : x.row(b, head, token), sizes.dim, row, dim);
    };
    for (int64_t from = 0; from < columns; from += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) stage(problem.k, from + lane, staged + lane * dim);
      for (int64_t d = 0; d < dim; ++d)
        for (int64_t lane = 0; lane < kLanes; ++lane)
          key_panel[panel_offset<C>(d, from + lane, columns)] = staged[lane * dim + d];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        stage(problem.v, from + lane, staged);
        for (int64_t d = 0; d < dim; ++d) value_panel[panel_offset<C>(from + lane, d, dim)] = staged[d];
      }
    }
  }

  template <typename T>
  void pack(const Problem<T>& problem) {
    const int64_t groups = problem.plan.keys.groups;
    at::parallel_for(0, sizes.batch * sizes.packed_heads * groups, 1, [&](int64_t begin, int64_t end) {
      AlignedBuffer<C> staged(kLanes * sizes.panel_dim);
      for (int64_t i = begin; i < end; ++i)
        pack_group(problem, i / groups / sizes.packed_heads, i / groups % sizes.packed_heads, i % groups, staged.data);
    });
  }
};

// Consecutive queries of one group.
struct QueryTile {
  int64_t b, h, group, first, rows;
  int64_t keys;  // number of keys in the key groups it keeps
};

// The columns of a piece in the score tile; the first ``valid`` of them hold keys.
struct PieceSpan {
  int64_t packed_column, column, valid, columns;
};

template <typename T, typename C>
class Worker {
 public:
  Worker(const Problem<T>& problem, const PackedKeysValues<C>& packed, const PooledTail<C>& tail)
      : problem_(problem), packed_(packed), tail_(tail), pass_columns_(std::max(kPassColumns, sizes_.piece)),
        queries_(sizes_.rows * sizes_.panel_dim), scores_(sizes_.rows * row_stride_),
        bf16_weights_(kInPlace ? 0 : sizes_.rows * row_stride_), output_(sizes_.rows * sizes_.panel_dim),
        bias_(tail.columns) {}

  void attend(const QueryTile& tile) {
    tile_ = tile, packed_head_ = tile.h / (sizes_.heads / sizes_.packed_heads);
    padded_rows_ = round_up(tile.rows, kLanes);
    states_.assign(tile.rows, SoftmaxState{});
    load_queries();
    next_group_ = plan_.index.row(tile.b, tile.h, tile.group), keys_done_ = 0;
    end_group_ = next_group_ + std::min<int64_t>(*plan_.count.row(tile.b, tile.h, tile.group), plan_.max_kept);
    const int32_t* kept = next_group_;
    has_output_ = false;
    while (collect_pass()) {
      update_softmax<false>(compute_scores(), nullptr);
      accumulate_output();
    }
    if (tail_.tokens) attend_tail(kept);
    store_output();
  }

 private:
  static constexpr bool kInPlace = std::is_same_v<C, float>;

  float* scores(int64_t i) { return scores_.data + i * row_stride_; }

  C* weights(int64_t i) {
    if constexpr (kInPlace) return scores(i);
    else return bf16_weights_.data + i * row_stride_;
  }

  // Rows after the tile's last query are zeros. They reduce the number of brgemm shapes, and their results are unused.
  void load_queries() {
    for (int64_t i = 0; i < padded_rows_; ++i) {
      const T* row = i < tile_.rows ? problem_.q.row(tile_.b, tile_.h, token(i)) : nullptr;
      copy_row(row, sizes_.dim, queries_.data + i * sizes_.panel_dim, sizes_.panel_dim);
    }
    if constexpr (!kInPlace)
      for (int64_t i = tile_.rows; i < padded_rows_; ++i) std::fill(weights(i), weights(i) + row_stride_, C(0.0f));
  }

  int64_t token(int64_t row) const { return plan_.queries.token(tile_.b, tile_.h, tile_.first + row); }

  // Adds the terms of all key groups but the kept ones to the softmax and the output.
  void attend_tail(const int32_t* kept) {
    tail_.bias(tile_.b, packed_head_, kept, end_group_, bias_.data);
    for (int64_t panel = 0; panel * kPassColumns < tail_.columns; ++panel) {
      const int64_t columns = tail_.panel_columns(panel);
      const float* bias = bias_.data + panel * kPassColumns;
      if (std::all_of(bias, bias + columns, [](float x) { return x == -INFINITY; })) continue;
      multiply<C>(padded_rows_, columns, sizes_.panel_dim, queries_.data, sizes_.panel_dim,
                  tail_.panel(tail_.keys, tile_.b, packed_head_, panel), columns, scores_.data, row_stride_, false);
      update_softmax<true>(columns, bias);
      multiply<C>(padded_rows_, sizes_.panel_dim, columns, weights(0), row_stride_,
                  tail_.panel(tail_.values, tile_.b, packed_head_, panel), sizes_.panel_dim, output_.data,
                  sizes_.panel_dim, has_output_);
      has_output_ = true;
    }
  }

  // Converts the scores of a pass to weights, and rescales the output of earlier passes to the new maximum of a row.
  template <bool kBiased>
  void update_softmax(int64_t columns, const float* bias) {
    for (int64_t i = 0; i < tile_.rows; ++i) {
      const float rescale = softmax_row<kBiased>(scores(i), weights(i), columns, problem_.scale, bias, states_[i]);
      if (!has_output_ || rescale == 1.0f) continue;
      float* output = output_.data + i * sizes_.panel_dim;
      for (int64_t d = 0; d < sizes_.panel_dim; ++d) output[d] *= rescale;
    }
  }

  // Fills spans_ with the next pieces, up to the columns of a pass. Returns whether there are any.
  bool collect_pass() {
    spans_.clear();
    for (int64_t column = 0; next_group_ != end_group_;) {
      const int64_t group = *next_group_;
      TORCH_CHECK_INDEX(0 <= group && group < plan_.keys.groups, "key groups of a plan must be in [0, ",
                        plan_.keys.groups, "), got ", group);
      const int64_t left = plan_.valid_keys(tile_.b, tile_.h, group) - keys_done_;
      if (left <= 0) {
        ++next_group_, keys_done_ = 0;
        continue;
      }
      const int64_t valid = std::min(left, sizes_.piece), columns = round_up(valid, kLanes);
      if (column + columns > pass_columns_) break;
      spans_.push_back({problem_.first_column(tile_.b, tile_.h, group) + keys_done_, column, valid, columns});
      column += columns, keys_done_ += valid;
    }
    return !spans_.empty();
  }

  // Computes the scores of the pass, with -inf in the padding columns of a piece. Returns the number of columns.
  int64_t compute_scores() {
    for (const PieceSpan& span : spans_) {
      multiply<C>(padded_rows_, span.columns, sizes_.panel_dim, queries_.data, sizes_.panel_dim,
                  packed_.panel(packed_.keys, tile_.b, packed_head_, span.packed_column), span.columns,
                  scores_.data + span.column, row_stride_, false);
      for (int64_t i = 0; i < tile_.rows; ++i)
        std::fill(scores(i) + span.column + span.valid, scores(i) + span.column + span.columns, -INFINITY);
    }
    return spans_.back().column + spans_.back().columns;
  }

  // Computes output = weights @ V, or adds to output. Pieces that are adjacent in memory share one product.
  void accumulate_output() {
    for (size_t i = 0; i < spans_.size();) {
      const PieceSpan& first = spans_[i];
      int64_t depth = spans_[i].columns;
      while (++i < spans_.size() && spans_[i].packed_column == first.packed_column + depth) depth += spans_[i].columns;
      multiply<C>(padded_rows_, sizes_.panel_dim, depth, weights(0) + first.column, row_stride_,
                  packed_.panel(packed_.values, tile_.b, packed_head_, first.packed_column), sizes_.panel_dim,
                  output_.data, sizes_.panel_dim, has_output_);
      has_output_ = true;
    }
  }

  void store_output() {
    for (int64_t i = 0; i < tile_.rows; ++i) {
      const auto [maximum, sum] = states_[i];
      const bool has_keys = sum > 0.0f;
      const float* output = output_.data + i * sizes_.panel_dim;
      T* target = problem_.out.row(tile_.b, tile_.h, token(i));
      for (int64_t d = 0; d < sizes_.dim; ++d) target[d] = from_float<T>(has_keys ? output[d] / sum : 0.0f);
      *problem_.lse.row(tile_.b, tile_.h, token(i)) =
          has_keys ? (maximum + std::log2(sum)) * kLn2 : -INFINITY;
    }
  }

  const Problem<T>& problem_;
  const Sizes& sizes_ = problem_.sizes;
  const Plan& plan_ = problem_.plan;
  const PackedKeysValues<C>& packed_;
  const PooledTail<C>& tail_;
  const int64_t pass_columns_, row_stride_ = pass_columns_ + kRowSkew;
  AlignedBuffer<C> queries_;          // [rows, panel_dim]
  AlignedBuffer<float> scores_;       // [rows, row_stride]
  AlignedBuffer<C> bf16_weights_;     // [rows, row_stride], empty if weights overwrite scores
  AlignedBuffer<float> output_;       // [rows, panel_dim]
  AlignedBuffer<float> bias_;         // [columns of the tail]
  std::vector<SoftmaxState> states_;  // [rows]
  std::vector<PieceSpan> spans_;
  QueryTile tile_;
  int64_t packed_head_, padded_rows_;
  bool has_output_;  // whether output_ holds a sum
  const int32_t *next_group_, *end_group_;  // the remaining key groups
  int64_t keys_done_;                       // keys of the next group in earlier passes
};

// Returns all tiles, those with the most keys first.
std::vector<QueryTile> tiles_by_work(const Sizes& sizes, const Plan& plan) {
  std::vector<QueryTile> tiles;
  const int64_t tile_rows = plan.queries.max_tokens_at_once(kTileRows);
  for (int64_t b = 0; b < sizes.batch; ++b)
    for (int64_t h = 0; h < sizes.heads; ++h)
      for (int64_t group = 0; group < plan.queries.groups; ++group) {
        const int64_t first = plan.queries.first(b, h, group), size = plan.queries.size(b, h, group);
        const int32_t* kept = plan.index.row(b, h, group);
        int64_t keys = 0;
        for (int64_t i = 0; i < std::min<int64_t>(*plan.count.row(b, h, group), plan.max_kept); ++i)
          if (0 <= kept[i] && kept[i] < plan.keys.groups) keys += plan.keys.size(b, h, kept[i]);
        for (int64_t done = 0; done < size; done += tile_rows)
          tiles.push_back({b, h, group, first + done, std::min(tile_rows, size - done), keys});
      }
  std::stable_sort(tiles.begin(), tiles.end(), [](const QueryTile& a, const QueryTile& b) { return a.keys > b.keys; });
  return tiles;
}

template <typename T, typename C>
void run(const Problem<T>& problem, int64_t tail_tokens) {
  PackedKeysValues<C> packed(problem.sizes);
  packed.pack(problem);
  PooledTail<C> tail(problem.plan, problem.sizes, tail_tokens);
  tail.pack(problem);
  const std::vector<QueryTile> tiles = tiles_by_work(problem.sizes, problem.plan);
  std::atomic<size_t> next_tile{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    Worker<T, C> worker(problem, packed, tail);
    for (size_t i; (i = next_tile.fetch_add(1)) < tiles.size();) worker.attend(tiles[i]);
    at::native::cpublas::brgemm_release(std::is_same_v<C, BFloat16>);
  });
}

// q, out [B, H, N, D]; k, v [B, Hkv, N, D]; index [B, H, Q, K] and count [B, H, Q] int32; orders [B, H, N] int64;
// edges [B, H, groups + 1] int32, or null for equal blocks; lengths [B] int32; lse [B, H, N]. The last dimension
// of each is contiguous. ``tail`` is the tokens of a pooled term, 0 without a tail.
void attend_into(const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Tensor& index, const Tensor& count, const std::optional<Tensor>& query_order,
                 const std::optional<Tensor>& query_edges, const std::optional<Tensor>& key_order,
                 const std::optional<Tensor>& key_edges, bool keys_per_head, const std::optional<Tensor>& lengths,
                 int64_t block, int64_t tail, double scale) {
  TORCH_CHECK_VALUE(scale > 0, "scale must be positive, got ", scale);
  const int64_t tokens = q.size(2), key_groups = key_edges ? key_edges->size(2) - 1 : count.size(2);
  const Plan plan{StridedTensor<const int32_t>(index), StridedTensor<const int32_t>(count), index.size(3),
                  TokenGroups(query_order, query_edges, count.size(2), block, tokens),
                  TokenGroups(key_order, key_edges, key_groups, block, tokens),
                  lengths ? lengths->const_data_ptr<int32_t>() : nullptr};
  Sizes sizes{q.size(0), q.size(1), k.size(1), q.size(3)};
  sizes.packed_heads = keys_per_head ? sizes.heads : sizes.kv_heads;
  sizes.panel_dim = round_up(sizes.dim, kLanes);
  sizes.piece = round_up(plan.keys.max_tokens_at_once(kPiece), kLanes);
  sizes.columns = key_edges ? round_up(tokens, kLanes) + (key_groups + 1) * kLanes : key_groups * sizes.piece;
  sizes.rows = round_up(plan.queries.max_tokens_at_once(kTileRows), kLanes);
  auto problem = [&]<typename T>(T) {
    using In = StridedTensor<const T>;
    const float to_log2 = static_cast<float>(scale) * kLog2E;
    return Problem<T>{sizes, plan, In(q), In(k), In(v), StridedTensor<T>(out), StridedTensor<float>(lse), to_log2};
  };
  if (q.scalar_type() == at::kFloat) run<float, float>(problem(float()), tail);
  else if (at::native::cpublas::could_pack(at::kBFloat16)) run<BFloat16, BFloat16>(problem(BFloat16()), tail);
  else run<BFloat16, float>(problem(BFloat16()), tail);
}

}  // namespace

TORCH_LIBRARY(dit_sparse_cpu, library) {
  library.def(
      "attend_into(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor index, Tensor count, "
      "Tensor? query_order, Tensor? query_edges, Tensor? key_order, Tensor? key_edges, bool keys_per_head, "
      "Tensor? lengths, int block, int tail, float scale) -> ()",
      torch::dispatch(c10::DispatchKey::CPU, &attend_into));
}
