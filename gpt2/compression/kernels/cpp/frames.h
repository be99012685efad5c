// Queries that a basis of un-rotated keys absorbs: for every block of K one of its own, rotated back by the position of
// the block's middle.
//
// A thread absorbs queries for the next few blocks together, so that each number of the basis is loaded once for all.
#pragma once

#include "parts.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace {

constexpr int kTogether = 6;  // blocks
constexpr int kPanel = kLanes * power_up_to(std::min(kSet.widest, kSet.sums / kTogether));  // columns of a basis

// What reads the keys of heads that share a basis, of read [G, h, r + 1, d] all but the last line, as panels of columns
// [G, h, panels, d, kPanel]. integers: as pairs of integers, [G, h, panels, (d + 1) / 2 + 1, kPanel] words of 32 bits, if
// the processor has products of these; the last line of a panel has the units of its columns, as floats
Tensor panels(const Tensor& read, bool integers) {
  const int64_t columns = read.size(2) - 1, count = (columns + kPanel - 1) / kPanel, d = read.size(3);
  const Tensor from = read.contiguous();
  const float* x = from.const_data_ptr<float>();
#ifdef __AVX2__
  if (integers) {
    const int64_t pairs = (d + 1) / 2, line = 2 * kPanel;  // integers of a line
    const Tensor out = at::zeros({read.size(0), read.size(1), count, pairs + 1, kPanel}, read.options().dtype(at::kInt));
    auto* to = reinterpret_cast<int16_t*>(out.mutable_data_ptr<int32_t>());
    for (int64_t head = 0; head < read.size(0) * read.size(1); head++)
      for (int64_t c = 0; c < columns; c++) {
        const float* own = x + (head * (columns + 1) + c) * d;
        const Unit unit(std::sqrt(dot(own, own, d)));
        int16_t* panel = to + (head * count + c / kPanel) * (pairs + 1) * line + c % kPanel * 2;
        for (int64_t i = 0; i < d; i++) panel[i / 2 * line + i % 2] = int16_t(std::nearbyint(own[i] * unit.inverse));
        std::memcpy(panel + pairs * line, &unit.value, sizeof unit.value);
      }
    return out;
  }
#endif
  Tensor out = at::empty({read.size(0), read.size(1), count, d, kPanel}, read.options());
  float* to = out.mutable_data_ptr<float>();
  std::fill_n(to, out.numel(), 0.f);
  for (int64_t head = 0; head < read.size(0) * read.size(1); head++)
    for (int64_t c = 0; c < columns; c++)
      for (int64_t i = 0; i < d; i++)
        to[((head * count + c / kPanel) * d + i) * kPanel + c % kPanel] = x[(head * (columns + 1) + c) * d + i];
  return out;
}

// How queries are absorbed for each block
struct Frames {
  const Tensor panels;     // of `panels`
  const Tensor constant;   // [G, h, d]: its product with a query is what the scores of all tokens have added
  const Tensor angles;     // [frames, 2, pairs], or [B, frames, 2, pairs] where rows have their own: cosines, and sines
  const bool interleaved;  // whether channels 2i and 2i + 1 rotate together, rather than i and i + pairs

  bool integers() const { return panels.scalar_type() == at::kInt; }

  // From one absorbed query to the next
  int64_t columns() const { return panels.size(2) * kPanel + kLanes; }

  // out[i] of x [d], rotated back by the angles of one frame
  void rotate_back(const float* x, const float* cos, float* out) const {
    const int64_t pairs = angles.size(-1), d = constant.size(2);
    const float* sin = cos + pairs;
    std::copy(x + 2 * pairs, x + d, out + 2 * pairs);
    for (int64_t i = 0; i < pairs; i++) {
      const int64_t a = interleaved ? 2 * i : i, b = interleaved ? a + 1 : i + pairs;
      const float one = x[a], other = x[b];
      out[a] = one * cos[i] + other * sin[i];
      out[b] = other * cos[i] - one * sin[i];
    }
  }

  // q: the queries of a group of heads, [h, M, d] → out [count, h · M, columns] for `count` frames from `frame` on. Of
  // the columns only the first `used` are computed, and column r, what the scores of all tokens have added
  void absorb(const float* q, int64_t b, int64_t g, int64_t frame, int count, int64_t M, int used, int r, float* rotated,
              float* out) const {
    const int64_t h = panels.size(1), d = constant.size(2), rows = h * M;
    const float* own = angles.const_data_ptr<float>() +
                       (frame + (angles.dim() == 4 ? b * angles.size(1) : 0)) * 2 * angles.size(-1);
    for (int64_t row = 0; row < rows; row++)
      for (int f = 0; f < count; f++)
        rotate_back(q + row * d, own + f * 2 * angles.size(-1), rotated + (row * count + f) * d);
#ifdef __AVX2__
    integers() ? times_integers(rotated, g, count, M, used, out) : times_floats(rotated, g, count, M, used, out);
#else
    times_floats(rotated, g, count, M, used, out);
#endif
    const float* added = constant.const_data_ptr<float>() + g * h * d;
    for (int64_t row = 0; row < rows; row++)
      for (int f = 0; f < count; f++)
        out[(f * rows + row) * columns() + r] = dot(rotated + (row * count + f) * d, added + row / M * d, d);
  }

 private:
  // Rotated queries [h · M, count, d] times the columns of a group's basis
  void times_floats(const float* rotated, int64_t g, int count, int64_t M, int used, float* out) const {
    const int64_t h = panels.size(1), P = panels.size(2), d = panels.size(3), rows = h * M;
    const float* panel = panels.const_data_ptr<float>() + g * h * P * d * kPanel;
    const int64_t needed = (used + kPanel - 1) / kPanel;
    for (int64_t i = 0; i < count * rows; i++) std::fill_n(out + i * columns(), needed * kPanel, 0.f);
    for (int64_t head = 0; head < h; head++, panel += P * d * kPanel)
      for (int64_t p = 0; p < needed; p++)
        for (int64_t row = head * M; row < (head + 1) * M; row++)
          along(rotated + row * count * d, d, panel + p * d * kPanel, d, kPanel, count,
                out + row * columns() + p * kPanel, rows * columns());
  }

#ifdef __AVX2__
  // As `times_floats`. A query and a column have lengths of at most kTop, so that no sum needs more than 32 bits
  void times_integers(const float* rotated, int64_t g, int count, int64_t M, int used, float* out) const {
    const int64_t h = panels.size(1), P = panels.size(2), lines = panels.size(3), d = constant.size(2), rows = h * M;
    const int64_t pairs = lines - 1;
    std::vector<int32_t> own(rows * count * pairs);
    std::vector<float> unit(rows * count);
    for (int64_t i = 0; i < rows * count; i++) {
      const float* q = rotated + i * d;
      const Unit whole(std::sqrt(dot(q, q, d)));
      round_to(q, d, whole.inverse, reinterpret_cast<int16_t*>(&own[i * pairs]));
      unit[i] = whole.value;
    }
    for (int64_t head = 0; head < h; head++) {
      const int32_t* basis = panels.const_data_ptr<int32_t>() + (g * h + head) * P * lines * kPanel;
      for (int64_t p = 0; p * kPanel < used; p++, basis += lines * kPanel) {
        const auto* units = reinterpret_cast<const float*>(basis + pairs * kPanel);
        for (int64_t row = head * M; row < (head + 1) * M; row++)
          pass<kTogether>(count, 0, [&](auto few, int) {
            times_panel<decltype(few)::value, kPanel / kLanes>(&own[row * count * pairs], pairs, basis, pairs,
                                                               &unit[row * count], units,
                                                               out + row * columns() + p * kPanel, rows * columns());
          });
      }
    }
  }
#endif
};

// What a thread has absorbed for the blocks ahead, of each group of heads
class Absorbed {
 public:
  // Absorbed queries of one frame, [h · M, columns]. q: M queries for each KV head, [B, H, M, d], contiguous; r:
  // coordinates of a token; used_ahead(n): how many of them have codes in any of the next n frames, of which n is made
  // the number that the thread has to do
  template <typename Used>
  const float* of(const Frames& frames, const Tensor& q, int64_t b, int64_t g, int64_t frame, int r,
                  const Used& used_ahead) {
    if (int64_t(groups.size()) <= g) groups.resize(g + 1);
    Group& own = groups[g];
    const int64_t h = frames.panels.size(1), M = q.size(2), d = q.size(3), size = h * M * frames.columns();
    if (b != own.b || frame < own.first || frame >= own.first + own.count) {
      own.b = b, own.first = frame, own.count = kTogether;
      const int used = used_ahead(own.count);
      rotated.resize(kTogether * h * M * d), own.queries.resize(kTogether * size);
      const float* from = q.const_data_ptr<float>() + (b * q.size(1) + g * h) * M * d;
      frames.absorb(from, b, g, frame, own.count, M, used, r, rotated.data(), own.queries.data());
    }
    return &own.queries[(frame - own.first) * size];
  }

 private:
  struct Group {
    std::vector<float> queries;
    int64_t b = -1, first = 0;
    int count = 0;
  };
  std::vector<Group> groups;
  std::vector<float> rotated;
};

}  // namespace
