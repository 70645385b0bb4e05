#!/usr/bin/env bash
# Fetches what scripts/gpu_check.sh needs on a machine without network: gpu_wheels.sh FOLDER [PYTHON_VERSION]
#
# torch, torchvision and timm are expected to be there already. pycuda comes as source and is built there.
set -euo pipefail
folder=${1:?usage: gpu_wheels.sh FOLDER [PYTHON_VERSION]}
version=${2:-3.12}
fetch() {
  python3 -m pip download --quiet --dest "$folder" --python-version "$version" --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 --only-binary :all: "$@"
}
fetch --no-deps av openvino openvino-telemetry PyNvVideoCodec onnx2torch onnx ml-dtypes cuda-bindings cuda-pathfinder \
  scikit-build-core pybind11 cython ninja pathspec pytest pluggy iniconfig hypothesis sortedcontainers typer rich \
  markdown-it-py mdurl pygments click shellingham annotated-doc scikit-image imageio tifffile lazy-loader facenet-pytorch \
  opencv-python-headless pyarrow safetensors pytools siphash24 mako markupsafe
# pip saves the source, then fails to read its metadata where there is no CUDA to build with: the file is what counts.
python3 -m pip download --quiet --dest "$folder" --no-deps --no-binary pycuda pycuda >/dev/null 2>&1 || true
ls "$folder"/pycuda-*.tar.gz >/dev/null
if [ "${WITH_TENSORRT_RTX:-0}" = 1 ]; then # 95 MB
  fetch --no-deps tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings
fi
du -sh "$folder"
