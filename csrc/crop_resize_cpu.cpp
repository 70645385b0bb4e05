// The CPU loop of crop_resize.
//
// One work item is a band of output rows of one crop. Per output row: the source rows under its taps are summed into
// one float row per component (vertical pass, contiguous, vectorised; under kArea first as whole numbers, because most
// rows weigh the same), which is then sampled at the output columns (horizontal pass), converted to RGB, normalised and
// stored. A turned picture is read in coded order and its pixels are stored turned, so that source rows stay
// contiguous.

#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>

#include "crop_resize.h"
#include "parallel.h"

// One binary for all x86-64 machines: the two inner loops exist twice, the loader picks. Elsewhere, once.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define DF_MULTIVERSION __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define DF_MULTIVERSION
#endif

namespace dfengine {

// dst[x] += sum over `rows` of weight[k] * row_k[x], contiguous samples.
template <typename Sample>
inline void add_rows_impl(const std::uint8_t* src, std::int64_t row_bytes, const float* weights, std::int32_t rows,
                          std::int32_t width, float* __restrict dst) {
  const auto row = [&](std::int32_t k) { return reinterpret_cast<const Sample*>(src + k * row_bytes); };
  std::int32_t k = 0;
  for (; k + 4 <= rows; k += 4) {
    const Sample *a = row(k), *b = row(k + 1), *c = row(k + 2), *d = row(k + 3);
    const float wa = weights[k], wb = weights[k + 1], wc = weights[k + 2], wd = weights[k + 3];
    for (std::int32_t x = 0; x < width; ++x) {
      dst[x] += wa * static_cast<float>(a[x]) + wb * static_cast<float>(b[x]) + wc * static_cast<float>(c[x]) +
                wd * static_cast<float>(d[x]);
    }
  }
  for (; k < rows; ++k) {
    const Sample* a = row(k);
    const float wa = weights[k];
    for (std::int32_t x = 0; x < width; ++x) dst[x] += wa * static_cast<float>(a[x]);
  }
}

DF_MULTIVERSION void add_rows_u8(const std::uint8_t* src, std::int64_t row_bytes, const float* weights,
                                 std::int32_t rows, std::int32_t width, float* __restrict dst) {
  add_rows_impl<std::uint8_t>(src, row_bytes, weights, rows, width, dst);
}

DF_MULTIVERSION void add_rows_u16(const std::uint8_t* src, std::int64_t row_bytes, const float* weights,
                                  std::int32_t rows, std::int32_t width, float* __restrict dst) {
  add_rows_impl<std::uint16_t>(src, row_bytes, weights, rows, width, dst);
}

// As many 8-bit samples as 16 bits can add up.
constexpr std::int32_t kMostEqualRows = 65535 / 255;

// dst[x] += weight * (sum over `rows` rows of row_k[x]), at most kMostEqualRows. `sum` is for `width` numbers.
// Sixteen whole numbers are added at a time where eight floats would be converted, multiplied and added.
DF_MULTIVERSION void add_equal_rows_u8(const std::uint8_t* src, std::int64_t row_bytes, float weight, std::int32_t rows,
                                       std::int32_t width, std::uint16_t* __restrict sum, float* __restrict dst) {
  const auto row = [&](std::int32_t k) { return src + k * row_bytes; };
  std::int32_t k = 0;
  if (rows >= 4) {
    const std::uint8_t *a = row(0), *b = row(1), *c = row(2), *d = row(3);
    for (std::int32_t x = 0; x < width; ++x) sum[x] = static_cast<std::uint16_t>(a[x] + b[x] + c[x] + d[x]);
    k = 4;
  } else {
    const std::uint8_t* a = row(0);
    for (std::int32_t x = 0; x < width; ++x) sum[x] = a[x];
    k = 1;
  }
  for (; k + 4 <= rows; k += 4) {
    const std::uint8_t *a = row(k), *b = row(k + 1), *c = row(k + 2), *d = row(k + 3);
    for (std::int32_t x = 0; x < width; ++x) sum[x] = static_cast<std::uint16_t>(sum[x] + a[x] + b[x] + c[x] + d[x]);
  }
  for (; k < rows; ++k) {
    const std::uint8_t* a = row(k);
    for (std::int32_t x = 0; x < width; ++x) sum[x] = static_cast<std::uint16_t>(sum[x] + a[x]);
  }
  for (std::int32_t x = 0; x < width; ++x) dst[x] += weight * static_cast<float>(sum[x]);
}

// dst[i] = sum over k of weights[k * out + i] * src[first[i] + k]
DF_MULTIVERSION void sample_columns(const float* __restrict src, const std::int32_t* __restrict first,
                                    const float* __restrict weights, std::int32_t taps, std::int32_t out,
                                    float* __restrict dst) {
  for (std::int32_t i = 0; i < out; ++i) dst[i] = weights[i] * src[first[i]];
  for (std::int32_t k = 1; k < taps; ++k) {
    const float* w = weights + static_cast<std::int64_t>(k) * out;
    const float* s = src + k;
    for (std::int32_t i = 0; i < out; ++i) dst[i] += w[i] * s[first[i]];
  }
}

// finish_pixel over a row. `sample` and `rgb` are (3, out); `coverage` is by component.
DF_MULTIVERSION void finish_row(const ColorMatrix& color_in, const Normalization& norm_in,
                                const float* __restrict sample, const float* const coverage[3],
                                const float row_coverage[3], std::int32_t out, float* __restrict rgb) {
  const ColorMatrix color = color_in;  // local copies: nothing the loop writes can alias them
  const Normalization norm = norm_in;
  const float *c0 = coverage[0], *c1 = coverage[1], *c2 = coverage[2];
  const float r0 = row_coverage[0], r1 = row_coverage[1], r2 = row_coverage[2];
  for (std::int32_t i = 0; i < out; ++i) {
    const float s[3] = {sample[i], sample[out + i], sample[2 * out + i]};
    const float c[3] = {c0[i] * r0, c1[i] * r1, c2[i] * r2};
    float pixel[3];
    finish_pixel(color, norm, s, c, pixel);
    rgb[i] = pixel[0];
    rgb[out + i] = pixel[1];
    rgb[2 * out + i] = pixel[2];
  }
}

// The same for HDR, whose powers take longer than all else.
void finish_hdr_row(const ColorMatrix& color, const Normalization& norm, const float* sample,
                    const float* const coverage[3], const float row_coverage[3], std::int32_t out, float* rgb) {
  for (std::int32_t i = 0; i < out; ++i) {
    float s[3], c[3], pixel[3];
    for (int j = 0; j < 3; ++j) {
      s[j] = sample[j * out + i];
      c[j] = coverage[j][i] * row_coverage[j];
    }
    finish_hdr_pixel(color, norm, s, c, pixel);
    for (int j = 0; j < 3; ++j) rgb[j * out + i] = pixel[j];
  }
}

namespace {

// The taps of every output pixel along one axis of one component, all inside the picture.
struct AxisTable {
  std::int32_t out = 0;
  std::int32_t taps = 0;  // the most any output pixel has; the rest are padded with weight 0
  std::vector<std::int32_t> first;  // (out), relative to `window_begin`
  std::vector<std::int32_t> count;  // (out)
  std::vector<float> weights;  // (taps, out)
  std::vector<float> coverage;  // (out), the weight that lay inside the picture
  std::int32_t window_begin = 0;  // samples [window_begin, window_end) are read
  std::int32_t window_end = 0;
  std::vector<Taps> taps_of;  // (out), as they were before the picture cut them off
};

// Weight that falls outside [0, size) goes to the nearest sample (kEdge) or is dropped (kZero). Fills `table`
// in place: crops come by the thousand (detector proposals), and its buffers keep their memory.
void fill_axis_table(Filter filter, Padding padding, const Axis& axis, std::int32_t size, std::int32_t begin,
                     std::int32_t end, AxisTable& table) {
  const std::int32_t out = end - begin;
  table.out = out;
  table.first.resize(out);
  table.count.resize(out);
  table.taps_of.resize(out);
  table.taps = 0;
  table.window_begin = size;
  table.window_end = 0;
  for (std::int32_t i = 0; i < out; ++i) {
    const Taps taps = table.taps_of[i] = make_taps(filter, axis, begin + i);
    const std::int32_t lo = std::clamp(taps.first, 0, size - 1);
    const std::int32_t hi = std::clamp(taps.first + taps.count - 1, 0, size - 1);
    table.first[i] = lo;
    table.count[i] = hi - lo + 1;
    table.taps = std::max(table.taps, table.count[i]);
    table.window_begin = std::min(table.window_begin, lo);
    table.window_end = std::max(table.window_end, hi + 1);
  }
  table.weights.assign(static_cast<std::size_t>(table.taps) * out, 0.f);
  table.coverage.resize(out);
  for (std::int32_t i = 0; i < out; ++i) {
    Taps& taps = table.taps_of[i];
    measure_taps(padding, size, taps);
    const std::int32_t lo = table.first[i];
    for (std::int32_t k = 0; k < taps.count; ++k) {
      const std::int32_t x = taps.first + k;
      if (padding == Padding::kZero && (x < 0 || x >= size)) continue;
      table.weights[static_cast<std::size_t>(std::clamp(x, 0, size - 1) - lo) * out + i] +=
          tap_weight(taps, k) * taps.norm;
    }
    table.coverage[i] = taps.coverage;
    table.first[i] = lo - table.window_begin;
  }
}

// Adds `rows` weighted rows of the window to `dst`.
void add_rows(const Image& image, const Plane& plane, Filter filter, std::int32_t x, std::int32_t y,
              const float* weights, std::int32_t rows, std::int32_t width, std::vector<std::uint8_t>& gathered,
              std::vector<std::uint16_t>& sum, float* dst) {
  const std::uint8_t* src = plane.data + y * plane.row_bytes + static_cast<std::int64_t>(x) * plane.step_bytes;
  if (filter == Filter::kArea && image.sample_bytes == 1 && plane.step_bytes == 1) {
    sum.resize(width);
    for (std::int32_t k = 0, run; k < rows; k += run) {
      run = 1;
      while (k + run < rows && run < kMostEqualRows && weights[k + run] == weights[k]) ++run;
      add_equal_rows_u8(src + k * plane.row_bytes, plane.row_bytes, weights[k], run, width, sum.data(), dst);
    }
    return;
  }
  const auto add = image.sample_bytes == 1 ? add_rows_u8 : add_rows_u16;
  if (plane.step_bytes == image.sample_bytes) {
    add(src, plane.row_bytes, weights, rows, width, dst);
    return;
  }
  gathered.resize(static_cast<std::size_t>(width) * image.sample_bytes);  // interleaved: gather a row, then add it
  for (std::int32_t k = 0; k < rows; ++k) {
    const std::uint8_t* from = src + k * plane.row_bytes;
    for (std::int32_t i = 0; i < width; ++i) {
      std::memcpy(gathered.data() + static_cast<std::size_t>(i) * image.sample_bytes,
                  from + static_cast<std::int64_t>(i) * plane.step_bytes, image.sample_bytes);
    }
    add(gathered.data(), 0, weights + k, 1, width, dst);
  }
}

template <typename Out>
Out store(float value);
template <>
float store<float>(float value) {
  return value;
}
template <>
std::uint16_t store<std::uint16_t>(float value) {
  return to_float16(value);
}

// Buffers of one thread.
struct Workspace {
  AxisTable horizontal[2], vertical[2];  // of the first component, and of the others
  std::vector<float> row_weights;  // of the source rows under one output row
  std::vector<std::uint16_t> sum;  // rows of equal weight, summed
  std::vector<float> summed;  // one component's rows, summed
  std::vector<float> sampled, rgb;  // (3, columns)
  std::vector<float> none;  // (columns), zeros: coverage of a component that is not there
  std::vector<std::uint8_t> gathered;  // a row of interleaved samples, made contiguous
};

// Coded output rows [row_begin, row_end) of one crop.
template <typename Out>
void crop_band(const Image& image, const CropBox& box, const CropResizeOptions& options, const Normalization& norm,
               std::int32_t row_begin, std::int32_t row_end, Out* out) {
  const CodedCrop crop = make_coded_crop(image, box, options);
  const OutputOrder order = make_output_order(image.mirrored, image.quarter_turns, options.out_h, options.out_w);
  const std::int32_t columns = crop.x.out;
  const std::int64_t channel = static_cast<std::int64_t>(options.out_h) * options.out_w;

  thread_local Workspace ws;
  // Cb and Cr lie on one grid, and share tables.
  for (int j = 0; j < std::min(image.components, 2); ++j) {
    Axis x = crop.x, y = crop.y;
    x.subsample = j == 0 ? 1 : image.subsample_x;
    y.subsample = j == 0 ? 1 : image.subsample_y;
    const Plane& plane = image.planes[j];
    fill_axis_table(options.filter, options.padding, x, plane.width, 0, columns, ws.horizontal[j]);
    fill_axis_table(options.filter, options.padding, y, plane.height, row_begin, row_end, ws.vertical[j]);
  }
  ws.sampled.assign(3 * static_cast<std::size_t>(columns), 0.f);
  ws.rgb.resize(ws.sampled.size());
  ws.none.assign(columns, 0.f);

  for (std::int32_t row = row_begin; row < row_end; ++row) {
    const float* coverage[3] = {ws.none.data(), ws.none.data(), ws.none.data()};
    float row_coverage[3] = {0.f, 0.f, 0.f};
    for (int j = 0; j < image.components; ++j) {
      const AxisTable& h = ws.horizontal[std::min(j, 1)];
      const AxisTable& v = ws.vertical[std::min(j, 1)];
      const std::int32_t i = row - row_begin;
      ws.row_weights.resize(v.count[i]);
      for (std::int32_t k = 0; k < v.count[i]; ++k)
        ws.row_weights[k] = v.weights[static_cast<std::size_t>(k) * v.out + i];
      const std::int32_t window = h.window_end - h.window_begin;
      ws.summed.assign(static_cast<std::size_t>(window) + h.taps, 0.f);  // padded taps read past the window, times 0
      add_rows(image, image.planes[j], options.filter, h.window_begin, v.window_begin + v.first[i],
               ws.row_weights.data(), v.count[i], window, ws.gathered, ws.sum, ws.summed.data());
      sample_columns(ws.summed.data(), h.first.data(), h.weights.data(), h.taps, columns,
                     ws.sampled.data() + static_cast<std::size_t>(j) * columns);
      coverage[j] = h.coverage.data();
      row_coverage[j] = v.coverage[i];
    }
    const auto finish = image.color.transfer == Transfer::kSdr ? finish_row : finish_hdr_row;
    finish(image.color, norm, ws.sampled.data(), coverage, row_coverage, columns, ws.rgb.data());
    Out* dst = out + order.base + row * order.per_row;
    for (int c = 0; c < 3; ++c, dst += channel) {
      const float* src = ws.rgb.data() + static_cast<std::size_t>(c) * columns;
      for (std::int32_t x = 0; x < columns; ++x) dst[x * order.per_column] = store<Out>(src[x]);
    }
  }
}

template <typename Out>
void run(const std::vector<Image>& images, const std::vector<CropBox>& boxes, const CropResizeOptions& options,
         int threads, Out* out) {
  const Normalization norm = make_normalization(options);
  const std::int64_t crop_size = 3ll * options.out_h * options.out_w;
  const auto n = static_cast<std::int64_t>(boxes.size());
  // Few crops are split into bands, so that one large picture (a pyramid level) uses all threads too.
  const std::int64_t bands = threads > 1 && n > 0 ? std::max<std::int64_t>(1, (2 * threads + n - 1) / n) : 1;
  // The detector's proposals come by score, from 16 pictures. In the order of memory, what one has read is still in the
  // cache for the next.
  std::vector<std::int64_t> order(boxes.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return std::tie(boxes[a].image, boxes[a].y1, a) < std::tie(boxes[b].image, boxes[b].y1, b);
  });
  parallel_for(n * bands, threads, [&](std::int64_t item) {
    const std::int64_t place = order[item / bands];
    const CropBox& box = boxes[place];
    const Image& image = images[box.image];
    const std::int64_t rows = image.turned() ? options.out_w : options.out_h;
    const std::int64_t band = item % bands;
    crop_band<Out>(image, box, options, norm, static_cast<std::int32_t>(rows * band / bands),
                   static_cast<std::int32_t>(rows * (band + 1) / bands), out + place * crop_size);
  });
}

}  // namespace

void crop_resize_cpu(const std::vector<Image>& images, const std::vector<CropBox>& boxes,
                     const CropResizeOptions& options, int threads, void* out) {
  check_crop_resize(images, boxes, options);
  DF_CHECK(threads >= 1, "threads must be at least 1, got " + std::to_string(threads));
  if (options.half) {
    run(images, boxes, options, threads, static_cast<std::uint16_t*>(out));
  } else {
    run(images, boxes, options, threads, static_cast<float*>(out));
  }
}

void pyramid_cpu(const std::vector<Image>& images, const std::vector<CropResizeOptions>& levels, int threads,
                 const std::vector<float*>& out) {
  std::vector<CropBox> whole;
  for (std::size_t n = 0; n < images.size(); ++n) {
    whole.push_back({0.f, 0.f, static_cast<float>(images[n].upright_width()),
                     static_cast<float>(images[n].upright_height()), static_cast<std::int32_t>(n)});
  }
  for (const CropResizeOptions& level : levels) check_crop_resize(images, whole, level);
  DF_CHECK(threads >= 1, "threads must be at least 1, got " + std::to_string(threads));
  const auto count = static_cast<std::int64_t>(levels.size());
  parallel_for(static_cast<std::int64_t>(images.size()) * count, threads, [&](std::int64_t item) {
    const std::int64_t n = item / count;
    const CropResizeOptions& level = levels[item % count];
    crop_band<float>(images[n], whole[n], level, make_normalization(level), 0,
                     images[n].turned() ? level.out_w : level.out_h,
                     out[item % count] + n * 3 * level.out_h * level.out_w);
  });
}

}  // namespace dfengine
