// Per-pixel maths of crop-and-resize: which samples make one output pixel, with which weights, and what
// colour they are. Compiled by g++ into the CPU op and by nvcc into the CUDA op, so that both have one
// sample grid, one filter and one rounding.
//
// Note [Filtering before colour]
// Colour conversion is affine, so filtering each component on its own grid and converting once per *output*
// pixel equals converting every source pixel and filtering RGB - except for the clamp to 0..1, which is
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
#include "transfer.h"

namespace dfengine {

enum class Filter {
  kTriangle,  // antialiased: a tent whose width follows the scale; bilinear when enlarging. PIL's BILINEAR, but for
              // the rim of the picture, where PIL drops what lies outside and `Padding` rules here.
  kArea,  // mean over whole pixels, bin edges floor/ceil: torch's adaptive average pooling ("area")
  kBilinear,  // two taps, no antialiasing: torch's and OpenCV's plain bilinear
};

enum class Padding {
  kEdge,  // outside the picture, its nearest pixel
  kZero,  // outside the picture, black (before mean and std)
};

// One axis of a crop: the half-open interval [begin, begin + length) of upright luma pixels becomes `out` pixels.
struct Axis {
  float begin = 0.f;
  float length = 0.f;
  std::int32_t out = 0;
  std::int32_t subsample = 1;  // luma pixels per sample of the component that is being read
};

// What makes one output pixel along one axis: samples [first, first + count) of the component, which may lie outside of
// the picture, sample first + k with weight tap_weight(taps, k) * norm.
//
// Note [One formula for all filters]
// A tent, and the overlap of a sample with a bin of whole pixels, are both a trapezoid over the distance between the
// sample and the middle of the output pixel, and a tent is one without a flat top: with the distance in units of the
// slope's length, the weight is saturate(reach - |distance + k * step|). So loops over taps know no filters.
struct alignas(16) Taps {
  std::int32_t first;
  std::int32_t count;
  float distance;
  float step;
  float reach;
  float norm;  // 1 / the sum of all weights; this and the next are filled in by `measure_taps`
  float coverage;  // the share of the weights that is not dropped: 1, but at the rim of a zero-padded crop
};

DF_HD inline std::int32_t floor_to_int(float v) { return static_cast<std::int32_t>(floorf(v)); }

// Floor division for possibly negative numerators.
DF_HD inline std::int32_t floor_div(std::int32_t a, std::int32_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

DF_HD inline float saturate(float v) {
#if defined(__CUDA_ARCH__)
  return __saturatef(v);  // free: a flag of the instruction that computes v
#else
  return v < 0.f ? 0.f : (v > 1.f ? 1.f : v);
#endif
}

// kArea works on whole pixels, at least one. To be applied to upright coordinates, before a turn: halves go up, and
// a turned picture must give what the upright one gives.
DF_HD inline void round_to_pixels(float& begin, float& end) {
  begin = floorf(begin + 0.5f);
  end = floorf(end + 0.5f);
  if (end < begin + 1.f) end = begin + 1.f;
}

// Taps of output pixel `i`. kArea takes an interval that `round_to_pixels` was applied to.
DF_HD inline Taps make_taps(Filter filter, const Axis& axis, std::int32_t i) {
  Taps taps{};
  const auto subsample = static_cast<float>(axis.subsample);
  if (filter == Filter::kArea) {
    const auto n = static_cast<std::int64_t>(axis.length);
    const auto lo = static_cast<std::int32_t>(i * n / axis.out);
    const auto hi = static_cast<std::int32_t>(((i + 1) * n + axis.out - 1) / axis.out);
    const std::int32_t begin = floor_to_int(axis.begin) + lo;  // the bin, in luma pixels
    const auto width = static_cast<float>(hi - lo);
    const float slope = width < subsample ? width : subsample;
    taps.first = floor_div(begin, axis.subsample);
    taps.count = floor_div(begin + (hi - lo) - 1, axis.subsample) - taps.first + 1;
    taps.distance = (static_cast<float>(taps.first * axis.subsample - begin) + 0.5f * (subsample - width)) / slope;
    taps.step = subsample / slope;
    taps.reach = 0.5f * (width + subsample) / slope;
    return taps;
  }
  const float scale = axis.length / static_cast<float>(axis.out);
  // Of the output pixel's middle, in samples of the component, pixel edges at integers.
  const float centre = (axis.begin + (static_cast<float>(i) + 0.5f) * scale) / subsample;
  float support = 1.f;  // half width of the tent, in samples of the component
  if (filter == Filter::kBilinear) {
    taps.first = floor_to_int(centre - 0.5f);
    taps.count = 2;
  } else {
    if (scale > subsample) support = scale / subsample;
    taps.first = floor_to_int(centre - support + 0.5f);
    const std::int32_t end = floor_to_int(centre + support + 0.5f);
    taps.count = end > taps.first ? end - taps.first : 1;
  }
  taps.distance = (static_cast<float>(taps.first) + 0.5f - centre) / support;
  taps.step = 1.f / support;
  taps.reach = 1.f;
  return taps;
}

// Weight of sample first + k, not normalised.
DF_HD inline float tap_weight(const Taps& taps, std::int32_t k) {
  return saturate(taps.reach - fabsf(taps.distance + static_cast<float>(k) * taps.step));
}

// Fills in `norm` and `coverage` for a component of `size` samples along this axis.
DF_HD inline void measure_taps(Padding padding, std::int32_t size, Taps& taps) {
  float total = 0.f, inside = 0.f;
  for (std::int32_t k = 0; k < taps.count; ++k) {
    const std::int32_t x = taps.first + k;
    const float w = tap_weight(taps, k);
    total += w;
    if (padding == Padding::kEdge || (x >= 0 && x < size)) inside += w;
  }
  taps.norm = 1.f / total;
  taps.coverage = inside * taps.norm;
}

// Mean and standard deviation of the network's input, as `out = rgb * scale + bias`.
struct Normalization {
  float scale[3];
  float bias[3];
};

// Filtered components -> one normalised RGB pixel. `coverage[j]` is the share of component j's taps that lay
// inside the picture: 1, except at the rim of a zero-padded crop, where it makes the missing part black.
DF_HD inline void finish_pixel(const ColorMatrix& color, const Normalization& norm, const float sample[3],
                               const float coverage[3], float rgb[3]) {
  float centred[3];
  for (int j = 0; j < 3; ++j) centred[j] = sample[j] - color.offset[j] * coverage[j];
  for (int c = 0; c < 3; ++c) {
    const float v = color.m[c][0] * centred[0] + color.m[c][1] * centred[1] + color.m[c][2] * centred[2];
    rgb[c] = saturate(v) * norm.scale[c] + norm.bias[c];
  }
}

// The same for a picture that may be HDR. A function of its own, so that the other stays as small as it is.
DF_HD inline void finish_hdr_pixel(const ColorMatrix& color, const Normalization& norm, const float sample[3],
                                   const float coverage[3], float rgb[3]) {
  const Normalization plain{{1.f, 1.f, 1.f}, {0.f, 0.f, 0.f}};
  finish_pixel(color, plain, sample, coverage, rgb);
  if (color.transfer != Transfer::kSdr) to_sdr(color.transfer, rgb);
  for (int c = 0; c < 3; ++c) rgb[c] = rgb[c] * norm.scale[c] + norm.bias[c];
}

// IEEE binary16, round to nearest even; saturates to infinity as a cast does.
DF_HD inline std::uint16_t to_float16(float value) {
#if defined(__CUDA_ARCH__)
  std::uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
#else
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
#endif
}

}  // namespace dfengine
