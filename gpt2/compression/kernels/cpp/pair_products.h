// Products of bfloat16 numbers, where the processor has them (AVX512_BF16): for models in bfloat16, whose queries have
// no more bits than that.
//
// One instruction multiplies 32 numbers with 32 others, and adds the two products of each pair of neighbours to a float:
// twice as many products as of floats. Codes of up to eight bits are exact in bfloat16, and sums are in float; what is
// multiplied with codes is rounded.
#pragma once

#include "vectors.h"

#include <algorithm>
#include <array>

#ifdef __AVX512BF16__

namespace {

constexpr int kPairLanes = 2 * kLanes;  // bfloat16 numbers of a vector
constexpr int kColumns = 4 * kLanes;    // sums of a query in registers

inline __m512i load_pairs(const void* from) { return load<__m512i>(from); }

inline __m512 add_pairs(__m512 sums, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }

// Two vectors of floats as bfloat16, the numbers of x first
inline __m512i rounded(__m512 x, __m512 y) { return (__m512i)_mm512_cvtne2ps_pbh(y, x); }

// Up to 16 floats, those of n that begin at i; 0 for others
inline __m512 load_up_to(const float* from, int i, int n) {
  if (n - i >= kLanes) return _mm512_loadu_ps(from + i);
  return i < n ? _mm512_maskz_loadu_ps((1 << (n - i)) - 1, from + i) : _mm512_setzero_ps();
}

// n floats as bfloat16, and a 0 behind them where n is odd
inline void round_to(const float* from, int n, uint16_t* to) {
  for (int i = 0; i < n; i += kPairLanes) {
    const __m512i own = rounded(load_up_to(from, i, n), load_up_to(from, i + kLanes, n));
    std::memcpy(to + i, &own, std::min(kPairLanes, (n - i + 1) / 2 * 2) * sizeof *to);
  }
}

// n floats, each with the bits that bfloat16 has. Weights of a sum are rounded for its constant as well as for its codes:
// else, where the two nearly cancel, what was rounded would be large beside what is left
inline void round_floats(const float* from, int n, float* to) {
  for (int i = 0; i < n; i += kLanes) {
    const __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load_up_to(from, i, n)));
    const __m512i own = _mm512_slli_epi32(wide, 16);
    std::memcpy(to + i, &own, std::min(kLanes, n - i) * sizeof *to);
  }
}

// The numbers of two vectors of floats in turns, as bfloat16
inline __m512i interleaved(const float* x, const float* y) {
  const auto wide = [](const float* from) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
  };
  return _mm512_or_si512(wide(x), _mm512_slli_epi32(wide(y), 16));
}

// Integers from `first` on as bfloat16, which has the upper half of a float's bits; the same again after `count` of them
inline std::array<uint16_t, 64> integers(int first, int count) {
  std::array<uint16_t, 64> all{};
  for (int i = 0; i < 64; i++) {
    const float x = first + i % count;
    std::memcpy(&all[i], reinterpret_cast<const char*>(&x) + 2, 2);
  }
  return all;
}

constexpr int kMiddle = 8;  // of four bits, from which these are counted, so that rounding is of the smallest numbers
const std::array<uint16_t, 64> kNibbles = integers(-kMiddle, 16);

// The lower four bits of 16-bit numbers as bfloat16: five bits index a table, which has four bits' numbers twice
inline __m512i nibbles(__m512i x) { return _mm512_permutexvar_epi16(x, load_pairs(&kNibbles[0])); }

// Of every fourth byte, from byte `part` on, the lower and then the upper four bits, as bfloat16
inline __m512i nibbles_of_byte(__m512i bytes, int part) {
  const __m512i upper = _mm512_set1_epi32(4 << 16);  // shifts of the second number in each pair
  return nibbles(_mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, _mm512_add_epi8(
      _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0), _mm512_set1_epi8(char(part)))), upper));
}

// sums[m][column] = Σ_i a[m][i] line i [column], i counting pairs, whose lines are `lines(i, line)`
template <int R, typename Lines>
inline void sum_pairs(const uint32_t* a, int64_t a_row, int pairs, const Lines& lines, __m512 (&sums)[R][4]) {
  for (int m = 0; m < R; m++)
    for (__m512& sum : sums[m]) sum = _mm512_setzero_ps();
  for (int i = 0; i < pairs; i++) {
    __m512i line[4];
    lines(i, line);
    for (int m = 0; m < R; m++) {
      const __m512i own = _mm512_set1_epi32(a[m * a_row + i]);
      for (int n = 0; n < 4; n++) sums[m][n] = add_pairs(sums[m][n], own, line[n]);
    }
  }
}

// out[m][column] = Σ_i a[m][i] panel[i][column] of kColumns columns, i counting pairs, which each column has side by side
template <int R>
void times_panel(const uint32_t* a, int64_t a_row, const uint32_t* panel, int pairs, float* out, int64_t out_row) {
  __m512 sums[R][4];
  const auto lines = [&](int i, __m512i (&line)[4]) {
    for (int n = 0; n < 4; n++) line[n] = load_pairs(panel + i * kColumns + kLanes * n);
  };
  sum_pairs<R>(a, a_row, pairs, lines, sums);
  for (int m = 0; m < R; m++)
    for (int n = 0; n < 4; n++) _mm512_storeu_ps(out + m * out_row + kLanes * n, sums[m][n]);
}

// out[m][t] = Σ_i a[m][i] tile[i][t] of 64 tokens t, i counting rows of the tile, of which `a` has pairs
template <int R>
void along_tokens(const uint32_t* a, int64_t a_row, const uint16_t* tile, int pairs, float* out, int64_t out_row) {
  __m512 sums[R][4];
  // Two rows as pairs, in which tokens 0 to 3, 8 to 11 and so on come in one vector, and those between them in another
  const auto lines = [&](int i, __m512i (&line)[4]) {
    for (int half = 0; half < 2; half++) {
      const uint16_t* row = tile + (2 * i) * kColumns + half * kPairLanes;
      const __m512i one = load_pairs(row), other = load_pairs(row + kColumns);
      line[2 * half] = _mm512_unpacklo_epi16(one, other), line[2 * half + 1] = _mm512_unpackhi_epi16(one, other);
    }
  };
  sum_pairs<R>(a, a_row, pairs, lines, sums);
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int m = 0; m < R; m++)
    for (int half = 0; half < 2; half++) {
      float* to = out + m * out_row + half * kPairLanes;
      const __m512 low = sums[m][2 * half], high = sums[m][2 * half + 1];
      _mm512_storeu_ps(to, _mm512_permutex2var_ps(low, first, high));
      _mm512_storeu_ps(to + kLanes, _mm512_permutex2var_ps(low, second, high));
    }
}

// out[m][i] = Σ_t p[m][t] tile[i][t] of 64 tokens t, for R queries and 16 / R rows of the tile, which has so many more
template <int R>
void across_tokens(const uint16_t* p, const uint16_t* tile, float* out, int64_t out_row) {
  constexpr int rows = kLanes / R;
  __m512i own[R][2];
  for (int m = 0; m < R; m++)
    for (int half = 0; half < 2; half++) own[m][half] = load_pairs(p + m * kColumns + half * kPairLanes);
  Lanes sums[kLanes];
  for (int i = 0; i < rows; i++) {
    const __m512i one = load_pairs(tile + i * kColumns), other = load_pairs(tile + i * kColumns + kPairLanes);
    for (int m = 0; m < R; m++)
      sums[m * rows + i] = Lanes(add_pairs(add_pairs(_mm512_setzero_ps(), own[m][0], one), own[m][1], other));
  }
  const Lanes all = totals(sums);
  const float* each = reinterpret_cast<const float*>(&all);
  for (int m = 0; m < R; m++) std::copy_n(each + m * rows, rows, out + m * out_row);
}

}  // namespace

#endif
