#include "crop_resize.h"

#include <cmath>

namespace dfengine {

namespace {

// The largest edge of a network input anybody uses is far below this; it only catches swapped arguments.
constexpr std::int32_t kMaxOut = 16384;
// Beyond this a float32 coordinate has no fraction left for the filter.
constexpr float kMaxCoordinate = 1 << 20;

struct LumaWeights {
  double kr, kb;
};

LumaWeights luma_weights(ColorStandard standard) {
  switch (standard) {
    case ColorStandard::kBt709:
      return {0.2126, 0.0722};
    case ColorStandard::kFcc:
      return {0.30, 0.11};
    case ColorStandard::kSmpte240m:
      return {0.212, 0.087};
    case ColorStandard::kBt2020:
      return {0.2627, 0.0593};
    default:
      return {0.299, 0.114};
  }
}

}  // namespace

ColorMatrix make_color_matrix(ColorStandard standard, bool full_range, int bit_depth, Transfer transfer) {
  DF_CHECK(bit_depth >= 8 && bit_depth <= 16, "bit_depth must be 8 to 16, got " + std::to_string(bit_depth));
  const double peak = std::ldexp(1.0, bit_depth) - 1;
  const double step = std::ldexp(1.0, bit_depth - 8);
  const double luma_offset = full_range ? 0 : 16 * step;
  const double luma = 1.0 / (full_range ? peak : 219 * step);
  const double chroma = 1.0 / (full_range ? peak : 224 * step);
  const double middle = 128 * step;

  double m[3][3] = {};
  double offset[3] = {luma_offset, middle, middle};
  if (standard == ColorStandard::kRgb) {
    for (int c = 0; c < 3; ++c) {
      m[c][c] = luma;
      offset[c] = luma_offset;
    }
  } else if (standard == ColorStandard::kGray) {
    for (auto& row : m) row[0] = luma;
  } else if (standard == ColorStandard::kYCgCo) {
    const double cg[3] = {-1, 1, -1}, co[3] = {1, 0, -1};
    for (int c = 0; c < 3; ++c) {
      m[c][0] = luma;
      m[c][1] = cg[c] * chroma;
      m[c][2] = co[c] * chroma;
    }
  } else {
    const LumaWeights k = luma_weights(standard);
    const double kg = 1 - k.kr - k.kb;
    for (auto& row : m) row[0] = luma;
    m[0][2] = 2 * (1 - k.kr) * chroma;
    m[1][1] = -2 * (1 - k.kb) * k.kb / kg * chroma;
    m[1][2] = -2 * (1 - k.kr) * k.kr / kg * chroma;
    m[2][1] = 2 * (1 - k.kb) * chroma;
  }
  ColorMatrix out;
  out.transfer = transfer;
  for (int c = 0; c < 3; ++c) {
    for (int j = 0; j < 3; ++j) out.m[c][j] = static_cast<float>(m[c][j]);
    out.offset[c] = static_cast<float>(offset[c]);
  }
  return out;
}

Normalization make_normalization(const CropResizeOptions& options) {
  Normalization norm;
  for (int c = 0; c < 3; ++c) {
    norm.scale[c] = 1.f / options.std[c];
    norm.bias[c] = -options.mean[c] / options.std[c];
  }
  return norm;
}

namespace {

// Stretches an axis of square pixels to coded ones. kArea takes whole ones, also where several make one square pixel.
void to_coded_pixels(std::int32_t coded, std::int32_t square, Filter filter, Axis& axis) {
  if (coded == square) return;
  const float scale = static_cast<float>(coded) / static_cast<float>(square);
  float begin = axis.begin * scale, end = (axis.begin + axis.length) * scale;
  if (filter == Filter::kArea) round_to_pixels(begin, end);
  axis.begin = begin;
  axis.length = end - begin;
}

// Clockwise quarter turns carry a coded point (x, y) of a w x h picture to
// (x, y), (h - y, x), (w - x, h - y), (y, w - x).
CodedCrop undo_turns(const Image& image, CropBox box, const CropResizeOptions& options) {
  const std::int32_t out_h = options.out_h, out_w = options.out_w;
  const auto w = static_cast<float>(image.square_width), h = static_cast<float>(image.square_height);
  const float width = box.x2 - box.x1, height = box.y2 - box.y1;
  switch (image.quarter_turns) {
    case 1:
      return {{box.y1, height, out_h}, {h - box.x2, width, out_w}};
    case 2:
      return {{w - box.x2, width, out_w}, {h - box.y2, height, out_h}};
    case 3:
      return {{w - box.y2, height, out_h}, {box.x1, width, out_w}};
    default:
      return {{box.x1, width, out_w}, {box.y1, height, out_h}};
  }
}

}  // namespace

CodedCrop make_coded_crop(const Image& image, CropBox box, const CropResizeOptions& options) {
  if (options.filter == Filter::kArea) {
    round_to_pixels(box.x1, box.x2);
    round_to_pixels(box.y1, box.y2);
  }
  CodedCrop crop = undo_turns(image, box, options);
  if (image.mirrored) crop.x.begin = static_cast<float>(image.square_width) - crop.x.begin - crop.x.length;
  to_coded_pixels(image.width, image.square_width, options.filter, crop.x);
  to_coded_pixels(image.height, image.square_height, options.filter, crop.y);
  return crop;
}

void check_crop_resize(const std::vector<Image>& images, const std::vector<CropBox>& boxes,
                       const CropResizeOptions& options) {
  DF_CHECK(options.out_h > 0 && options.out_w > 0 && options.out_h <= kMaxOut && options.out_w <= kMaxOut,
           "out_hw must be within 1.." + std::to_string(kMaxOut) + ", got (" + std::to_string(options.out_h) + ", " +
               std::to_string(options.out_w) + ")");
  for (int c = 0; c < 3; ++c) {
    DF_CHECK(std::isfinite(options.mean[c]), "mean must be finite");
    DF_CHECK(std::isfinite(options.std[c]) && options.std[c] > 1e-6f,
             "std must be positive (at least 1e-6), got " + std::to_string(options.std[c]));
  }
  for (std::size_t n = 0; n < boxes.size(); ++n) {
    const CropBox& box = boxes[n];
    const std::string name = "box " + std::to_string(n) + " ";
    DF_CHECK(box.image >= 0 && static_cast<std::size_t>(box.image) < images.size(),
             name + "refers to image " + std::to_string(box.image) + ", but there are " +
                 std::to_string(images.size()) + " images");
    for (const float v : {box.x1, box.y1, box.x2, box.y2}) {
      DF_CHECK(std::isfinite(v) && std::fabs(v) <= kMaxCoordinate,
               name + "has a coordinate that is not finite or beyond 2^20: " + std::to_string(v));
    }
    DF_CHECK(box.x2 > box.x1 && box.y2 > box.y1, name + "is empty: xyxy (" + std::to_string(box.x1) + ", " +
                                                     std::to_string(box.y1) + ", " + std::to_string(box.x2) + ", " +
                                                     std::to_string(box.y2) + ")");
  }
}

}  // namespace dfengine
