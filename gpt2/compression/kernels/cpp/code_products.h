// Products of queries, or of attention weights, with rows of codes that never leave the registers.
//
// A vector of 32-bit lanes is loaded from a row of bytes, and a shift and a mask take one code out of every lane. So the
// codes of one such vector are four bytes apart in the row. Nothing is shuffled: instead, what is multiplied with codes
// comes in their order (`CodeOrder`).
#pragma once

#include "vectors.h"

#include <algorithm>
#include <vector>

namespace {

// Rows of bytes. `stride`: bytes from one to the next
struct Rows {
  const uint8_t* first;
  int64_t stride;
  int count, bytes;
  int64_t next;  // bytes to the rows of the next block, for prefetching

  const uint8_t* operator[](int row) const { return first + row * stride; }
};

constexpr int kUnit = 4 * kLanes;  // bytes of a vector

// The order of a row's codes in vectors. With four bits to a code, the high halves of bytes follow the low halves, or,
// where rows are `paired`, are codes of another row in the same order
struct CodeOrder {
  std::vector<int> place;  // of each code in the order of the row

  CodeOrder(int codes, int bytes) : place(codes) {
    for (int c = 0; c < codes; c++) {
      const int half = c / bytes, byte = c % bytes;
      place[c] = half * bytes + byte / kUnit * kUnit + byte % 4 * kLanes + byte % kUnit / 4;
    }
  }
  void to(const float* from, float* out) const {
    for (size_t c = 0; c < place.size(); c++) out[place[c]] = from[c];
  }
  void back(const float* from, float* out) const {
    for (size_t c = 0; c < place.size(); c++) out[c] = from[place[c]];
  }
};

// paired: with four bits, whether a byte has codes of two rows, i and i + count, rather than two codes of one row
template <int bits, bool paired>
struct Codes {
  static_assert(bits == 8 ? !paired : bits == 4);
  static constexpr int parts = bits == 8 || paired ? 4 : 8;  // vectors of codes in a vector of bytes, for one row

  static int rows(const Rows& rows) { return paired ? 2 * rows.count : rows.count; }

  // Where a part's codes begin in the order of codes
  static int place(int part, int bytes) { return part % 4 * kLanes + part / 4 * bytes; }

  template <int shift>
  static Lanes shifted(Words x) {
    constexpr uint32_t mask = (1u << bits) - 1;
    return __builtin_convertvector(Ints(shift + bits == 32 ? x >> shift : (x >> shift) & mask), Lanes);
  }

  // Codes of two rows, from the bytes of both, or, where paired, from those of the first
  template <int part>
  static void decode(Words one, Words two, Lanes& first, Lanes& second) {
    constexpr int shift = part % 4 * 8 + part / 4 * 4;
    first = shifted<shift>(one);
    if constexpr (paired)
      second = shifted<shift + 4>(one);
    else
      second = shifted<shift>(two);
  }

  // sums[h][m] += w[m] · codes of row h, for two rows' bytes at `place` of R queries
  template <int R, int part = 0>
  static void dot_part(Words one, Words two, const float* w, int64_t w_row, int bytes, Lanes (&sums)[2][R]) {
    if constexpr (part < parts) {
      Lanes first, second;
      decode<part>(one, two, first, second);
      for (int m = 0; m < R; m++) {
        const Lanes weights = load(w + m * w_row + place(part, bytes));
        sums[0][m] += weights * first, sums[1][m] += weights * second;
      }
      dot_part<R, part + 1>(one, two, w, w_row, bytes, sums);
    }
  }

  template <int R>
  static void dot_few(const Rows& rows, const float* w, int64_t w_row, float* out, int64_t out_row) {
    const int all = Codes::rows(rows), half = (all + 1) / 2;
    for (int i = 0; i < half; i += kLanes) {
      const int here = std::min(kLanes, half - i);
      Lanes each[2][R][kLanes] = {};
      for (int k = 0; k < here; k++) {
        const uint8_t *one = rows[i + k], *two = rows[paired ? i + k : std::min(half + i + k, all - 1)];
        Lanes sums[2][R] = {};
        for (int j = 0; j < rows.bytes; j += kUnit) {
          if (j % 64 == 0) {
            __builtin_prefetch(one + rows.next + j);
            if (!paired) __builtin_prefetch(two + rows.next + j);
          }
          dot_part<R>(load<Words>(one + j), load<Words>(two + j), w + j, w_row, rows.bytes, sums);
        }
        for (int h = 0; h < 2; h++)
          for (int m = 0; m < R; m++) each[h][m][k] = sums[h][m];
      }
      for (int h = 0; h < 2; h++)
        for (int m = 0; m < R; m++) {
          const Lanes sums = totals(each[h][m]);
          const int from = h * half + i;
          std::memcpy(out + m * out_row + from, &sums, sizeof(float) * std::min(here, all - from));
        }
    }
  }

  // out[m][c] = Σ_i w[m][i] codes of row i, for one vector of bytes, and N of its parts from `part` on
  template <int R, int N, int part>
  static void combine_few(const Rows& rows, int j, const float* w, int64_t w_row, float* out, int64_t out_row) {
    const int all = Codes::rows(rows), half = (all + 1) / 2;
    Lanes sums[N][R] = {};
    const bool ahead = part == 0 && j % 64 == 0;
    for (int i = 0; i < half; i++) {
      const uint8_t *one = rows[i] + j, *two = rows[paired ? i : std::min(half + i, all - 1)] + j;
      if (ahead) {
        __builtin_prefetch(one + rows.next);
        if (!paired) __builtin_prefetch(two + rows.next);
      }
      add_parts<R, N, part>(load<Words>(one), load<Words>(two), w + i, w + half + i, w_row, sums);
    }
    for (int n = 0; n < N; n++)
      for (int m = 0; m < R; m++) std::memcpy(out + m * out_row + j + place(part + n, rows.bytes), &sums[n][m], sizeof(Lanes));
    if constexpr (part + N < parts) combine_few<R, N, part + N>(rows, j, w, w_row, out, out_row);
  }

  template <int R, int N, int part, int n = 0>
  static void add_parts(Words one, Words two, const float* w1, const float* w2, int64_t w_row, Lanes (&sums)[N][R]) {
    if constexpr (n < N) {
      Lanes first, second;
      decode<part + n>(one, two, first, second);
      for (int m = 0; m < R; m++) {
        sums[n][m] += w1[m * w_row] * first;
        sums[n][m] += w2[m * w_row] * second;
      }
      add_parts<R, N, part, n + 1>(one, two, w1, w2, w_row, sums);
    }
  }

  // Calls run<R>(m) for as many queries at a time as fit into registers, in passes of about equal size
  template <typename Run>
  static void in_passes(int M, const Run& run) {
    constexpr int most = kSet.queries;
    int m = 0;
    for (int passes = (M + most - 1) / most; passes > 0; passes--) {
      const int queries = (M - m + passes - 1) / passes;
      pass<most>(queries, m, run);
      m += queries;
    }
  }
  template <int R, typename Run>
  static void pass(int queries, int m, const Run& run) {
    if (queries == R) return run(std::integral_constant<int, R>(), m);
    if constexpr (R > 1) pass<R - 1>(queries, m, run);
  }

 public:
  // out[m][i] = Σ_c w[m][c] codes[i][c], w in the order of codes
  static void dot_rows(const Rows& rows, const float* w, int64_t w_row, int M, float* out, int64_t out_row) {
    in_passes(M, [&](auto few, int m) {
      dot_few<decltype(few)::value>(rows, w + m * w_row, w_row, out + m * out_row, out_row);
    });
  }

  // out[m][c] = Σ_i w[m][i] codes[i][c], out in the order of codes. If the number of rows is odd, w has a 0 behind them
  static void combine_rows(const Rows& rows, const float* w, int64_t w_row, int M, float* out, int64_t out_row) {
    in_passes(M, [&](auto few, int m) {
      constexpr int R = decltype(few)::value, N = std::min(4, power_up_to(kSet.mixed / R));
      for (int j = 0; j < rows.bytes; j += kUnit)
        combine_few<R, N, 0>(rows, j, w + m * w_row, w_row, out + m * out_row, out_row);
    });
  }
};

}  // namespace
