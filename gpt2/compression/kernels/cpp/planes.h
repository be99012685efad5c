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
    int order[r], count[8];  // channels of each width, by falling width
    sort(widths.at(at.b, at.g, at.index()), order, count);
    const uint8_t* plane = block.at(at.b, at.g, at.index());
    const uint8_t* metadata = plane;
    for (int k = 7; k > 0; k--) metadata += 8 * kWidths[k] * count[k];
    const int coded = r - count[0];
    float offset[r];
    const bool far = any_far(metadata, coded);
    if (far) offsets(metadata, order, coded, offset);
    Run<Tile> run{plane, metadata, order, far ? offset : nullptr, block.block, tile};
    run.all(count);
  }

  // The channels in the order in which a block has them, and how many have each width index, of which three planes of
  // r bits are given. Of 64 channels at a time, those of one width are the bits of a mask
  void sort(const uint8_t* packed, int* order, int* count) const {
    const int bytes = (r + 7) / 8, words = (r + 63) / 64;
    uint64_t planes[3][words];
    for (int j = 0; j < 3; j++) {
      planes[j][words - 1] = 0;
      std::memcpy(planes[j], packed + j * bytes, bytes);
    }
    int found = 0;
    for (int k = 7; k >= 0; k--) {
      const int before = found;
      for (int w = 0; w < words; w++) {
        uint64_t mask = w + 1 < words || r % 64 == 0 ? ~uint64_t(0) : (uint64_t(1) << r % 64) - 1;
        for (int j = 0; j < 3; j++) mask &= k >> j & 1 ? planes[j][w] : ~planes[j][w];
        for (; mask; mask &= mask - 1) order[found++] = 64 * w + __builtin_ctzll(mask);
      }
      count[k] = found - before;
    }
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

  static bool any_far(const uint8_t* metadata, int coded) {
    uint8_t least = 255;
    for (int i = 0; i < coded; i++) least = std::min(least, metadata[2 * i + 1]);
    return !least;
  }

  // The offset of every channel that has codes. Far offsets, marked by a byte of 0, follow all metadata in the order of
  // the channels
  void offsets(const uint8_t* metadata, const int* order, int coded, float* offset) const {
    std::fill_n(offset, r, 0.f);
    for (int i = 0; i < coded; i++) offset[order[i]] = metadata[2 * i + 1] - 128;
    const uint8_t* next = metadata + 2 * coded;
    for (int c = 0; c < r; c++) {
      if (offset[c] != -128) continue;
      int16_t own;
      std::memcpy(&own, next, sizeof own);
      offset[c] = own, next += sizeof own;
    }
  }
};

}  // namespace
