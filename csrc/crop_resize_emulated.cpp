// The program of the CUDA kernel on the CPU, thread after thread.

#include <memory>

#include "crop_tile.h"

namespace dfengine {

namespace {

// Odd blocks run their threads backwards: threads that wait for what others do between two barriers would show.
struct EmulatedThreads {
  explicit EmulatedThreads(bool is_backwards) : backwards(is_backwards), pixels(kTileThreads) {}

  template <typename Body>
  void each(const Body& body) {
    for (int i = 0; i < kTileThreads; ++i) {
      const int t = backwards ? kTileThreads - 1 - i : i;
      body(t, pixels[t]);
    }
  }

  bool backwards;
  std::vector<TilePixels> pixels;  // zeros
};

}  // namespace

void crop_resize_emulated(const std::vector<Image>& images, const std::vector<CropBox>& boxes,
                          const CropResizeOptions& options, void* out) {
  for_each_launch(images, boxes, options, out, [&](const TileLaunch& launch, int tiles, int count) {
    const auto shared = std::make_unique<TileShared>();
    for (int box = 0; box < count; ++box) {
      for (int tile = 0; tile < tiles; ++tile) {
        std::memset(shared.get(), 0xff, sizeof(TileShared));  // NaN: what is read before it is written shows
        EmulatedThreads threads((box + tile) % 2 == 1);
        const auto run =
            options.half
                ? (launch.hdr ? crop_tile<std::uint16_t, true, EmulatedThreads>
                              : crop_tile<std::uint16_t, false, EmulatedThreads>)
                : (launch.hdr ? crop_tile<float, true, EmulatedThreads> : crop_tile<float, false, EmulatedThreads>);
        run(launch, tile, box, *shared, threads);
      }
    }
  });
}

}  // namespace dfengine
