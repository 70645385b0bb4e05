"""Tests that need a GPU. They skip without one, saying why; DFENGINE_REQUIRE_CUDA=1 turns that into a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from dfengine.errors import DeviceError
from dfengine.gpu.lanes import Gpu

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)


@cache
def why_no_gpu() -> str:
    """ "" if there is one."""
    try:
        Gpu.open().close()
    except DeviceError as error:
        return str(error)
    return ""


def missing(reason: str) -> None:
    """Ends a test whose device or package is not here: a skip, or a failure where a GPU is required."""
    if os.environ.get("DFENGINE_REQUIRE_CUDA", "") not in ("", "0"):
        pytest.fail(f"DFENGINE_REQUIRE_CUDA is set: {reason}")
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    if reason := why_no_gpu():
        missing(reason)


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    gpu = Gpu.open()
    yield gpu
    gpu.close()
