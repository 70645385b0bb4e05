// From the colours of HDR to those of SDR, which is what networks were trained on.
//
// Light up to diffuse white, which HDR puts at 203 cd/m2 (ITU-R BT.2408), becomes the range of SDR, and what is brighter
// is clipped: lamps and reflections, never skin. Display light of BT.2020 primaries (the only ones of ITU-R BT.2100)
// goes to BT.709 ones (the matrix of ITU-R BT.2087, inverted) and through the inverse of ITU-R BT.1886.
#pragma once

#include <cmath>
#include <cstdint>

#include "image.h"

namespace dfengine {

constexpr float kDiffuseWhite = 203.f;  // cd/m2
constexpr float kHlgPeak = 1000.f;  // cd/m2, the display for which BT.2100 states a system gamma of 1.2

// SMPTE ST 2084, in cd/m2.
DF_HD inline float pq_light(float v) {
  constexpr float kM1 = 2610.f / 16384.f, kM2 = 2523.f / 32.f;
  constexpr float kC1 = 3424.f / 4096.f, kC2 = 2413.f / 128.f, kC3 = 2392.f / 128.f;
  const float n = powf(v, 1.f / kM2);
  const float above = n > kC1 ? n - kC1 : 0.f;
  return 10000.f * powf(above / (kC2 - kC3 * n), 1.f / kM1);
}

// Light of the scene, 0..1 (ITU-R BT.2100, table 5).
DF_HD inline float hlg_light(float v) {
  constexpr float kA = 0.17883277f, kB = 1.f - 4.f * kA, kC = 0.55991073f;
  return v <= 0.5f ? v * v / 3.f : (expf((v - kC) / kA) + kB) / 12.f;
}

// RGB on the scale 0..1 of `transfer`, which is not kSdr -> RGB on the scale 0..1 of SDR, in place.
DF_HD inline void to_sdr(Transfer transfer, float rgb[3]) {
  float light[3];  // in diffuse whites
  if (transfer == Transfer::kPq) {
    for (int c = 0; c < 3; ++c) light[c] = pq_light(rgb[c]) / kDiffuseWhite;
  } else {
    for (int c = 0; c < 3; ++c) light[c] = hlg_light(rgb[c]);
    const float luminance = 0.2627f * light[0] + 0.6780f * light[1] + 0.0593f * light[2];
    const float gain = powf(luminance, 0.2f) * (kHlgPeak / kDiffuseWhite);
    for (int c = 0; c < 3; ++c) light[c] *= gain;
  }
  constexpr float kTo709[3][3] = {
      {1.6605f, -0.5876f, -0.0728f}, {-0.1246f, 1.1329f, -0.0083f}, {-0.0182f, -0.1006f, 1.1187f}};
  for (int c = 0; c < 3; ++c) {
    const float v = kTo709[c][0] * light[0] + kTo709[c][1] * light[1] + kTo709[c][2] * light[2];
    rgb[c] = powf(v < 0.f ? 0.f : (v > 1.f ? 1.f : v), 1.f / 2.4f);
  }
}

}  // namespace dfengine
