// The encoder of bit planes, with the same search for each channel's width as codecs/mixed.py.
#pragma once

#include "planes.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <tuple>
#include <vector>

namespace {

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

constexpr float kShift = 12582912;  // adding it rounds to an integer, which the lower bits then hold

// Codes of a vector of numbers, each with kShift added; that of NaN is 0
inline Lanes shifted_codes(const float* y, Lanes origin, float inverse, Lanes last) {
  const Lanes none = {};
  Lanes code = (load(y) - origin) * inverse;
  code = code > none ? code : none;
  code = code < last ? code : last;
  return code + kShift;
}

// Squared errors of a block on each of N grids: together, as one grid's sums alone wait for one another
template <int N>
inline void errors_of(const float* y, Grid* grids, int bits) {
  const Lanes none = {}, last = none + float((1 << bits) - 1);
  Lanes origin[N], step[N], sums[N] = {};
  float inverse[N];
  for (int n = 0; n < N; n++)
    origin[n] = none + grids[n].origin(bits), step[n] = none + grids[n].step(), inverse[n] = 1 / grids[n].step();
  for (int t = 0; t < kBlock; t += kLanes)
    for (int n = 0; n < N; n++) {
      const Lanes code = shifted_codes(y + t, origin[n], inverse[n], last) - kShift;
      const Lanes rest = load(y + t) - (code * step[n] + origin[n]);
      sums[n] += rest * rest;
    }
  for (int n = 0; n < N; n++) grids[n].error = total(sums[n]);
}

// The smallest and the largest number of a block; of one with NaN any two numbers, or NaN
std::pair<float, float> range_of(const float* y) {
  Lanes low = load(y), high = low;
  for (int t = kLanes; t < kBlock; t += kLanes) {
    const Lanes own = load(y + t);
    low = own < low ? own : low, high = own > high ? own : high;
  }
  float least = low[0], most = high[0];
  for (int lane = 1; lane < kLanes; lane++) least = std::min(least, low[lane]), most = std::max(most, high[lane]);
  return {least, most};
}

// Bit `bit` of 64 bytes, that of byte i as the i-th
inline uint64_t bits_of(const uint8_t* bytes, int bit) {
#if defined(__AVX512BW__)
  return _mm512_test_epi8_mask(_mm512_loadu_si512(bytes), _mm512_set1_epi8(char(1 << bit)));
#elif defined(__AVX2__)
  const auto half = [&](int from) {
    const __m256i own = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + from));
    return uint64_t(uint32_t(_mm256_movemask_epi8(_mm256_sll_epi16(own, _mm_cvtsi32_si128(7 - bit)))));
  };
  return half(0) | half(32) << 32;
#else
  uint64_t all = 0;
  for (int t = 0; t < kBlock; t++) all |= uint64_t(bytes[t] >> bit & 1) << t;
  return all;
#endif
}

constexpr int kGrids = 4;  // whose errors are summed together

// The uniform grid with the least squared error among the shares of the range to try
Grid best_grid(const float* y, float low, float high, int bits, at::ArrayRef<double> shares) {
  constexpr float half = 0.5f / kOctave;
  const float middle = (low + high) / 2, last = (1 << bits) - 1, unit = Grid::unit(bits);
  // Whether an offset in one byte would need a step much wider than the range asks for
  const bool far_off = std::abs(middle) / (kReach * unit) > kFarFrom / last * (high - low);
  const float reach = far_off ? kFarReach : kReach;
  // The offset is in units of the step: if it is out of reach, the step must be wider
  const float least = std::max(std::abs(middle) / (reach * unit) * std::exp2(half), 1e-30f);
  Grid best{};
  in_passes<kGrids>(shares.size(), [&](auto N, int first) {
    Grid grids[N];
    for (int n = 0; n < N; n++) {
      const float wanted = std::max((high - low) * float(shares[first + n]) / last, least);
      const float exponent = std::nearbyint(std::log2(wanted) * kOctave) + kScaleZero;
      // In this form NaN, for which comparisons are false, gives an index inside the table
      grids[n].exponent = exponent > 0 ? (exponent < 255 ? exponent : 255) : 0;
      const float offset = std::nearbyint(middle / grids[n].step() / unit);
      grids[n].offset = offset > -reach ? (offset < reach ? offset : reach) : -reach;
    }
    errors_of<N>(y, grids, bits);
    const Grid* found = first ? &best : grids;
    for (const Grid& grid : grids) found = grid.error < found->error ? &grid : found;
    best = *found;
  });
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
    const auto [low, high] = range_of(y);
    errors[c] = dot(y, y, kBlock);
    for (int w = 1; w < kMenu; w++) {
      grids[w * r + c] = best_grid(y, low, high, kWidths[w], kWidths[w] <= 4 ? narrow : wide);
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
    const Lanes none = {}, origin = none + grid.origin(bits), last = none + float((1 << bits) - 1);
    const float inverse = 1 / grid.step();
    uint8_t bytes[2][kBlock];  // of each code the lower one and the upper one
    for (int t = 0; t < kBlock; t += kLanes) {
      const Lanes code = shifted_codes(y + t, origin, inverse, last);
      Ints own;
      std::memcpy(&own, &code, sizeof own);
      using LaneBytes = uint8_t __attribute__((vector_size(kLanes)));
      const LaneBytes lower = __builtin_convertvector(own & 255, LaneBytes);
      const LaneBytes upper = __builtin_convertvector(own >> 8 & 255, LaneBytes);
      std::memcpy(bytes[0] + t, &lower, sizeof lower), std::memcpy(bytes[1] + t, &upper, sizeof upper);
    }
    for (int j = 0; j < bits; j++) {
      const uint64_t plane = bits_of(bytes[j / 8], j % 8);
      std::memcpy(out + 8 * j, &plane, sizeof plane);
    }
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
