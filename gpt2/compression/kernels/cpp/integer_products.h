// Products of 16-bit integers, where the processor adds them in pairs (AVX2, AVX-512).
//
// One instruction multiplies 16-bit integers and adds the two products of each pair of neighbours: twice as many products
// as of floats. Codes are integers already. What is multiplied with them, such as a query's coordinates, is rounded to
// integer multiples of a unit, by which the largest of them has 15 bits: that loses far less than codes of up to eight
// bits do. Sums are exact, in 32 bits.
#pragma once

#include "vectors.h"

#include <algorithm>
#include <cmath>

#ifdef __AVX2__

namespace {

constexpr int kPairLanes = 2 * kLanes;  // integers of a vector
constexpr int kTop = 32767;
constexpr float kLeast = 1e-30f;  // smaller numbers are 0, so that a unit's inverse is finite

using Shorts = uint16_t __attribute__((vector_size(kSet.bytes)));
using HalfShorts = int16_t __attribute__((vector_size(kSet.bytes / 2)));

#ifdef __AVX512F__
inline Ints nearest(Lanes x) { return (Ints)_mm512_cvtps_epi32((__m512)x); }
inline Ints low_pairs(Shorts x, Shorts y) { return (Ints)_mm512_unpacklo_epi16((__m512i)x, (__m512i)y); }
inline Ints high_pairs(Shorts x, Shorts y) { return (Ints)_mm512_unpackhi_epi16((__m512i)x, (__m512i)y); }
inline Ints add_pairs(Ints sums, Ints x, Ints y) {
#ifdef __AVX512VNNI__
  return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)x, (__m512i)y);
#else
  return sums + (Ints)_mm512_madd_epi16((__m512i)x, (__m512i)y);
#endif
}
// Of every lane's four bytes the one at `part`, in all four places
inline Ints repeated(Ints bytes, int part) {
  const __m512i places = _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0);
  return (Ints)_mm512_shuffle_epi8((__m512i)bytes, _mm512_add_epi8(places, _mm512_set1_epi8(char(part))));
}
#else
inline Ints nearest(Lanes x) { return (Ints)_mm256_cvtps_epi32((__m256)x); }
inline Ints low_pairs(Shorts x, Shorts y) { return (Ints)_mm256_unpacklo_epi16((__m256i)x, (__m256i)y); }
inline Ints high_pairs(Shorts x, Shorts y) { return (Ints)_mm256_unpackhi_epi16((__m256i)x, (__m256i)y); }
inline Ints add_pairs(Ints sums, Ints x, Ints y) {
#ifdef __AVXVNNI__
  return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)x, (__m256i)y);
#else
  return sums + (Ints)_mm256_madd_epi16((__m256i)x, (__m256i)y);
#endif
}
inline Ints repeated(Ints bytes, int part) {
  const __m256i places = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C, 0, 0x04040404, 0x08080808, 0x0C0C0C0C);
  return (Ints)_mm256_shuffle_epi8((__m256i)bytes, _mm256_add_epi8(places, _mm256_set1_epi8(char(part))));
}
#endif

// What an integer stands for, and by what a number is multiplied to become one; largest: the largest number, or NaN
struct Unit {
  float value, inverse;

  explicit Unit(float largest, int top = kTop)
      : value(largest / float(top)), inverse(largest > kLeast ? float(top) / largest : 0.f) {}
};

// The largest of n absolute values; NaN if there is one, whose bits are the largest
inline float largest(const float* x, int n) {
  Ints most = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Ints own = load<Ints>(x + i) & 0x7FFFFFFF;
    most = own > most ? own : most;
  }
  int32_t bits = 0;
  for (int lane = 0; lane < kLanes; lane++) bits = std::max(bits, int32_t(most[lane]));
  float found;
  std::memcpy(&found, &bits, sizeof found);
  for (; i < n; i++)
    if (!(std::fabs(x[i]) <= found)) found = std::fabs(x[i]);
  return found;
}

// n floats as integers, and a 0 behind them where n is odd
inline void round_to(const float* from, int n, float inverse, int16_t* to) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const HalfShorts own = __builtin_convertvector(nearest(load(from + i) * inverse), HalfShorts);
    std::memcpy(to + i, &own, sizeof own);
  }
  for (; i < n; i++) to[i] = int16_t(std::nearbyint(from[i] * inverse));
  if (n % 2) to[n] = 0;
}

// The numbers of two vectors of floats in turns, as integers
inline Ints in_turns(const float* x, const float* y, float x_inverse, float y_inverse) {
  return (nearest(load(x) * x_inverse) & 0xFFFF) | nearest(load(y) * y_inverse) << 16;
}

// sums[m][n] += Σ_i a[m][i] line i [n], i counting pairs, whose lines are `lines(i, line)`
template <int R, int N, typename Lines>
inline void sum_pairs(const int32_t* a, int64_t a_row, int pairs, const Lines& lines, Ints (&sums)[R][N]) {
  for (int i = 0; i < pairs; i++) {
    Ints line[N];
    lines(i, line);
    for (int m = 0; m < R; m++) {
      const Ints own = Ints{} + a[m * a_row + i];
      for (int n = 0; n < N; n++) sums[m][n] = add_pairs(sums[m][n], own, line[n]);
    }
  }
}

// out[m][column] = unit[m] units[column] Σ_i a[m][i] panel[i][column] of N vectors of columns, i counting pairs, which
// each column has side by side
template <int R, int N>
void times_panel(const int32_t* a, int64_t a_row, const int32_t* panel, int pairs, const float* unit, const float* units,
                 float* out, int64_t out_row) {
  Ints sums[R][N] = {};
  const auto lines = [&](int i, Ints (&line)[N]) {
    for (int n = 0; n < N; n++) line[n] = load<Ints>(panel + (i * N + n) * kLanes);
  };
  sum_pairs<R>(a, a_row, pairs, lines, sums);
  for (int m = 0; m < R; m++)
    for (int n = 0; n < N; n++) {
      const Lanes all = __builtin_convertvector(sums[m][n], Lanes) * (load(units + n * kLanes) * unit[m]);
      std::memcpy(out + m * out_row + n * kLanes, &all, sizeof all);
    }
}

// Tokens in their order, of vectors in which each four of them follow four that the other vector has
template <int second, int... lane>
inline Lanes tokens_of(Lanes low, Lanes high, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(
      low, high, ((lane + second * kLanes) / 8 * 4 + lane % 4 + (lane % 8 < 4 ? 0 : kLanes))...);
}

// out[m][t] = unit[m] Σ_i a[m][i] tile[i][t] of 64 tokens t, i counting rows of the tile, of which `a` has pairs
template <int R>
void along_tokens(const int32_t* a, int64_t a_row, const int16_t* tile, int pairs, const float* unit, float* out,
                  int64_t out_row) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  constexpr int N = kSet.pairs;  // vectors of sums of a query: two for each vector of tokens
  for (int first = 0; first < 64; first += N * kLanes) {
    Ints sums[R][N] = {};
    const auto lines = [&](int i, Ints (&line)[N]) {
      for (int n = 0; n < N; n += 2) {
        const int16_t* row = tile + 2 * i * 64 + first + n * kLanes;
        const Shorts one = load<Shorts>(row), other = load<Shorts>(row + 64);
        line[n] = low_pairs(one, other), line[n + 1] = high_pairs(one, other);
      }
    };
    sum_pairs<R>(a, a_row, pairs, lines, sums);
    for (int m = 0; m < R; m++)
      for (int n = 0; n < N; n += 2) {
        const Lanes low = __builtin_convertvector(sums[m][n], Lanes) * unit[m];
        const Lanes high = __builtin_convertvector(sums[m][n + 1], Lanes) * unit[m];
        const Lanes both[] = {tokens_of<0>(low, high, lanes), tokens_of<1>(low, high, lanes)};
        std::memcpy(out + m * out_row + first + n * kLanes, both, sizeof both);
      }
  }
}

// out[m][i] = unit[m] Σ_t p[m][t] tile[i][t] of 64 tokens t, for R queries and kLanes / R rows of the tile, which has so
// many more
template <int R>
void across_tokens(const int16_t* p, const int16_t* tile, const float* unit, float* out, int64_t out_row) {
  constexpr int rows = kLanes / R, N = 64 / kPairLanes;
  Ints own[R][N];
  for (int m = 0; m < R; m++)
    for (int n = 0; n < N; n++) own[m][n] = load<Ints>(p + m * 64 + n * kPairLanes);
  Ints sums[kLanes] = {};
  for (int i = 0; i < rows; i++) {
    Ints line[N];
    for (int n = 0; n < N; n++) line[n] = load<Ints>(tile + i * 64 + n * kPairLanes);
    for (int m = 0; m < R; m++) {
      Ints sum = {};
      for (int n = 0; n < N; n++) sum = add_pairs(sum, own[m][n], line[n]);
      sums[m * rows + i] = sum;
    }
  }
  const Lanes all = __builtin_convertvector(totals(sums), Lanes);
  for (int m = 0; m < R; m++)
    for (int i = 0; i < rows; i++) out[m * out_row + i] = all[m * rows + i] * unit[m];
}

}  // namespace

#endif
