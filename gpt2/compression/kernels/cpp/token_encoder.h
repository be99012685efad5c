// Integers over the range of each token's coordinates, chosen as codecs/integer.py does, bit for bit.
#pragma once

#include "vectors.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr float kLargestHalf = 65504.f, kSmallestNormal = 0x1p-14f;
constexpr float kSmallestScale = 0x1p-17f;  // SMALLEST of codecs/integer.py

// The nearest float16 that is not above x
at::Half half_not_above(float x) {
  const at::Half rounded(x);
  const float value = rounded;
  if (!(value > x)) return rounded;
  if (value == 0) return at::Half(-kSmallestNormal);
  return at::Half(uint16_t(rounded.x + (value > 0 ? -1 : 1)), at::Half::from_bits());
}

// Least and largest of r numbers; false where one is no number of float16
bool range_of(const float* x, int64_t r, float& low, float& high) {
  float least[kLanes], most[kLanes];
  std::fill_n(least, kLanes, std::numeric_limits<float>::infinity());
  std::fill_n(most, kLanes, -std::numeric_limits<float>::infinity());
  bool fits = true;
  for (int64_t first = 0; first < r; first += kLanes) {
    const int n = int(std::min<int64_t>(kLanes, r - first));
    for (int i = 0; i < n; i++) {
      const float own = x[first + i];
      fits &= std::abs(own) <= kLargestHalf;  // false for NaN
      least[i] = own < least[i] ? own : least[i];
      most[i] = own > most[i] ? own : most[i];
    }
  }
  low = *std::min_element(least, least + kLanes), high = *std::max_element(most, most + kLanes);
  return fits;
}

// z [N, r] float32 → codes [N, r], or [N, ⌈r / 2⌉] of 4 bits, scales and offsets [N]; nothing where a number is none of
// float16, which takes wider metadata
std::vector<Tensor> encode_tokens(const Tensor& z, int64_t bits) {
  TORCH_CHECK(z.is_contiguous() && z.dim() == 2 && (bits == 4 || bits == 8), "tokens in 4 or 8 bits, contiguous");
  const int64_t N = z.size(0), r = z.size(1), bytes = bits == 8 ? r : (r + 1) / 2;
  const float last = float((1 << bits) - 1);
  Tensor codes = at::empty({N, bytes}, z.options().dtype(at::kByte));
  Tensor scales = at::empty({N}, z.options().dtype(at::kHalf)), offsets = at::empty({N}, scales.options());
  std::atomic<bool> fits{true};
  at::parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> own(2 * bytes);
    for (int64_t i = begin; i < end; i++) {
      const float* x = z.const_data_ptr<float>() + i * r;
      float low, high;
      if (!range_of(x, r, low, high)) {
        fits = false;
        return;
      }
      const at::Half half_offset = half_not_above(low);
      const float offset = half_offset;
      const at::Half half_scale(std::min(std::max((high - offset) / last, kSmallestScale), kLargestHalf));
      const float scale = half_scale;
      offsets.mutable_data_ptr<at::Half>()[i] = half_offset, scales.mutable_data_ptr<at::Half>()[i] = half_scale;
      uint8_t* to = codes.mutable_data_ptr<uint8_t>() + i * bytes;
      uint8_t* each = bits == 8 ? to : own.data();
      for (int64_t j = 0; j < r; j++)
        each[j] = uint8_t(std::min(std::max(std::nearbyint((x[j] - offset) / scale), 0.f), last));
      for (int64_t j = 0; bits == 4 && j < bytes; j++) to[j] = own[j] | own[bytes + j] << 4;
    }
  });
  if (!fits) return {};
  return {codes, scales, offsets};
}

}  // namespace
