// The plan and the tensors of a call, as the CPU kernel reads them.

#pragma once

#include "tiles.h"

#include <optional>

namespace {

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

}  // namespace
