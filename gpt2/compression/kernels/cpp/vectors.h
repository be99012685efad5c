// The vectors of each instruction set, and how many sums fit into its registers.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

namespace {

// Vectors and tiles of sums that fit an instruction set's registers beside their operands. A tile that doesn't fit
// spills in the innermost loop, which costs a multiple of the time: so a new set needs figures of its own.
// Vectors wider than the registers compile too, but to code that goes through memory
struct InstructionSet {
  int bytes;     // of a vector
  int sums;      // `along`: vectors of sums of all queries, of which there are up to six
  int widest;    // `along`: most vectors of sums per query
  int together;  // `across`: queries at a time
  int queries;   // products with codes: queries at a time
  int mixed;     // `combine_rows`: vectors of sums of all queries
  int pairs;     // `along_tokens`, in pairs of integers: vectors of sums per query, of which there are up to six
};

#if defined(__AVX512F__)
constexpr InstructionSet kSet = {64, 24, 4, 1, 8, 16, 4};  // 32 registers
#elif defined(__AVX2__)
constexpr InstructionSet kSet = {32, 12, 8, 1, 4, 8, 2};  // 16 registers
#elif defined(__ARM_NEON)
constexpr InstructionSet kSet = {16, 24, 8, 4, 8, 16, 0};  // 32 registers
#else
constexpr InstructionSet kSet = {16, 12, 8, 2, 3, 6, 0};  // 16 registers; without a fused multiply-add, products need one too
#endif

constexpr int kLanes = kSet.bytes / sizeof(float);
using Lanes = float __attribute__((vector_size(kSet.bytes)));
using Ints = int32_t __attribute__((vector_size(kSet.bytes)));
using Words = uint32_t __attribute__((vector_size(kSet.bytes)));  // whose shifts bring in zeros

template <typename Vector = Lanes>
inline Vector load(const void* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Lanes load_floats(const float* from) { return load(from); }
inline Lanes load_floats(const int16_t* from) {
  using Halves = int16_t __attribute__((vector_size(kSet.bytes / 2)));
  return __builtin_convertvector(load<Halves>(from), Lanes);
}

inline void add(float* to, Lanes x) {
  x += load(to);
  std::memcpy(to, &x, sizeof x);
}

// Prefetch what is needed soon; prefetching past the end is harmless. A processor has few dozens of lines on their way,
// and waits if it shall prefetch more: so each step of a loop prefetches what the same step needs for the next tile
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// Add lanes that are h apart, and combine two vectors into one: every 2h lanes have h sums of x, then h sums of y
template <int h, typename Vector, int... l>
inline Vector halved(Vector x, Vector y, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(x, y, (l / (2 * h) * 2 * h + l % h + (l % (2 * h) < h ? 0 : kLanes))...) +
         __builtin_shufflevector(x, y, (l / (2 * h) * 2 * h + l % h + (l % (2 * h) < h ? 0 : kLanes) + h)...);
}

// One vector whose lanes are the sums of as many vectors, by a tree of pairwise sums
template <int h = 1, typename Vector>
inline Vector totals(const Vector* x) {
  if constexpr (h == kLanes)
    return x[0];
  else {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
    Vector half[kLanes / 2 / h];
    for (int i = 0; i < kLanes / 2 / h; i++) half[i] = halved<h>(x[2 * i], x[2 * i + 1], lanes);
    return totals<2 * h>(static_cast<const Vector*>(half));
  }
}

template <int h, int... l>
inline Lanes turned(Lanes x, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(x, x, ((l + h) % kLanes)...);
}

// The sum of a vector's lanes, by halves
template <int h = kLanes / 2>
inline float total(Lanes x) {
  x += turned<h>(x, std::make_integer_sequence<int, kLanes>());
  if constexpr (h == 1)
    return x[0];
  else
    return total<h / 2>(x);
}

// Σ_i a[i]
inline float sum(const float* a, int n) {
  Lanes sums = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) sums += load(a + i);
  float sum = total(sums);
  for (; i < n; i++) sum += a[i];
  return sum;
}

// Σ_i a[i] b[i]
inline float dot(const float* a, const float* b, int n) {
  Lanes sums = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) sums += load(a + i) * load(b + i);
  float sum = total(sums);
  for (; i < n; i++) sum += a[i] * b[i];
  return sum;
}

template <int R, typename Run>
void pass(int queries, int m, const Run& run) {
  if (queries == R) return run(std::integral_constant<int, R>(), m);
  if constexpr (R > 1) pass<R - 1>(queries, m, run);
}

// Calls run<R>(m) for up to `most` of M queries at a time, from query m on, in passes of about equal size
template <int most, typename Run>
void in_passes(int M, const Run& run) {
  int m = 0;
  for (int passes = (M + most - 1) / most; passes > 0; passes--) {
    const int queries = (M - m + passes - 1) / passes;
    pass<most>(queries, m, run);
    m += queries;
  }
}

// The largest power of two up to n: the columns of most tiles are a multiple of such widths
constexpr int power_up_to(int n) { return n < 2 ? 1 : 2 * power_up_to(n / 2); }

}  // namespace
