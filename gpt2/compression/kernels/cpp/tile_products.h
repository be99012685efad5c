// Products of queries, or of attention weights, with a tile of decoded floats.
#pragma once

#include "vectors.h"

#include <algorithm>

namespace {

// out[m][j] += Σ_i a[m][i] tile[i][j] for R queries and N vectors of columns; the sums stay in registers. Tiles of `along`
// are of floats, or of 16-bit integers
template <int R, int N, typename T>
inline void along_few(const float* a, int64_t a_row, const T* tile, int I, int J, float* out, int64_t out_row) {
  Lanes sums[R][N] = {};
  for (int i = 0; i < I; i++) {
    Lanes line[N];
    for (int n = 0; n < N; n++) line[n] = load_floats(tile + i * J + kLanes * n);
    for (int m = 0; m < R; m++)
      for (int n = 0; n < N; n++) sums[m][n] += a[m * a_row + i] * line[n];
  }
  for (int m = 0; m < R; m++)
    for (int n = 0; n < N; n++) add(out + m * out_row + kLanes * n, sums[m][n]);
}

template <int R, typename T, int N = power_up_to(std::min(kSet.widest, kSet.sums / R))>
void along_rows(const float* a, int64_t a_row, const T* tile, int I, int J, float* out, int64_t out_row, int j = 0) {
  for (; j + N * kLanes <= J; j += N * kLanes) along_few<R, N>(a, a_row, tile + j, I, J, out + j, out_row);
  if constexpr (N > 1)
    along_rows<R, T, N / 2>(a, a_row, tile, I, J, out, out_row, j);
  else
    for (; j < J; j++)
      for (int m = 0; m < R; m++)
        for (int i = 0; i < I; i++) out[m * out_row + j] += a[m * a_row + i] * tile[i * J + j];
}

// As many queries at a time as fit into registers, in passes of about equal size
template <typename T>
void along(const float* a, int64_t a_row, const T* tile, int I, int J, int M, float* out, int64_t out_row) {
  in_passes<6>(M, [&](auto few, int m) {
    along_rows<decltype(few)::value>(a + m * a_row, a_row, tile, I, J, out + m * out_row, out_row);
  });
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

}  // namespace
