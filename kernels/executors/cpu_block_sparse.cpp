// Forward pass of block-sparse attention for x86 CPUs, with equal blocks or clusters of any size.
//
// Keys and values are packed once per call: every group of keys is split into pieces with a panel K^T [D, columns] and
// a panel V [columns, D]. Each worker takes query tiles from a shared counter, those with the most keys first, and runs
// the online softmax over the pieces of the key groups that the tile keeps, several pieces per pass. Both matrix
// products use oneDNN's brgemm, which PyTorch exports. Token orders are applied on packing, reading and writing.

#include "cpu_tiles.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <vector>

namespace {

// Clusters are split into pieces and tiles of few sizes, because brgemm compiles a kernel for every shape.
constexpr int64_t kPiece = 64;
constexpr int64_t kTileRows = 128;

// The queries or keys in the plan's order, split into groups: equal blocks, or clusters by their edges.
struct TokenGroups {
  std::optional<StridedTensor<const int64_t>> order;  // [B, H, N]
  std::optional<StridedTensor<const int32_t>> edges;  // [B, H, groups + 1]
  int64_t groups, block, tokens;

  TokenGroups(const std::optional<Tensor>& order_tensor, const std::optional<Tensor>& edges_tensor, int64_t groups,
              int64_t block, int64_t tokens)
      : groups(groups), block(block), tokens(tokens) {
    if (order_tensor) order.emplace(*order_tensor);
    if (edges_tensor) edges.emplace(*edges_tensor);
  }

  int64_t first(int64_t b, int64_t h, int64_t group) const {
    return edges ? *edges->row(b, h, group) : std::min(group * block, tokens);
  }
  int64_t size(int64_t b, int64_t h, int64_t group) const { return first(b, h, group + 1) - first(b, h, group); }

  // Returns the token at a position of the ordered sequence.
  int64_t token(int64_t b, int64_t h, int64_t position) const {
    return order ? *order->row(b, h, position) : position;
  }

  // Returns the maximal number of tokens computed at once: a block, or ``limit`` tokens of a cluster.
  int64_t max_tokens_at_once(int64_t limit) const { return edges ? limit : block; }
};

struct Plan {
  StridedTensor<const int32_t> index;  // [B, H, query groups, K]
  StridedTensor<const int32_t> count;  // [B, H, query groups]
  int64_t max_kept;                    // K
  TokenGroups queries, keys;
  const int32_t* lengths;  // [B] or null; padding is at the end of the order of the keys

  int64_t valid_keys(int64_t b, int64_t h, int64_t group) const {
    const int64_t size = keys.size(b, h, group);
    return lengths ? std::clamp<int64_t>(lengths[b] - keys.first(b, h, group), 0, size) : size;
  }
};

struct Sizes {
  int64_t batch, heads, kv_heads, dim;
  int64_t packed_heads;  // kv_heads, or heads if query heads differ in how they group keys
  int64_t panel_dim;
  int64_t piece;    // maximal columns of a panel
  int64_t columns;  // columns for all keys of a head, group after group
  int64_t rows;     // maximal queries of a tile
};

template <typename T>
struct Problem {
  Sizes sizes;
  Plan plan;
  StridedTensor<const T> q, k, v;  // [B, H, N, D], [B, Hkv, N, D] twice
  StridedTensor<T> out;            // [B, H, N, D]
  StridedTensor<float> lse;        // [B, H, N]
  float scale;                     // from scores to base-2 logarithms of weights

  // Returns the first column of a group. Clusters leave room to round each up to a multiple of the vector width.
  int64_t first_column(int64_t b, int64_t h, int64_t group) const {
    return plan.keys.edges ? round_up(plan.keys.first(b, h, group), kLanes) + group * kLanes : group * sizes.piece;
  }
};

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
  Worker(const Problem<T>& problem, const PackedKeysValues<C>& packed)
      : problem_(problem), packed_(packed), pass_columns_(std::max(kPassColumns, sizes_.piece)),
        queries_(sizes_.rows * sizes_.panel_dim), scores_(sizes_.rows * row_stride_),
        bf16_weights_(kInPlace ? 0 : sizes_.rows * row_stride_), output_(sizes_.rows * sizes_.panel_dim) {}

  void attend(const QueryTile& tile) {
    tile_ = tile, packed_head_ = tile.h / (sizes_.heads / sizes_.packed_heads);
    padded_rows_ = round_up(tile.rows, kLanes);
    states_.assign(tile.rows, SoftmaxState{});
    load_queries();
    next_group_ = plan_.index.row(tile.b, tile.h, tile.group), keys_done_ = 0;
    end_group_ = next_group_ + std::min<int64_t>(*plan_.count.row(tile.b, tile.h, tile.group), plan_.max_kept);
    for (bool first_pass = true; collect_pass(); first_pass = false) {
      const int64_t columns = compute_scores();
      for (int64_t i = 0; i < tile.rows; ++i) {
        const float rescale = softmax_row(scores(i), weights(i), columns, problem_.scale, states_[i]);
        if (first_pass || rescale == 1.0f) continue;
        float* output = output_.data + i * sizes_.panel_dim;
        for (int64_t d = 0; d < sizes_.panel_dim; ++d) output[d] *= rescale;
      }
      accumulate_output(!first_pass);
    }
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
  void accumulate_output(bool add) {
    for (size_t i = 0; i < spans_.size();) {
      const PieceSpan& first = spans_[i];
      int64_t depth = spans_[i].columns;
      while (++i < spans_.size() && spans_[i].packed_column == first.packed_column + depth) depth += spans_[i].columns;
      multiply<C>(padded_rows_, sizes_.panel_dim, depth, weights(0) + first.column, row_stride_,
                  packed_.panel(packed_.values, tile_.b, packed_head_, first.packed_column), sizes_.panel_dim,
                  output_.data, sizes_.panel_dim, add);
      add = true;
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
  const int64_t pass_columns_, row_stride_ = pass_columns_ + kRowSkew;
  AlignedBuffer<C> queries_;          // [rows, panel_dim]
  AlignedBuffer<float> scores_;       // [rows, row_stride]
  AlignedBuffer<C> bf16_weights_;     // [rows, row_stride], empty if weights overwrite scores
  AlignedBuffer<float> output_;       // [rows, panel_dim]
  std::vector<SoftmaxState> states_;  // [rows]
  std::vector<PieceSpan> spans_;
  QueryTile tile_;
  int64_t packed_head_, padded_rows_;
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
void run(const Problem<T>& problem) {
  PackedKeysValues<C> packed(problem.sizes);
  packed.pack(problem);
  const std::vector<QueryTile> tiles = tiles_by_work(problem.sizes, problem.plan);
  std::atomic<size_t> next_tile{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    Worker<T, C> worker(problem, packed);
    for (size_t i; (i = next_tile.fetch_add(1)) < tiles.size();) worker.attend(tiles[i]);
    at::native::cpublas::brgemm_release(std::is_same_v<C, BFloat16>);
  });
}

// q, out [B, H, N, D]; k, v [B, Hkv, N, D]; index [B, H, Q, K] and count [B, H, Q] int32; orders [B, H, N] int64;
// edges [B, H, groups + 1] int32, or null for equal blocks; lengths [B] int32; lse [B, H, N]. The last dimension
// of each is contiguous.
void attend_into(const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Tensor& index, const Tensor& count, const std::optional<Tensor>& query_order,
                 const std::optional<Tensor>& query_edges, const std::optional<Tensor>& key_order,
                 const std::optional<Tensor>& key_edges, bool keys_per_head, const std::optional<Tensor>& lengths,
                 int64_t block, double scale) {
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
  if (q.scalar_type() == at::kFloat) run<float, float>(problem(float()));
  else if (at::native::cpublas::could_pack(at::kBFloat16)) run<BFloat16, BFloat16>(problem(BFloat16()));
  else run<BFloat16, float>(problem(BFloat16()));
}

}  // namespace

TORCH_LIBRARY(dit_sparse_cpu, library) {
  library.def(
      "attend_into(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor index, Tensor count, "
      "Tensor? query_order, Tensor? query_edges, Tensor? key_order, Tensor? key_edges, bool keys_per_head, "
      "Tensor? lengths, int block, float scale) -> ()",
      torch::dispatch(c10::DispatchKey::CPU, &attend_into));
}
