"""How much of this machine a process may use, and how many videos that is at a time."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

# Videos in work on a GPU: two for each of the seven or eight decoders that the largest have, so that one is decoded
# while another goes through the networks. Chosen, not measured. Cards with fewer decoders let them wait in line.
GPU_WORKERS = 16


def default_workers(on_gpu: bool, cores: int) -> int:
    """Videos in work at a time, by default."""
    return GPU_WORKERS if on_gpu else cores


def threads_each(cores: int, videos: int) -> int:
    """Threads for each of ``videos`` that are in work at a time."""
    return max(1, cores // videos)


def usable_cores() -> int:
    """Cores that this process may run on: those it is bound to, or what a container's quota amounts to, if less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _cpu_quota())))


def _cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that the control group of a container gets, inf if all it wants."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (root / "cpu.max").read_text().split()  # version 2; "max" is no number
        return int(quota) / int(period)
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = ((root / f"cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    return math.inf
