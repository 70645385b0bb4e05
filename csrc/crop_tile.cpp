// From images and boxes to launches of the program in crop_tile.h.

#include "crop_tile.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

namespace dfengine {

namespace {

TileImage make_tile_image(const Image& image, std::size_t index) {
  TileImage out{};
  const std::string name = "image " + std::to_string(index) + ": ";
  for (int j = 0; j < image.components; ++j) {
    const Plane& plane = image.planes[j];
    DF_CHECK(std::abs(plane.row_bytes) <= std::numeric_limits<std::int32_t>::max(),
             name + "rows of component " + std::to_string(j) + " are " + std::to_string(plane.row_bytes) +
                 " bytes apart; a GPU reads up to 2^31 - 1");
    const bool aligned = (reinterpret_cast<std::uintptr_t>(plane.data) | static_cast<std::uintptr_t>(plane.row_bytes) |
                          static_cast<std::uintptr_t>(plane.step_bytes)) %
                             image.sample_bytes ==
                         0;
    DF_CHECK(aligned, name + "the 16-bit samples of component " + std::to_string(j) +
                          " are at odd addresses, which a GPU cannot read; copy them to an array of their own");
    out.data[j] = plane.data;
    out.row_bytes[j] = static_cast<std::int32_t>(plane.row_bytes);
    out.step_bytes[j] = plane.step_bytes;
  }
  DF_CHECK(std::max(image.subsample_x, image.subsample_y) <= std::numeric_limits<std::uint16_t>::max(),
           name + "subsampling_xy is beyond 65535");
  out.width = image.width;
  out.height = image.height;
  out.subsample_x = static_cast<std::uint16_t>(image.subsample_x);
  out.subsample_y = static_cast<std::uint16_t>(image.subsample_y);
  out.orientation = static_cast<std::uint8_t>(image.quarter_turns | (image.mirrored ? 4 : 0));
  out.components = static_cast<std::uint8_t>(image.components);
  out.sample_bytes = static_cast<std::uint8_t>(image.sample_bytes);
  return out;
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Rows of a tile: as many as leave room for the columns under it (Note [Chunks]) and do not make one block read more
// than 128 rows, so that small outputs of large boxes are shared by many blocks. Chosen, not fitted.
int choose_tile_rows(const Image& image, const CodedCrop& crop) {
  const double scale_x = static_cast<double>(crop.x.length) / crop.x.out;
  const double scale_y = static_cast<double>(crop.y.length) / crop.y.out;
  const double columns = ceil_div(crop.x.out, ceil_div(crop.x.out, kTileColumns));
  const auto chunks = [&](int lanes, double subsample) {
    const double scale = scale_x / subsample;
    const double window = columns * scale + 2 * std::max(1.0, scale) + kVectorBytes;  // tents overhang; alignment
    return std::ceil(window * lanes / kChunkFloats);
  };
  const double most = std::max(chunks(1, 1), image.components == 3 ? chunks(2, image.subsample_x) : 0);
  int rows = kTileRows;
  while (rows > 1 && (rows * most > kTileRows || rows * scale_y > 128 || rows / 2 >= crop.y.out)) rows /= 2;
  return rows;
}

}  // namespace

void for_each_launch(const std::vector<Image>& images, const std::vector<CropBox>& boxes,
                     const CropResizeOptions& options, void* out,
                     const std::function<void(const TileLaunch&, int, int)>& launch) {
  check_crop_resize(images, boxes, options);
  const auto arguments = std::make_unique<TileLaunch>();
  arguments->norm = make_normalization(options);
  arguments->out_h = options.out_h;
  arguments->out_w = options.out_w;
  arguments->filter = options.filter;
  arguments->padding = options.padding;
  arguments->hdr = false;
  const std::size_t crop_bytes = std::size_t{3} * options.out_h * options.out_w * (options.half ? 2 : 4);

  std::vector<int> place(images.size(), -1);  // of an image in this launch
  int image_count = 0, color_count = 0, box_count = 0, tiles = 0;
  const auto add_image = [&](std::int32_t index) {  // false if there is no room
    if (place[index] >= 0) return true;
    const ColorMatrix& color = images[index].color;
    ColorMatrix* const end = arguments->colors + color_count;
    ColorMatrix* const same = std::find_if(
        arguments->colors, end, [&](const ColorMatrix& c) { return !std::memcmp(&c, &color, sizeof color); });
    if (image_count == kMaxImages || same - arguments->colors == kMaxColors) return false;
    if (same == end) arguments->colors[color_count++] = color;
    arguments->hdr |= color.transfer != Transfer::kSdr;
    TileImage& image = arguments->images[image_count];
    image = make_tile_image(images[index], index);
    image.color = static_cast<std::uint8_t>(same - arguments->colors);
    place[index] = image_count++;
    return true;
  };
  std::size_t first = 0;
  const auto flush = [&](std::size_t end) {
    if (box_count == 0) return;
    arguments->out = static_cast<std::uint8_t*>(out) + first * crop_bytes;
    launch(*arguments, tiles, box_count);
    std::fill(place.begin(), place.end(), -1);
    image_count = color_count = box_count = tiles = 0;
    arguments->hdr = false;
    first = end;
  };
  for (std::size_t n = 0; n < boxes.size(); ++n) {
    if (box_count == kMaxBoxes || !add_image(boxes[n].image)) {
      flush(n);
      add_image(boxes[n].image);
    }
    const Image& image = images[boxes[n].image];
    const CodedCrop crop = make_coded_crop(image, boxes[n], options);
    const int tile_rows = choose_tile_rows(image, crop);
    arguments->boxes[box_count++] = {crop.x.begin,
                                     crop.x.length,
                                     crop.y.begin,
                                     crop.y.length,
                                     static_cast<std::uint16_t>(place[boxes[n].image]),
                                     static_cast<std::uint16_t>(tile_rows)};
    tiles = std::max(tiles, ceil_div(crop.x.out, kTileColumns) * ceil_div(crop.y.out, tile_rows));
  }
  flush(boxes.size());
}

}  // namespace dfengine
