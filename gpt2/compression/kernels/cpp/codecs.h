// How tokens are stored, and their products with queries and with attention weights, block by block.
//
// Where the length of rows allows, products take codes into registers (`code_products.h`). Elsewhere a block is decoded
// into a tile of floats, small enough for the L1 cache, which all queries then read (`tile_products.h`).
#pragma once

#include "code_products.h"
#include "tile_products.h"
#include "vectors.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <vector>

namespace {

using at::Tensor;

constexpr int kBlock = 64;    // tokens coded together
constexpr int kOctave = 8, kScaleZero = 17 * kOctave;  // a scale's byte: step = 2^(byte / 8 − 17)
constexpr int kQueries = 16;  // queries for which a block's scales are applied at a time

// Address of a field's entry for one batch row, group and block
struct Field {
  const char* data;
  int64_t batch, group, block;

  explicit Field(const Tensor& t) : data(static_cast<const char*>(t.const_data_ptr())) {
    TORCH_CHECK(t.dim() > 3 ? t.stride(-1) == 1 || t.size(-1) == 1 : true, "fields have a contiguous last dimension");
    const int64_t size = t.element_size();
    batch = t.stride(0) * size, group = t.stride(1) * size, block = t.stride(2) * size;
  }
  template <typename T = uint8_t>
  const T* at(int64_t b, int64_t g, int64_t n) const {
    return reinterpret_cast<const T*>(data + b * batch + g * group + n * block);
  }
};

const std::array<float, 256> kSteps = [] {
  std::array<float, 256> steps{};
  for (int i = 0; i < 256; i++) steps[i] = std::exp2((i - kScaleZero) / float(kOctave));
  return steps;
}();

inline float number(at::Half x) {
#if defined(__F16C__) || defined(__ARM_FEATURE_FP16_SCALAR_ARITHMETIC)
  _Float16 own;  // which one instruction converts
  std::memcpy(&own, &x, sizeof own);
  return own;
#else
  return x;
#endif
}

// Up to 64 tokens of one batch row and group, from `first` on
struct Block {
  int64_t b, g, first;
  int tokens;

  int64_t index() const { return first / kBlock; }
};

// Memory that a thread uses for one block after the other. At an address where no vector crosses cache lines, which
// halves the rate of loads and stores
class Scratch {
 public:
  const bool integers;          // whether products may be of integers, where the processor has those
  const void* holds = nullptr;  // the codes of which the memory has the tile, if any

  explicit Scratch(bool integers = false) : integers(integers) {}

  // Memory that may hold a tile from before
  float* floats(size_t count) {
    if (memory.size() < count + kAlign) holds = nullptr, memory.resize(count + kAlign);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
  // Memory whose content is overwritten
  float* fresh(size_t count) {
    holds = nullptr;
    return floats(count);
  }

 private:
  static constexpr size_t kAlign = 64 / sizeof(float);
  std::vector<float> memory;
};

// How one part of the tokens is stored
struct Codec {
  const int r;
  const bool by_token;             // whether tokens can be read from any one on, not just blocks
  std::optional<CodeOrder> order;  // of coordinates in q and in sums, if it isn't that of the basis

  Codec(int r, bool by_token) : r(r), by_token(by_token) {}
  virtual ~Codec() = default;

  // Coordinates of a block beyond which all are 0
  virtual int used(const Block& at) const { return r; }
  // out[m][t] = q[m] · ẑ of the block's token t; out has rows of 64
  virtual void scores(const Block& at, const float* q, int64_t q_row, int M, float* out, Scratch& scratch) const = 0;
  // out[m] += Σ_t p[m][t] ẑ of token t; p has rows of 64, with 0 beyond the block's tokens
  virtual void add_sums(const Block& at, const float* p, int M, float* out, int64_t out_row, Scratch& scratch) const = 0;
};

// A codec that can decode a block into a tile, token by token [tokens][r]
struct TileCodec : Codec {
  using Codec::Codec;

  virtual void decode(const Block& at, float* tile) const = 0;

  void scores(const Block& at, const float* q, int64_t q_row, int M, float* out, Scratch& scratch) const override {
    float* tile = scratch.fresh(kBlock * r);
    decode(at, tile);
    std::fill_n(out, M * kBlock, 0.f);
    across(q, q_row, tile, at.tokens, r, M, out, kBlock);
  }
  void add_sums(const Block& at, const float* p, int M, float* out, int64_t out_row, Scratch& scratch) const override {
    float* tile = scratch.fresh(kBlock * r);
    decode(at, tile);
    along(p, kBlock, tile, at.tokens, r, M, out, out_row);
  }
};

// Exact vectors, as the model computed them
template <typename T>
struct Exact final : TileCodec {
  Field x;

  // first: number of the first head that is read
  Exact(const Tensor* fields, int r, int64_t first) : TileCodec(r, true), x(fields[0]) { x.data += first * x.group; }

  void decode(const Block& at, float* tile) const override {
    for (int t = 0; t < at.tokens; t++) {
      const T* from = x.at<T>(at.b, at.g, at.first + t);
      for (int c = 0; c < r; c++) tile[t * r + c] = from[c];
    }
  }
};

// Codes with a scale and an offset for every token. With four bits the first half of the coordinates is in the low
// halves of bytes, the second half in the high ones
template <int bits>
struct Token final : TileCodec {
  using Of = Codes<bits, false>;
  Field codes, scale, offset;
  const int low;

  Token(const Tensor* fields, int r)
      : TileCodec(r, true), codes(fields[0]), scale(fields[1]), offset(fields[2]), low(bits == 8 ? r : (r + 1) / 2) {
    if (low % kUnit == 0 && r * bits == low * 8) order.emplace(r, low);
  }

  void scales(const Block& at, float* s, float* o) const {
    for (int t = 0; t < at.tokens; t++) {
      s[t] = number(*scale.at<at::Half>(at.b, at.g, at.first + t));
      o[t] = number(*offset.at<at::Half>(at.b, at.g, at.first + t));
    }
  }
  Rows rows(const Block& at) const {
    return {codes.at(at.b, at.g, at.first), codes.block, at.tokens, low, kBlock * codes.block};
  }

  void scores(const Block& at, const float* q, int64_t q_row, int M, float* out, Scratch& scratch) const override {
    if (!order) return TileCodec::scores(at, q, q_row, M, out, scratch);
    float s[kBlock], o[kBlock];
    scales(at, s, o);
    Of::dot_rows(rows(at), q, q_row, M, out, kBlock);
    for (int m = 0; m < M; m++, out += kBlock) {
      const float all = sum(q + m * q_row, r);
      for (int t = 0; t < at.tokens; t++) out[t] = out[t] * s[t] + all * o[t];
    }
  }

  void add_sums(const Block& at, const float* p, int M, float* out, int64_t out_row, Scratch& scratch) const override {
    if (!order) return TileCodec::add_sums(at, p, M, out, out_row, scratch);
    float s[kBlock] = {}, o[kBlock] = {};
    scales(at, s, o);
    float* own = scratch.fresh(kQueries * (kBlock + r));
    float* sums = own + kQueries * kBlock;
    for (int first = 0; first < M; first += kQueries) {
      const int few = std::min(kQueries, M - first);
      for (int i = 0; i < few * kBlock; i++) own[i] = p[first * kBlock + i] * s[i % kBlock];
      Of::combine_rows(rows(at), own, kBlock, few, sums, r);
      for (int m = 0; m < few; m++) {
        const float all = dot(p + (first + m) * kBlock, o, kBlock);
        float* to = out + (first + m) * out_row;
        for (int c = 0; c < r; c++) to[c] += sums[m * r + c] + all;
      }
    }
  }

  void decode(const Block& at, float* tile) const override {
    float s[kBlock], o[kBlock];
    scales(at, s, o);
    const Rows all = rows(at);
    for (int t = 0; t < at.tokens; t++) {
      const uint8_t* code = all[t];
      prefetch(code + all.next, low);
      float* row = tile + t * r;
      if (bits == 8) {
        for (int c = 0; c < r; c++) row[c] = code[c] * s[t] + o[t];
      } else {
        for (int c = 0; c < low; c++) row[c] = (code[c] & 15) * s[t] + o[t];
        for (int c = low; c < r; c++) row[c] = (code[c - low] >> 4) * s[t] + o[t];
      }
    }
  }
};

// Codes with a scale and an offset for every channel of a block. At four bits tokens t and t + 32 share a byte
template <int bits>
struct Channel final : TileCodec {
  using Of = Codes<bits, bits == 4>;
  Field codes, scale, offset;

  Channel(const Tensor* fields, int r) : TileCodec(r, false), codes(fields[0]), scale(fields[1]), offset(fields[2]) {
    if (r % kUnit == 0) order.emplace(r, r);
  }

  // Of every channel, in the order of codes
  void scales(const Block& at, float* s, float* o) const {
    const uint8_t* exponent = scale.at(at.b, at.g, at.index());
    const at::Half* origin = offset.at<at::Half>(at.b, at.g, at.index());
    prefetch(exponent + scale.block, r), prefetch(origin + offset.block / sizeof *origin, r * sizeof *origin);
    for (int c = 0; c < r; c++) {
      const int place = order ? order->place[c] : c;
      s[place] = kSteps[exponent[c]], o[place] = number(origin[c]);
    }
  }
  Rows rows(const Block& at) const {
    return {codes.at(at.b, at.g, at.index()), r, kBlock * bits / 8, r, codes.block};
  }

  void scores(const Block& at, const float* q, int64_t q_row, int M, float* out, Scratch& scratch) const override {
    if (!order) return TileCodec::scores(at, q, q_row, M, out, scratch);
    float* s = scratch.fresh((2 + kQueries) * r);
    float *o = s + r, *own = o + r;
    scales(at, s, o);
    for (int first = 0; first < M; first += kQueries) {
      const int few = std::min(kQueries, M - first);
      for (int m = 0; m < few; m++)
        for (int c = 0; c < r; c++) own[m * r + c] = q[(first + m) * q_row + c] * s[c];
      dot_codes(rows(at), own, few, out + first * kBlock, scratch);
      for (int m = first; m < first + few; m++) {
        const float all = dot(q + m * q_row, o, r);
        for (int t = 0; t < kBlock; t++) out[m * kBlock + t] += all;
      }
    }
  }

  void add_sums(const Block& at, const float* p, int M, float* out, int64_t out_row, Scratch& scratch) const override {
    if (!order) return TileCodec::add_sums(at, p, M, out, out_row, scratch);
    float* s = scratch.fresh((2 + kQueries) * r + kQueries * kBlock);
    float *o = s + r, *sums = o + r, *spare = sums + kQueries * r;
    scales(at, s, o);
    for (int first = 0; first < M; first += kQueries) {
      const int few = std::min(kQueries, M - first);
      const float* weights = combine(rows(at), p + first * kBlock, few, sums, spare, scratch);
      for (int m = 0; m < few; m++) {
        const float all = sum(weights + m * kBlock, kBlock);
        float* to = out + (first + m) * out_row;
        for (int c = 0; c < r; c++) to[c] += sums[m * r + c] * s[c] + all * o[c];
      }
    }
  }

  // Products of codes with queries that are multiplied with their scales
  void dot_codes(const Rows& rows, const float* q, int M, float* out, const Scratch& scratch) const {
#ifdef __AVX2__
    constexpr int kMostChannels = 4096;  // whose sums fit 32 bits
    if constexpr (bits == 4)
      if (scratch.integers && r <= kMostChannels) return Of::dot_integers(rows, q, r, M, out, kBlock);
#endif
    Of::dot_rows(rows, q, r, M, out, kBlock);
  }

  // Sums of codes by weights p [M][64]; returns the weights with which they were multiplied, p or `spare`
  const float* combine(const Rows& rows, const float* p, int M, float* sums, float* spare, const Scratch& scratch) const {
#ifdef __AVX2__
    if constexpr (bits == 4)
      if (scratch.integers) {
        Of::combine_integers(rows, p, kBlock, M, sums, r, spare);
        return spare;
      }
#endif
    Of::combine_rows(rows, p, kBlock, M, sums, r);
    return p;
  }

  void decode(const Block& at, float* tile) const override {
    float s[r], o[r];
    scales(at, s, o);
    const Rows all = rows(at);
    for (int t = 0; t < all.count; t++) {
      const uint8_t* code = all[t];
      prefetch(code + all.next, r);
      float* row = tile + t * r;
      if (bits == 8) {
        for (int c = 0; c < r; c++) row[c] = code[c] * s[c] + o[c];
      } else {
        float* later = row + all.count * r;
        for (int c = 0; c < r; c++) row[c] = (code[c] & 15) * s[c] + o[c];
        for (int c = 0; c < r; c++) later[c] = (code[c] >> 4) * s[c] + o[c];
      }
    }
  }
};

}  // namespace
