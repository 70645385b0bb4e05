// The CUDA version of crop_resize: a block a tile, a row of the grid a box. The program is in crop_tile.h.
//
// Note [Why this shape]
// Batches of crops are bound by instructions and shared memory as much as by device memory: a 400 px box to 224 px
// moves 11 bytes a pixel, and takes some 120 instructions (counted in the loops that nvcc makes, not measured). Hence
// what there is to see in crop_tile.h: 8-byte loads, bytes made floats without conversions, weights shared by the rows
// of a thread, a matrix on the scale 0..1 whose clamp is a flag of the multiply-add, sums that stay in registers from
// the horizontal pass to the store. Stores are 2 or 4 bytes a thread and 64 or 128 bytes a warp; pairs of halves would
// be half as many, but a thread would need two columns, and with them twice the conflicts in shared memory. Two blocks
// of 512 threads with 64 registers fill half of a multiprocessor or more. 256 crops of 224 px are 7,168 blocks, a level
// of 240 x 427 px of 16 frames 3,360, and one of 12 x 21 px 192.
//
// Launches share nothing but what they read, so any number of streams may run this at once.

#include <stdexcept>
#include <string>

#include "crop_tile.h"

namespace dfengine {

namespace {

struct CudaThreads {
  template <typename Body>
  DF_HD void each([[maybe_unused]] const Body& body) {
#if defined(__CUDA_ARCH__)
    body(static_cast<int>(threadIdx.x), pixels);
    __syncthreads();
#endif
  }

  TilePixels pixels = {};
};

// The curves of HDR need more than the 64 registers that two blocks leave a thread.
template <typename Out, bool Hdr>
__global__ void __launch_bounds__(kTileThreads, Hdr ? 1 : 2)
    crop_resize_kernel(const __grid_constant__ TileLaunch launch) {
  __shared__ TileShared shared;
  CudaThreads threads;
  crop_tile<Out, Hdr>(launch, blockIdx.x, blockIdx.y, shared, threads);
}

template <bool Hdr>
const void* kernel_of(bool half) {
  return half ? reinterpret_cast<const void*>(crop_resize_kernel<std::uint16_t, Hdr>)
              : reinterpret_cast<const void*>(crop_resize_kernel<float, Hdr>);
}

}  // namespace

void crop_resize_cuda(const std::vector<Image>& images, const std::vector<CropBox>& boxes,
                      const CropResizeOptions& options, std::uintptr_t stream, void* out) {
  for_each_launch(images, boxes, options, out, [&](const TileLaunch& launch, int tiles, int count) {
    const void* arguments[] = {&launch};
    const auto kernel = launch.hdr ? kernel_of<true>(options.half) : kernel_of<false>(options.half);
    const cudaError_t status =
        cudaLaunchKernel(kernel, dim3(tiles, count), dim3(kTileThreads), const_cast<void**>(arguments), 0,
                         reinterpret_cast<cudaStream_t>(stream));
    if (status != cudaSuccess) {
      throw std::runtime_error(std::string("crop_resize could not be launched on the GPU: ") +
                               cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                               "). `dfengine info` names the GPUs it was compiled for; the driver must be one for CUDA "
                               "12.1 or later");
    }
  });
}

}  // namespace dfengine
