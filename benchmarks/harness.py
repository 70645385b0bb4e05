"""What all benchmarks share: timing, the description of the machine, and the result file.

A benchmark checks agreement first and time second, runs its rivals in the same process on the same input, and reports
medians with their spread. The README's tables are drawn from the result files by scripts/update_readme.py.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from dfengine.machine import usable_cores

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("dfengine", "numpy", "av", "openvino", "torch", "torchvision", "facenet-pytorch", "opencv-python-headless")


def time_calls(call: Callable[[], object], *, repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Seconds a call: median, smallest and largest of ``repeats``, after ``warm_up`` calls that do not count."""
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "repeats": repeats}


def describe_machine() -> dict[str, Any]:
    """The machine, the versions and the commit a result belongs to."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": cpu,
        "cores": usable_cores(),
        "gpu": _gpu(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
        "git": _git("rev-parse", "--short", "HEAD")
        + ("+changes" if _git("status", "--porcelain", "--", ".", ":!benchmarks/results") else ""),
        "date": datetime.date.today().isoformat(),
    }


def load(name: str) -> dict[str, Any]:
    """What ``save`` wrote, {} if that never happened."""
    path = RESULTS / f"{name}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return result


def save(name: str, result: dict[str, Any]) -> Path:
    """Writes benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result | {"machine": describe_machine()}, indent=2) + "\n")
    return path


def _gpu() -> str:
    """The first GPU, with its driver; "none" without one."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return lines[0] if lines else "none"


def _git(*words: str) -> str:
    root = Path(__file__).parents[1]
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False).stdout.strip()
