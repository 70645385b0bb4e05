// Per-pixel maths of crop-and-resize: which samples make one output pixel, with which weights, and what
// colour they are. Compiled by g++ into the CPU op and by nvcc into the CUDA op, so that both have one
// sample grid, one filter and one rounding.
//
// Note [Filtering before colour]
// Colour conversion is affine, so filtering each component on its own grid and converting once per *output*
// pixel equals converting every source pixel and filtering RGB - except for the clamp to 0..255, which is
// applied once at the end. That makes chroma cost a quarter of luma for 4:2:0, and no RGB frame exists.
//
// Note [Chroma grid]
// Chroma sample c covers the luma interval [c * s, (c + 1) * s) for subsampling s: the convention of
// swscale's unscaled YUV to RGB conversion, with which the training sets of this field were made. Left-sited
// streams are thereby read with an error of half a luma pixel in chroma.
#pragma once

#include <cmath>
#include <cstdint>

#include "image.h"

namespace dfengine {

enum class Filter {
  kTriangle,  // antialiased: a tent whose width follows the scale; bilinear when enlarging. PIL's BILINEAR, but for
              // the rim of the picture, where PIL drops what lies outside and `Padding` rules here.
  kArea,  // mean over whole pixels, bin edges floor/ceil: torch's adaptive average pooling ("area")
  kBilinear,  // two taps, no antialiasing: torch's and OpenCV's plain bilinear
};

// One axis of a crop: the half-open interval [begin, begin + length) of upright luma pixels becomes `out` pixels.
struct Axis {
  float begin = 0.f;
  float length = 0.f;
  std::int32_t out = 0;
  std::int32_t subsample = 1;  // luma pixels per sample of the component that is being read
};

// Samples [first, first + count) of the component; may leave the picture, see `Taps` users for padding.
struct TapRange {
  std::int32_t first = 0;
  std::int32_t count = 0;
};

DF_HD inline std::int32_t floor_to_int(float v) { return static_cast<std::int32_t>(floorf(v)); }

// Floor division for possibly negative numerators.
DF_HD inline std::int32_t floor_div(std::int32_t a, std::int32_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// Centre of output pixel `i`, in samples of the component, pixel edges at integers.
DF_HD inline float tap_centre(const Axis& axis, std::int32_t i) {
  const float scale = axis.length / static_cast<float>(axis.out);
  return (axis.begin + (static_cast<float>(i) + 0.5f) * scale) / static_cast<float>(axis.subsample);
}

// Half width of the tent, in samples of the component.
DF_HD inline float tap_support(const Axis& axis) {
  const float scale = axis.length / (static_cast<float>(axis.out) * static_cast<float>(axis.subsample));
  return scale > 1.f ? scale : 1.f;
}

// kArea works on whole pixels, at least one. To be applied to upright coordinates, before a turn: halves go up, and
// a turned picture must give what the upright one gives.
DF_HD inline void round_to_pixels(float& begin, float& end) {
  begin = floorf(begin + 0.5f);
  end = floorf(end + 0.5f);
  if (end < begin + 1.f) end = begin + 1.f;
}

// The luma bin of output pixel `i` under kArea, of an interval that `round_to_pixels` was applied to.
DF_HD inline TapRange area_bin(const Axis& axis, std::int32_t i) {
  const std::int32_t begin = floor_to_int(axis.begin);
  const auto n = static_cast<std::int64_t>(axis.length);
  const auto lo = static_cast<std::int32_t>(i * n / axis.out);
  const auto hi = static_cast<std::int32_t>(((i + 1) * n + axis.out - 1) / axis.out);
  return {begin + lo, hi - lo};
}

DF_HD inline TapRange tap_range(Filter filter, const Axis& axis, std::int32_t i) {
  if (filter == Filter::kArea) {
    const TapRange bin = area_bin(axis, i);
    const std::int32_t first = floor_div(bin.first, axis.subsample);
    const std::int32_t last = floor_div(bin.first + bin.count - 1, axis.subsample);
    return {first, last - first + 1};
  }
  const float centre = tap_centre(axis, i);
  if (filter == Filter::kBilinear) return {floor_to_int(centre - 0.5f), 2};
  const float support = tap_support(axis);
  const std::int32_t first = floor_to_int(centre - support + 0.5f);
  const std::int32_t end = floor_to_int(centre + support + 0.5f);
  return {first, end > first ? end - first : 1};
}

// Weight of sample `x`, not normalised. The caller divides by the sum over the range.
DF_HD inline float tap_weight(Filter filter, const Axis& axis, std::int32_t i, std::int32_t x) {
  if (filter == Filter::kArea) {
    const TapRange bin = area_bin(axis, i);
    const std::int32_t lo = x * axis.subsample > bin.first ? x * axis.subsample : bin.first;
    const std::int32_t bin_end = bin.first + bin.count;
    const std::int32_t hi = (x + 1) * axis.subsample < bin_end ? (x + 1) * axis.subsample : bin_end;
    return hi > lo ? static_cast<float>(hi - lo) : 0.f;
  }
  const float support = filter == Filter::kBilinear ? 1.f : tap_support(axis);
  const float distance = fabsf(static_cast<float>(x) + 0.5f - tap_centre(axis, i)) / support;
  return distance < 1.f ? 1.f - distance : 0.f;
}

// Mean and standard deviation of the network's input, as `out = rgb * scale + bias` on rgb in 0..255.
struct Normalization {
  float scale[3];
  float bias[3];
};

DF_HD inline float clamp_255(float v) { return v < 0.f ? 0.f : (v > 255.f ? 255.f : v); }

// Filtered components -> one normalised RGB pixel. `coverage[j]` is the share of component j's taps that lay
// inside the picture: 1, except at the rim of a zero-padded crop, where it makes the missing part black.
DF_HD inline void finish_pixel(const ColorMatrix& color, const Normalization& norm, const float sample[3],
                               const float coverage[3], float rgb[3]) {
  float centred[3];
  for (int j = 0; j < 3; ++j) centred[j] = sample[j] - color.offset[j] * coverage[j];
  for (int c = 0; c < 3; ++c) {
    const float v = color.m[c][0] * centred[0] + color.m[c][1] * centred[1] + color.m[c][2] * centred[2];
    rgb[c] = clamp_255(v) * norm.scale[c] + norm.bias[c];
  }
}

// IEEE binary16, round to nearest even; saturates to infinity as a cast does.
DF_HD inline std::uint16_t to_float16(float value) {
  union {
    float f;
    std::uint32_t u;
  } bits;
  bits.f = value;
  const std::uint32_t sign = (bits.u >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits.u & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return static_cast<std::uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal: let the float adder round at 2^-24
    bits.u = magnitude;
    bits.f += 0.5f;
    return static_cast<std::uint16_t>(sign | (bits.u - 0x3f000000u));
  }
  const std::uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

}  // namespace dfengine
