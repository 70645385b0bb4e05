// Views over decoded pictures, and the one colour rule of dfengine.
//
// Nothing here owns memory, and nothing here knows what a face is.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define DF_HD __host__ __device__
#else
#define DF_HD
#endif

namespace dfengine {

// One colour component of a picture: Y, Cb, Cr, or R, G, B. Interleaved chroma (NV12, P016) is two planes
// with `step_bytes` of two samples that start one sample apart.
struct Plane {
  const std::uint8_t* data = nullptr;
  std::int64_t row_bytes = 0;  // from one row to the next; may be larger than the row, may be negative
  std::int32_t step_bytes = 0;  // from one sample to the next
  std::int32_t width = 0;
  std::int32_t height = 0;
};

enum class Transfer : std::int32_t { kSdr, kPq, kHlg };

// The affine map from samples to RGB on the scale 0..1: rgb[i] = sum_j m[i][j] * (sample[j] - offset[j]).
// Passed by value, to kernels too: a matrix in shared memory of the device would race between streams.
struct ColorMatrix {
  float m[3][3];
  float offset[3];
  Transfer transfer;  // of the RGB that the matrix gives
};

// A decoded picture as the decoder left it ("coded" orientation), with what is needed to read it.
struct Image {
  Plane planes[3];  // Y, Cb, Cr or R, G, B; gray pictures use only the first
  std::int32_t components = 0;  // 1 or 3
  std::int32_t sample_bytes = 1;  // 1 or 2
  std::int32_t width = 0;  // of the first plane, coded orientation
  std::int32_t height = 0;
  std::int32_t square_width = 0;  // the same in square pixels, in which boxes are
  std::int32_t square_height = 0;
  std::int32_t subsample_x = 1;  // first-plane pixels per chroma sample
  std::int32_t subsample_y = 1;
  bool mirrored = false;  // left and right are to be swapped first,
  std::int32_t quarter_turns = 0;  // and then as many clockwise turns, 0..3, make the picture upright
  ColorMatrix color;

  DF_HD bool turned() const { return (quarter_turns & 1) != 0; }
  DF_HD std::int32_t upright_width() const { return turned() ? square_height : square_width; }
  DF_HD std::int32_t upright_height() const { return turned() ? square_width : square_height; }
};

enum class ColorStandard { kRgb, kGray, kBt601, kBt709, kFcc, kSmpte240m, kBt2020, kYCgCo };

// Builds the matrix for samples of `bit_depth` bits. MSB-aligned samples (P010, P016) are 16-bit samples.
//
// Luma weights (Kr, Kb): BT.601 .299 .114, BT.709 .2126 .0722, FCC .30 .11, SMPTE 240M .212 .087,
// BT.2020 .2627 .0593 (ITU-T H.273, table 4). Limited range is 16..235 (chroma 16..240) at 8 bits, scaled by
// 2^(bit_depth - 8) at other depths; full range is 0..2^bit_depth - 1.
ColorMatrix make_color_matrix(ColorStandard standard, bool full_range, int bit_depth, Transfer transfer);

}  // namespace dfengine
