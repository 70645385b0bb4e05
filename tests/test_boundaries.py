"""What import-linter and ruff cannot say of the boundaries: the C++ headers, and what an import may load.

Which module may import which is in pyproject.toml, and checked by ``make lint``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"


def test_compiled_modules_know_nothing_of_the_package():
    for path in (ROOT / "dfengine").rglob("*.pyx"):
        text = path.read_text("utf-8")
        assert set(re.findall(r"^\s*(?:from|import|cimport) (\w+)", text, re.M)) <= {"numpy", "libc"}


STANDARD_HEADER = re.compile(r"[a-z_]+")  # <vector>, <cstdint>: no dot, no slash


@pytest.mark.parametrize("path", sorted(CSRC.iterdir()), ids=lambda p: p.name)
def test_includes(path):
    text = path.read_text("utf-8")
    own = {p.name for p in CSRC.iterdir()}
    may_use_cuda = path.suffix == ".cu"
    for bracket, name in re.findall(r"^\s*#\s*include\s*([<\"])([^>\"]+)[>\"]", text, re.M):
        if bracket == '"':
            assert name in own, f"{name} is not in csrc/"
        elif name.startswith("pybind11/"):
            assert path.name == "bindings.cpp", "only bindings.cpp includes pybind11"
        elif not STANDARD_HEADER.fullmatch(name):
            assert may_use_cuda, f"{path.name} includes {name}"
            assert name.startswith(("cuda", "device_")), f"{path.name} includes {name}"
    if path.name != "bindings.cpp":
        assert "Python.h" not in text
    if path.suffix == ".h":
        assert "#pragma once" in text


def test_csrc_knows_no_faces():
    words = re.compile(r"\b(deepfake|fake|face|mtcnn|track)s?\b", re.I)
    for path in CSRC.glob("*.h"):
        code = re.sub(r"//.*", "", path.read_text("utf-8"))
        assert not words.search(code), path.name


def test_import_dfengine_imports_nothing_heavy():
    """Also a machine without torch, a GPU or OpenCV can import it, and start quickly."""
    code = "import dfengine, sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "cv2", "tensorrt", "tensorrt_rtx", "pycuda", "PyNvVideoCodec", "openvino", "onnx", "pyarrow",
             "timm", "PIL", "skimage", "typer", "training", "benchmarks"}  # fmt: skip
    assert not heavy & set(result.stdout.split())
    assert result.stderr == ""
