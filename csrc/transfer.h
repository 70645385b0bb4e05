// From the colours of HDR to those of SDR, which is what networks were trained on.
//
// Light up to diffuse white, which HDR puts at 203 cd/m2 (ITU-R BT.2408), becomes the range of SDR, and what is
// brighter is clipped: lamps and reflections, never skin. Display light of BT.2020 primaries (the only ones of ITU-R
// BT.2100) goes to BT.709 ones (the matrix of ITU-R BT.2087, inverted) and through the inverse of ITU-R BT.1886.
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

// Display light in diffuse whites -> SDR.
DF_HD inline float bt1886_signal(float light) {
  return powf(light < 0.f ? 0.f : (light > 1.f ? 1.f : light), 1.f / 2.4f);
}

// RGB on the scale 0..1 of `transfer`, which is not kSdr -> RGB on the scale 0..1 of SDR, in place. Without loops: what
// is indexed by one would not be kept in registers.
DF_HD inline void to_sdr(Transfer transfer, float rgb[3]) {
  float r, g, b, gain;
  if (transfer == Transfer::kPq) {
    r = pq_light(rgb[0]);
    g = pq_light(rgb[1]);
    b = pq_light(rgb[2]);
    gain = 1.f / kDiffuseWhite;
  } else {
    r = hlg_light(rgb[0]);
    g = hlg_light(rgb[1]);
    b = hlg_light(rgb[2]);
    gain = powf(0.2627f * r + 0.6780f * g + 0.0593f * b, 0.2f) * (kHlgPeak / kDiffuseWhite);
  }
  rgb[0] = bt1886_signal(gain * (1.6605f * r - 0.5876f * g - 0.0728f * b));
  rgb[1] = bt1886_signal(gain * (-0.1246f * r + 1.1329f * g - 0.0083f * b));
  rgb[2] = bt1886_signal(gain * (-0.0182f * r - 0.1006f * g + 1.1187f * b));
}

}  // namespace dfengine
