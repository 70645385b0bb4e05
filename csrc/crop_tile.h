// The GPU version of crop_resize, as the program of one block of threads: a tile of one crop.
//
// It is a template over who runs it: crop_resize_cuda.cu runs it as a kernel, crop_resize_emulated.cpp on the CPU, so
// that geometry, indices and arithmetic are tested where there is no GPU.
//
// Note [Two passes in a tile]
// A tile is at most 64 columns x 32 rows of a crop, in coded orientation. For luma, and then for chroma:
//   vertical    the source rows under each row of the tile are summed into one row of floats in shared memory. A thread
//               takes 8 bytes of a source row at a time (8 samples, or 4 of 16 bits), neighbours take neighbouring
//               bytes, so that reads are coalesced however many taps there are;
//   horizontal  a thread owns one column of the tile and up to 4 rows, whose sums it keeps in registers: it works out
//               each weight once for all of its rows.
// Then colour, mean and std in registers, and the stores. Against gathering all taps of a pixel in one thread that is
// about as many instructions for crops (4 x 4 taps) and far fewer for pyramid levels (90 x 90), and no thread is alone
// with a pixel of such a level: its taps are shared by a block.
//
// Weights are computed where they are needed: a fused multiply-add, a saturating add and a product cost less than a
// table in shared memory of a size nobody knows, and a box may have any number of taps.
//
// Note [Chunks]
// Shared memory holds 32 rows of 128 floats. Where the columns under a tile need more than one row of 128, the tile is
// made lower, so that a row of sums takes several rows of the buffer ("chunks") and there is work for all threads. What
// is wider still goes in several passes. Every sum runs over its taps in order whatever the tile, so a crop does not
// depend on the batch it is in.
#pragma once

#include <cstring>
#include <functional>
#include <stdexcept>

#include "crop_resize.h"

namespace dfengine {

// What the compiler of the device does with a loop. Left alone, it unrolls all of them.
#if defined(__CUDA_ARCH__)
#define DF_PRAGMA(text) _Pragma(#text)
#define DF_UNROLLED(times) DF_PRAGMA(unroll times)
#else
#define DF_UNROLLED(times)
#endif
#define DF_ROLLED DF_UNROLLED(1)

constexpr int kTileThreads = 512;
constexpr int kTileColumns = 64;
constexpr int kTileRows = 32;
constexpr int kRowGroups = kTileThreads / kTileColumns;  // thread t has column t % 64 and rows t / 64 + 8 * p
constexpr int kRowsPerThread = kTileRows / kRowGroups;
constexpr int kChunkFloats = 128;
constexpr int kStagePitch = kTileRows + 1;  // a row of a column in each bank
constexpr int kVectorBytes = 8;

struct TileImage {
  const std::uint8_t* data[3];
  std::int32_t row_bytes[3];
  std::int32_t step_bytes[3];
  std::int32_t width, height;  // of the first plane
  std::uint16_t subsample_x, subsample_y;
  std::uint8_t orientation, components, sample_bytes, color;  // orientation: quarter turns, and 4 if mirrored
};

struct TileBox {
  float begin_x, length_x, begin_y, length_y;  // coded orientation
  std::uint16_t image;
  std::uint16_t tile_rows;  // a power of two, at most kTileRows
};

// The arguments of a launch. Everything goes by value, so no memory is allocated, copied or shared between streams: the
// limit is 32,764 bytes (CUDA 12.1 and later, compute capability 7.0 and later). Larger batches take several launches.
constexpr int kMaxImages = 256;
constexpr int kMaxBoxes = 640;
constexpr int kMaxColors = 16;

struct TileLaunch {
  TileImage images[kMaxImages];
  void* out;  // of the first box
  ColorMatrix colors[kMaxColors];
  TileBox boxes[kMaxBoxes];
  Normalization norm;
  std::int32_t out_h, out_w;
  Filter filter;
  Padding padding;
  bool hdr;  // of any picture
};
static_assert(sizeof(TileLaunch) <= 32764, "larger than the parameters of a kernel may be");

// Calls launch(arguments, most tiles of any box, boxes) as often as the batch needs. Throws InvalidArgument for
// what the CPU version can read, but a GPU cannot.
void for_each_launch(const std::vector<Image>& images, const std::vector<CropBox>& boxes,
                     const CropResizeOptions& options, void* out,
                     const std::function<void(const TileLaunch&, int, int)>& launch);

// Shared memory of a block.
struct alignas(16) TileShared {
  float sums[kTileRows][kChunkFloats];
  Taps columns[2][kTileColumns];  // of luma, and of chroma
  Taps rows[2][kTileRows];
};
static_assert(sizeof(TileShared::sums) >= sizeof(float) * kTileColumns * kStagePitch, "turned tiles are staged there");

// What a thread keeps in registers: the sums, and then the colours, of its pixels.
struct TilePixels {
  float value[kRowsPerThread][3];
};

// The tile at hand. The same for all threads of a block.
struct Tile {
  const TileLaunch& launch;
  const TileBox& box;
  const TileImage& image;
  int box_index;
  int column0, row0;  // of its first pixel
  int columns, rows;  // it has; `rows` of box.tile_rows, none if there is no such tile

  DF_HD Tile(const TileLaunch& arguments, int tile_index, int box_of_launch)
      : launch(arguments),
        box(arguments.boxes[box_of_launch]),
        image(arguments.images[box.image]),
        box_index(box_of_launch) {
    const int across = (all_columns() + kTileColumns - 1) / kTileColumns;
    const int width = (all_columns() + across - 1) / across;  // tiles of equal width waste no threads on a narrow last
    column0 = tile_index % across * width;
    row0 = tile_index / across * box.tile_rows;
    columns = all_columns() - column0 < width ? all_columns() - column0 : width;
    rows = all_rows() - row0 < box.tile_rows ? all_rows() - row0 : box.tile_rows;
  }

  DF_HD bool turned() const { return (image.orientation & 1) != 0; }
  DF_HD int all_columns() const { return turned() ? launch.out_h : launch.out_w; }
  DF_HD int all_rows() const { return turned() ? launch.out_w : launch.out_h; }
  DF_HD int plane_width(int grid) const {
    return grid == 0 ? image.width : (image.width + image.subsample_x - 1) / image.subsample_x;
  }
  DF_HD int plane_height(int grid) const {
    return grid == 0 ? image.height : (image.height + image.subsample_y - 1) / image.subsample_y;
  }
};

// Columns of a component that a tile reads, and how. `Lanes` components go together: luma alone, or both of chroma.
struct TileWindow {
  int begin, columns;
  int chunks;  // rows of the buffer for one row of sums
  bool interleaved;  // a column is `Lanes` samples next to each other
  bool vectors;  // samples can be read 8 bytes at a time
};

DF_HD inline int clamp_index(int i, int size) {
  i = i < size - 1 ? i : size - 1;
  return i > 0 ? i : 0;
}

// Bytes from the first row, or sample of a row, to another: one instruction, which the compiler misses.
DF_HD inline std::int64_t distance_bytes(std::int32_t i, std::int32_t bytes_each) {
#if defined(__CUDA_ARCH__)
  std::int64_t product;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(i), "r"(bytes_each));
  return product;
#else
  return static_cast<std::int64_t>(i) * bytes_each;
#endif
}

template <int Lanes>
DF_HD inline TileWindow make_window(const Tile& tile, const TileShared& shared) {
  constexpr int kGrid = Lanes - 1;
  const TileImage& image = tile.image;
  const int bytes = image.sample_bytes;
  const int plane = kGrid, last = kGrid + Lanes - 1;
  const Taps& right = shared.columns[kGrid][tile.columns - 1];
  TileWindow window;
  window.begin = shared.columns[kGrid][0].first;
  const int end = right.first + right.count;

  const bool alike =
      image.step_bytes[last] == image.step_bytes[plane] && image.row_bytes[last] == image.row_bytes[plane];
  window.interleaved =
      image.step_bytes[plane] == Lanes * bytes && alike && image.data[last] == image.data[plane] + (Lanes - 1) * bytes;
  const auto address_of = [&](int j) { return reinterpret_cast<std::uintptr_t>(image.data[j]); };
  const bool planar =
      image.step_bytes[plane] == bytes && alike && (address_of(last) - address_of(plane)) % kVectorBytes == 0;
  // The window begins where 8 bytes are aligned, and so does each chunk.
  const int step = image.step_bytes[plane];
  const int over = static_cast<int>((address_of(plane) + distance_bytes(window.begin, step)) % kVectorBytes);
  window.vectors = (window.interleaved || planar) && image.row_bytes[plane] % kVectorBytes == 0 && over % step == 0;
  if (window.vectors) window.begin -= over / step;
  window.columns = end - window.begin;
  constexpr int kChunkColumns = kChunkFloats / Lanes;
  window.chunks = (window.columns + kChunkColumns - 1) / kChunkColumns;
  return window;
}

// a / divisor for 0 <= a < 2048 and 1 <= divisor <= 32.
struct SmallDivisor {
  int divisor;
  std::uint32_t reciprocal;
  DF_HD explicit SmallDivisor(int d) : divisor(d), reciprocal((65536u + d - 1) / d) {}
  DF_HD int divide(int a) const { return static_cast<int>((static_cast<std::uint32_t>(a) * reciprocal) >> 16); }
};

// A GPU faults where a CPU does not mind.
inline void must_be_aligned(const void* address, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) throw std::logic_error("a GPU would fault here");
}

template <typename T>
DF_HD inline T load(const void* address) {
#if defined(__CUDA_ARCH__)
  return __ldg(static_cast<const T*>(address));  // through the read-only cache: nobody writes to pictures here
#else
  must_be_aligned(address, sizeof(T));
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
#endif
}

// 8 bytes.
#if defined(__CUDACC__)
using Words = uint2;
#else
struct Words {
  std::uint32_t x, y;
};
#endif

// Sample n of a word. To put its bytes into the mantissa of 2^23 and to subtract that is two instructions of common
// kinds; a conversion (I2F) is one of a kind that is issued at a fraction of their rate (CUDA C++ Programming Guide,
// throughput of native arithmetic instructions).
template <typename Sample>
DF_HD inline float sample_of(std::uint32_t word, int n) {
#if defined(__CUDA_ARCH__)
  const std::uint32_t selector = sizeof(Sample) == 1 ? 0x7440u + n : 0x7410u + 0x22u * n;
  return __uint_as_float(__byte_perm(word, 0x4b000000u, selector)) - 8388608.f;
#else
  return static_cast<float>(static_cast<Sample>(word >> (8 * sizeof(Sample) * n)));
#endif
}

// Where 16 bytes are aligned.
DF_HD inline void store4(const float* from, float* to) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
#else
  must_be_aligned(to, 4 * sizeof(float));
  std::memcpy(to, from, 4 * sizeof(float));
#endif
}

// Sum of one column of a component over the taps of a row.
DF_HD inline float sum_column(const std::uint8_t* column, const TileImage& image, int plane, int height,
                              const Taps& taps) {
  float sum = 0.f;
  DF_ROLLED
  for (int k = 0; k < taps.count; ++k) {
    const std::uint8_t* at = column + distance_bytes(clamp_index(taps.first + k, height), image.row_bytes[plane]);
    const int sample = image.sample_bytes == 1 ? load<std::uint8_t>(at) : load<std::uint16_t>(at);
    sum += tap_weight(taps, k) * taps.norm * static_cast<float>(sample);
  }
  return sum;
}

// The same for 8 bytes of columns; the sum of each goes to `to`, `stride` floats after the one before.
template <typename Sample>
DF_HD inline void sum_vector(const std::uint8_t* columns, std::int32_t row_bytes, int height, const Taps& taps,
                             float* to, int stride) {
  constexpr int kSamples = kVectorBytes / sizeof(Sample);
  float sum[kSamples] = {};
  DF_UNROLLED(4)  // loads in flight
  for (int k = 0; k < taps.count; ++k) {
    const auto words = load<Words>(columns + distance_bytes(clamp_index(taps.first + k, height), row_bytes));
    const float w = tap_weight(taps, k) * taps.norm;
    for (int n = 0; n < kSamples; ++n) {
      sum[n] += w * sample_of<Sample>(n < kSamples / 2 ? words.x : words.y, n % (kSamples / 2));
    }
  }
  if (stride == 1) {
    for (int n = 0; n < kSamples; n += 4) store4(sum + n, to + n);
  } else {
    for (int n = 0; n < kSamples; ++n) to[n * stride] = sum[n];
  }
}

// Thread t's share of the vertical pass over `chunks` chunks from `chunk0` on.
template <int Lanes>
DF_HD inline void sum_rows(const Tile& tile, const TileWindow& window, int chunk0, int chunks, TileShared& shared,
                           int t) {
  constexpr int kGrid = Lanes - 1;
  constexpr int kChunkColumns = kChunkFloats / Lanes;
  const TileImage& image = tile.image;
  const int width = tile.plane_width(kGrid), height = tile.plane_height(kGrid);
  const int samples = image.sample_bytes == 1 ? kVectorBytes : kVectorBytes / 2;  // of a vector
  // A vector has samples of one plane, or those of all lanes for fewer columns.
  const int strips = window.interleaved ? 1 : Lanes;
  const int columns_each = samples * strips / Lanes;
  const int used = window.columns < kChunkColumns ? window.columns : kChunkColumns;
  const int vectors = (used + columns_each - 1) / columns_each;
  const SmallDivisor by_items(vectors * strips), by_rows(tile.rows);
  const int items = chunks * tile.rows * by_items.divisor;
  for (int item = t; item < items; item += kTileThreads) {
    const int line = by_items.divide(item), chunk = by_rows.divide(line);
    const int row = line - chunk * tile.rows;
    int vector = item - line * by_items.divisor;
    const int strip = vector >= vectors ? 1 : 0;
    vector -= strip * vectors;
    const int column = (chunk0 + chunk) * kChunkColumns + vector * columns_each;  // of the window
    if (column >= window.columns) continue;

    const Taps taps = shared.rows[kGrid][row];
    const int x = window.begin + column;
    float* to = &shared.sums[chunk * tile.box.tile_rows + row][vector * columns_each * Lanes + strip];
    if (window.vectors && x >= 0 && x + columns_each <= width) {
      const std::uint8_t* from = image.data[kGrid + strip] + distance_bytes(x, image.step_bytes[kGrid]);
      if (image.sample_bytes == 1) {
        sum_vector<std::uint8_t>(from, image.row_bytes[kGrid], height, taps, to, strips);
      } else {
        sum_vector<std::uint16_t>(from, image.row_bytes[kGrid], height, taps, to, strips);
      }
      continue;
    }
    DF_ROLLED  // at the rim of the picture, or of another layout: rare, so small rather than fast
        for (int n = 0; n < samples; ++n) {
      const int plane = kGrid + (strips == 1 ? n % Lanes : strip);
      const int wanted = x + (strips == 1 ? n / Lanes : n);
      const bool outside = tile.launch.padding == Padding::kZero && (wanted < 0 || wanted >= width);
      const std::uint8_t* from =
          image.data[plane] + distance_bytes(clamp_index(wanted, width), image.step_bytes[plane]);
      to[n * strips] = outside ? 0.f : sum_column(from, image, plane, height, taps);
    }
  }
}

// Thread t's share of the horizontal pass, for `Rows` rows a thread.
template <int Lanes, int Rows>
DF_HD inline void sum_columns(const Tile& tile, const TileWindow& window, int chunk0, int chunks,
                              const TileShared& shared, int t, TilePixels& pixels) {
  constexpr int kGrid = Lanes - 1;
  constexpr int kChunkColumns = kChunkFloats / Lanes;
  const int column = t % kTileColumns, group = t / kTileColumns;
  if (column >= tile.columns || group >= tile.box.tile_rows) return;
  const Taps taps = shared.columns[kGrid][column];
  const int offset = taps.first - window.begin;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int begin = (chunk0 + chunk) * kChunkColumns - offset;  // the chunk's first column, as a tap
    const int k_begin = begin > 0 ? begin : 0;
    const int k_end = begin + kChunkColumns < taps.count ? begin + kChunkColumns : taps.count;
    const float* row = shared.sums[chunk * tile.box.tile_rows + group] - static_cast<std::ptrdiff_t>(begin) * Lanes;
    DF_UNROLLED(2)
    for (int k = k_begin; k < k_end; ++k) {
      const float w = tap_weight(taps, k) * taps.norm;
      for (int p = 0; p < Rows; ++p) {  // rows beyond the tile's are summed too, and not stored
        const float* from = row + k * Lanes + p * kRowGroups * kChunkFloats;
        if (Lanes == 1) {
          pixels.value[p][0] += w * from[0];
        } else {
#if defined(__CUDA_ARCH__)
          const float2 pair = *reinterpret_cast<const float2*>(from);
          pixels.value[p][1] += w * pair.x;
          pixels.value[p][2] += w * pair.y;
#else
          must_be_aligned(from, 2 * sizeof(float));
          for (int lane = 0; lane < Lanes; ++lane) pixels.value[p][kGrid + lane] += w * from[lane];
#endif
        }
      }
    }
  }
}

// Thread t's share of the taps: those of one row or column of luma or chroma.
DF_HD inline void set_up_taps(const Tile& tile, TileShared& shared, int t) {
  constexpr int kAxes = kTileColumns + kTileRows;
  const int grid = t / kAxes, i = t % kAxes;
  if (grid >= (tile.image.components == 3 ? 2 : 1)) return;
  const bool is_row = i >= kTileColumns;
  const int n = is_row ? i - kTileColumns : i;
  if (n >= (is_row ? tile.rows : tile.columns)) return;
  const TileBox& box = tile.box;
  const std::int32_t subsample = grid == 0 ? 1 : (is_row ? tile.image.subsample_y : tile.image.subsample_x);
  const Axis axis{is_row ? box.begin_y : box.begin_x, is_row ? box.length_y : box.length_x,
                  is_row ? tile.all_rows() : tile.all_columns(), subsample};
  const std::int32_t size = is_row ? tile.plane_height(grid) : tile.plane_width(grid);
  Taps taps = make_taps(tile.launch.filter, axis, n + (is_row ? tile.row0 : tile.column0));
  measure_taps(tile.launch.padding, size, taps);
  if (is_row && tile.launch.padding == Padding::kZero) {  // rows outside weigh nothing; columns outside are zeros
    const int skipped = taps.first < 0 ? (-taps.first < taps.count ? -taps.first : taps.count) : 0;
    const int end = taps.first + taps.count < size ? taps.first + taps.count : size;
    taps.first += skipped;
    taps.count = end > taps.first ? end - taps.first : 0;
    taps.distance += static_cast<float>(skipped) * taps.step;
  }
  (is_row ? shared.rows[grid] : shared.columns[grid])[n] = taps;
}

// Sums of thread t's pixels -> normalised RGB, in place.
template <bool Hdr>
DF_HD inline void finish_pixels(const Tile& tile, const TileShared& shared, int t, TilePixels& pixels) {
  const int column = t % kTileColumns, group = t / kTileColumns;
  if (column >= tile.columns) return;
  const ColorMatrix& color = tile.launch.colors[tile.image.color];
  const bool chroma = tile.image.components == 3;
  const float luma_x = shared.columns[0][column].coverage;
  const float chroma_x = chroma ? shared.columns[1][column].coverage : 0.f;
  for (int p = 0; p < kRowsPerThread; ++p) {
    const int row = group + p * kRowGroups;
    if (row >= tile.rows) break;
    const float c = chroma ? chroma_x * shared.rows[1][row].coverage : 0.f;
    const float coverage[3] = {luma_x * shared.rows[0][row].coverage, c, c};
    if (Hdr) {
      finish_hdr_pixel(color, tile.launch.norm, pixels.value[p], coverage, pixels.value[p]);
    } else {
      finish_pixel(color, tile.launch.norm, pixels.value[p], coverage, pixels.value[p]);
    }
  }
}

DF_HD inline void store(float value, float* to) { *to = value; }
DF_HD inline void store(float value, std::uint16_t* to) { *to = to_float16(value); }

// The whole program. `threads.each(body)` calls body(t, pixels of t) for each thread t of the block, and then waits for
// all of them. What is outside of `each` is the same for all threads.
template <int Lanes, typename Threads>
DF_HD inline void filter_lanes(const Tile& tile, TileShared& shared, Threads& threads) {
  const TileWindow window = make_window<Lanes>(tile, shared);
  const int tile_rows = tile.box.tile_rows;
  const int at_once = kTileRows / tile_rows;
  for (int chunk0 = 0; chunk0 < window.chunks; chunk0 += at_once) {
    const int chunks = window.chunks - chunk0 < at_once ? window.chunks - chunk0 : at_once;
    threads.each([&](int t, TilePixels&) { sum_rows<Lanes>(tile, window, chunk0, chunks, shared, t); });
    threads.each([&](int t, TilePixels& pixels) {
      if (tile_rows == kTileRows) {
        sum_columns<Lanes, kRowsPerThread>(tile, window, chunk0, chunks, shared, t, pixels);
      } else if (tile_rows == kTileRows / 2) {
        sum_columns<Lanes, kRowsPerThread / 2>(tile, window, chunk0, chunks, shared, t, pixels);
      } else {
        sum_columns<Lanes, 1>(tile, window, chunk0, chunks, shared, t, pixels);
      }
    });
  }
}

// `Hdr`: with the code for HDR, which SDR alone is spared.
template <typename Out, bool Hdr, typename Threads>
DF_HD inline void crop_tile(const TileLaunch& launch, int tile_index, int box_index, TileShared& shared,
                            Threads& threads) {
  const Tile tile(launch, tile_index, box_index);
  if (tile.rows <= 0) return;  // other boxes have more tiles
  threads.each([&](int t, TilePixels&) { set_up_taps(tile, shared, t); });
  filter_lanes<1>(tile, shared, threads);
  if (tile.image.components == 3) filter_lanes<2>(tile, shared, threads);
  threads.each([&](int t, TilePixels& pixels) { finish_pixels<Hdr>(tile, shared, t, pixels); });

  const std::int64_t channel = static_cast<std::int64_t>(launch.out_h) * launch.out_w;
  const int orientation = tile.image.orientation;
  const OutputOrder order = make_output_order((orientation & 4) != 0, orientation & 3, launch.out_h, launch.out_w);
  Out* out = static_cast<Out*>(launch.out) + box_index * 3 * channel + order.base + tile.row0 * order.per_row +
             tile.column0 * order.per_column;
  if (!tile.turned()) {
    threads.each([&](int t, TilePixels& pixels) {
      const int column = t % kTileColumns, group = t / kTileColumns;
      if (column >= tile.columns) return;
      for (int p = 0; p < kRowsPerThread; ++p) {
        const int row = group + p * kRowGroups;
        if (row >= tile.rows) break;
        Out* to = out + row * order.per_row + column * order.per_column;
        for (int c = 0; c < 3; ++c) store(pixels.value[p][c], to + c * channel);
      }
    });
    return;
  }
  // Neighbours in the output are neighbours down a column here: through shared memory, so that stores stay coalesced.
  float* stage = &shared.sums[0][0];
  for (int c = 0; c < 3; ++c) {
    threads.each([&](int t, TilePixels& pixels) {
      const int column = t % kTileColumns, group = t / kTileColumns;
      for (int p = 0; p < kRowsPerThread; ++p) {
        stage[column * kStagePitch + group + p * kRowGroups] = pixels.value[p][c];
      }
    });
    threads.each([&](int t, TilePixels&) {
      const int row = t % kTileRows;
      if (row >= tile.rows) return;
      for (int column = t / kTileRows; column < tile.columns; column += kTileThreads / kTileRows) {
        store(stage[column * kStagePitch + row], out + c * channel + row * order.per_row + column * order.per_column);
      }
    });
  }
}

}  // namespace dfengine
