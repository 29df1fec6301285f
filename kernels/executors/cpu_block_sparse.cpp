// Block-sparse attention forward for x86 CPUs, between blocks of one size or clusters of any.
//
// K and V are packed once per call: every group of keys becomes pieces, each a panel K^T [D, columns] and a panel
// V [columns, D]. Then each worker takes tiles of queries from a shared counter, those with the most keys first, and
// runs the online softmax over the pieces that the tile's group visits, a pass of several pieces at a time. Both
// products are oneDNN's brgemm, which torch exports. Token orders are applied while tokens are packed, read and written.

#include "cpu_tiles.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <vector>

namespace {

// Clusters are cut into pieces and tiles of few sizes, for brgemm compiles a kernel for every shape.
constexpr int64_t kPiece = 64;
constexpr int64_t kTileRows = 128;

// The tokens of one side in the plan's order, cut into groups: blocks of one size, or clusters by their edges.
struct Side {
  std::optional<Heads<const int64_t>> order;  // [B, H, N]
  std::optional<Heads<const int32_t>> edges;  // [B, H, groups + 1]
  int64_t groups, block, tokens;

  Side(const std::optional<Tensor>& order_of, const std::optional<Tensor>& edges_of, int64_t groups, int64_t block,
       int64_t tokens)
      : groups(groups), block(block), tokens(tokens) {
    if (order_of) order.emplace(*order_of);
    if (edges_of) edges.emplace(*edges_of);
  }

  int64_t first(int64_t b, int64_t h, int64_t group) const {
    return edges ? *edges->row(b, h, group) : std::min(group * block, tokens);
  }
  int64_t size(int64_t b, int64_t h, int64_t group) const { return first(b, h, group + 1) - first(b, h, group); }

  // The token at a place of the ordered sequence.
  int64_t token(int64_t b, int64_t h, int64_t place) const { return order ? *order->row(b, h, place) : place; }

  // Most tokens that are computed at once: a block, or a part of a cluster.
  int64_t part(int64_t most) const { return edges ? most : block; }
};

struct Plan {
  Heads<const int32_t> index;  // [B, H, query groups, K]
  Heads<const int32_t> count;  // [B, H, query groups]
  int64_t width;
  Side queries, keys;
  const int32_t* lengths;  // [B] or null; padding stands at the end of the order of the keys

  int64_t valid_keys(int64_t b, int64_t h, int64_t group) const {
    const int64_t size = keys.size(b, h, group);
    return lengths ? std::clamp<int64_t>(lengths[b] - keys.first(b, h, group), 0, size) : size;
  }
};

struct Sizes {
  int64_t batch, heads, kv_heads, dim;
  int64_t packed_heads;  // kv_heads, or heads where every query head groups its keys its own way
  int64_t panel_dim;
  int64_t piece;    // most columns of a panel
  int64_t columns;  // that hold the keys of a head, group after group
  int64_t rows;     // most queries of a tile
};

template <typename T>
struct Problem {
  Sizes sizes;
  Plan plan;
  Heads<const T> q, k, v;  // [B, H, N, D], [B, Hkv, N, D] twice
  Heads<T> out;            // [B, H, N, D]
  Heads<float> lse;        // [B, H, N]
  float scale;             // of scores, to base-2 logarithms

  // Where the columns of a group start. Groups of any size leave room for rounding each up to whole vectors.
  int64_t column(int64_t b, int64_t h, int64_t group) const {
    return plan.keys.edges ? round_up(plan.keys.first(b, h, group), kLanes) + group * kLanes : group * sizes.piece;
  }
};

// K^T and V of every piece, panel after panel; padding is zero.
template <typename C>
struct Packed {
  const Sizes& sizes;
  Scratch<C> keys, values;

  explicit Packed(const Sizes& sizes) : sizes(sizes), keys(elements()), values(elements()) {}

  int64_t elements() const { return sizes.batch * sizes.packed_heads * sizes.columns * sizes.panel_dim; }

  C* at(const Scratch<C>& panels, int64_t b, int64_t packed_head, int64_t column) const {
    return panels.data + ((b * sizes.packed_heads + packed_head) * sizes.columns + column) * sizes.panel_dim;
  }

  template <typename T>
  void pack_group(const Problem<T>& problem, int64_t b, int64_t packed_head, int64_t group, C* staged) {
    const int64_t valid = problem.plan.valid_keys(b, packed_head, group);
    const int64_t column = problem.column(b, packed_head, group);
    for (int64_t done = 0; done < valid; done += sizes.piece)
      pack_piece(problem, b, packed_head, problem.plan.keys.first(b, packed_head, group) + done,
                 std::min(valid - done, sizes.piece), column + done, staged);
  }

  template <typename T>
  void pack_piece(const Problem<T>& problem, int64_t b, int64_t packed_head, int64_t first, int64_t valid,
                  int64_t column, C* staged) {
    const int64_t head = packed_head / (sizes.packed_heads / sizes.kv_heads);
    const int64_t dim = sizes.panel_dim, columns = round_up(valid, kLanes);
    C* key_panel = at(keys, b, packed_head, column);
    C* value_panel = at(values, b, packed_head, column);
    auto stage = [&](const Heads<const T>& x, int64_t place, C* row) {
      const int64_t token = place < valid ? problem.plan.keys.token(b, packed_head, first + place) : -1;
      copy_row(token < 0 ? nullptr : x.row(b, head, token), sizes.dim, row, dim);
    };
    for (int64_t from = 0; from < columns; from += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) stage(problem.k, from + lane, staged + lane * dim);
      for (int64_t d = 0; d < dim; ++d)
        for (int64_t lane = 0; lane < kLanes; ++lane)
          key_panel[place_in_panel<C>(d, from + lane, columns)] = staged[lane * dim + d];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        stage(problem.v, from + lane, staged);
        for (int64_t d = 0; d < dim; ++d) value_panel[place_in_panel<C>(from + lane, d, dim)] = staged[d];
      }
    }
  }

  template <typename T>
  void pack(const Problem<T>& problem) {
    const int64_t groups = problem.plan.keys.groups;
    at::parallel_for(0, sizes.batch * sizes.packed_heads * groups, 1, [&](int64_t begin, int64_t end) {
      Scratch<C> staged(kLanes * sizes.panel_dim);
      for (int64_t i = begin; i < end; ++i)
        pack_group(problem, i / groups / sizes.packed_heads, i / groups % sizes.packed_heads, i % groups, staged.data);
    });
  }
};

// A tile of queries: some of one group's.
struct Tile {
  int64_t b, h, group, first, rows;
  int64_t keys;  // that it visits
};

// A piece's place in the score tile: ``valid`` of its ``columns`` hold keys.
struct Span {
  int64_t packed, column, valid, columns;
};

template <typename T, typename C>
class Worker {
 public:
  Worker(const Problem<T>& problem, const Packed<C>& packed)
      : problem_(problem), packed_(packed), pass_columns_(std::max(kPassColumns, sizes_.piece)),
        queries_(sizes_.rows * sizes_.panel_dim), scores_(sizes_.rows * row_stride_),
        narrow_weights_(kInPlace ? 0 : sizes_.rows * row_stride_), output_(sizes_.rows * sizes_.panel_dim) {}

  void attend(const Tile& tile) {
    tile_ = tile, packed_head_ = tile.h / (sizes_.heads / sizes_.packed_heads);
    padded_rows_ = round_up(tile.rows, kLanes);
    running_.assign(tile.rows, Running{});
    load_queries();
    next_ = plan_.index.row(tile.b, tile.h, tile.group), done_ = 0;
    end_ = next_ + std::min<int64_t>(*plan_.count.row(tile.b, tile.h, tile.group), plan_.width);
    for (bool first_pass = true; gather_pass(); first_pass = false) {
      const int64_t columns = score();
      for (int64_t i = 0; i < tile.rows; ++i) {
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

  // Rows beyond the tile's are zeros: they make the shapes of products few, and nobody reads what becomes of them.
  void load_queries() {
    for (int64_t i = 0; i < padded_rows_; ++i) {
      const T* row = i < tile_.rows ? problem_.q.row(tile_.b, tile_.h, token(i)) : nullptr;
      copy_row(row, sizes_.dim, queries_.data + i * sizes_.panel_dim, sizes_.panel_dim);
    }
    if constexpr (!kInPlace)
      for (int64_t i = tile_.rows; i < padded_rows_; ++i) std::fill(weights(i), weights(i) + row_stride_, C(0.0f));
  }

  int64_t token(int64_t row) const { return plan_.queries.token(tile_.b, tile_.h, tile_.first + row); }

  // Fills spans_ with as many pieces of the groups that are left as a pass holds. Whether there are any.
  bool gather_pass() {
    spans_.clear();
    for (int64_t column = 0; next_ != end_;) {
      TORCH_CHECK_INDEX(0 <= *next_ && *next_ < plan_.keys.groups, "the plan names key group ", *next_, " of ",
                        plan_.keys.groups);
      const int64_t left = plan_.valid_keys(tile_.b, tile_.h, *next_) - done_;
      if (left <= 0) {
        ++next_, done_ = 0;
        continue;
      }
      const int64_t valid = std::min(left, sizes_.piece), columns = round_up(valid, kLanes);
      if (column + columns > pass_columns_) break;
      spans_.push_back({problem_.column(tile_.b, tile_.h, *next_) + done_, column, valid, columns});
      column += columns, done_ += valid;
    }
    return !spans_.empty();
  }

  // Scores of the pass, with -inf in the columns that pad a piece. Returns their number.
  int64_t score() {
    for (const Span& span : spans_) {
      multiply<C>(padded_rows_, span.columns, sizes_.panel_dim, queries_.data, sizes_.panel_dim,
                  packed_.at(packed_.keys, tile_.b, packed_head_, span.packed), span.columns,
                  scores_.data + span.column, row_stride_, false);
      for (int64_t i = 0; i < tile_.rows; ++i)
        std::fill(scores(i) + span.column + span.valid, scores(i) + span.column + span.columns, -INFINITY);
    }
    return spans_.back().column + spans_.back().columns;
  }

  // output (+)= weights @ V, with pieces that lie one after another in memory in one product.
  void accumulate(bool onto_output) {
    for (size_t i = 0; i < spans_.size();) {
      const Span& first = spans_[i];
      int64_t depth = spans_[i].columns;
      while (++i < spans_.size() && spans_[i].packed == first.packed + depth) depth += spans_[i].columns;
      multiply<C>(padded_rows_, sizes_.panel_dim, depth, weights(0) + first.column, row_stride_,
                  packed_.at(packed_.values, tile_.b, packed_head_, first.packed), sizes_.panel_dim, output_.data,
                  sizes_.panel_dim, onto_output);
      onto_output = true;
    }
  }

  void store() {
    for (int64_t i = 0; i < tile_.rows; ++i) {
      const auto [maximum, sum] = running_[i];
      const bool seen = sum > 0.0f;
      const float* output = output_.data + i * sizes_.panel_dim;
      T* target = problem_.out.row(tile_.b, tile_.h, token(i));
      for (int64_t d = 0; d < sizes_.dim; ++d) target[d] = narrow<T>(seen ? output[d] / sum : 0.0f);
      *problem_.lse.row(tile_.b, tile_.h, token(i)) = seen ? (maximum + std::log2(sum)) * kLn2 : -INFINITY;
    }
  }

  const Problem<T>& problem_;
  const Sizes& sizes_ = problem_.sizes;
  const Plan& plan_ = problem_.plan;
  const Packed<C>& packed_;
  const int64_t pass_columns_, row_stride_ = pass_columns_ + kRowSkew;
  Scratch<C> queries_;            // [rows, panel_dim]
  Scratch<float> scores_;         // [rows, row_stride]
  Scratch<C> narrow_weights_;     // [rows, row_stride], empty where weights replace scores
  Scratch<float> output_;         // [rows, panel_dim]
  std::vector<Running> running_;  // [rows]
  std::vector<Span> spans_;
  Tile tile_;
  int64_t packed_head_, padded_rows_;
  const int32_t *next_, *end_;  // the key groups that are left
  int64_t done_;                // keys of the next of them that earlier passes took
};

// All tiles, those with the most keys first.
std::vector<Tile> fullest_first(const Sizes& sizes, const Plan& plan) {
  std::vector<Tile> tiles;
  const int64_t part = plan.queries.part(kTileRows);
  for (int64_t b = 0; b < sizes.batch; ++b)
    for (int64_t h = 0; h < sizes.heads; ++h)
      for (int64_t group = 0; group < plan.queries.groups; ++group) {
        const int64_t first = plan.queries.first(b, h, group), size = plan.queries.size(b, h, group);
        const int32_t* kept = plan.index.row(b, h, group);
        int64_t keys = 0;
        for (int64_t i = 0; i < std::min<int64_t>(*plan.count.row(b, h, group), plan.width); ++i)
          if (0 <= kept[i] && kept[i] < plan.keys.groups) keys += plan.keys.size(b, h, kept[i]);
        for (int64_t done = 0; done < size; done += part)
          tiles.push_back({b, h, group, first + done, std::min(part, size - done), keys});
      }
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.keys > b.keys; });
  return tiles;
}

template <typename T, typename C>
void run(const Problem<T>& problem) {
  Packed<C> packed(problem.sizes);
  packed.pack(problem);
  const std::vector<Tile> tiles = fullest_first(problem.sizes, problem.plan);
  std::atomic<size_t> taken{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    Worker<T, C> worker(problem, packed);
    for (size_t i; (i = taken.fetch_add(1)) < tiles.size();) worker.attend(tiles[i]);
    at::native::cpublas::brgemm_release(std::is_same_v<C, BFloat16>);
  });
}

// q, out [B, H, N, D]; k, v [B, Hkv, N, D]; index [B, H, Q, K] and count [B, H, Q] int32; orders [B, H, N] int64;
// edges [B, H, groups + 1] int32, without which groups are blocks; lengths [B] int32; lse [B, H, N]. The last dimension
// of each is contiguous.
void attend_into(const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Tensor& index, const Tensor& count, const std::optional<Tensor>& query_order,
                 const std::optional<Tensor>& query_edges, const std::optional<Tensor>& key_order,
                 const std::optional<Tensor>& key_edges, bool keys_per_head, const std::optional<Tensor>& lengths,
                 int64_t block, double scale) {
  TORCH_CHECK_VALUE(scale > 0, "scale must be positive, not ", scale);
  const int64_t tokens = q.size(2), key_groups = key_edges ? key_edges->size(2) - 1 : count.size(2);
  const Plan plan{Heads<const int32_t>(index), Heads<const int32_t>(count), index.size(3),
                  Side(query_order, query_edges, count.size(2), block, tokens),
                  Side(key_order, key_edges, key_groups, block, tokens),
                  lengths ? lengths->const_data_ptr<int32_t>() : nullptr};
  Sizes sizes{q.size(0), q.size(1), k.size(1), q.size(3)};
  sizes.packed_heads = keys_per_head ? sizes.heads : sizes.kv_heads;
  sizes.panel_dim = round_up(sizes.dim, kLanes);
  sizes.piece = round_up(plan.keys.part(kPiece), kLanes);
  sizes.columns = key_edges ? round_up(tokens, kLanes) + (key_groups + 1) * kLanes : key_groups * sizes.piece;
  sizes.rows = round_up(plan.queries.part(kTileRows), kLanes);
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
      "Tensor? query_order, Tensor? query_edges, Tensor? key_order, Tensor? key_edges, bool keys_per_head, "
      "Tensor? lengths, int block, float scale) -> ()",
      torch::dispatch(c10::DispatchKey::CPU, &attend_into));
}
