#!/usr/bin/env bash
# Proves and measures the GPU path on a machine with an NVIDIA GPU; no network is needed.
#
#   scripts/gpu_check.sh install WHEELS        what scripts/gpu_wheels.sh fetched; may be called once for each part of it
#   scripts/gpu_check.sh check OUT [VIDEOS]    builds, tests, measures; OUT gets gpu_check.json, the logs and the results
#
# PYTHON is the interpreter whose torch is used. Every step is run whatever became of those before it; the exit code is
# that of the worst. Steps that take videos are left out, and said to be, when none are given.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=build/gpu-venv

install() {
  [ -x $venv/bin/python ] || "$python" -m venv --system-site-packages $venv || return
  local pip="$venv/bin/python -m pip install --quiet --no-index --no-deps --no-build-isolation --find-links $1"
  local wheels
  mapfile -t wheels < <(find "$1" -name '*.whl' | sort)
  # What the machine has already is kept: its torch was built against its numpy.
  $pip "${wheels[@]}" || return
  local source
  source=$(find "$1" -name 'pycuda-*.tar.gz' | head -n 1)
  # A wheel of it that was built elsewhere (docs/gpu.md) is among the wheels above.
  if [ -n "$source" ] && ! ls "$1"/pycuda-*.whl >/dev/null 2>&1; then
    CUDA_ROOT=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")") $pip "$source" || return
  fi
}

check() {
  local out videos=${2:-}
  mkdir -p "$1" && out=$(realpath "$1")
  local bin=$PWD/$venv/bin
  export DFENGINE_REQUIRE_CUDA=1 DFENGINE_TEST_DATA=${DFENGINE_TEST_DATA:-}
  worst=0
  rows=()
  step() {
    local name=$1 started=$SECONDS rc=0
    shift
    echo "== $name: $*"
    timeout "${STEP_SECONDS:-400}" "$@" >"$out/$name.log" 2>&1 || rc=$?
    tail -n 5 "$out/$name.log"
    rows+=("{\"step\": \"$name\", \"rc\": $rc, \"seconds\": $((SECONDS - started))}")
    printf '[%s]\n' "$(IFS=,; echo "${rows[*]}")" >"$out/gpu_check.json"
    [ $rc -le $worst ] || worst=$rc
  }
  step machine bash -c 'nvidia-smi; ldconfig -p | grep -E "libnvcuvid|libnvidia-encode|libcuda\.so"; nvcc --version'
  step build env DFENGINE_CUDA=ON "$bin/python" -m pip install --no-index --no-deps --no-build-isolation --editable .
  step info "$bin/dfengine" info
  step tests "$bin/python" -m pytest tests/gpu --maxfail=20 -q
  if command -v compute-sanitizer >/dev/null; then
    step sanitizer compute-sanitizer --error-exitcode 9 "$bin/python" -m pytest tests/gpu/test_crop_resize.py -q
  fi
  step gpu_ops "$bin/python" -m benchmarks.gpu_ops
  step gpu_nets "$bin/python" -m benchmarks.gpu_nets
  if [ -n "$videos" ]; then
    step nvdec "$bin/python" -m benchmarks.nvdec --videos "$videos"
    step gpu_engine "$bin/python" -m benchmarks.gpu_engine --videos "$videos"
  else
    echo "== no videos were given: NVDEC and the engine are not measured"
  fi
  cp benchmarks/results/gpu_*.json benchmarks/results/nvdec.json "$out" 2>/dev/null
  exit $worst
}

case ${1:-} in
  install) install "${2:?usage: gpu_check.sh install WHEELS}" ;;
  check) check "${2:?usage: gpu_check.sh check OUT [VIDEOS]}" "${3:-}" ;;
  *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
