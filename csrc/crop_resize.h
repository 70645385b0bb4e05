// crop_resize: many boxes of many pictures -> one normalised NCHW batch, in one call.
//
// Boxes are xyxy, float, half-open, in square pixels of the *upright* picture (mirrored and turned), and may leave it.
// Output is (boxes, 3, out_h, out_w) RGB, contiguous, float32 or float16:
//   out = (rgb / 255 - mean) / std.
// The CPU version is the specification of the CUDA version: same header (resample.h), same grid, same filter.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "image.h"
#include "resample.h"

namespace dfengine {

struct CropResizeOptions {
  std::int32_t out_h = 0;
  std::int32_t out_w = 0;
  Filter filter = Filter::kTriangle;
  Padding padding = Padding::kEdge;
  float mean[3] = {0.f, 0.f, 0.f};  // on RGB in 0..1
  float std[3] = {1.f, 1.f, 1.f};
  bool half = false;  // float16 output
};

struct CropBox {
  float x1, y1, x2, y2;
  std::int32_t image;  // index into `images`
};

// A caller's mistake; becomes ValueError in Python.
struct InvalidArgument : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

#define DF_CHECK(condition, message)                              \
  do {                                                            \
    if (!(condition)) throw ::dfengine::InvalidArgument(message); \
  } while (false)

// Throws InvalidArgument. Called by every device's entry point.
void check_crop_resize(const std::vector<Image>& images, const std::vector<CropBox>& boxes,
                       const CropResizeOptions& options);

Normalization make_normalization(const CropResizeOptions& options);

// A box in coded orientation; `subsample` is filled in per component.
struct CodedCrop {
  Axis x, y;
};

CodedCrop make_coded_crop(const Image& image, CropBox box, const CropResizeOptions& options);

// Where the pixels of a coded crop go in the upright output: index = base + row * per_row + column * per_column.
struct OutputOrder {
  std::int64_t base, per_row, per_column;
};

DF_HD inline OutputOrder make_turned_order(std::int32_t quarter_turns, std::int64_t out_h, std::int64_t out_w) {
  switch (quarter_turns) {
    case 1:
      return {out_w - 1, -1, out_w};
    case 2:
      return {out_h * out_w - 1, -out_w, -1};
    case 3:
      return {(out_h - 1) * out_w, 1, -out_w};
    default:
      return {0, out_w, 1};
  }
}

DF_HD inline OutputOrder make_output_order(bool mirrored, std::int32_t quarter_turns, std::int64_t out_h,
                                           std::int64_t out_w) {
  OutputOrder order = make_turned_order(quarter_turns, out_h, out_w);
  if (mirrored) {
    const std::int64_t columns = (quarter_turns & 1) != 0 ? out_h : out_w;
    order.base += (columns - 1) * order.per_column;
    order.per_column = -order.per_column;
  }
  return order;
}

// `out` holds boxes.size() * 3 * out_h * out_w elements, float or std::uint16_t (binary16) as `options.half`
// says. Work is shared by `threads` threads, the caller's among them; the result does not depend on them.
void crop_resize_cpu(const std::vector<Image>& images, const std::vector<CropBox>& boxes,
                     const CropResizeOptions& options, int threads, void* out);

// Every picture, whole, at several sizes: out[l] holds images.size() * 3 * levels[l].out_h * levels[l].out_w floats.
// What crop_resize_cpu gives level by level, but picture by picture: a picture then comes from memory once. `half` is
// not used.
void pyramid_cpu(const std::vector<Image>& images, const std::vector<CropResizeOptions>& levels, int threads,
                 const std::vector<float*>& out);

// The same on a GPU, where `out` and the planes lie: enqueued on `stream` (a cudaStream_t) of the current context, and
// not waited for. The views are read during the call, the memory they point to when the stream comes to it. Throws
// std::runtime_error if the kernel cannot be launched.
void crop_resize_cuda(const std::vector<Image>& images, const std::vector<CropBox>& boxes,
                      const CropResizeOptions& options, std::uintptr_t stream, void* out);

// The program of the CUDA kernel, run on the CPU over memory of the host: slow, for tests.
void crop_resize_emulated(const std::vector<Image>& images, const std::vector<CropBox>& boxes,
                          const CropResizeOptions& options, void* out);

}  // namespace dfengine
