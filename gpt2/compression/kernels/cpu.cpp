// Scores and weighted sums over packed codes, for CPUs.
//
// A tile is one block's coordinates as floats, small enough for the first cache: decoded there, used by all queries,
// and gone. It lies as its codes lie: token by token [tokens][r], or channel by channel [r][tokens]. So there are two
// loops, along a tile's rows and across them, and each serves scores in one layout and weighted sums in the other.
//
//     scores         q [B, G, M, r], out [B, H, M', T]   out = q · ẑ
//     weighted_sums  p [B, H, M', T]  → [B, G, M, r]     Σ p ẑ
//
// A call is for all parts of one layer's K or V at once: pieces of blocks, exact sinks, exact tail. G groups of M rows
// are the same rows as H heads of M' queries. Fields are as the quantizers store them, each [B, G, blocks, …] with its
// last dimensions contiguous.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace {

using at::Tensor;

constexpr int kBlock = 64;    // tokens coded together
constexpr int kOctave = 8, kScaleZero = 20 * kOctave;  // a scale's byte: step = 2^(byte / 8 − 20)
constexpr int kGrain = 2;     // tiles below which a second thread costs more than it saves
constexpr int kWidths[] = {0, 2, 3, 4, 5, 6, 8, 10};

// Where a field's entry for one batch row, group and block begins
struct Field {
  const char* data;
  int64_t batch, group, block;

  explicit Field(const Tensor& t) : data(static_cast<const char*>(t.const_data_ptr())) {
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

// A byte's bits as eight bytes of 0 or 1
const std::array<uint64_t, 256> kSpread = [] {
  std::array<uint64_t, 256> spread{};
  for (int i = 0; i < 256; i++)
    for (int bit = 0; bit < 8; bit++) spread[i] |= uint64_t(i >> bit & 1) << (8 * bit);
  return spread;
}();

// Codes of four bits lie in halves: the first half of `count` in the low nibbles, the others above
inline void unpack(const uint8_t* codes, int count, int bits, float* out) {
  if (bits == 8) {
    for (int i = 0; i < count; i++) out[i] = codes[i];
    return;
  }
  const int half = (count + 1) / 2;
  for (int i = 0; i < half; i++) out[i] = codes[i] & 15;
  for (int i = half; i < count; i++) out[i] = codes[i - half] >> 4;
}

// How one part of the tokens is stored
struct Codec {
  const int r;
  const bool by_channel;  // how a tile lies

  Codec(int r, bool by_channel) : r(r), by_channel(by_channel) {}
  virtual ~Codec() = default;
  // The tile of up to 64 tokens from `first` on
  virtual void decode(int64_t b, int64_t g, int64_t first, int tokens, float* tile) const = 0;
};

// Vectors as the model made them
template <typename T>
struct Exact final : Codec {
  Field x;

  Exact(const Tensor* fields, int r) : Codec(r, false), x(fields[0]) {}

  void decode(int64_t b, int64_t g, int64_t first, int tokens, float* tile) const override {
    for (int t = 0; t < tokens; t++) {
      const T* from = x.at<T>(b, g, first + t);
      for (int c = 0; c < r; c++) tile[t * r + c] = from[c];
    }
  }
};

// A scale and an offset for every token
struct Token final : Codec {
  Field codes, scale, offset;
  int bits;

  Token(const Tensor* fields, int r, int bits)
      : Codec(r, false), codes(fields[0]), scale(fields[1]), offset(fields[2]), bits(bits) {}

  void decode(int64_t b, int64_t g, int64_t first, int tokens, float* tile) const override {
    for (int t = 0; t < tokens; t++) {
      const float s = *scale.at<at::Half>(b, g, first + t), o = *offset.at<at::Half>(b, g, first + t);
      float* row = tile + t * r;
      unpack(codes.at(b, g, first + t), r, bits, row);
      for (int c = 0; c < r; c++) row[c] = row[c] * s + o;
    }
  }
};

// A scale and an offset for every channel of a block. At four bits tokens t and t + 32 share a byte
struct Channel final : Codec {
  Field codes, scale, offset;
  int bits;

  Channel(const Tensor* fields, int r, int bits)
      : Codec(r, false), codes(fields[0]), scale(fields[1]), offset(fields[2]), bits(bits) {}

  void decode(int64_t b, int64_t g, int64_t first, int, float* tile) const override {
    const int64_t n = first / kBlock;
    const uint8_t* code = codes.at(b, g, n);
    const uint8_t* exponent = scale.at(b, g, n);
    const at::Half* origin = offset.at<at::Half>(b, g, n);
    float step[r], zero[r];
    for (int c = 0; c < r; c++) step[c] = kSteps[exponent[c]], zero[c] = origin[c];
    const int rows = kBlock * bits / 8;
    for (int t = 0; t < rows; t++, code += r) {
      float* row = tile + t * r;
      if (bits == 8) {
        for (int c = 0; c < r; c++) row[c] = code[c] * step[c] + zero[c];
      } else {
        float* later = row + rows * r;
        for (int c = 0; c < r; c++) row[c] = (code[c] & 15) * step[c] + zero[c];
        for (int c = 0; c < r; c++) later[c] = (code[c] >> 4) * step[c] + zero[c];
      }
    }
  }
};

// Every channel of a block in a width of its own, as bit planes by falling width, and the metadata behind them
struct Planes final : Codec {
  Field block, widths;

  Planes(const Tensor* fields, int r) : Codec(r, true), block(fields[0]), widths(fields[1]) {}

  void decode(int64_t b, int64_t g, int64_t first, int, float* tile) const override {
    const int64_t n = first / kBlock;
    uint8_t index[r + 8];
    indices(widths.at(b, g, n), index);
    int count[8] = {}, place[8];
    for (int c = 0; c < r; c++) count[index[c]]++;
    const uint8_t* plane = block.at(b, g, n);
    const uint8_t* metadata = plane;
    for (int k = 7, next = 0; k >= 0; k--) {
      place[k] = next;
      next += count[k], metadata += 8 * kWidths[k] * count[k];
    }
    int order[r];
    for (int c = 0; c < r; c++) order[place[index[c]]++] = c;
    for (int i = 0; i < r; i++) {
      const int bits = kWidths[index[order[i]]];
      float* row = tile + order[i] * kBlock;
      if (bits) channel(plane, bits, metadata, row);
      else std::memset(row, 0, kBlock * sizeof(float));
      plane += 8 * bits, metadata += 2;
    }
  }

  // Three planes of r bits
  void indices(const uint8_t* packed, uint8_t* index) const {
    const int bytes = (r + 7) / 8;
    for (int i = 0; i < bytes; i++) {
      uint64_t eight = kSpread[packed[i]] | kSpread[packed[bytes + i]] << 1 | kSpread[packed[2 * bytes + i]] << 2;
      std::memcpy(index + 8 * i, &eight, 8);
    }
  }

  static void channel(const uint8_t* plane, int bits, const uint8_t* metadata, float* row) {
    const float step = kSteps[metadata[0]];
    const float unit = std::max((1 << bits) / 64.f, 0.25f);
    const float zero = step * (unit * (metadata[1] - 128) - ((1 << bits) - 1) / 2.f);
    uint8_t low[kBlock], high[kBlock];
    codes(plane, std::min(bits, 8), low);
    if (bits <= 8) {
      for (int t = 0; t < kBlock; t++) row[t] = low[t] * step + zero;
      return;
    }
    codes(plane + 64, bits - 8, high);
    for (int t = 0; t < kBlock; t++) row[t] = (low[t] + 256 * high[t]) * step + zero;
  }

  static void codes(const uint8_t* plane, int bits, uint8_t* out) {
#ifdef __AVX512BW__
    // A plane is a mask over 64 bytes
    __m512i all = _mm512_setzero_si512();
    for (int j = 0; j < bits; j++) {
      uint64_t mask;
      std::memcpy(&mask, plane + 8 * j, 8);
      all = _mm512_or_si512(all, _mm512_maskz_set1_epi8(mask, char(1 << j)));
    }
    _mm512_storeu_si512(out, all);
#else
    // Eight tokens at a time: a byte of a plane becomes eight bytes of 0 or 1
    for (int i = 0; i < 8; i++) {
      uint64_t eight = 0;
      for (int j = 0; j < bits; j++) eight |= kSpread[plane[8 * j + i]] << j;
      std::memcpy(out + 8 * i, &eight, 8);
    }
#endif
  }
};

// out[m][j] += Σ_i a[m][i] tile[i][j] for R queries and 16 N columns, whose sums stay in registers
template <int R, int N>
inline void along_few(const float* a, int64_t a_row, const float* tile, int I, int J, float* out, int64_t out_row) {
  float sums[R][16 * N] = {};
  for (int i = 0; i < I; i++)
    for (int m = 0; m < R; m++) {
      const float weight = a[m * a_row + i];
      for (int j = 0; j < 16 * N; j++) sums[m][j] += weight * tile[i * J + j];
    }
  for (int m = 0; m < R; m++)
    for (int j = 0; j < 16 * N; j++) out[m * out_row + j] += sums[m][j];
}

template <int R>
void along_rows(const float* a, int64_t a_row, const float* tile, int I, int J, float* out, int64_t out_row) {
  int j = 0;
  for (; j + 64 <= J; j += 64) along_few<R, 4>(a, a_row, tile + j, I, J, out + j, out_row);
  for (; j + 16 <= J; j += 16) along_few<R, 1>(a, a_row, tile + j, I, J, out + j, out_row);
  for (; j < J; j++)
    for (int m = 0; m < R; m++)
      for (int i = 0; i < I; i++) out[m * out_row + j] += a[m * a_row + i] * tile[i * J + j];
}

void along(const float* a, int64_t a_row, const float* tile, int I, int J, int M, float* out, int64_t out_row) {
  int m = 0;
  for (; m + 4 <= M; m += 4) along_rows<4>(a + m * a_row, a_row, tile, I, J, out + m * out_row, out_row);
  if (M - m == 3) along_rows<3>(a + m * a_row, a_row, tile, I, J, out + m * out_row, out_row);
  if (M - m == 2) along_rows<2>(a + m * a_row, a_row, tile, I, J, out + m * out_row, out_row);
  if (M - m == 1) along_rows<1>(a + m * a_row, a_row, tile, I, J, out + m * out_row, out_row);
}

using Lanes = float __attribute__((vector_size(64)));

inline Lanes load(const float* from) {
  Lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// Sums of lanes that are h apart, of two vectors in one: lanes of x, then of y, in every stretch of 2h
template <int h, int... l>
inline Lanes halved(Lanes x, Lanes y, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(x, y, (l / (2 * h) * 2 * h + l % h + (l % (2 * h) < h ? 0 : 16))...) +
         __builtin_shufflevector(x, y, (l / (2 * h) * 2 * h + l % h + (l % (2 * h) < h ? 0 : 16) + h)...);
}

// The sums of sixteen vectors in one, in pairs of pairs
template <int h = 1>
inline Lanes totals(const Lanes* x) {
  if constexpr (h == 16)
    return x[0];
  else {
    Lanes half[8 / h];
    for (int i = 0; i < 8 / h; i++) half[i] = halved<h>(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, 16>());
    return totals<2 * h>(half);
  }
}

// out[m][i] += Σ_j a[m][j] tile[i][j], sixteen rows of the tile at a time
void across(const float* a, int64_t a_row, const float* tile, int I, int J, int M, float* out, int64_t out_row) {
  const int whole_i = I / 16 * 16, whole_j = J / 16 * 16;
  for (int m = 0; m < M; m++, a += a_row, out += out_row) {
    for (int i = 0; i < whole_i; i += 16) {
      Lanes sums[16] = {};
      for (int j = 0; j < whole_j; j += 16) {
        const Lanes weights = load(a + j);
        for (int k = 0; k < 16; k++) sums[k] += weights * load(tile + (i + k) * J + j);
      }
      const Lanes sum = totals(sums);
      for (int k = 0; k < 16; k++) out[i + k] += sum[k];
    }
    for (int i = 0; i < I; i++)
      for (int j = i < whole_i ? whole_j : 0; j < J; j++) out[i] += a[j] * tile[i * J + j];
  }
}

enum Kind { kExact, kToken, kChannel, kPlanes };

std::unique_ptr<Codec> codec_of(int64_t kind, const Tensor* fields, int r, int bits) {
  if (kind == kToken) return std::make_unique<Token>(fields, r, bits);
  if (kind == kChannel) return std::make_unique<Channel>(fields, r, bits);
  if (kind == kPlanes) return std::make_unique<Planes>(fields, r);
  TORCH_CHECK(kind == kExact, "no codec of kind ", kind);
  if (fields->scalar_type() == at::kHalf) return std::make_unique<Exact<at::Half>>(fields, r);
  if (fields->scalar_type() == at::kBFloat16) return std::make_unique<Exact<at::BFloat16>>(fields, r);
  return std::make_unique<Exact<float>>(fields, r);
}

// Some tokens of one layer's K or V: where they begin among all, how they are stored, and the tiles they make
struct Part {
  std::unique_ptr<Codec> codec;
  int64_t groups, start, length, skip;  // skip: of its first places, which are no tokens
};

struct Tile {
  const Part* part;
  int64_t b, g, first;
  int tokens, skip;
};

// layout: kind, bits, r, start, length and skip of every part
std::vector<Part> parts_of(at::TensorList fields, at::IntArrayRef layout) {
  constexpr int per_kind[] = {1, 3, 3, 2};
  std::vector<Part> parts;
  const Tensor* next = fields.data();
  for (const int64_t* l = layout.begin(); l < layout.end(); l += 6) {
    parts.push_back({codec_of(l[0], next, l[2], l[1]), next->size(1), l[3], l[4], l[5]});
    next += per_kind[l[0]];
  }
  return parts;
}

// Neighbours belong to the same head: a thread's share is a stretch of them
std::vector<Tile> tiles_of(const std::vector<Part>& parts, int64_t batch) {
  std::vector<Tile> tiles;
  for (const Part& part : parts)
    for (int64_t b = 0; b < batch; b++)
      for (int64_t g = 0; g < part.groups; g++)
        for (int64_t first = 0; first < part.length; first += kBlock)
          tiles.push_back({&part, b, g, first, int(std::min<int64_t>(kBlock, part.length - first)),
                           int(first ? 0 : part.skip)});
  return tiles;
}

// What the first places of a tile hold counts for nothing
void forget(float* tile, const Codec& codec, int skip) {
  if (!codec.by_channel)
    std::fill_n(tile, skip * codec.r, 0.f);
  else
    for (int c = 0; skip && c < codec.r; c++) std::fill_n(tile + c * kBlock, skip, 0.f);
}

int64_t widest(const std::vector<Part>& parts) {
  int64_t r = 0;
  for (const Part& part : parts) r = std::max<int64_t>(r, part.codec->r);
  return r;
}

void scores(at::TensorList qs, at::TensorList fields, at::IntArrayRef layout, Tensor out) {
  const auto parts = parts_of(fields, layout);
  const auto tiles = tiles_of(parts, out.size(0));
  const int64_t T = out.size(3);
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, tiles.size(), kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(kBlock * widest(parts)), sums;
    for (int64_t i = begin; i < end; i++) {
      const Tile& tile = tiles[i];
      const Codec& codec = *tile.part->codec;
      const Tensor& q = qs[tile.part - parts.data()];
      const int64_t M = q.size(2), row = (tile.b * q.size(1) + tile.g) * M;
      codec.decode(tile.b, tile.g, tile.first, tile.tokens, buffer.data());
      const float* from = q.const_data_ptr<float>() + row * codec.r;
      float* own = to + row * T + tile.part->start + tile.first;
      sums.assign(M * kBlock, 0.f);
      if (codec.by_channel)
        along(from, codec.r, buffer.data(), codec.r, kBlock, M, sums.data(), kBlock);
      else
        across(from, codec.r, buffer.data(), tile.tokens, codec.r, M, sums.data(), kBlock);
      for (int64_t m = 0; m < M; m++)
        std::copy_n(&sums[m * kBlock + tile.skip], tile.tokens - tile.skip, own + m * T + tile.skip);
    }
  });
}

// outs: which of the sums a part goes into. All parts of one sum have the same groups and rank
std::vector<Tensor> weighted_sums(
    const Tensor& p, at::TensorList fields, at::IntArrayRef layout, at::IntArrayRef outs) {
  const auto parts = parts_of(fields, layout);
  const auto tiles = tiles_of(parts, p.size(0));
  const int64_t B = p.size(0), rows = p.size(1) * p.size(2), T = p.size(3), threads = at::get_num_threads();
  std::vector<Tensor> sums;  // of each thread apart: [threads, B, G, M, r]
  for (size_t i = 0; i < parts.size(); i++) {
    const int64_t G = parts[i].groups;
    if (outs[i] == int64_t(sums.size())) sums.push_back(at::zeros({threads, B, G, rows / G, parts[i].codec->r}, p.options()));
  }
  const float* weights = p.const_data_ptr<float>();
  at::parallel_for(0, tiles.size(), kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(kBlock * widest(parts));
    for (int64_t i = begin; i < end; i++) {
      const Tile& tile = tiles[i];
      const Codec& codec = *tile.part->codec;
      Tensor& sum = sums[outs[tile.part - parts.data()]];
      const int64_t M = sum.size(3), row = (tile.b * tile.part->groups + tile.g) * M;
      codec.decode(tile.b, tile.g, tile.first, tile.tokens, buffer.data());
      forget(buffer.data(), codec, tile.skip);
      const float* from = weights + row * T + tile.part->start + tile.first;
      float* own = sum.mutable_data_ptr<float>() + at::get_thread_num() * sum.stride(0) + row * codec.r;
      if (codec.by_channel)
        across(from, T, buffer.data(), codec.r, kBlock, M, own, codec.r);
      else
        along(from, T, buffer.data(), tile.tokens, codec.r, M, own, codec.r);
    }
  });
  for (Tensor& sum : sums) sum = sum.sum(0);
  return sums;
}

}  // namespace

TORCH_LIBRARY(kv_compression, m) {
  m.def("scores(Tensor[] qs, Tensor[] fields, int[] layout, Tensor(a!) out) -> ()", &scores);
  m.def("weighted_sums(Tensor p, Tensor[] fields, int[] layout, int[] outs) -> Tensor[]", &weighted_sums);
}
