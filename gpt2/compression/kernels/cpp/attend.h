// Attention of one query per sequence and head over all parts of a layer's K and V in one pass over their blocks.
//
// Each thread has a running maximum of every row's scores, and sums relative to it, so that nothing as long as the
// context is stored. At the end the sums of all threads are brought to a common maximum (as in FlashDecoding).
#pragma once

#include "frames.h"
#include "parts.h"

#include <ATen/ops/add.h>
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>

#include <cmath>
#include <limits>
#include <optional>

namespace {

// e^x for x up to 0; 0 where it would be denormal, and NaN for NaN. Cephes' polynomial: within 1e-7 of e^x
inline Lanes exp_of(Lanes x) {
  constexpr float kShift = 12582912;  // adding it rounds to an integer, which the lower bits then hold
  const Lanes shifted = x * 1.44269504088896f + kShift, n = shifted - kShift;
  const Lanes f = x - n * 0.693359375f + n * 2.12194440e-4f;
  Lanes y = f * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * f * f + f + 1.f;
  Ints exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  const Ints power = (exponent - 0x4B400000 + 127) << 23;
  Lanes scale;
  std::memcpy(&scale, &power, sizeof scale);
  y *= scale;
  Ints bits;
  std::memcpy(&bits, &y, sizeof bits);
  bits &= ~(x < -87.f);
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// Tokens from `position` on that lie in one block of K and in one of V, at an offset in each
struct Span {
  const Part *k, *v;
  int64_t position, k_first, v_first;
  int k_offset, v_offset, tokens;
};

// The part that holds a position. Where exact sinks take the places of a block's padding, these are the sinks
const Part* part_at(const std::vector<Part>& parts, int64_t position) {
  for (const Part& part : parts)
    if (position >= part.start + part.skip && position < part.start + part.length) return &part;
  return nullptr;
}

// Where a part's block with a position begins, and the end of it. Parts whose tokens can be read one by one have no
// blocks
std::pair<int64_t, int64_t> block_at(const Part& part, int64_t position) {
  const int64_t within = position - part.start;
  if (part.codec->by_token) return {within, std::min(within + kBlock, part.length)};
  return {within / kBlock * kBlock, std::min((within / kBlock + 1) * kBlock, part.length)};
}

// All tokens as spans. Empty if K's and V's blocks overlap in another way
std::vector<Span> spans_of(const std::vector<Part>& ks, const std::vector<Part>& vs, int64_t tokens) {
  std::vector<Span> spans;
  for (int64_t position = 0; position < tokens; position += spans.back().tokens) {
    const Part *k = part_at(ks, position), *v = part_at(vs, position);
    if (!k || !v) return {};
    const auto [k_first, k_end] = block_at(*k, position);
    const auto [v_first, v_end] = block_at(*v, position);
    const int64_t end = std::min(k->start + k_end, v->start + v_end);
    for (const auto& [part, its_end] : {std::pair(k, k_end), std::pair(v, v_end)})
      if (!part->codec->by_token && part->start + its_end != end) return {};
    spans.push_back({k, v, position, k_first, v_first, int(position - k->start - k_first),
                     int(position - v->start - v_first), int(end - position)});
  }
  return spans;
}

// What a thread has summed up: of each row the maximum of its scores, the sum of weights relative to it, and sums of ẑ
struct Running {
  std::vector<float> most, weight;
  std::vector<std::vector<float>> sums;

  Running(int64_t rows, const std::vector<Sum>& all) : most(rows, -INFINITY), weight(rows, 0.f) {
    for (const Sum& sum : all) sums.emplace_back(sum.out.numel(), 0.f);
  }

  // Make `x` the maximum of a row
  void raise(int64_t row, float x) {
    const float scale = std::exp(most[row] - x);
    most[row] = x, weight[row] *= scale;
    for (auto& sum : sums) {
      const int64_t columns = sum.size() / most.size();
      for (int64_t i = row * columns; i < (row + 1) * columns; i++) sum[i] *= scale;
    }
  }

  // Turn a row's scores of one block into weights, 0 outside of `tokens` from `offset` on
  void weigh(int64_t row, float* x, int offset, int tokens) {
    std::fill_n(x, offset, -INFINITY), std::fill(x + offset + tokens, x + kBlock, -INFINITY);
    Lanes most_lanes = load(x);
    for (int t = kLanes; t < kBlock; t += kLanes) {
      const Lanes own = load(x + t);
      most_lanes = own > most_lanes ? own : most_lanes;
    }
    float high = most_lanes[0];
    for (int lane = 1; lane < kLanes; lane++) high = std::max(high, float(most_lanes[lane]));
    if (high > most[row]) raise(row, high);
    const float from = most[row] > -INFINITY ? most[row] : 0;
    Lanes all = {};
    for (int t = 0; t < kBlock; t += kLanes) {
      const Lanes p = exp_of(load(x + t) - from);
      std::memcpy(x + t, &p, sizeof p), all += p;
    }
    weight[row] += ::total(all);
  }
};

// What decode steps of a layer share until another block is full: exact sinks and blocks, and the bases that they are
// read through. A step then hands over little, which is most of its time where few tokens are held
struct Layer final : torch::CustomClassHolder {
  std::vector<Part> ks, vs;
  int64_t heads;                        // KV heads
  std::optional<Tensor> values, units;  // as of `output`, where V is in coordinates of a basis
  std::optional<Frames> frames;         // of K's blocks, whose queries these absorb; else they are absorbed already
  bool integers;                        // whether products of codes may be of integers
  std::vector<Tensor> memory;           // in which the parts are
};

// A layer's parts as one step has them: before those that steps share, so many heads of its exact tail
std::vector<Part> with_tail(const std::vector<Part>& parts, const Tensor& tail, int64_t first_head, int64_t heads,
                            int64_t tokens) {
  std::vector<Part> all;
  all.reserve(parts.size() + 1);
  if (const int64_t length = tail.size(2))
    all.push_back({exact_codec(tail, first_head), heads, tokens - length, length, 0, false, true});
  all.insert(all.end(), parts.begin(), parts.end());
  // The last of them may have grown in its place since they were made
  if (!parts.empty()) all.back().length = tokens - tail.size(2) - all.back().start;
  return all;
}

struct Attention {
  const std::vector<Part> ks, vs;
  const Tensor exact_q, coded_q;        // what exact parts of K are compared with, and blocks
  const std::optional<Frames>& frames;  // of K's blocks, where these absorb coded_q; else it is absorbed already
  const float scaling;                  // of scores
  const int64_t B, rows;                // rows: queries of one sequence, of all heads
  std::vector<Sum> sums;                // over exact parts, if there are any, then over coded ones, if any
  int64_t units = 0;                    // ranges of heads that no group of heads crosses
  int64_t first_coded = 0;              // position of the first slot of K's blocks

  // exact_q [B, H, M, d], contiguous
  Attention(std::vector<Part> k_parts, std::vector<Part> v_parts, const Tensor& exact_q, const Tensor& coded_q,
            const std::optional<Frames>& frames, float scaling)
      : ks(std::move(k_parts)), vs(std::move(v_parts)), exact_q(exact_q), coded_q(coded_q), frames(frames),
        scaling(scaling), B(exact_q.size(0)), rows(exact_q.size(1) * exact_q.size(2)) {
    for (const auto* parts : {&ks, &vs})
      for (const Part& part : *parts) units = std::gcd(units, part.groups);
    const auto coded = std::find_if(ks.begin(), ks.end(), [](const Part& part) { return !part.exact; });
    if (coded != ks.end()) first_coded = coded->start;
    for (const Part& part : vs)
      if (size_t(sum_of(part)) == sums.size()) sums.emplace_back(part, B, rows, exact_q.options());
  }

  // Exact parts come first
  int sum_of(const Part& part) const { return !part.exact && vs[0].exact; }

  // bias: added to the scores of a sequence's tokens. ahead: spans from this one on that the thread will be given
  void run(const Span& span, int64_t b, int64_t unit, int64_t ahead, const float* bias, Running& to, Queries& queries,
           Absorbed& absorbed, std::vector<float>& weights, Scratch& scratch) const {
    const int64_t first_row = unit * (rows / units), own_rows = rows / units;
    weights.resize(own_rows * kBlock);
    score(span, b, unit, ahead, queries, absorbed, weights.data(), scratch);
    for (int64_t m = 0; m < own_rows; m++) {
      float* x = &weights[m * kBlock];
      for (int t = 0; t < kBlock; t++) x[t] *= scaling;
      for (int t = 0; bias && t < span.tokens; t++) x[span.k_offset + t] += bias[span.position + t];
      to.weigh(b * rows + first_row + m, x, span.k_offset, span.tokens);
      if (span.k_offset == span.v_offset) continue;
      std::memmove(x + span.v_offset, x + span.k_offset, span.tokens * sizeof(float));
      std::fill_n(x, span.v_offset, 0.f);
      std::fill(x + span.v_offset + span.tokens, x + kBlock, 0.f);
    }
    const int64_t out = sum_of(*span.v), groups = span.v->groups / units, M = rows / span.v->groups;
    const int64_t columns = span.v->columns();
    for (int64_t g = 0; g < groups; g++) {
      const Block at{b, unit * groups + g, span.v_first, span.v_offset + span.tokens};
      float* sum = &to.sums[out][(b * rows + at.g * M) * columns];
      span.v->codec->add_sums(at, &weights[g * M * kBlock], M, sum, columns, scratch);
      for (int64_t m = 0; span.v->affine && m < M; m++)
        sum[m * columns + span.v->codec->r] += ::sum(&weights[(g * M + m) * kBlock], kBlock);
    }
  }

  // Scores of a span's block of K, for the queries of one unit
  void score(const Span& span, int64_t b, int64_t unit, int64_t ahead, Queries& queries, Absorbed& absorbed, float* out,
             Scratch& scratch) const {
    const int64_t groups = span.k->groups / units, M = rows / span.k->groups;
    const Tensor& q = span.k->exact ? exact_q : coded_q;
    for (int64_t g = 0; g < groups; g++, out += M * kBlock) {
      const Block at{b, unit * groups + g, span.k_first, span.k_offset + span.tokens};
      if (frames && !span.k->exact) {
        const auto used = [&](int& count) { return used_ahead(&span, ahead, b, at.g, count); };
        const int r = span.k->codec->r;
        queries.take(*span.k, absorbed.of(*frames, q, b, at.g, frame_of(span), r, used), frames->columns(), M);
      } else {
        queries.of(*span.k, at, q);
      }
      span.k->codec->scores(at, queries.rows, queries.row, M, out, scratch);
      for (int64_t m = 0; span.k->affine && m < M; m++)
        for (int t = 0; t < kBlock; t++) out[m * kBlock + t] += queries.constant(m);
    }
  }

  int64_t frame_of(const Span& span) const { return (span.k->start - first_coded + span.k_first) / kBlock; }

  // How many coordinates have codes in any of the frames that begin at `span`: of `count` at most, and of those only
  // that are among the next `ahead` spans, to which number `count` is reduced
  int used_ahead(const Span* span, int64_t ahead, int64_t b, int64_t g, int& count) const {
    const int64_t first = frame_of(*span), end = first + count;
    int used = 0;
    count = 0;
    for (const Span* last = span + ahead; span < last && !span->k->exact && frame_of(*span) < end; span++) {
      used = std::max(used, span->k->codec->used({b, g, span->k_first, kBlock}));
      count = frame_of(*span) - first + 1;
    }
    return used;
  }

  // The sums of all threads, divided by all weights. sinks: a logit for each of `heads` that takes weight of its own
  std::vector<Tensor> total(std::vector<Running>& threads, const float* sinks, int64_t heads) {
    for (int64_t row = 0; row < B * rows; row++) {
      const float sink = sinks ? sinks[row % rows / (rows / heads)] : -INFINITY;
      float most = sink, weight = 0;
      for (const Running& own : threads) most = std::max(most, own.most[row]);
      for (Running& own : threads) own.raise(row, most), weight += own.weight[row];
      if (sinks) weight += std::exp(sink - most);
      for (Running& own : threads)
        for (auto& sum : own.sums) {
          const int64_t columns = sum.size() / (B * rows);
          for (int64_t i = row * columns; i < (row + 1) * columns; i++) sum[i] /= weight;
        }
    }
    std::vector<Tensor> out;
    for (size_t s = 0; s < sums.size(); s++) {
      std::vector<float>& all = threads[0].sums[s];
      for (size_t thread = 1; thread < threads.size(); thread++)
        for (size_t i = 0; i < all.size(); i++) all[i] += threads[thread].sums[s][i];
      out.push_back(sums[s].ordered(all.data()));
    }
    return out;
  }
};

// Σ p v̂ [B, H, M, d] of sums over exact tokens, if there are any, and then over coded ones, if any. values: the basis of
// what is coded, [G, h, r + 1, d], or one for all groups; the heads of a group are contiguous. It is of floats, or of
// integer multiples of `units` [G, h, r + 1]
Tensor output(const std::vector<Tensor>& sums, const std::optional<Tensor>& values, const std::optional<Tensor>& units) {
  if (!values) return sums.size() > 1 ? at::add(sums[0], sums[1]) : sums[0];
  const Tensor& y = sums.back();  // [B, G, h · M, r + 1]
  const int64_t B = y.size(0), G = y.size(1), h = values->size(1), rank = y.size(3), d = values->size(3);
  const int64_t M = y.size(2) / h, own_groups = values->size(0) > 1;
  const Tensor out = sums.size() > 1 ? sums[0] : at::zeros({B, G * h, M, d}, y.options());
  const float* from = y.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  std::vector<float> scaled(units ? M * rank : 0);
  for (int64_t b = 0; b < B; b++)
    for (int64_t g = 0; g < G; g++)
      for (int64_t head = 0; head < h; head++, from += M * rank, to += M * d) {
        const int64_t place = own_groups * g * values->stride(0) + head * rank * d;
        if (!units) {
          along(from, rank, values->const_data_ptr<float>() + place, rank, d, M, to, d);
          continue;
        }
        const float* unit = units->const_data_ptr<float>() + (own_groups * g * h + head) * rank;
        for (int64_t i = 0; i < M * rank; i++) scaled[i] = from[i] * unit[i % rank];
        along(scaled.data(), rank, values->const_data_ptr<int16_t>() + place, rank, d, M, to, d);
      }
  return out;
}

// A layer of `heads` KV heads, with the parts that decode steps share. values and units: as of `output`. basis, constant,
// angles and interleaved: as of `Frames`, where every block of K has queries of its own, which are absorbed here
c10::intrusive_ptr<Layer> layer(int64_t heads, at::TensorList k_fields, at::IntArrayRef k_layout, at::TensorList v_fields,
                                at::IntArrayRef v_layout, const std::optional<Tensor>& values,
                                const std::optional<Tensor>& units, const std::optional<Tensor>& basis,
                                const std::optional<Tensor>& constant, const std::optional<Tensor>& angles,
                                bool interleaved, bool integers) {
  auto own = c10::make_intrusive<Layer>();
  own->ks = parts_of(k_fields, k_layout), own->vs = parts_of(v_fields, v_layout);
  own->heads = heads, own->values = values, own->units = units, own->integers = integers;
  if (basis) own->frames.emplace(Frames{*basis, *constant, *angles, interleaved});  // with braces for C++17, as PyTorch 2.11 has it
  for (const auto fields : {k_fields, v_fields}) own->memory.insert(own->memory.end(), fields.begin(), fields.end());
  return own;
}

// query [B, Hq, 1, d], of any dtype. absorbed: as K's blocks are read with it, [B, G, M, r + 1], unless that is the query
// itself, or frames absorb it. tails: of K and of V, or of both, K's heads first. bias [B, T]: added to scores. sinks: a
// logit for each query head. Returns one tensor [B, Hq, 1, d], or none if K's and V's blocks overlap in a way that one
// pass can't follow
std::vector<Tensor> attend(const c10::intrusive_ptr<Layer>& layer, const Tensor& query,
                           const std::optional<Tensor>& absorbed, at::TensorList tails, int64_t tokens, double scaling,
                           const std::optional<Tensor>& bias, const std::optional<Tensor>& sinks) {
  const int64_t heads = layer->heads, v_first = tails.size() == 1 ? heads : 0;
  const Tensor q = query.to(at::kFloat).contiguous().view({query.size(0), heads, -1, query.size(3)});
  Attention attention(with_tail(layer->ks, tails.front(), 0, heads, tokens),
                      with_tail(layer->vs, tails.back(), v_first, heads, tokens), q, absorbed ? *absorbed : q,
                      layer->frames, scaling);
  const auto spans = spans_of(attention.ks, attention.vs, tokens);
  if (spans.empty()) return {};
  const int64_t count = spans.size(), B = attention.B, units = attention.units;
  const float* added = bias ? bias->const_data_ptr<float>() : nullptr;
  // Allocated by one thread: where each allocated its own, which this one frees, steps took up to a third longer
  std::vector<Running> threads(at::get_num_threads(), Running(B * attention.rows, attention.sums));
  at::parallel_for(0, B * units * count, 2, [&](int64_t begin, int64_t end) {
    Running& own = threads[at::get_thread_num()];
    Queries queries;
    Absorbed absorbed_ahead;
    std::vector<float> weights;
    Scratch scratch(layer->integers);
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / (units * count), ahead = std::min(end - i, count - i % count);
      attention.run(spans[i % count], b, i / count % units, ahead, added ? added + b * tokens : nullptr, own, queries,
                    absorbed_ahead, weights, scratch);
    }
  });
  const auto sums =
      attention.total(threads, sinks ? sinks->const_data_ptr<float>() : nullptr, sinks ? sinks->numel() : 1);
  const Tensor found = output(sums, layer->values, layer->units);
  return {found.view({B, query.size(1), 1, found.size(3)}).to(query.scalar_type())};
}

}  // namespace
