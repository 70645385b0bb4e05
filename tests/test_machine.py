"""How much of a machine may be used."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from dfengine import info, machine
from dfengine.machine import default_workers, threads_each, usable_cores


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000"}, math.inf),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu.max": "something else"}, math.inf),
    ],
)
def test_a_quota_of_a_container(tmp_path: Path, files: dict[str, str], cores: float) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert machine._cpu_quota(tmp_path) == cores


@pytest.mark.parametrize(("bound", "quota", "cores"), [(8, math.inf, 8), (8, 2.5, 3), (2, 2.5, 2), (8, 0.1, 1)])
def test_the_narrower_of_binding_and_quota_counts(
    monkeypatch: pytest.MonkeyPatch, bound: int, quota: float, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(bound)))
    monkeypatch.setattr(machine, "_cpu_quota", lambda: quota)
    assert usable_cores() == cores
    assert default_workers(False, usable_cores()) == cores
    assert default_workers(True, usable_cores()) == 16


def test_info_tells_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "usable_cores", lambda: 3)
    assert info.build_info()["cores"] == 3
    assert info.devices()["cpu"].endswith(", 3 cores")


@pytest.mark.parametrize(("cores", "videos", "threads"), [(8, 1, 8), (8, 3, 2), (8, 8, 1), (2, 16, 1)])
def test_videos_share_the_cores(cores: int, videos: int, threads: int) -> None:
    assert threads_each(cores, videos) == threads
