// Pooled tail of a plan: the means of the keys and of the values of every term, packed for products with query tiles.

#pragma once

#include "plan.h"

#include <ATen/Parallel.h>

#include <vector>

namespace {

// Terms are at most ``tokens`` consecutive tokens of one key group. Columns are packed in panels of kPassColumns.
template <typename C>
struct PooledTail {
  const Sizes& sizes;
  int64_t tokens, groups;           // tokens of a term, and key groups; no tail if tokens is 0
  int64_t columns = 0;              // for the terms of a head; set while first_term is initialized
  std::vector<int64_t> first_term;  // [B, packed heads, groups + 1]
  AlignedBuffer<C> keys, values;    // [B, packed heads, columns, panel_dim] each
  AlignedBuffer<float> log_sizes;   // [B, packed heads, columns] in base 2; -inf for a term without tokens

  PooledTail(const Plan& plan, const Sizes& sizes, int64_t tokens)
      : sizes(sizes), tokens(tokens), groups(plan.keys.groups), first_term(count_terms(plan)), keys(elements()),
        values(elements()), log_sizes(sizes.batch * sizes.packed_heads * columns) {}

  int64_t elements() const { return sizes.batch * sizes.packed_heads * columns * sizes.panel_dim; }

  const int64_t* terms(int64_t b, int64_t packed_head) const {
    return first_term.data() + (b * sizes.packed_heads + packed_head) * (groups + 1);
  }

  int64_t panel_columns(int64_t panel) const { return std::min(kPassColumns, columns - panel * kPassColumns); }

  C* panel(const AlignedBuffer<C>& panels, int64_t b, int64_t packed_head, int64_t number) const {
    const int64_t column = (b * sizes.packed_heads + packed_head) * columns + number * kPassColumns;
    return panels.data + column * sizes.panel_dim;
  }

  // Writes the bias of every column for queries that keep some key groups: the logarithm of the tokens of its term, or
  // -inf for a term of a kept group.
  void bias(int64_t b, int64_t packed_head, const int32_t* kept, const int32_t* kept_end, float* bias) const {
    const float* own = log_sizes.data + (b * sizes.packed_heads + packed_head) * columns;
    const int64_t* first = terms(b, packed_head);
    std::copy(own, own + columns, bias);
    for (; kept != kept_end; ++kept) std::fill(bias + first[*kept], bias + first[*kept + 1], -INFINITY);
  }

  template <typename T>
  void pack(const Problem<T>& problem) {
    if (!tokens) return;
    at::parallel_for(0, sizes.batch * sizes.packed_heads * groups, 1, [&](int64_t begin, int64_t end) {
      AlignedBuffer<float> sums(sizes.panel_dim);
      for (int64_t i = begin; i < end; ++i)
        pack_group(problem, i / groups / sizes.packed_heads, i / groups % sizes.packed_heads, i % groups, sums.data);
    });
  }

 private:
  std::vector<int64_t> count_terms(const Plan& plan) {
    if (!tokens) return {};
    std::vector<int64_t> first;
    first.reserve(sizes.batch * sizes.packed_heads * (groups + 1));
    for (int64_t b = 0; b < sizes.batch; ++b)
      for (int64_t h = 0; h < sizes.packed_heads; ++h) {
        int64_t terms = 0;
        for (int64_t group = 0; group < groups; ++group) {
          first.push_back(terms);
          terms += (plan.keys.size(b, h, group) + tokens - 1) / tokens;
        }
        first.push_back(terms);
        columns = std::max(columns, round_up(terms, kLanes));
      }
    return first;
  }

  // Packs the terms of a group, and after those of the last group the columns that hold no term.
  template <typename T>
  void pack_group(const Problem<T>& problem, int64_t b, int64_t packed_head, int64_t group, float* sums) {
    const int64_t* first = terms(b, packed_head);
    const int64_t valid = problem.plan.valid_keys(b, packed_head, group);
    const int64_t start = problem.plan.keys.first(b, packed_head, group);
    const int64_t end = group + 1 == groups ? columns : first[group + 1];
    for (int64_t column = first[group], done = 0; column < end; ++column, done += tokens) {
      const int64_t size = std::clamp<int64_t>(valid - done, 0, tokens);
      const int64_t panel_number = column / kPassColumns, in_panel = column % kPassColumns;
      log_sizes.data[(b * sizes.packed_heads + packed_head) * columns + column] = std::log2(float(size));
      mean(problem, problem.k, b, packed_head, start + done, size, sums);
      C* target = panel(keys, b, packed_head, panel_number);
      for (int64_t d = 0; d < sizes.panel_dim; ++d)
        target[panel_offset<C>(d, in_panel, panel_columns(panel_number))] = from_float<C>(sums[d]);
      mean(problem, problem.v, b, packed_head, start + done, size, sums);
      target = panel(values, b, packed_head, panel_number);
      for (int64_t d = 0; d < sizes.panel_dim; ++d)
        target[panel_offset<C>(in_panel, d, sizes.panel_dim)] = from_float<C>(sums[d]);
    }
  }

  // Writes the mean of ``size`` tokens from a position on to sums [panel_dim]; zeros without tokens.
  template <typename T>
  void mean(const Problem<T>& problem, const StridedTensor<const T>& x, int64_t b, int64_t packed_head,
            int64_t position, int64_t size, float* sums) const {
    const int64_t head = packed_head / (sizes.packed_heads / sizes.kv_heads);
    std::fill(sums, sums + sizes.panel_dim, 0.0f);
    for (int64_t i = 0; i < size; ++i) {
      const T* row = x.row(b, head, problem.plan.keys.token(b, packed_head, position + i));
      for (int64_t d = 0; d < sizes.dim; ++d) sums[d] += to_float(row[d]);
    }
    const float factor = 1.0f / std::max<float>(size, 1.0f);
    for (int64_t d = 0; d < sizes.dim; ++d) sums[d] *= factor;
  }
};

}  // namespace
