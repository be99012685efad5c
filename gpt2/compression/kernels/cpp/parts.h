// Parts of the tokens of a layer's K or V, and what is computed with their blocks.
#pragma once

#include "planes.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace {

enum Kind { kExact, kToken, kChannel, kPlanes };

// Heads from number `first` on of exact vectors
std::shared_ptr<const Codec> exact_codec(const Tensor& x, int64_t first) {
  const int d = x.size(3);
  if (x.scalar_type() == at::kHalf) return std::make_shared<Exact<at::Half>>(&x, d, first);
  if (x.scalar_type() == at::kBFloat16) return std::make_shared<Exact<at::BFloat16>>(&x, d, first);
  TORCH_CHECK(x.scalar_type() == at::kFloat, "no codec for vectors of ", x.scalar_type());
  return std::make_shared<Exact<float>>(&x, d, first);
}

std::shared_ptr<const Codec> codec_of(int64_t kind, const Tensor* fields, int r, int bits) {
  if (kind == kExact) return exact_codec(*fields, 0);
  if (kind == kPlanes) return std::make_shared<Planes>(fields, r);
  TORCH_CHECK(kind == kToken || kind == kChannel, "no codec of kind ", kind);
  TORCH_CHECK(bits == 4 || bits == 8, "no codec of ", bits, " bits");
  if (kind == kToken && bits == 4) return std::make_shared<Token<4>>(fields, r);
  if (kind == kToken) return std::make_shared<Token<8>>(fields, r);
  if (bits == 4) return std::make_shared<Channel<4>>(fields, r);
  return std::make_shared<Channel<8>>(fields, r);
}

// Some tokens of one layer's K or V: how they are stored, and their place among all tokens
struct Part {
  std::shared_ptr<const Codec> codec;
  int64_t groups, start, length, skip;  // skip: number of padding slots at the start
  bool affine;                          // vectors have an additional last coordinate, which is 1 for every token
  bool exact;                           // whether these are vectors as the model computed them

  int64_t columns() const { return codec->r + affine; }
};

// A block of a part, of which the first `skip` tokens are padding
struct Place : Block {
  const Part* part;
  int skip;
};

// layout: seven numbers for each part: kind, bits, r, start, length, skip, affine
std::vector<Part> parts_of(at::TensorList fields, at::IntArrayRef layout) {
  constexpr int per_kind[] = {1, 3, 3, 2};
  std::vector<Part> parts;
  const Tensor* next = fields.data();
  for (const int64_t* l = layout.begin(); l < layout.end(); l += 7) {
    parts.push_back({codec_of(l[0], next, l[2], l[1]), next->size(1), l[3], l[4], l[5], l[6] != 0, l[0] == kExact});
    next += per_kind[l[0]];
  }
  return parts;
}

// Consecutive blocks belong to the same head, and a thread gets a range of them
std::vector<Place> places_of(const std::vector<Part>& parts, int64_t batch) {
  std::vector<Place> places;
  for (const Part& part : parts)
    for (int64_t b = 0; b < batch; b++)
      for (int64_t g = 0; g < part.groups; g++)
        for (int64_t first = 0; first < part.length; first += kBlock)
          places.push_back({{b, g, first, int(std::min<int64_t>(kBlock, part.length - first))}, &part,
                            int(first ? 0 : part.skip)});
  return places;
}

// The queries of a block, in the order in which its codec wants them. Blocks that follow each other mostly share them
class Queries {
 public:
  const float* rows = nullptr;
  int64_t row = 0;  // floats from one query to the next

  // Those of a block in q [B, G, M, columns], or [B, G, blocks, M, columns] where every block has its own
  void of(const Part& part, const Block& at, const Tensor& q) {
    const int64_t frame = q.dim() == 5 ? at.index() * q.stride(2) : 0;
    const float* from = q.const_data_ptr<float>() + at.b * q.stride(0) + at.g * q.stride(1) + frame;
    if (from == last && part.codec.get() == last_codec) return;
    take(part, from, q.size(-1), q.size(-2));
    last = from, last_codec = part.codec.get();
  }

  // M queries from an address on, with so many floats from one to the next
  void take(const Part& part, const float* from, int64_t columns, int64_t M) {
    const Codec& codec = *part.codec;
    raw = rows = from, row = raw_row = columns, r = codec.r, last = nullptr;
    if (!codec.order) return;
    row = r, reordered.resize(M * row), rows = reordered.data();
    for (int64_t m = 0; m < M; m++) codec.order->to(from + m * columns, &reordered[m * row]);
  }

  // What a query's score of any token has added, where vectors have an additional last coordinate
  float constant(int64_t m) const { return raw[m * raw_row + r]; }

 private:
  const float* raw = nullptr;
  int64_t raw_row = 0, r = 0;
  std::vector<float> reordered;
  const float* last = nullptr;
  const Codec* last_codec = nullptr;
};

// A sum over some parts, of which all have the same codec, groups and rank
struct Sum {
  const Part* part;
  Tensor out;  // [B, G, M, r], or r + 1 for affine parts

  Sum(const Part& part, int64_t B, int64_t rows, const at::TensorOptions& options)
      : part(&part), out(at::empty({B, part.groups, rows / part.groups, part.columns()}, options)) {}

  // The sum, from what has the codec's order of coordinates
  Tensor ordered(const float* from) {
    const int64_t size = out.numel(), columns = part->columns();
    float* to = out.mutable_data_ptr<float>();
    std::copy_n(from, size, to);
    for (int64_t row = 0; part->codec->order && row < size; row += columns) part->codec->order->back(from + row, to + row);
    return out;
  }
};

}  // namespace
