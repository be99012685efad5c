// CPU kernels over packed codes: scores and weighted sums of one layer's K or V, and encoders.
//
//     scores         q [B, G, M, r], out [B, H, M', T]   out = q · ẑ
//     weighted_sums  p [B, H, M', T]  → [B, G, M, r]     Σ p ẑ
//     attend         both and the softmax between them, for one query per head
//     panels         a basis as `attend` takes it to absorb queries itself
//
// One call handles all parts: chunks of blocks, exact sinks, exact tail. G groups of M rows are the same rows as H heads
// of M' queries. Where a block has queries of its own, q is [B, G, blocks, M, r]. Fields are the tensors that quantizers
// store, each [B, G, blocks, …] with contiguous last dimensions.

#include "attend.h"
#include "plane_encoder.h"
#include "tile_products.h"
#include "token_encoder.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace {

constexpr int kGrain = 2;  // least number of blocks that is worth a thread

void scores(at::TensorList qs, at::TensorList fields, at::IntArrayRef layout, Tensor out) {
  const auto parts = parts_of(fields, layout);
  const auto places = places_of(parts, out.size(0));
  const int64_t T = out.size(3), rows = out.size(1) * out.size(2);
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, places.size(), kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> sums;
    Scratch scratch;
    Queries queries;
    for (int64_t i = begin; i < end; i++) {
      const Place& at = places[i];
      const Codec& codec = *at.part->codec;
      const Tensor& q = qs[at.part - parts.data()];
      const int64_t M = q.size(-2);
      queries.of(*at.part, at, q);
      sums.resize(M * kBlock);
      codec.scores(at, queries.rows, queries.row, M, sums.data(), scratch);
      float* own = to + (at.b * rows + at.g * M) * T + at.part->start + at.first;
      for (int64_t m = 0; m < M; m++) {
        const float constant = at.part->affine ? queries.constant(m) : 0.f;
        for (int t = at.skip; t < at.tokens; t++) own[m * T + t] = sums[m * kBlock + t] + constant;
      }
    }
  });
}

// A block's weights p, rows of T tokens, with 0 for padding and beyond its tokens, [M][64]
void weights_of(const Place& at, const float* p, int64_t T, int64_t M, std::vector<float>& out) {
  out.assign(M * kBlock, 0.f);
  for (int64_t m = 0; m < M; m++)
    std::copy_n(p + m * T + at.skip, at.tokens - at.skip, &out[m * kBlock + at.skip]);
}

// outs: for each part the index of the sum to which it is added
std::vector<Tensor> weighted_sums(
    const Tensor& p, at::TensorList fields, at::IntArrayRef layout, at::IntArrayRef outs) {
  const auto parts = parts_of(fields, layout);
  const auto places = places_of(parts, p.size(0));
  const int64_t rows = p.size(1) * p.size(2), T = p.size(3), threads = at::get_num_threads();
  std::vector<Sum> sums;
  std::vector<std::vector<float>> apart;  // the sums of each thread, so that no two threads write to the same address
  for (size_t i = 0; i < parts.size(); i++) {
    if (outs[i] < int64_t(sums.size())) continue;
    sums.emplace_back(parts[i], p.size(0), rows, p.options());
    apart.emplace_back(threads * sums.back().out.numel(), 0.f);
  }
  const float* weights = p.const_data_ptr<float>();
  at::parallel_for(0, places.size(), kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> own;
    Scratch scratch;
    for (int64_t i = begin; i < end; i++) {
      const Place& at = places[i];
      const int64_t which = outs[at.part - parts.data()], columns = at.part->columns();
      const Tensor& out = sums[which].out;
      const int64_t M = out.size(2), row = at.b * rows + at.g * M;
      weights_of(at, weights + row * T + at.part->start + at.first, T, M, own);
      float* to = apart[which].data() + at::get_thread_num() * out.numel() + row * columns;
      at.part->codec->add_sums(at, own.data(), M, to, columns, scratch);
      for (int64_t m = 0; at.part->affine && m < M; m++)
        to[m * columns + at.part->codec->r] += sum(&own[m * kBlock], kBlock);
    }
  });
  std::vector<Tensor> out;
  for (size_t s = 0; s < sums.size(); s++) {
    const size_t size = sums[s].out.numel();
    for (size_t from = size; from < apart[s].size(); from += size)
      for (size_t i = 0; i < size; i++) apart[s][i] += apart[s][from + i];
    out.push_back(sums[s].ordered(apart[s].data()));
  }
  return out;
}

}  // namespace

TORCH_LIBRARY(kv_compression, m) {
  m.def("scores(Tensor[] qs, Tensor[] fields, int[] layout, Tensor(a!) out) -> ()", &scores);
  m.def("weighted_sums(Tensor p, Tensor[] fields, int[] layout, int[] outs) -> Tensor[]", &weighted_sums);
  m.class_<Layer>("Layer").def("attend", &attend);
  m.def("layer(int heads, Tensor[] k_fields, int[] k_layout, Tensor[] v_fields, int[] v_layout, Tensor? values, "
        "Tensor? units, Tensor? basis, Tensor? constant, Tensor? angles, bool interleaved, bool integers) "
        "-> __torch__.torch.classes.kv_compression.Layer", &layer);
  m.def("panels(Tensor read, bool integers) -> Tensor", &panels);
  m.def("encode_tokens(Tensor z, int bits) -> Tensor[]", &encode_tokens);
  m.def("encode_planes(Tensor y, int payload, float[] narrow, float[] wide) -> (Tensor, Tensor)", &encode_planes);
}
