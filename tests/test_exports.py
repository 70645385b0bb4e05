"""What is public is listed, and what is listed is there."""

from __future__ import annotations

import builtins
import importlib
import inspect
from pathlib import Path

import pytest

import dfengine
from dfengine import errors

PACKAGE = Path(dfengine.__file__).parent
WITH_ALL = [
    name
    for path in sorted(PACKAGE.rglob("*.py"))
    if "\n__all__ = " in path.read_text("utf-8")
    for name in [".".join((dfengine.__name__, *path.relative_to(PACKAGE).with_suffix("").parts))]
]


def test_public_names():
    assert dfengine.__all__ == ["Bundle", "Engine", "VideoScore", "build_info", "errors", "score"]


@pytest.mark.parametrize("name", WITH_ALL)
def test_listed_names_are_sorted_and_exist(name):
    module = importlib.import_module(name.removesuffix(".__init__"))
    assert list(module.__all__) == sorted(set(module.__all__))
    for public in module.__all__:
        assert hasattr(module, public)


def test_all_errors_are_listed():
    defined = {n for n, v in vars(errors).items() if getattr(v, "__module__", None) == errors.__name__}
    assert set(errors.__all__) == {name for name in defined if not name.startswith("_")}


def test_the_drawing_of_the_error_tree_is_true():
    drawn = {}
    parents = []
    for line in errors.__doc__.splitlines():
        name = line.strip().lstrip("│├└─ ").split(" ")[0]
        if not isinstance(getattr(errors, name, None), type):
            continue
        depth = (line.index(name) - 4) // 4
        parents[depth:] = [name]
        drawn[name] = parents[depth - 1] if depth else "Exception"
        for builtin in ("FileNotFoundError", "PermissionError", "ValueError", "RuntimeError"):
            if f"({builtin})" in line:
                assert issubclass(getattr(errors, name), getattr(builtins, builtin))
    classes = {n: c for n, c in vars(errors).items() if inspect.isclass(c) and c.__module__ == errors.__name__}
    assert drawn == {n: c.__bases__[0].__name__ for n, c in classes.items()}


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.NotAVideo("it is text", path="a.txt", stage="open"), "a.txt: it is text"),
        (errors.DeviceError("no driver"), "no driver"),
        (errors.BundleError("damaged", path=Path("x/y")), "x/y: damaged"),
        (errors.SourceNotFound("gone", path="\udcff.mp4"), "\\xff.mp4: gone"),
    ],
)
def test_errors_carry_path_and_stage(error, text):
    assert str(error) == text
    assert isinstance(error, errors.DfengineError)
    assert error.message in text
    str(error).encode()


def test_version_is_that_of_the_distribution():
    from importlib import metadata

    assert dfengine.__version__ == metadata.version("dfengine") == dfengine.build_info()["dfengine"]
