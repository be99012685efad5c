// Blocks of bit planes, of channels that have different widths.
#pragma once

#include "plane_tiles.h"

namespace {

// Blocks whose channels have different widths: bit planes, sorted by falling width, followed by the metadata
struct Planes final : Codec {
  Field block, widths;

  Planes(const Tensor* fields, int r) : Codec(r, false), block(fields[0]), widths(fields[1]) {}

  void scores(const Block& at, const float* q, int64_t q_row, int M, float* out, Scratch& scratch) const override {
    float* tile = decoded(at, scratch);
#ifdef __AVX2__
    if (scratch.integers) return IntegerTile(tile, r).scores(q, q_row, used(at), M, out);
#endif
    std::fill_n(out, M * kBlock, 0.f);
    along(q, q_row, tile, used(at), kBlock, M, out, kBlock);
  }
  void add_sums(const Block& at, const float* p, int M, float* out, int64_t out_row, Scratch& scratch) const override {
    float* tile = decoded(at, scratch);
#ifdef __AVX2__
    if (scratch.integers) return IntegerTile(tile, r).add_sums(p, used(at), M, out, out_row);
#endif
    across(p, kBlock, tile, used(at), kBlock, M, out, out_row);
  }

  // Channels up to the last one that has codes. Bases have their channels sorted by how far they spread, so that those
  // behind it are often many
  int used(const Block& at) const override {
    const uint8_t* packed = widths.at(at.b, at.g, at.index());
    const int bytes = (r + 7) / 8;
    for (int i = bytes - 1; i >= 0; i--)
      if (const int any = packed[i] | packed[bytes + i] | packed[2 * bytes + i])
        return std::min(r, 8 * i + 32 - __builtin_clz(any));
    return 0;
  }

 private:
  // The tile of a block. Where K and V are the same codes, the second to ask finds it decoded
  float* decoded(const Block& at, Scratch& scratch) const {
    const uint8_t* codes = block.at(at.b, at.g, at.index());
#ifdef __AVX2__
    float* tile = scratch.floats(scratch.integers ? IntegerTile::floats(r) : kBlock * r);
    if (scratch.holds == codes) return tile;
    scratch.integers ? decode(at, IntegerTile(tile, r)) : decode(at, FloatTile{tile});
#else
    float* tile = scratch.floats(kBlock * r);
    if (scratch.holds != codes) decode(at, FloatTile{tile});
#endif
    scratch.holds = codes;
    return tile;
  }

  template <typename Tile>
  void decode(const Block& at, const Tile& tile) const {
    uint8_t index[r + 8];
    indices(widths.at(at.b, at.g, at.index()), index);
    int count[8] = {}, place[8];
    for (int c = 0; c < r; c += kBlock) {
      const uint64_t some = counts(index + c, std::min(kBlock, r - c));
      for (int k = 0; k < 8; k++) count[k] += some >> 8 * k & 255;
    }
    const uint8_t* plane = block.at(at.b, at.g, at.index());
    const uint8_t* metadata = plane;
    for (int k = 7, next = 0; k >= 0; k--) {
      place[k] = next;
      next += count[k], metadata += 8 * kWidths[k] * count[k];
    }
    int order[r];
    for (int first = 0; first < r; first += kBlock) {
      const int end = std::min(first + kBlock, r);
      uint64_t before = 0;
      for (int c = first; c < end; c++) {
        order[place[index[c]] + (before >> 8 * index[c] & 255)] = c;
        before += uint64_t(1) << 8 * index[c];
      }
      for (int k = 0; k < 8; k++) place[k] += before >> 8 * k & 255;
    }
    const int coded = r - count[0];
    float offset[r];
    const bool far = any_far(metadata, coded);
    if (far) offsets(metadata, index, order, coded, offset);
    Run<Tile> run{plane, metadata, order, far ? offset : nullptr, block.block, tile};
    run.all(count);
  }

  // How many of up to 64 channels have each width index, a byte for each. In a register, as counting in memory would
  // wait for the last channel's count to be written before it is read
  static uint64_t counts(const uint8_t* index, int channels) {
    uint64_t all = 0;
    for (int c = 0; c < channels; c++) all += uint64_t(1) << 8 * index[c];
    return all;
  }

  // Where decoding has arrived. Channels of one width follow each other, so each width has code of its own
  template <typename Tile>
  struct Run {
    const uint8_t *plane, *metadata;
    const int* order;
    const float* offset;  // if any is far
    int64_t next;         // bytes to the next block
    Tile tile;

    template <int k = 7>
    void all(const int* count) {
      channels<k>(count);
      if constexpr (k > 0) all<k - 1>(count);
    }
    template <int k>
    void channels(const int* count) {
      constexpr int bits = kWidths[k];
      for (int i = 0; i < count[k]; i++, order++) {
        if constexpr (bits == 0) {
          tile.clear(*order);
        } else {
          prefetch(plane + next, 8 * bits);
          tile.template write<bits>(*order, plane, kSteps[*metadata], offset ? offset[*order] : metadata[1] - 128);
          plane += 8 * bits, metadata += 2;
        }
      }
    }
  };

  // Width index of every channel, from three bit planes of r bits
  void indices(const uint8_t* packed, uint8_t* index) const {
    const int bytes = (r + 7) / 8;
    for (int i = 0; i < bytes; i++) {
      uint64_t eight = kSpread[packed[i]] | kSpread[packed[bytes + i]] << 1 | kSpread[packed[2 * bytes + i]] << 2;
      std::memcpy(index + 8 * i, &eight, 8);
    }
  }

  static bool any_far(const uint8_t* metadata, int coded) {
    uint8_t least = 255;
    for (int i = 0; i < coded; i++) least = std::min(least, metadata[2 * i + 1]);
    return !least;
  }

  // The offset of every channel that has codes. Far offsets, marked by a byte of 0, follow all metadata in the order of
  // the channels
  void offsets(const uint8_t* metadata, const uint8_t* index, const int* order, int coded, float* offset) const {
    for (int i = 0; i < coded; i++) offset[order[i]] = metadata[2 * i + 1] - 128;
    const uint8_t* next = metadata + 2 * coded;
    for (int c = 0; c < r; c++) {
      if (!index[c] || offset[c] != -128) continue;
      int16_t own;
      std::memcpy(&own, next, sizeof own);
      offset[c] = own, next += sizeof own;
    }
  }
};

}  // namespace
