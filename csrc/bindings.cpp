// The only file that knows Python: buffers in and out, the GIL, exceptions.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "crop_resize.h"

namespace py = pybind11;
using namespace dfengine;

namespace {

template <typename Enum>
Enum parse(const std::string& what, const std::string& value, const std::vector<std::pair<std::string, Enum>>& names) {
  std::string known;
  for (const auto& [name, result] : names) {
    if (name == value) return result;
    known += (known.empty() ? "" : ", ") + name;
  }
  throw InvalidArgument(what + " must be one of " + known + "; got '" + value + "'");
}

ColorStandard parse_standard(const std::string& value) {
  return parse<ColorStandard>("matrix", value,
                              {{"rgb", ColorStandard::kRgb},
                               {"gray", ColorStandard::kGray},
                               {"bt601", ColorStandard::kBt601},
                               {"bt709", ColorStandard::kBt709},
                               {"fcc", ColorStandard::kFcc},
                               {"smpte240m", ColorStandard::kSmpte240m},
                               {"bt2020", ColorStandard::kBt2020},
                               {"ycgco", ColorStandard::kYCgCo}});
}

Transfer parse_transfer(const std::string& value) {
  return parse<Transfer>("transfer", value, {{"sdr", Transfer::kSdr}, {"pq", Transfer::kPq}, {"hlg", Transfer::kHlg}});
}

Filter parse_filter(const std::string& value) {
  return parse<Filter>("resize", value,
                       {{"triangle", Filter::kTriangle}, {"area", Filter::kArea}, {"bilinear", Filter::kBilinear}});
}

// A two-dimensional array of samples, wherever it is.
struct Samples {
  const std::uint8_t* data;
  std::int64_t height, width, row_bytes, step_bytes;
  std::int32_t sample_bytes;
};

Samples check_samples(const std::string& name, const void* data, const py::dtype& dtype,
                      const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides) {
  const bool u8 = dtype.equal(py::dtype::of<std::uint8_t>());
  DF_CHECK(u8 || dtype.equal(py::dtype::of<std::uint16_t>()),
           name + " must be uint8 or uint16, got " + py::str(dtype).cast<std::string>());
  DF_CHECK(shape.size() == 2 && shape[0] > 0 && shape[1] > 0, name + " must be a non-empty (H, W) array");
  return {static_cast<const std::uint8_t*>(data), shape[0], shape[1], strides[0], strides[1], u8 ? 1 : 2};
}

// Memory of the host. `keep` holds the arrays while it is read.
struct HostArrays {
  std::vector<py::array> keep;

  Samples operator()(const py::handle& source, const std::string& name) {
    DF_CHECK(py::isinstance<py::array>(source), name + " must be a NumPy array");
    const py::array array = py::reinterpret_borrow<py::array>(source);
    keep.push_back(array);
    return check_samples(name, array.data(), array.dtype(), {array.shape(), array.shape() + array.ndim()},
                         {array.strides(), array.strides() + array.ndim()});
  }
};

// What __cuda_array_interface__ says (version 3,
// https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html). Its stream is not looked at: the caller
// orders the streams.
struct DeviceArray {
  void* data;
  bool read_only;
  py::dtype dtype;
  std::vector<std::int64_t> shape, strides;

  DeviceArray(const py::handle& source, const std::string& name) {
    DF_CHECK(py::hasattr(source, "__cuda_array_interface__"),
             name + " must lie on the device, with __cuda_array_interface__; got " +
                 py::str(py::type::handle_of(source).attr("__name__")).cast<std::string>());
    const auto interface = source.attr("__cuda_array_interface__").cast<py::dict>();
    dtype = py::dtype::from_args(interface["typestr"]);
    shape = interface["shape"].cast<std::vector<std::int64_t>>();
    const auto where = interface["data"].cast<std::pair<std::uintptr_t, bool>>();
    data = reinterpret_cast<void*>(where.first);
    read_only = where.second;
    strides.resize(shape.size());
    std::int64_t next = dtype.itemsize();
    for (std::size_t i = shape.size(); i-- > 0; next *= shape[i]) strides[i] = next;
    if (interface.contains("strides") && !interface["strides"].is_none()) {
      const auto given = interface["strides"].cast<std::vector<std::int64_t>>();
      const bool empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
      for (std::size_t i = 0; i < shape.size(); ++i) {
        contiguous = contiguous && (empty || shape[i] == 1 || given[i] == strides[i]);
      }
      strides = given;
    }
  }

  bool contiguous = true;  // in the order of C
};

Samples device_samples(const py::handle& source, const std::string& name) {
  const DeviceArray array(source, name);
  return check_samples(name, array.data, array.dtype, array.shape, array.strides);
}

// A dfengine.types.Image, without copying. `samples_of(component, its name)` gives its Samples.
template <typename SamplesOf>
Image read_image(const py::handle& source, SamplesOf& samples_of) {
  const auto components = source.attr("components").cast<py::tuple>();
  DF_CHECK(components.size() == 1 || components.size() == 3,
           "an image has 1 or 3 components, got " + std::to_string(components.size()));
  Image image;
  image.components = static_cast<std::int32_t>(components.size());
  for (std::size_t j = 0; j < components.size(); ++j) {
    const Samples samples = samples_of(components[j], "component " + std::to_string(j));
    Plane& plane = image.planes[j];
    plane.data = samples.data;
    plane.height = static_cast<std::int32_t>(samples.height);
    plane.width = static_cast<std::int32_t>(samples.width);
    plane.row_bytes = samples.row_bytes;
    plane.step_bytes = static_cast<std::int32_t>(samples.step_bytes);
    DF_CHECK(j == 0 || samples.sample_bytes == image.sample_bytes, "all components of an image must have one dtype");
    image.sample_bytes = samples.sample_bytes;
  }
  image.width = image.planes[0].width;
  image.height = image.planes[0].height;
  const auto subsampling = source.attr("subsampling_xy").cast<std::array<std::int32_t, 2>>();
  image.subsample_x = subsampling[0];
  image.subsample_y = subsampling[1];
  DF_CHECK(image.subsample_x >= 1 && image.subsample_y >= 1, "subsampling_xy must be at least (1, 1)");
  for (int j = 1; j < image.components; ++j) {
    const Plane& plane = image.planes[j];
    const std::int32_t w = (image.width + image.subsample_x - 1) / image.subsample_x;
    const std::int32_t h = (image.height + image.subsample_y - 1) / image.subsample_y;
    DF_CHECK(plane.width == w && plane.height == h,
             "component " + std::to_string(j) + " has shape (" + std::to_string(plane.height) + ", " +
                 std::to_string(plane.width) + "), but subsampling_xy asks for (" + std::to_string(h) + ", " +
                 std::to_string(w) + ")");
  }
  const auto rotation = source.attr("rotation").cast<int>();
  DF_CHECK(rotation == 0 || rotation == 90 || rotation == 180 || rotation == 270,
           "rotation must be 0, 90, 180 or 270 degrees clockwise, got " + std::to_string(rotation));
  image.quarter_turns = rotation / 90;
  image.mirrored = source.attr("mirrored").cast<bool>();
  const auto upright = source.attr("upright_hw").cast<std::array<std::int32_t, 2>>();
  image.square_width = upright[image.turned() ? 0 : 1];
  image.square_height = upright[image.turned() ? 1 : 0];
  DF_CHECK(image.square_width >= 1 && image.square_height >= 1, "pixel_aspect must be positive");
  const auto standard = source.attr("matrix").cast<std::string>();
  DF_CHECK((image.components == 1) == (standard == "gray"), "matrix 'gray' goes with one component, and only it");
  const auto bit_depth = source.attr("bit_depth").cast<int>();
  image.color = make_color_matrix(parse_standard(standard), source.attr("full_range").cast<bool>(), bit_depth,
                                  parse_transfer(source.attr("transfer").cast<std::string>()));
  DF_CHECK(bit_depth <= 8 * image.sample_bytes,
           "bit_depth " + std::to_string(bit_depth) + " does not fit the samples, which are uint8");
  return image;
}

using Boxes = py::array_t<float, py::array::c_style>;
using ImageIndex = py::array_t<std::int32_t, py::array::c_style>;

std::vector<CropBox> read_boxes(const Boxes& boxes, const ImageIndex& image_index) {
  DF_CHECK(boxes.ndim() == 2 && boxes.shape(1) == 4, "boxes must have shape (N, 4)");
  DF_CHECK(image_index.ndim() == 1 && image_index.shape(0) == boxes.shape(0),
           "image_index must have shape (N,), one entry a box: there are " + std::to_string(boxes.shape(0)) +
               " boxes and " + std::to_string(image_index.size()) + " entries");
  std::vector<CropBox> crops(static_cast<std::size_t>(boxes.shape(0)));
  for (py::ssize_t n = 0; n < boxes.shape(0); ++n) {
    crops[n] = {boxes.at(n, 0), boxes.at(n, 1), boxes.at(n, 2), boxes.at(n, 3), image_index.at(n)};
  }
  return crops;
}

CropResizeOptions read_options(std::int32_t out_h, std::int32_t out_w, const std::array<float, 3>& mean,
                               const std::array<float, 3>& std_, const std::string& resize, const std::string& padding,
                               const std::string& dtype) {
  CropResizeOptions options;
  options.out_h = out_h;
  options.out_w = out_w;
  options.filter = parse_filter(resize);
  options.padding = parse<Padding>("padding", padding, {{"edge", Padding::kEdge}, {"zero", Padding::kZero}});
  options.half = parse<bool>("dtype", dtype, {{"float32", false}, {"float16", true}});
  std::copy(mean.begin(), mean.end(), options.mean);
  std::copy(std_.begin(), std_.end(), options.std);
  return options;
}

std::vector<py::array> pyramid(const py::sequence& images, const std::vector<std::array<std::int32_t, 2>>& sizes_hw,
                               const std::array<float, 3>& mean, const std::array<float, 3>& std_,
                               const std::string& resize, int threads) {
  HostArrays arrays;
  std::vector<Image> views;
  for (const auto& image : images) views.push_back(read_image(image, arrays));
  std::vector<CropResizeOptions> levels;
  for (const auto& hw : sizes_hw) {
    CropResizeOptions level;
    level.out_h = hw[0];
    level.out_w = hw[1];
    level.filter = parse_filter(resize);
    std::copy(mean.begin(), mean.end(), level.mean);
    std::copy(std_.begin(), std_.end(), level.std);
    check_crop_resize(views, {}, level);  // before the output is allocated from its sizes
    levels.push_back(level);
  }
  std::vector<py::array> out;
  std::vector<float*> data;
  for (const auto& level : levels) {
    out.push_back(py::array_t<float>(std::vector<py::ssize_t>{py::ssize_t(views.size()), 3, level.out_h, level.out_w}));
    data.push_back(static_cast<float*>(out.back().mutable_data()));
  }
  {
    const py::gil_scoped_release release;
    pyramid_cpu(views, levels, threads, data);
  }
  return out;
}

py::array crop_resize(const py::sequence& images, const Boxes& boxes, const ImageIndex& image_index,
                      const std::array<std::int32_t, 2>& out_hw, const std::array<float, 3>& mean,
                      const std::array<float, 3>& std_, const std::string& resize, const std::string& padding,
                      const std::string& dtype, int threads) {
  const auto crops = read_boxes(boxes, image_index);
  const auto options = read_options(out_hw[0], out_hw[1], mean, std_, resize, padding, dtype);
  HostArrays arrays;
  std::vector<Image> views;
  for (const auto& image : images) views.push_back(read_image(image, arrays));
  check_crop_resize(views, crops, options);  // before the output is allocated from its sizes
  py::array out(py::dtype(dtype), std::vector<py::ssize_t>{boxes.shape(0), 3, options.out_h, options.out_w});
  void* data = out.mutable_data();
  {
    const py::gil_scoped_release release;
    crop_resize_cpu(views, crops, options, threads, data);
  }
  return out;
}

// The GPU's side of the same op. `run(views, crops, options, address of out)`.
template <typename Run>
void crop_resize_into(const py::sequence& images, const Boxes& boxes, const ImageIndex& image_index,
                      const py::handle& out, const std::array<float, 3>& mean, const std::array<float, 3>& std_,
                      const std::string& resize, const std::string& padding, const Run& run) {
  const auto crops = read_boxes(boxes, image_index);
  const DeviceArray target(out, "out");
  const auto dtype = py::str(target.dtype).cast<std::string>();
  DF_CHECK(dtype == "float32" || dtype == "float16", "out must be float32 or float16, got " + dtype);
  const auto n = static_cast<std::int64_t>(crops.size());
  DF_CHECK(target.shape.size() == 4 && target.shape[0] == n && target.shape[1] == 3,
           "out must have shape (" + std::to_string(n) + ", 3, H, W), one crop a box; got " +
               py::str(py::tuple(py::cast(target.shape))).cast<std::string>());
  DF_CHECK(target.contiguous, "out must be C-contiguous");
  DF_CHECK(!target.read_only, "out must be writable");
  for (const std::int64_t side : {target.shape[2], target.shape[3]}) {
    DF_CHECK(side <= std::numeric_limits<std::int32_t>::max(), "out is too large");
  }
  const auto options = read_options(static_cast<std::int32_t>(target.shape[2]),
                                    static_cast<std::int32_t>(target.shape[3]), mean, std_, resize, padding, dtype);
  std::vector<Image> views;
  for (const auto& image : images) views.push_back(read_image(image, device_samples));
  const py::gil_scoped_release release;
  run(views, crops, options, target.data);
}

void run_emulated(const py::sequence& images, const Boxes& boxes, const ImageIndex& image_index, const py::object& out,
                  const std::array<float, 3>& mean, const std::array<float, 3>& std_, const std::string& resize,
                  const std::string& padding) {
  crop_resize_into(images, boxes, image_index, out, mean, std_, resize, padding,
                   [](const auto& views, const auto& crops, const auto& options, void* data) {
                     crop_resize_emulated(views, crops, options, data);
                   });
}

#if defined(DFENGINE_CUDA_ARCHITECTURES)
void run_cuda(const py::sequence& images, const Boxes& boxes, const ImageIndex& image_index, const py::object& out,
              const std::array<float, 3>& mean, const std::array<float, 3>& std_, const std::string& resize,
              const std::string& padding, std::uintptr_t stream) {
  crop_resize_into(images, boxes, image_index, out, mean, std_, resize, padding,
                   [&](const auto& views, const auto& crops, const auto& options, void* data) {
                     crop_resize_cuda(views, crops, options, stream, data);
                   });
}
#endif

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  m.doc() = "Pixel kernels of dfengine. Knows images and boxes, nothing of faces.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const InvalidArgument& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    }
  });
  m.attr("compiler") = "C++ " __VERSION__;
  m.def("crop_resize", &crop_resize, py::arg("images"), py::arg("boxes"), py::arg("image_index"), py::kw_only(),
        py::arg("out_hw"), py::arg("mean"), py::arg("std"), py::arg("resize") = "triangle", py::arg("padding") = "edge",
        py::arg("dtype") = "float32", py::arg("threads") = 1,
        R"(Crops and resizes boxes of many images into one normalised batch.

images: sequence of dfengine.types.Image, any mix of sizes and formats.
boxes: (N, 4) float32 xyxy, square pixels, half-open, in the upright image; may leave it.
image_index: (N,) int32, the image of each box.
mean, std: on RGB in 0..1. Returns (N, 3, H, W), RGB, (rgb / 255 - mean) / std.
resize: 'triangle' (antialiased), 'area' (torch's adaptive average over whole pixels), 'bilinear'.
padding: 'edge' or 'zero' (black) for what lies outside the image.
Releases the GIL. The result does not depend on `threads`. Raises ValueError.)");
  m.def("pyramid", &pyramid, py::arg("images"), py::arg("sizes_hw"), py::kw_only(), py::arg("mean"), py::arg("std"),
        py::arg("resize") = "triangle", py::arg("threads") = 1,
        R"(Every image, whole, at several sizes: for each of sizes_hw what crop_resize would give, bit for bit.

Goes image by image, so that an image is read from memory once. Returns a list of (N, 3, H, W) float32 arrays.
Releases the GIL. Raises ValueError.)");
  m.def(
      "crop_resize_emulated", &run_emulated, py::arg("images"), py::arg("boxes"), py::arg("image_index"), py::kw_only(),
      py::arg("out"), py::arg("mean"), py::arg("std"), py::arg("resize") = "triangle", py::arg("padding") = "edge",
      R"(The program of crop_resize_cuda, run on the CPU over arrays whose "device" pointers are addresses of the host.

For tests: slow.)");
#if defined(DFENGINE_CUDA_ARCHITECTURES)
  const int architectures[] = {DFENGINE_CUDA_ARCHITECTURES};
  m.attr("cuda_architectures") =
      py::tuple(py::cast(std::vector<int>(std::begin(architectures), std::end(architectures))));
  m.def("crop_resize_cuda", &run_cuda, py::arg("images"), py::arg("boxes"), py::arg("image_index"), py::kw_only(),
        py::arg("out"), py::arg("mean"), py::arg("std"), py::arg("resize") = "triangle", py::arg("padding") = "edge",
        py::arg("stream"),
        R"(crop_resize on the GPU whose context is current.

images: as for crop_resize, with components that have __cuda_array_interface__. boxes, image_index: on the host.
out: (N, 3, H, W) float16 or float32 with __cuda_array_interface__, C-contiguous: gives the size and the dtype.
stream: handle of the stream that the kernel is enqueued on. Nothing is waited for and nothing is allocated there; the
caller keeps the arrays, and orders the streams they come from.
Raises ValueError as crop_resize does, and RuntimeError if the kernel cannot be launched.)");
#else
  m.attr("cuda_architectures") = py::tuple();
#endif
}
