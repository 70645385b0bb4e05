// The only file that knows Python: buffers in and out, the GIL, exceptions.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

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

Filter parse_filter(const std::string& value) {
  return parse<Filter>("resize", value,
                       {{"triangle", Filter::kTriangle}, {"area", Filter::kArea}, {"bilinear", Filter::kBilinear}});
}

// A dfengine.types.Image, without copying. `keep` holds the arrays while their memory is read.
Image read_image(const py::handle& source, std::vector<py::array>& keep) {
  const auto components = source.attr("components").cast<py::tuple>();
  DF_CHECK(components.size() == 1 || components.size() == 3,
           "an image has 1 or 3 components, got " + std::to_string(components.size()));
  Image image;
  image.components = static_cast<std::int32_t>(components.size());
  for (std::size_t j = 0; j < components.size(); ++j) {
    DF_CHECK(py::isinstance<py::array>(components[j]), "component " + std::to_string(j) + " must be a NumPy array");
    const py::array array = py::reinterpret_borrow<py::array>(components[j]);
    const bool u8 = py::isinstance<py::array_t<std::uint8_t>>(array);
    DF_CHECK(u8 || py::isinstance<py::array_t<std::uint16_t>>(array), "component " + std::to_string(j) +
                                                                          " must be uint8 or uint16, got " +
                                                                          py::str(array.dtype()).cast<std::string>());
    DF_CHECK(array.ndim() == 2 && array.size() > 0,
             "component " + std::to_string(j) + " must be a non-empty (H, W) array");
    Plane& plane = image.planes[j];
    plane.data = static_cast<const std::uint8_t*>(array.data());
    plane.height = static_cast<std::int32_t>(array.shape(0));
    plane.width = static_cast<std::int32_t>(array.shape(1));
    plane.row_bytes = array.strides(0);
    plane.step_bytes = static_cast<std::int32_t>(array.strides(1));
    const std::int32_t bytes = u8 ? 1 : 2;
    DF_CHECK(j == 0 || bytes == image.sample_bytes, "all components of an image must have one dtype");
    image.sample_bytes = bytes;
    keep.push_back(array);
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
  const auto standard = source.attr("matrix").cast<std::string>();
  DF_CHECK((image.components == 1) == (standard == "gray"), "matrix 'gray' goes with one component, and only it");
  const auto bit_depth = source.attr("bit_depth").cast<int>();
  image.color = make_color_matrix(parse_standard(standard), source.attr("full_range").cast<bool>(), bit_depth);
  DF_CHECK(bit_depth <= 8 * image.sample_bytes,
           "bit_depth " + std::to_string(bit_depth) + " does not fit the samples, which are uint8");
  return image;
}

std::vector<py::array> pyramid(const py::sequence& images, const std::vector<std::array<std::int32_t, 2>>& sizes_hw,
                               const std::array<float, 3>& mean, const std::array<float, 3>& std_,
                               const std::string& resize, int threads) {
  std::vector<py::array> keep;
  std::vector<Image> views;
  for (const auto& image : images) views.push_back(read_image(image, keep));
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

py::array crop_resize(const py::sequence& images, const py::array_t<float, py::array::c_style>& boxes,
                      const py::array_t<std::int32_t, py::array::c_style>& image_index,
                      const std::array<std::int32_t, 2>& out_hw, const std::array<float, 3>& mean,
                      const std::array<float, 3>& std_, const std::string& resize, const std::string& padding,
                      const std::string& dtype, int threads) {
  DF_CHECK(boxes.ndim() == 2 && boxes.shape(1) == 4, "boxes must have shape (N, 4)");
  DF_CHECK(image_index.ndim() == 1 && image_index.shape(0) == boxes.shape(0),
           "image_index must have shape (N,), one entry a box: there are " + std::to_string(boxes.shape(0)) +
               " boxes and " + std::to_string(image_index.size()) + " entries");
  CropResizeOptions options;
  options.out_h = out_hw[0];
  options.out_w = out_hw[1];
  options.filter = parse_filter(resize);
  options.padding = parse<Padding>("padding", padding, {{"edge", Padding::kEdge}, {"zero", Padding::kZero}});
  options.half = parse<bool>("dtype", dtype, {{"float32", false}, {"float16", true}});
  std::copy(mean.begin(), mean.end(), options.mean);
  std::copy(std_.begin(), std_.end(), options.std);

  std::vector<py::array> keep;
  std::vector<Image> views;
  for (const auto& image : images) views.push_back(read_image(image, keep));
  std::vector<CropBox> crops(static_cast<std::size_t>(boxes.shape(0)));
  for (py::ssize_t n = 0; n < boxes.shape(0); ++n) {
    crops[n] = {boxes.at(n, 0), boxes.at(n, 1), boxes.at(n, 2), boxes.at(n, 3), image_index.at(n)};
  }
  check_crop_resize(views, crops, options);  // before the output is allocated from its sizes
  py::array out(py::dtype(dtype), std::vector<py::ssize_t>{boxes.shape(0), 3, options.out_h, options.out_w});
  void* data = out.mutable_data();
  {
    const py::gil_scoped_release release;
    crop_resize_cpu(views, crops, options, threads, data);
  }
  return out;
}

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
boxes: (N, 4) float32 xyxy, pixels, half-open, in the upright image; may leave it.
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
}
