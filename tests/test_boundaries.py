"""The table "Boundaries" of docs/architecture.md, by reading imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dfengine"
CSRC = ROOT / "csrc"

STAGES = {"decode", "detect", "track", "crop", "backbone", "audio", "aggregate"}
VALUES = {"types", "errors"}
COMPILED = {"_kernels", "_boxes"}
ALL = {p.stem for p in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
ALL |= COMPILED

# Layer -> the layers of dfengine it may import; itself always.
MAY_IMPORT = {
    "types": set(),
    "errors": set(),
    "bundle": VALUES,
    "cuda": VALUES,
    "runtime": VALUES | {"bundle", "cuda"},
    "media": VALUES,
    "sampling": VALUES | {"bundle"},
    **{stage: VALUES | {"bundle", "runtime"} | COMPILED for stage in STAGES},
    "decode": VALUES | {"bundle", "cuda", "runtime", "sampling", "media"} | COMPILED,
    "audio": VALUES | {"bundle", "media"},
    "results": VALUES,
    "deadline": VALUES | {"bundle", "sampling"},
    "worker": VALUES | {"bundle", "engine"},
    "batch": VALUES | {"bundle", "runtime", "engine", "deadline", "worker"},
    "info": VALUES | {"bundle", "runtime"} | COMPILED,
    "engine": ALL - {"cli", "batch", "worker", "deadline", "results", "__init__", "__main__"},
    "cli": {"__init__", "batch", "deadline", "results", "info", "bundle"} | VALUES,  # no stage
    "__main__": {"cli"},
    "__init__": {"engine", "bundle", "types", "errors", "info"},
}

# Packages from elsewhere -> the layers that may import them. The standard library and numpy are free.
ELSEWHERE = {
    "av": {"media", "decode", "audio", "info"},
    "openvino": {"runtime"},
    "typer": {"cli"},
    "rich": {"cli"},
    "pyarrow": {"results"},
    "tensorrt": {"runtime"},
    "tensorrt_rtx": {"runtime"},
    "torch": {"runtime"},
    "onnx2torch": {"runtime"},
    "pycuda": {"cuda"},
    "cuda": {"cuda"},  # NVIDIA's cuda-bindings
    "PyNvVideoCodec": {"decode"},
}
ONLY_IN_FUNCTIONS = set(ELSEWHERE) - {"av", "typer", "rich"}


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """All imported modules, with whether that happens in a function."""
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            if node.module == "dfengine":
                names = ("__init__" if alias.name == "__version__" else alias.name for alias in node.names)
                found.extend((f"dfengine.{name}", in_function) for name in names)
            else:
                found.append((node.module, in_function))
        for child in ast.iter_child_nodes(node):
            visit(child, in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(tree, False)
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports(path):
    here = layer(path)
    assert here in MAY_IMPORT, f"{here} has no row in the table of boundaries"
    for module, in_function in imports(ast.parse(path.read_text("utf-8"))):
        top, _, rest = module.partition(".")
        if top == "dfengine":
            other = rest.split(".")[0]
            assert other in ALL, f"{module} is no layer of dfengine"
            assert other == here or other in MAY_IMPORT.get(here, VALUES), f"{here} must not import {module}"
        elif top != "numpy" and top not in sys.stdlib_module_names:
            assert here in ELSEWHERE.get(top, set()), f"{here} must not import {top}"
            assert in_function or top not in ONLY_IN_FUNCTIONS, f"{top} must be imported inside a function"


def test_compiled_modules_know_nothing_of_the_package():
    for path in PACKAGE.glob("*.pyx"):
        text = path.read_text("utf-8")
        assert set(re.findall(r"^\s*(?:from|import|cimport) (\w+)", text, re.M)) <= {"numpy", "libc"}


def test_the_engine_prints_nothing():
    for path in FILES:
        calls = (n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call))
        printed = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert layer(path) == "cli" or not printed, f"{path.name} prints in line {printed}"


def test_the_table_rejects_what_it_should():
    """The reader above, on code that breaks the rules."""
    tree = ast.parse(
        "import torch\nfrom dfengine import crop, _boxes\ndef f():\n    from dfengine.engine import Engine\n"
    )
    found = [("torch", False), ("dfengine.crop", False), ("dfengine._boxes", False), ("dfengine.engine", True)]
    assert imports(tree) == found
    assert "crop" not in MAY_IMPORT["track"]
    assert "engine" not in MAY_IMPORT["track"]


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


def test_training_and_benchmarks_are_not_imported():
    for path in FILES:
        tops = {module.split(".")[0] for module, _ in imports(ast.parse(path.read_text("utf-8")))}
        assert not tops & {"training", "benchmarks", "tests"}, path.name
