// CPU kernels: scores and weighted sums over packed codes, and the encoder of bit planes.
//
// A tile holds one block's coordinates as floats. It is small enough for the L1 cache: a block is decoded into it, used
// by all queries, and overwritten by the next. It has the layout of its codes: token by token [tokens][r], or channel
// by channel [r][tokens]. So there are two loops, `along` a tile's rows and `across` them, and each serves scores in
// one layout and weighted sums in the other.
//
//     scores         q [B, G, M, r], out [B, H, M', T]   out = q · ẑ
//     weighted_sums  p [B, H, M', T]  → [B, G, M, r]     Σ p ẑ
//
// One call handles all parts of one layer's K or V: chunks of blocks, exact sinks, exact tail. G groups of M rows are
// the same rows as H heads of M' queries. Fields are the tensors that quantizers store, each [B, G, blocks, …] with
// contiguous last dimensions.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using at::Tensor;

constexpr int kBlock = 64;    // tokens coded together
constexpr int kOctave = 8, kScaleZero = 17 * kOctave;  // a scale's byte: step = 2^(byte / 8 − 17)
constexpr int kGrain = 2;     // least number of tiles that is worth a thread
constexpr int kWidths[] = {0, 2, 3, 4, 5, 6, 8, 10};

// The vectors of an instruction set, and tiles of sums that fit its registers beside their operands. A tile that doesn't
// fit spills in the innermost loop, which costs a multiple of the time: so a new set needs figures of its own.
// Vectors wider than the registers compile too, but to code that goes through memory
struct InstructionSet {
  int bytes;     // of a vector
  int sums;      // `along`: vectors of sums of all queries, of which there are up to six
  int widest;    // `along`: most vectors of sums per query
  int together;  // `across`: queries at a time
};

#if defined(__AVX512F__)
constexpr InstructionSet kSet = {64, 24, 4, 1};  // 32 registers
#elif defined(__AVX2__)
constexpr InstructionSet kSet = {32, 12, 8, 1};  // 16 registers
#elif defined(__ARM_NEON)
constexpr InstructionSet kSet = {16, 24, 8, 4};  // 32 registers
#else
constexpr InstructionSet kSet = {16, 12, 8, 2};  // 16 registers; without a fused multiply-add, products need one too
#endif

constexpr int kLanes = kSet.bytes / sizeof(float);
using Lanes = float __attribute__((vector_size(kSet.bytes)));

inline Lanes load(const float* from) {
  Lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void add(float* to, Lanes x) {
  x += load(to);
  std::memcpy(to, &x, sizeof x);
}

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

// Prefetch what is needed soon; prefetching past the end is harmless. A processor has few dozens of lines on their way,
// and waits if it shall prefetch more: so each step of a loop prefetches what the same step needs for the next tile
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

const std::array<float, 256> kSteps = [] {
  std::array<float, 256> steps{};
  for (int i = 0; i < 256; i++) steps[i] = std::exp2((i - kScaleZero) / float(kOctave));
  return steps;
}();

// The bits of a byte as eight bytes of 0 or 1
const std::array<uint64_t, 256> kSpread = [] {
  std::array<uint64_t, 256> spread{};
  for (int i = 0; i < 256; i++)
    for (int bit = 0; bit < 8; bit++) spread[i] |= uint64_t(i >> bit & 1) << (8 * bit);
  return spread;
}();

// How one part of the tokens is stored
struct Codec {
  const int r;
  const bool by_channel;  // layout of a tile

  Codec(int r, bool by_channel) : r(r), by_channel(by_channel) {}
  virtual ~Codec() = default;
  // Decode the tile of up to 64 tokens from `first` on
  virtual void decode(int64_t b, int64_t g, int64_t first, int tokens, float* tile) const = 0;
};

// Exact vectors, as the model computed them
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

// Codes with a scale and an offset for every token
struct Token final : Codec {
  Field codes, scale, offset;
  int bits;

  Token(const Tensor* fields, int r, int bits)
      : Codec(r, false), codes(fields[0]), scale(fields[1]), offset(fields[2]), bits(bits) {}

  void decode(int64_t b, int64_t g, int64_t first, int tokens, float* tile) const override {
    // With four bits the first half of the coordinates is in the low nibbles, the second half in the high nibbles
    const int low = (r + 1) / 2, high = r - low;
    for (int t = 0; t < tokens; t++) {
      const float s = *scale.at<at::Half>(b, g, first + t), o = *offset.at<at::Half>(b, g, first + t);
      const uint8_t* code = codes.at(b, g, first + t);
      prefetch(code + kBlock * codes.block, codes.block);
      float* row = tile + t * r;
      if (bits == 8) {
        for (int c = 0; c < r; c++) row[c] = code[c] * s + o;
      } else {
        for (int c = 0; c < low; c++) row[c] = (code[c] & 15) * s + o;
        for (int c = 0; c < high; c++) row[low + c] = (code[c] >> 4) * s + o;
      }
    }
  }
};

// Codes with a scale and an offset for every channel of a block. At four bits tokens t and t + 32 share a byte
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
    prefetch(exponent + scale.block, r), prefetch(origin + offset.block / sizeof *origin, r * sizeof *origin);
    alignas(64) float step[r], zero[r];
    for (int c = 0; c < r; c++) step[c] = kSteps[exponent[c]], zero[c] = origin[c];
    const int rows = kBlock * bits / 8;
    for (int t = 0; t < rows; t++, code += r) {
      prefetch(code + codes.block, r);
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

// Blocks whose channels have different widths: bit planes, sorted by falling width, followed by the metadata
struct Planes final : Codec {
  Field block, widths;

  Planes(const Tensor* fields, int r) : Codec(r, true), block(fields[0]), widths(fields[1]) {}

  void decode(int64_t b, int64_t g, int64_t first, int, float* tile) const override {
    const int64_t n = first / kBlock;
    uint8_t index[r + 8];
    indices(widths.at(b, g, n), index);
    int count[8] = {}, place[8];
    for (int c = 0; c < r; c += kBlock) {
      const uint64_t some = counts(index + c, std::min(kBlock, r - c));
      for (int k = 0; k < 8; k++) count[k] += some >> 8 * k & 255;
    }
    const uint8_t* plane = block.at(b, g, n);
    const uint8_t* metadata = plane;
    for (int k = 7, next = 0; k >= 0; k--) {
      place[k] = next;
      next += count[k], metadata += 8 * kWidths[k] * count[k];
    }
    int order[r];
    for (int first = 0; first < r; first += kBlock) {
      const int end = std::min(first + kBlock, r);
      uint64_t before = 0;
      for (int c = first; c < end; c++) {
        order[place[index[c]] + (before >> 8 * index[c] & 255)] = c;
        before += uint64_t(1) << 8 * index[c];
      }
      for (int k = 0; k < 8; k++) place[k] += before >> 8 * k & 255;
    }
    const int coded = r - count[0];
    float offset[r];
    const bool far = any_far(metadata, coded);
    if (far) offsets(metadata, index, order, coded, offset);
    Run run{plane, metadata, order, far ? offset : nullptr, block.block, tile};
    run.channels<7>(count), run.channels<6>(count), run.channels<5>(count), run.channels<4>(count);
    run.channels<3>(count), run.channels<2>(count), run.channels<1>(count), run.channels<0>(count);
  }

  // How many of up to 64 channels have each width index, a byte for each. In a register, as counting in memory would
  // wait for the last channel's count to be written before it is read
  static uint64_t counts(const uint8_t* index, int channels) {
    uint64_t all = 0;
    for (int c = 0; c < channels; c++) all += uint64_t(1) << 8 * index[c];
    return all;
  }

  // Where decoding has arrived. Channels of one width follow each other, so each width has code of its own
  struct Run {
    const uint8_t *plane, *metadata;
    const int* order;
    const float* offset;  // if any is far
    int64_t next;         // bytes to the next block
    float* tile;

    template <int k>
    void channels(const int* count) {
      constexpr int bits = kWidths[k];
      for (int i = 0; i < count[k]; i++, order++) {
        float* row = tile + *order * kBlock;
        if constexpr (bits == 0) {
          std::memset(row, 0, kBlock * sizeof(float));
        } else {
          prefetch(plane + next, 8 * bits);
          channel<bits>(plane, kSteps[*metadata], offset ? offset[*order] : metadata[1] - 128, row);
          plane += 8 * bits, metadata += 2;
        }
      }
    }
  };

  // Width index of every channel, from three bit planes of r bits
  void indices(const uint8_t* packed, uint8_t* index) const {
    const int bytes = (r + 7) / 8;
    for (int i = 0; i < bytes; i++) {
      uint64_t eight = kSpread[packed[i]] | kSpread[packed[bytes + i]] << 1 | kSpread[packed[2 * bytes + i]] << 2;
      std::memcpy(index + 8 * i, &eight, 8);
    }
  }

  static bool any_far(const uint8_t* metadata, int coded) {
    uint8_t least = 255;
    for (int i = 0; i < coded; i++) least = std::min(least, metadata[2 * i + 1]);
    return !least;
  }

  // The offset of every channel that has codes. Far offsets, marked by a byte of 0, follow all metadata in the order of
  // the channels
  void offsets(const uint8_t* metadata, const uint8_t* index, const int* order, int coded, float* offset) const {
    for (int i = 0; i < coded; i++) offset[order[i]] = metadata[2 * i + 1] - 128;
    const uint8_t* next = metadata + 2 * coded;
    for (int c = 0; c < r; c++) {
      if (!index[c] || offset[c] != -128) continue;
      int16_t own;
      std::memcpy(&own, next, sizeof own);
      offset[c] = own, next += sizeof own;
    }
  }

  template <int bits>
  static void channel(const uint8_t* plane, float step, float offset, float* row) {
    constexpr float unit = std::max((1 << bits) / 64.f, 0.25f);
    [[maybe_unused]] constexpr int low = std::min(bits, 8);  // planes of the lower byte
    const float zero = step * (unit * offset - ((1 << bits) - 1) / 2.f);
#ifdef __AVX512BW__
    // A plane is used as a mask over the 64 codes
    const __m512i lower = codes<low>(plane), upper = codes<bits - low>(plane + 64);
    spread<0, bits>(lower, upper, step, zero, row);
    spread<1, bits>(lower, upper, step, zero, row);
    spread<2, bits>(lower, upper, step, zero, row);
    spread<3, bits>(lower, upper, step, zero, row);
  }

  template <int bits>
  static __m512i codes(const uint8_t* plane) {
    __m512i all = _mm512_setzero_si512();
    for (int j = 0; j < bits; j++) {
      uint64_t mask;
      std::memcpy(&mask, plane + 8 * j, 8);
      all = _mm512_or_si512(all, _mm512_maskz_set1_epi8(mask, char(1 << j)));
    }
    return all;
  }

  // The i-th 16 of the 64 codes as coordinates
  template <int i, int bits>
  static void spread(__m512i lower, __m512i upper, float step, float zero, float* row) {
    __m512i code = _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(lower, i));
    if (bits > 8)
      code = _mm512_or_si512(
          code, _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(upper, i)), 8));
    const __m512 x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(step), _mm512_set1_ps(zero));
    _mm512_storeu_ps(row + 16 * i, x);
  }
#elif defined(__AVX2__)
    // Eight tokens in lanes of 32 bits, each with a byte of four planes, of which a lane keeps its own token's bits.
    // Multiply-adds of bytes and of pairs make one number of them, token t's times 2^t, which its step undoes
    constexpr int groups = (bits + 3) / 4;
    const __m256i own = _mm256_setr_epi32(
        0x01010101, 0x02020202, 0x04040404, 0x08080808, 0x10101010, 0x20202020, 0x40404040, int(0x80808080));
    const __m256i weights = _mm256_set1_epi32(0x08040201);
    const __m256 steps = step * __m256{1, 1 / 2.f, 1 / 4.f, 1 / 8.f, 1 / 16.f, 1 / 32.f, 1 / 64.f, 1 / 128.f};
    uint32_t fours[3][8];
    interleave<std::min(bits, 4)>(plane, fours[0]);
    if constexpr (bits > 4) interleave<std::min(bits - 4, 4)>(plane + 32, fours[1]);
    if constexpr (bits > 8) interleave<bits - 8>(plane + 64, fours[2]);
    for (int i = 0; i < 8; i++) {
      __m256i code = _mm256_setzero_si256();
      for (int group = 0; group < groups; group++) {
        const __m256i set = _mm256_and_si256(_mm256_set1_epi32(fours[group][i]), own);
        const __m256i part = _mm256_madd_epi16(
            _mm256_maddubs_epi16(set, weights), _mm256_set1_epi16(1 << 4 * group));
        code = _mm256_add_epi32(code, part);
      }
      _mm256_storeu_ps(row + 8 * i, _mm256_cvtepi32_ps(code) * steps + zero);
    }
  }

  // The i-th bytes of up to four planes as number i
  template <int planes>
  static void interleave(const uint8_t* plane, uint32_t* out) {
    const __m128i pairs = _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    const auto two = [&](int from) {
      const auto* address = reinterpret_cast<const __m128i*>(plane + 8 * from);
      const __m128i both = from + 1 < planes ? _mm_loadu_si128(address)
                           : from < planes   ? _mm_loadl_epi64(address)
                                             : _mm_setzero_si128();
      return _mm_shuffle_epi8(both, pairs);
    };
    const __m128i lower = two(0), upper = two(2);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi16(lower, upper));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4), _mm_unpackhi_epi16(lower, upper));
  }
#else
    uint8_t lower[kBlock], upper[kBlock];
    codes<low>(plane, lower);
    if constexpr (bits <= 8) {
      for (int t = 0; t < kBlock; t++) row[t] = lower[t] * step + zero;
    } else {
      codes<bits - low>(plane + 64, upper);
      for (int t = 0; t < kBlock; t++) row[t] = (lower[t] + 256 * upper[t]) * step + zero;
    }
  }

  // Codes of 16 tokens at a time: each byte of a plane is spread to eight bytes of 0 or 1
  template <int bits>
  static void codes(const uint8_t* plane, uint8_t* out) {
    using Bytes = uint8_t __attribute__((vector_size(16)));
    using Words = uint64_t __attribute__((vector_size(16)));
    for (int i = 0; i < kBlock / 8; i += 2) {
      Bytes all = {};
      for (int j = bits - 1; j >= 0; j--)
        all = all + all + Bytes(Words{kSpread[plane[8 * j + i]], kSpread[plane[8 * j + i + 1]]});
      std::memcpy(out + 8 * i, &all, sizeof all);
    }
  }
#endif
};

// out[m][j] += Σ_i a[m][i] tile[i][j] for R queries and N vectors of columns; the sums stay in registers
template <int R, int N>
inline void along_few(const float* a, int64_t a_row, const float* tile, int I, int J, float* out, int64_t out_row) {
  Lanes sums[R][N] = {};
  for (int i = 0; i < I; i++) {
    Lanes line[N];
    for (int n = 0; n < N; n++) line[n] = load(tile + i * J + kLanes * n);
    for (int m = 0; m < R; m++)
      for (int n = 0; n < N; n++) sums[m][n] += a[m * a_row + i] * line[n];
  }
  for (int m = 0; m < R; m++)
    for (int n = 0; n < N; n++) add(out + m * out_row + kLanes * n, sums[m][n]);
}

// The largest power of two up to n: the columns of most tiles are a multiple of such widths
constexpr int power_up_to(int n) { return n < 2 ? 1 : 2 * power_up_to(n / 2); }

template <int R, int N = power_up_to(std::min(kSet.widest, kSet.sums / R))>
void along_rows(
    const float* a, int64_t a_row, const float* tile, int I, int J, float* out, int64_t out_row, int j = 0) {
  for (; j + N * kLanes <= J; j += N * kLanes) along_few<R, N>(a, a_row, tile + j, I, J, out + j, out_row);
  if constexpr (N > 1)
    along_rows<R, N / 2>(a, a_row, tile, I, J, out, out_row, j);
  else
    for (; j < J; j++)
      for (int m = 0; m < R; m++)
        for (int i = 0; i < I; i++) out[m * out_row + j] += a[m * a_row + i] * tile[i * J + j];
}

// As many queries at a time as fit into registers, in passes of about equal size
void along(const float* a, int64_t a_row, const float* tile, int I, int J, int M, float* out, int64_t out_row) {
  for (int passes = (M + 5) / 6; passes > 0; passes--) {
    const int rows = (M + passes - 1) / passes;
    const auto run = rows == 6   ? along_rows<6>
                     : rows == 5 ? along_rows<5>
                     : rows == 4 ? along_rows<4>
                     : rows == 3 ? along_rows<3>
                     : rows == 2 ? along_rows<2>
                                 : along_rows<1>;
    run(a, a_row, tile, I, J, out, out_row, 0);
    M -= rows, a += rows * a_row, out += rows * out_row;
  }
}

// Add lanes that are h apart, and combine two vectors into one: every 2h lanes have h sums of x, then h sums of y
template <int h, int... l>
inline Lanes halved(Lanes x, Lanes y, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(x, y, (l / (2 * h) * 2 * h + l % h + (l % (2 * h) < h ? 0 : kLanes))...) +
         __builtin_shufflevector(x, y, (l / (2 * h) * 2 * h + l % h + (l % (2 * h) < h ? 0 : kLanes) + h)...);
}

// One vector whose lanes are the sums of as many vectors, by a tree of pairwise sums
template <int h = 1>
inline Lanes totals(const Lanes* x) {
  if constexpr (h == kLanes)
    return x[0];
  else {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
    Lanes half[kLanes / 2 / h];
    for (int i = 0; i < kLanes / 2 / h; i++) half[i] = halved<h>(x[2 * i], x[2 * i + 1], lanes);
    return totals<2 * h>(half);
  }
}

// out[m][i] += Σ_j a[m][j] tile[i][j] for R queries and as many rows of the tile as a vector has lanes
template <int R>
inline void across_few(
    const float* a, int64_t a_row, const float* tile, int J, int whole_j, float* out, int64_t out_row) {
  Lanes sums[R][kLanes] = {};
  for (int j = 0; j < whole_j; j += kLanes) {
    Lanes weights[R];
    for (int m = 0; m < R; m++) weights[m] = load(a + m * a_row + j);
    for (int k = 0; k < kLanes; k++) {
      const Lanes line = load(tile + k * J + j);
      for (int m = 0; m < R; m++) sums[m][k] += weights[m] * line;
    }
  }
  for (int m = 0; m < R; m++) add(out + m * out_row, totals(sums[m]));
}

// out[m][i] += Σ_j a[m][j] tile[i][j]. fixed: J as a compile-time constant, so that the compiler knows the address of
// each row; 0 if it isn't known
template <int fixed>
void across_rows(const float* a, int64_t a_row, const float* tile, int I, int J, int M, float* out, int64_t out_row) {
  if (fixed) J = fixed;
  constexpr int R = kSet.together;
  const int whole_i = I / kLanes * kLanes, whole_j = J / kLanes * kLanes;
  for (int i = 0; i < whole_i; i += kLanes) {
    int m = 0;
    for (; m + R <= M; m += R)
      across_few<R>(a + m * a_row, a_row, tile + i * J, J, whole_j, out + m * out_row + i, out_row);
    for (; m < M; m++) across_few<1>(a + m * a_row, a_row, tile + i * J, J, whole_j, out + m * out_row + i, out_row);
  }
  // What is left: the last columns of these rows, and the last rows
  const auto rest = [=](int from_i, int to_i, int from_j) {
    for (int m = 0; m < M; m++)
      for (int i = from_i; i < to_i; i++)
        for (int j = from_j; j < J; j++) out[m * out_row + i] += a[m * a_row + j] * tile[i * J + j];
  };
  if (whole_j < J) rest(0, whole_i, whole_j);
  if (whole_i < I) rest(whole_i, I, 0);
}

void across(const float* a, int64_t a_row, const float* tile, int I, int J, int M, float* out, int64_t out_row) {
  const auto run = J == 64 ? across_rows<64> : J == 128 ? across_rows<128> : across_rows<0>;
  run(a, a_row, tile, I, J, M, out, out_row);
}

enum Kind { kExact, kToken, kChannel, kPlanes };

std::unique_ptr<Codec> codec_of(int64_t kind, const Tensor* fields, int r, int bits) {
  if (kind == kToken) return std::make_unique<Token>(fields, r, bits);
  if (kind == kChannel) return std::make_unique<Channel>(fields, r, bits);
  if (kind == kPlanes) return std::make_unique<Planes>(fields, r);
  TORCH_CHECK(kind == kExact, "no codec of kind ", kind);
  if (fields->scalar_type() == at::kHalf) return std::make_unique<Exact<at::Half>>(fields, r);
  if (fields->scalar_type() == at::kBFloat16) return std::make_unique<Exact<at::BFloat16>>(fields, r);
  TORCH_CHECK(fields->scalar_type() == at::kFloat, "no codec for vectors of ", fields->scalar_type());
  return std::make_unique<Exact<float>>(fields, r);
}

// Some tokens of one layer's K or V: how they are stored, and their place among all tokens
struct Part {
  std::unique_ptr<Codec> codec;
  int64_t groups, start, length, skip;  // skip: number of padding slots at the start
  bool affine;                          // vectors have an additional last coordinate, which is 1 for every token

  int64_t columns() const { return codec->r + affine; }
};

struct Tile {
  const Part* part;
  int64_t b, g, first;
  int tokens, skip;
};

// layout: seven numbers for each part: kind, bits, r, start, length, skip, affine
std::vector<Part> parts_of(at::TensorList fields, at::IntArrayRef layout) {
  constexpr int per_kind[] = {1, 3, 3, 2};
  std::vector<Part> parts;
  const Tensor* next = fields.data();
  for (const int64_t* l = layout.begin(); l < layout.end(); l += 7) {
    parts.push_back({codec_of(l[0], next, l[2], l[1]), next->size(1), l[3], l[4], l[5], l[6] != 0});
    next += per_kind[l[0]];
  }
  return parts;
}

// Consecutive tiles belong to the same head, and a thread gets a range of them
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

// Set the padding slots of a tile to 0
void clear_padding(float* tile, const Codec& codec, int skip) {
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

// A tile of rank r. At an address where no vector crosses cache lines, which halves the rate of loads and stores
struct TileBuffer {
  std::vector<float> memory;
  float* tile;

  explicit TileBuffer(int64_t r) : memory(kBlock * r + 64 / sizeof(float)) {
    tile = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
  TileBuffer(const TileBuffer&) = delete;
};

void scores(at::TensorList qs, at::TensorList fields, at::IntArrayRef layout, Tensor out) {
  const auto parts = parts_of(fields, layout);
  const auto tiles = tiles_of(parts, out.size(0));
  const int64_t T = out.size(3);
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, tiles.size(), kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> sums;
    const TileBuffer buffer(widest(parts));
    for (int64_t i = begin; i < end; i++) {
      const Tile& tile = tiles[i];
      const Codec& codec = *tile.part->codec;
      const Tensor& q = qs[tile.part - parts.data()];
      const int64_t M = q.size(2), row = (tile.b * q.size(1) + tile.g) * M;
      codec.decode(tile.b, tile.g, tile.first, tile.tokens, buffer.tile);
      const int64_t columns = tile.part->columns();
      const float* from = q.const_data_ptr<float>() + row * columns;
      float* own = to + row * T + tile.part->start + tile.first;
      sums.resize(M * kBlock);
      for (int64_t m = 0; m < M; m++)
        std::fill_n(&sums[m * kBlock], kBlock, tile.part->affine ? from[m * columns + codec.r] : 0.f);
      if (codec.by_channel)
        along(from, columns, buffer.tile, codec.r, kBlock, M, sums.data(), kBlock);
      else
        across(from, columns, buffer.tile, tile.tokens, codec.r, M, sums.data(), kBlock);
      for (int64_t m = 0; m < M; m++)
        std::copy_n(&sums[m * kBlock + tile.skip], tile.tokens - tile.skip, own + m * T + tile.skip);
    }
  });
}

// outs: for each part the index of the sum to which it is added. All parts of one sum have the same groups and rank
std::vector<Tensor> weighted_sums(
    const Tensor& p, at::TensorList fields, at::IntArrayRef layout, at::IntArrayRef outs) {
  const auto parts = parts_of(fields, layout);
  const auto tiles = tiles_of(parts, p.size(0));
  const int64_t B = p.size(0), rows = p.size(1) * p.size(2), T = p.size(3), threads = at::get_num_threads();
  std::vector<Tensor> sums;
  std::vector<std::vector<float>> apart;  // the sums of each thread, so that no two threads write to the same address
  for (size_t i = 0; i < parts.size(); i++) {
    const int64_t G = parts[i].groups;
    if (outs[i] < int64_t(sums.size())) continue;
    sums.push_back(at::empty({B, G, rows / G, parts[i].columns()}, p.options()));
    apart.emplace_back(threads * sums.back().numel(), 0.f);
  }
  const float* weights = p.const_data_ptr<float>();
  at::parallel_for(0, tiles.size(), kGrain, [&](int64_t begin, int64_t end) {
    const TileBuffer buffer(widest(parts));
    for (int64_t i = begin; i < end; i++) {
      const Tile& tile = tiles[i];
      const Codec& codec = *tile.part->codec;
      const int64_t which = outs[tile.part - parts.data()];
      const Tensor& sum = sums[which];
      const int64_t columns = tile.part->columns();
      const int64_t M = sum.size(2), row = (tile.b * tile.part->groups + tile.g) * M;
      codec.decode(tile.b, tile.g, tile.first, tile.tokens, buffer.tile);
      clear_padding(buffer.tile, codec, tile.skip);
      const float* from = weights + row * T + tile.part->start + tile.first;
      float* own = apart[which].data() + at::get_thread_num() * sum.numel() + row * columns;
      if (codec.by_channel)
        across(from, T, buffer.tile, codec.r, kBlock, M, own, columns);
      else
        along(from, T, buffer.tile, tile.tokens, codec.r, M, own, columns);
      for (int64_t m = 0; tile.part->affine && m < M; m++)
        for (int t = tile.skip; t < tile.tokens; t++) own[m * columns + codec.r] += from[m * T + t];
    }
  });
  for (size_t i = 0; i < sums.size(); i++) {
    const int64_t size = sums[i].numel();
    float* to = sums[i].mutable_data_ptr<float>();
    std::copy_n(apart[i].data(), size, to);
    for (int64_t thread = 1; thread < threads; thread++)
      for (int64_t j = 0; j < size; j++) to[j] += apart[i][thread * size + j];
  }
  return sums;
}

// --- encoder of bit planes, with the same search for each channel's width as codecs/mixed.py

constexpr int kMenu = 8;
constexpr int kMetadata = 2, kFar = 2;  // bytes of metadata of a channel, and additional bytes of a far offset
constexpr float kReach = 127, kFarReach = 32767, kFarFrom = 2;

struct Grid {
  float error, offset;
  int exponent;

  float step() const { return kSteps[exponent]; }
  bool far() const { return std::abs(offset) > kReach; }
  static float unit(int bits) { return std::max((1 << bits) / 64.f, 0.25f); }
  float origin(int bits) const { return step() * (unit(bits) * offset - ((1 << bits) - 1) / 2.f); }
};

inline float code_of(float y, float origin, float inverse, float last) {
  const float code = std::nearbyint((y - origin) * inverse);
  return code > 0 ? (code < last ? code : last) : 0;
}

float error_of(const float* y, const Grid& grid, int bits) {
  const float origin = grid.origin(bits), step = grid.step(), inverse = 1 / step, last = (1 << bits) - 1;
  float sum = 0;
  for (int t = 0; t < kBlock; t++) {
    const float rest = y[t] - (code_of(y[t], origin, inverse, last) * step + origin);
    sum += rest * rest;
  }
  return sum;
}

// The uniform grid with the least squared error among the shares of the range to try
Grid best_grid(const float* y, float low, float high, int bits, at::ArrayRef<double> shares) {
  constexpr float half = 0.5f / kOctave;
  const float middle = (low + high) / 2, last = (1 << bits) - 1;
  // Whether an offset in one byte would need a step much wider than the range asks for
  const bool far_off = std::abs(middle) / (kReach * Grid::unit(bits)) > kFarFrom / last * (high - low);
  const float reach = far_off ? kFarReach : kReach;
  Grid best{};
  for (const double share : shares) {
    Grid grid{};
    const float unit = Grid::unit(bits);
    // The offset is in units of the step: if it is out of reach, the step must be wider
    const float wanted = std::max((high - low) * float(share) / last,
                                  std::abs(middle) / (reach * unit) * std::exp2(half));
    const float exponent = std::nearbyint(std::log2(std::max(wanted, 1e-30f)) * kOctave) + kScaleZero;
    // In this form NaN, for which comparisons are false, gives an index inside the table
    grid.exponent = exponent > 0 ? (exponent < 255 ? exponent : 255) : 0;
    const float offset = std::nearbyint(middle / grid.step() / unit);
    grid.offset = offset > -reach ? (offset < reach ? offset : reach) : -reach;
    grid.error = error_of(y, grid, bits);
    if (share == shares[0] || grid.error < best.error) best = grid;
  }
  return best;
}

struct PlaneWriter {
  int r, payload;
  at::ArrayRef<double> narrow, wide;
  std::vector<Grid> grids;           // [kMenu][r]
  std::vector<float> errors, bytes;  // [kMenu][r]
  std::vector<int> choice;

  PlaneWriter(int r, int payload, at::ArrayRef<double> narrow, at::ArrayRef<double> wide)
      : r(r), payload(payload), narrow(narrow), wide(wide), grids(kMenu * r), errors(kMenu * r), bytes(kMenu * r),
        choice(r) {}

  void write(const float* y, uint8_t* block, uint8_t* widths) {
    for (int c = 0; c < r; c++) measure(y + c * kBlock, c);
    choose();
    pack(y, block);
    const int bytes = (r + 7) / 8;
    for (int c = 0; c < r; c++)
      for (int plane = 0; plane < 3; plane++) widths[plane * bytes + c / 8] |= (choice[c] >> plane & 1) << c % 8;
  }

  void measure(const float* y, int c) {
    const auto [low, high] = std::minmax_element(y, y + kBlock);
    errors[c] = 0;
    for (int t = 0; t < kBlock; t++) errors[c] += y[t] * y[t];
    for (int w = 1; w < kMenu; w++) {
      grids[w * r + c] = best_grid(y, *low, *high, kWidths[w], kWidths[w] <= 4 ? narrow : wide);
      errors[w * r + c] = grids[w * r + c].error;
      bytes[w * r + c] = 8 * kWidths[w] + kMetadata + kFar * grids[w * r + c].far();
    }
  }

  // Choose the widths with the least error within the payload, by bisection on the price of a byte: at the lowest price
  // every channel takes its best width, at the highest none is worth its bytes
  void choose() {
    double few = 1e-30, many = 1e-30;
    for (const float error : errors) many += error;
    for (int i = 0; i < 40; i++) {
      const double price = std::sqrt(few * many);
      (at_price(price) <= payload ? many : few) = price;
    }
    at_price(many);
  }

  int at_price(float price) {
    int spent = 0;
    std::vector<float> least(errors.begin(), errors.begin() + r);
    std::fill(choice.begin(), choice.end(), 0);
    for (int w = 1; w < kMenu; w++) {
      const float *own = errors.data() + w * r, *size = bytes.data() + w * r;
      for (int c = 0; c < r; c++) {
        const float cost = own[c] + price * size[c];
        const bool better = cost < least[c];
        least[c] = better ? cost : least[c];
        choice[c] = better ? w : choice[c];
      }
    }
    for (int c = 0; c < r; c++) spent += bytes[choice[c] * r + c];
    return spent;
  }

  void pack(const float* y, uint8_t* block) const {
    uint8_t* metadata = block;
    for (int c = 0; c < r; c++) metadata += 8 * kWidths[choice[c]];
    for (int w = kMenu - 1; w > 0; w--)
      for (int c = 0; c < r; c++)
        if (choice[c] == w) {
          const Grid& grid = grids[w * r + c];
          planes(y + c * kBlock, grid, kWidths[w], block);
          block += 8 * kWidths[w];
          *metadata++ = grid.exponent, *metadata++ = grid.far() ? 0 : int(grid.offset) + 128;
        }
    for (int c = 0; c < r; c++) {
      const Grid& grid = grids[choice[c] * r + c];
      if (!choice[c] || !grid.far()) continue;
      const int16_t offset = grid.offset;
      std::memcpy(metadata, &offset, sizeof offset), metadata += sizeof offset;
    }
  }

  static void planes(const float* y, const Grid& grid, int bits, uint8_t* out) {
    const float origin = grid.origin(bits), inverse = 1 / grid.step(), last = (1 << bits) - 1;
    uint64_t plane[16] = {};
    for (int t = 0; t < kBlock; t++) {
      const uint64_t code = code_of(y[t], origin, inverse, last);
      for (int j = 0; j < bits; j++) plane[j] |= (code >> j & 1) << t;
    }
    std::memcpy(out, plane, 8 * bits);
  }
};

// y [N, r, 64] → blocks [N, payload] and width indices [N, 3 · ⌈r / 8⌉]
std::tuple<Tensor, Tensor> encode_planes(
    const Tensor& y, int64_t payload, at::ArrayRef<double> narrow, at::ArrayRef<double> wide) {
  TORCH_CHECK(y.is_contiguous() && y.dim() == 3 && y.size(2) == kBlock, "blocks of 64 tokens, contiguous");
  const int64_t N = y.size(0), r = y.size(1), bytes = 3 * ((r + 7) / 8);
  const auto options = y.options().dtype(at::kByte);
  Tensor block = at::zeros({N, payload}, options), widths = at::zeros({N, bytes}, options);
  at::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
    PlaneWriter writer(r, payload, narrow, wide);
    for (int64_t i = begin; i < end; i++)
      writer.write(
          y.const_data_ptr<float>() + i * r * kBlock, block.mutable_data_ptr<uint8_t>() + i * payload,
          widths.mutable_data_ptr<uint8_t>() + i * bytes);
  });
  return {block, widths};
}

}  // namespace

TORCH_LIBRARY(kv_compression, m) {
  m.def("scores(Tensor[] qs, Tensor[] fields, int[] layout, Tensor(a!) out) -> ()", &scores);
  m.def("weighted_sums(Tensor p, Tensor[] fields, int[] layout, int[] outs) -> Tensor[]", &weighted_sums);
  m.def("encode_planes(Tensor y, int payload, float[] narrow, float[] wide) -> (Tensor, Tensor)", &encode_planes);
}
