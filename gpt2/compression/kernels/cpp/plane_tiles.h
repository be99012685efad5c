// Bit planes of 64 tokens' codes of one channel, as a row of a tile with which queries and weights are multiplied.
#pragma once

#include "codecs.h"

namespace {

constexpr int kWidths[] = {0, 2, 3, 4, 5, 6, 8, 10};

// Steps that the unit of an offset has
template <int bits>
constexpr float kUnitOf = std::max((1 << bits) / 64.f, 0.25f);

// The bits of a byte as eight bytes of 0 or 1
const std::array<uint64_t, 256> kSpread = [] {
  std::array<uint64_t, 256> spread{};
  for (int i = 0; i < 256; i++)
    for (int bit = 0; bit < 8; bit++) spread[i] |= uint64_t(i >> bit & 1) << (8 * bit);
  return spread;
}();

#ifdef __AVX512BW__
// The codes of up to eight planes, a byte for each token. A plane is used as a mask over them
template <int bits>
inline __m512i codes_of(const uint8_t* plane) {
  __m512i all = _mm512_setzero_si512();
  for (int j = 0; j < bits; j++) {
    uint64_t mask;
    std::memcpy(&mask, plane + 8 * j, 8);
    all = _mm512_or_si512(all, _mm512_maskz_set1_epi8(mask, char(1 << j)));
  }
  return all;
}
#endif

// Coordinates as floats, channel by channel, [r][64]
struct FloatTile {
  float* rows;

  void clear(int c) const { std::memset(rows + c * kBlock, 0, kBlock * sizeof(float)); }
  template <int bits>
  void write(int c, const uint8_t* plane, float step, float offset) const {
    float* row = rows + c * kBlock;
    [[maybe_unused]] constexpr int low = std::min(bits, 8);  // planes of the lower byte
    const float zero = step * (kUnitOf<bits> * offset - ((1 << bits) - 1) / 2.f);
#ifdef __AVX512BW__
    const __m512i lower = codes_of<low>(plane), upper = codes_of<bits - low>(plane + 64);
    spread<0, bits>(lower, upper, step, zero, row);
    spread<1, bits>(lower, upper, step, zero, row);
    spread<2, bits>(lower, upper, step, zero, row);
    spread<3, bits>(lower, upper, step, zero, row);
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

#ifdef __AVX2__

// Centered codes as integers, channel by channel, [r][64]; and how coordinates follow from them: step · (code + shift)
class IntegerTile {
 public:
  // Of r channels, in a tile's memory
  IntegerTile(float* memory, int r)
      : r(r), rows(rows_of(r)), codes(reinterpret_cast<int16_t*>(memory)), steps(memory + rows * kBlock / 2),
        shifts(steps + rows), spare(shifts + rows) {
    if (r % 2) clear(r);  // products are of pairs of channels
  }
  static int floats(int r) { return rows_of(r) * (kBlock / 2 + 2 + kSpare); }

  void clear(int c) const {
    std::memset(codes + c * kBlock, 0, kBlock * sizeof *codes);
    steps[c] = shifts[c] = 0;
  }

  template <int bits>
  void write(int c, const uint8_t* plane, float step, float offset) const {
    steps[c] = step, shifts[c] = kUnitOf<bits> * offset + 0.5f;
    int16_t* row = codes + c * kBlock;
    [[maybe_unused]] Bytes lower[kVectors], upper[kVectors];
    bytes_of<std::min(bits, 8)>(plane, lower);
    if constexpr (bits > 8) bytes_of<bits - 8>(plane + 64, upper);
    for (int n = 0; n < kVectors; n++) {
      if constexpr (bits <= 8) lower[n] -= uint8_t(1 << (bits - 1));
      for (int half = 0; half < 2; half++) {
        Shorts own = wide<bits <= 8>(lower[n], half);
        if constexpr (bits > 8) own = (own | wide<false>(upper[n], half) << 8) - uint16_t(1 << (bits - 1));
        std::memcpy(row + (half * kVectors + n) * kPairLanes, &own, sizeof own);
      }
    }
  }

  // As `Codec::scores`, of the first `used` channels
  void scores(const float* q, int64_t q_row, int used, int M, float* out) const {
    // Such that sums fit 32 bits
    const int top = std::min<int64_t>(kTop, ((int64_t(1) << 31) - 1) / (kMostCode * std::max(used, 1)));
    in_passes<kTogether>(M, [&](auto few, int first) {
      constexpr int R = decltype(few)::value;
      auto* own = reinterpret_cast<int16_t*>(spare);
      float *scaled = spare + kTogether * rows / 2, constant[R], unit[R];
      for (int m = 0; m < R; m++) {
        const float* from = q + (first + m) * q_row;
        for (int c = 0; c < used; c++) scaled[c] = from[c] * steps[c];
        const Unit whole(largest(scaled, used), top);
        round_to(scaled, used, whole.inverse, own + m * rows);
        unit[m] = whole.value;
        constant[m] = dot(scaled, shifts, used);  // not rounded: a bias may be hundreds of times what codes tell apart
      }
      float* to = out + first * kBlock;
      along_tokens<R>(reinterpret_cast<int32_t*>(own), rows / 2, codes, (used + 1) / 2, unit, to, kBlock);
      for (int m = 0; m < R; m++)
        for (int t = 0; t < kBlock; t++) to[m * kBlock + t] += constant[m];
    });
  }

  // As `Codec::add_sums`, of the first `used` channels. Weights are rounded for the constant as well as for the codes:
  // else, where the two nearly cancel, what was rounded would be large beside what is left
  void add_sums(const float* p, int used, int M, float* out, int64_t out_row) const {
    in_passes<2>(M, [&](auto few, int first) {
      constexpr int R = decltype(few)::value;
      int16_t own[R * kBlock];
      float unit[R];
      for (int m = 0; m < R; m++) {
        const float* from = p + (first + m) * kBlock;
        const Unit whole(largest(from, kBlock));
        round_to(from, kBlock, whole.inverse, own + m * kBlock);
        unit[m] = whole.value;
      }
      for (int c = 0; c < used; c += kLanes / R) across_tokens<R>(own, codes + c * kBlock, unit, spare + c, rows);
      for (int m = 0; m < R; m++) {
        int all = 0;
        for (int t = 0; t < kBlock; t++) all += own[m * kBlock + t];
        const float weight = all * unit[m];
        float* to = out + (first + m) * out_row;
        for (int c = 0; c < used; c++) to[c] += steps[c] * (spare[m * rows + c] + weight * shifts[c]);
      }
    });
  }

 private:
  static constexpr int kTogether = 6;               // queries
  static constexpr int kSpare = kTogether / 2 + 1;  // floats per channel: queries as integers, and one as floats; or sums
  static constexpr int kMostCode = 512;             // in absolute value
  static constexpr int kVectors = kBlock / kSet.bytes;  // of bytes, each of one token
  using Bytes = uint8_t __attribute__((vector_size(kSet.bytes)));
  const int r, rows;                                // rows: channels, and unused ones up to a whole vector
  int16_t* codes;
  float *steps, *shifts, *spare;

  static int rows_of(int r) { return (r + 1 + kLanes - 1) / kLanes * kLanes; }

  // Codes of 64 tokens of up to eight planes: the lower halves of all vectors, one after the other, have the first 32
#ifdef __AVX512BW__
  template <int bits>
  static void bytes_of(const uint8_t* plane, Bytes (&out)[kVectors]) {
    out[0] = (Bytes)codes_of<bits>(plane);
  }
  template <bool is_signed>
  static Shorts wide(Bytes x, int half) {
    const __m512i all = (__m512i)x;
    const __m256i own = half ? _mm512_extracti64x4_epi64(all, 1) : _mm512_castsi512_si256(all);
    return (Shorts)(is_signed ? _mm512_cvtepi8_epi16(own) : _mm512_cvtepu8_epi16(own));
  }
#else
  template <int bits>
  static void bytes_of(const uint8_t* plane, Bytes (&out)[kVectors]) {
    const __m256i low = _mm256_set1_epi8(15), four = nibbles<std::min(bits, 4)>(plane);
    __m256i even = _mm256_and_si256(four, low), odd = _mm256_and_si256(_mm256_srli_epi16(four, 4), low);
    if constexpr (bits > 4) {
      const __m256i high = nibbles<bits - 4>(plane + 32);
      even = _mm256_or_si256(even, _mm256_andnot_si256(low, _mm256_slli_epi16(high, 4)));
      odd = _mm256_or_si256(odd, _mm256_andnot_si256(low, high));
    }
    out[0] = (Bytes)_mm256_unpacklo_epi32(even, odd), out[1] = (Bytes)_mm256_unpackhi_epi32(even, odd);
  }

  // Of up to four planes the codes of 64 tokens, eight in each lane of 32 bits: in the lower halves of its bytes those of
  // the first four tokens. Of a byte of each of four planes, 4 x 8 bits, two exchanges make 8 x 4 (Warren, Hacker's
  // Delight, "Transposing a bit matrix")
  template <int planes>
  static __m256i nibbles(const uint8_t* plane) {
    const auto pair = [&](int from) {
      const auto* address = reinterpret_cast<const __m128i*>(plane + 8 * from);
      return planes >= from + 2   ? _mm_loadu_si128(address)
             : planes == from + 1 ? _mm_loadl_epi64(address)
                                  : _mm_setzero_si128();
    };
    const __m256i halves = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i x = _mm256_permutevar8x32_epi32(_mm256_set_m128i(pair(2), pair(0)), halves);
    return exchanged<14>(exchanged<7>(_mm256_shuffle_epi8(x, bytes), 0x00AA00AA), 0x0000CCCC);
  }

  // Each lane's bits at `mask` exchanged with those that are `distance` above them
  template <int distance>
  static __m256i exchanged(__m256i x, int mask) {
    const __m256i differ = _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi32(x, distance)), _mm256_set1_epi32(mask));
    return _mm256_xor_si256(x, _mm256_xor_si256(differ, _mm256_slli_epi32(differ, distance)));
  }
  template <bool is_signed>
  static Shorts wide(Bytes x, int half) {
    const __m256i all = (__m256i)x;
    const __m128i own = half ? _mm256_extracti128_si256(all, 1) : _mm256_castsi256_si128(all);
    return (Shorts)(is_signed ? _mm256_cvtepi8_epi16(own) : _mm256_cvtepu8_epi16(own));
  }
#endif
};

#endif

}  // namespace
