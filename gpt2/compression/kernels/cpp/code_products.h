// Products of queries, or of attention weights, with rows of codes that never leave the registers.
//
// A vector of 32-bit lanes is loaded from a row of bytes, and a shift and a mask take one code out of every lane. So the
// codes of one such vector are four bytes apart in the row. Nothing is shuffled: instead, what is multiplied with codes
// comes in their order (`CodeOrder`).
#pragma once

#include "integer_products.h"
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
  static constexpr int halves = bits == 8 || paired ? 1 : 2;  // of a byte with codes of one row

  static int rows(const Rows& rows) { return paired ? 2 * rows.count : rows.count; }

  template <int shift>
  static Lanes shifted(Words x) {
    constexpr uint32_t mask = (1u << bits) - 1;
    return __builtin_convertvector(Ints(shift + bits == 32 ? x >> shift : (x >> shift) & mask), Lanes);
  }

  // Codes of two rows, from byte `part` of each lane: of both, or, where paired, of the first alone
  template <int half, int part>
  static void decode(Words one, Words two, Lanes& first, Lanes& second) {
    constexpr int shift = part * 8 + half * 4;
    first = shifted<shift>(one);
    if constexpr (paired)
      second = shifted<shift + 4>(one);
    else
      second = shifted<shift>(two);
  }

  // sums[h][m] += w[m] · codes of row h, for two rows' bytes at `place` of R queries
  template <int R, int half, int part = 0>
  static void dot_part(Words one, Words two, const float* w, int64_t w_row, Lanes (&sums)[2][R]) {
    if constexpr (part < 4) {
      Lanes first, second;
      decode<half, part>(one, two, first, second);
      for (int m = 0; m < R; m++) {
        const Lanes weights = load(w + m * w_row + part * kLanes);
        sums[0][m] += weights * first, sums[1][m] += weights * second;
      }
      dot_part<R, half, part + 1>(one, two, w, w_row, sums);
    }
  }

  template <int R>
  static void dot_few(const Rows& rows, const float* w, int64_t w_row, float* out, int64_t out_row) {
    const int all = Codes::rows(rows), pairs = (all + 1) / 2;  // of rows i and i + pairs
    for (int i = 0; i < pairs; i += kLanes) {
      const int here = std::min(kLanes, pairs - i);
      Lanes each[2][R][kLanes];
      if (here < kLanes) std::fill_n(&each[0][0][0], 2 * R * kLanes, Lanes{});
      for (int k = 0; k < here; k++) {
        const uint8_t *one = rows[i + k], *two = rows[paired ? i + k : std::min(pairs + i + k, all - 1)];
        Lanes sums[2][R] = {};
        for (int j = 0; j < rows.bytes; j += kUnit) {
          if (j % 64 == 0) {
            __builtin_prefetch(one + rows.next + j);
            if (!paired) __builtin_prefetch(two + rows.next + j);
          }
          dot_part<R, 0>(load<Words>(one + j), load<Words>(two + j), w + j, w_row, sums);
        }
        for (int j = 0; halves == 2 && j < rows.bytes; j += kUnit)
          dot_part<R, 1>(load<Words>(one + j), load<Words>(two + j), w + rows.bytes + j, w_row, sums);
        for (int h = 0; h < 2; h++)
          for (int m = 0; m < R; m++) each[h][m][k] = sums[h][m];
      }
      for (int h = 0; h < 2; h++)
        for (int m = 0; m < R; m++) {
          const Lanes sums = totals(each[h][m]);
          const int from = h * pairs + i;
          std::memcpy(out + m * out_row + from, &sums, sizeof(float) * std::min(here, all - from));
        }
    }
  }

  // out[m][c] = Σ_i w[m][i] codes of row i, for one vector of bytes: of one half, N bytes of each lane from `part` on
  template <int R, int N, int half = 0, int part = 0>
  static void combine_few(const Rows& rows, int j, const float* w, int64_t w_row, float* out, int64_t out_row) {
    const int all = Codes::rows(rows), pairs = (all + 1) / 2;  // of rows i and i + pairs
    Lanes sums[N][R] = {};
    const bool ahead = half == 0 && part == 0 && j % 64 == 0;
    for (int i = 0; i < pairs; i++) {
      const uint8_t *one = rows[i] + j, *two = rows[paired ? i : std::min(pairs + i, all - 1)] + j;
      if (ahead) {
        __builtin_prefetch(one + rows.next);
        if (!paired) __builtin_prefetch(two + rows.next);
      }
      add_parts<R, N, half, part>(load<Words>(one), load<Words>(two), w + i, w + pairs + i, w_row, sums);
    }
    for (int n = 0; n < N; n++)
      for (int m = 0; m < R; m++)
        std::memcpy(out + m * out_row + half * rows.bytes + j + (part + n) * kLanes, &sums[n][m], sizeof(Lanes));
    if constexpr (part + N < 4)
      combine_few<R, N, half, part + N>(rows, j, w, w_row, out, out_row);
    else if constexpr (half + 1 < halves)
      combine_few<R, N, half + 1>(rows, j, w, w_row, out, out_row);
  }

  // Codes are decoded before any weight is loaded, so that sums, codes and one weight at a time fill the registers
  template <int R, int N, int half, int part>
  static void add_parts(Words one, Words two, const float* w1, const float* w2, int64_t w_row, Lanes (&sums)[N][R]) {
    Lanes first[N], second[N];
    decode_all<N, half, part>(one, two, first, second);
    for (int m = 0; m < R; m++) {
      for (int n = 0; n < N; n++) sums[n][m] += w1[m * w_row] * first[n];
      for (int n = 0; n < N; n++) sums[n][m] += w2[m * w_row] * second[n];
    }
  }
  template <int N, int half, int part, int n = 0>
  static void decode_all(Words one, Words two, Lanes (&first)[N], Lanes (&second)[N]) {
    if constexpr (n < N) {
      decode<half, part + n>(one, two, first[n], second[n]);
      decode_all<N, half, part, n + 1>(one, two, first, second);
    }
  }

 public:
  // out[m][i] = Σ_c w[m][c] codes[i][c], w in the order of codes
  static void dot_rows(const Rows& rows, const float* w, int64_t w_row, int M, float* out, int64_t out_row) {
    in_passes<kSet.queries>(M, [&](auto few, int m) {
      dot_few<decltype(few)::value>(rows, w + m * w_row, w_row, out + m * out_row, out_row);
    });
  }

#ifdef __AVX2__
  // As `dot_rows` of paired rows, with queries as integers
  static void dot_integers(const Rows& rows, const float* w, int64_t w_row, int M, float* out, int64_t out_row) {
    static_assert(paired);
    in_passes<kSet.queries>(M, [&](auto few, int first) {
      constexpr int R = decltype(few)::value;
      int16_t own[R][rows.bytes];
      float unit[R];
      for (int m = 0; m < R; m++) {
        const float* from = w + (first + m) * w_row;
        const Unit whole(largest(from, rows.bytes));
        unit[m] = whole.value;
        for (int j = 0; j < rows.bytes; j += kUnit)
          for (int odd = 0; odd < 2; odd++) {
            const float* part = from + j + odd * kLanes;
            const Ints both = in_turns(part, part + 2 * kLanes, whole.inverse, whole.inverse);
            std::memcpy(&own[m][j + odd * kPairLanes], &both, sizeof both);
          }
      }
      for (int i = 0; i < rows.count; i += kLanes) {
        Ints each[2][R][kLanes];
        for (int k = 0; k < kLanes; k++) {
          const uint8_t* row = rows[i + k];
          Ints sums[2][R] = {};
          for (int j = 0; j < rows.bytes; j += kUnit) {
            if (j % 64 == 0) __builtin_prefetch(row + rows.next + j);
            const Shorts bytes = load<Shorts>(row + j);
            const Ints one[] = {Ints(bytes & 15), Ints(bytes >> 8 & 15)}, two[] = {Ints(bytes >> 4 & 15), Ints(bytes >> 12)};
            for (int m = 0; m < R; m++)
              for (int odd = 0; odd < 2; odd++) {
                const Ints weights = load<Ints>(&own[m][j + odd * kPairLanes]);
                sums[0][m] = add_pairs(sums[0][m], weights, one[odd]);
                sums[1][m] = add_pairs(sums[1][m], weights, two[odd]);
              }
          }
          for (int h = 0; h < 2; h++)
            for (int m = 0; m < R; m++) each[h][m][k] = sums[h][m];
        }
        for (int h = 0; h < 2; h++)
          for (int m = 0; m < R; m++) {
            const Lanes sums = __builtin_convertvector(totals(each[h][m]), Lanes) * unit[m];
            std::memcpy(out + (first + m) * out_row + h * rows.count + i, &sums, sizeof sums);
          }
      }
    });
  }

  // As `combine_rows` of paired rows, with weights as integers. `rounded` [M][2 · rows] becomes what these stand for
  static void combine_integers(
      const Rows& rows, const float* w, int64_t w_row, int M, float* out, int64_t out_row, float* rounded) {
    static_assert(paired);
    constexpr int kUpper = 16;  // upper halves of bytes stay where they are, and so count 16 times as much
    in_passes<kSet.queries>(M, [&](auto few, int first) {
      constexpr int R = decltype(few)::value, N = std::min(4, power_up_to(kSet.mixed / R));
      int32_t own[R][rows.count];
      float unit[R];
      for (int m = 0; m < R; m++) {
        const float* from = w + (first + m) * w_row;
        const Unit whole(largest(from, 2 * rows.count));
        unit[m] = whole.value;
        for (int i = 0; i < rows.count; i += kLanes) {
          const Ints both = in_turns(from + i, from + rows.count + i, whole.inverse, whole.inverse / kUpper);
          std::memcpy(&own[m][i], &both, sizeof both);
          const Lanes one = __builtin_convertvector(both & 0xFFFF, Lanes) * whole.value;
          const Lanes two = __builtin_convertvector(both >> 16, Lanes) * (whole.value * kUpper);
          float* to = rounded + (first + m) * w_row + i;
          std::memcpy(to, &one, sizeof one), std::memcpy(to + rows.count, &two, sizeof two);
        }
      }
      for (int j = 0; j < rows.bytes; j += kUnit)
        for (int part = 0; part < 4; part += N) {
          Ints sums[N][R] = {};
          for (int i = 0; i < rows.count; i++) {
            const uint8_t* row = rows[i] + j;
            if (!part && j % 64 == 0) __builtin_prefetch(row + rows.next);
            const Ints bytes = load<Ints>(row);
            Ints both[N];
            for (int n = 0; n < N; n++) both[n] = repeated(bytes, part + n) & 0x00F0000F;
            for (int m = 0; m < R; m++) {
              const Ints weights = Ints{} + own[m][i];
              for (int n = 0; n < N; n++) sums[n][m] = add_pairs(sums[n][m], weights, both[n]);
            }
          }
          for (int n = 0; n < N; n++)
            for (int m = 0; m < R; m++) {
              const Lanes all = __builtin_convertvector(sums[n][m], Lanes) * unit[m];
              std::memcpy(out + (first + m) * out_row + j + (part + n) * kLanes, &all, sizeof all);
            }
        }
    });
  }
#endif

  // out[m][c] = Σ_i w[m][i] codes[i][c], out in the order of codes. If the number of rows is odd, w has a 0 behind them
  static void combine_rows(const Rows& rows, const float* w, int64_t w_row, int M, float* out, int64_t out_row) {
    in_passes<kSet.queries>(M, [&](auto few, int m) {
      constexpr int R = decltype(few)::value, N = std::min(4, power_up_to(kSet.mixed / R));
      for (int j = 0; j < rows.bytes; j += kUnit)
        combine_few<R, N>(rows, j, w + m * w_row, w_row, out + m * out_row, out_row);
    });
  }
};

}  // namespace
