// Blocks of bit planes, of channels that have different widths.
#pragma once

#include "codecs.h"

namespace {

constexpr int kWidths[] = {0, 2, 3, 4, 5, 6, 8, 10};

// The bits of a byte as eight bytes of 0 or 1
const std::array<uint64_t, 256> kSpread = [] {
  std::array<uint64_t, 256> spread{};
  for (int i = 0; i < 256; i++)
    for (int bit = 0; bit < 8; bit++) spread[i] |= uint64_t(i >> bit & 1) << (8 * bit);
  return spread;
}();

// Blocks whose channels have different widths: bit planes, sorted by falling width, followed by the metadata. A tile is
// channel by channel, [r][64]
struct Planes final : Codec {
  Field block, widths;

  Planes(const Tensor* fields, int r) : Codec(r, false), block(fields[0]), widths(fields[1]) {}

  void scores(const Block& at, const float* q, int64_t q_row, int M, float* out, Scratch& scratch) const override {
    std::fill_n(out, M * kBlock, 0.f);
    along(q, q_row, decoded(at, scratch), used(at), kBlock, M, out, kBlock);
  }
  void add_sums(const Block& at, const float* p, int M, float* out, int64_t out_row, Scratch& scratch) const override {
    across(p, kBlock, decoded(at, scratch), used(at), kBlock, M, out, out_row);
  }

  // Channels up to the last one that has codes. Bases have their channels sorted by how far they spread, so that those
  // behind it are often many
  int used(const Block& at) const override {
    const uint8_t* packed = widths.at(at.b, at.g, at.index());
    const int bytes = (r + 7) / 8;
    for (int i = bytes - 1; i >= 0; i--)
      if (const int any = packed[i] | packed[bytes + i] | packed[2 * bytes + i])
        return std::min(r, 8 * i + 32 - __builtin_clz(any));
    return 0;
  }

 private:
  // The tile of a block. Where K and V are the same codes, the second to ask finds it decoded
  const float* decoded(const Block& at, Scratch& scratch) const {
    float* tile = scratch.floats(kBlock * r);
    const uint8_t* codes = block.at(at.b, at.g, at.index());
    if (scratch.holds != codes) decode(at, tile);
    scratch.holds = codes;
    return tile;
  }

  void decode(const Block& at, float* tile) const {
    uint8_t index[r + 8];
    indices(widths.at(at.b, at.g, at.index()), index);
    int count[8] = {}, place[8];
    for (int c = 0; c < r; c += kBlock) {
      const uint64_t some = counts(index + c, std::min(kBlock, r - c));
      for (int k = 0; k < 8; k++) count[k] += some >> 8 * k & 255;
    }
    const uint8_t* plane = block.at(at.b, at.g, at.index());
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

}  // namespace
