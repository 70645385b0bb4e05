"""Stand-ins for the engine inside worker processes. What happens to a video is written in its name.

    KIND-anything.mp4       KIND: ok, no_face, error, hang, exit, SIGSEGV, SIGKILL, once (crashes the first time only)
    12.5s-anything.mp4      takes that long for what was asked, less for less: see ``RELATIVE``

Each try appends "begin NAME" and "end NAME" to $FAKE_LOG, so that tests see what ran when.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dfengine.bundle import Bundle
from dfengine.errors import DeviceError
from dfengine.types import ErrorInfo, Plan, VideoScore

# Cost by sampling, of a bundle that asks for uniform:8.
RELATIVE = {"uniform:8": 1.0, "uniform:4": 0.5, "uniform:2": 0.25, "uniform:1": 0.1}


def make(bundle: Bundle, device: str, threads: int) -> Callable[[str, Plan, Callable[[str], None]], VideoScore]:
    def score(path: str, plan: Plan, on_stage: Callable[[str], None]) -> VideoScore:
        name = Path(path).name
        _log(f"begin {name}")
        on_stage("decode")
        kind = name.split("-")[0]
        if kind == "once":
            marker = Path(path).with_suffix(".tried")
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGSEGV)
        elif kind == "hang":
            threading.Event().wait(600)
        elif kind == "exit":
            os._exit(3)
        elif kind == "raise":
            raise ZeroDivisionError("a defect")
        elif kind.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, kind))
            time.sleep(10)
        elif kind.endswith("s"):
            relative = RELATIVE[str(plan.sampling.policy)] * (1 if plan.sampling.mode == "reference" else 0.7)
            time.sleep(float(kind[:-1]) * relative)
        elif kind == "warn":
            logging.getLogger("dfengine").warning("said in the worker, with threads=%d", threads)
        on_stage("")
        _log(f"end {name}")
        spent = {**spent_on(plan), "bundle": bundle.name, "device": f"{device}*{threads}"}
        if kind == "error":
            return VideoScore(path, "error", error=ErrorInfo("DecodeError", "decode", "damaged"), **spent)
        if kind == "no_face":
            return VideoScore(path, "no_face", **spent)
        return VideoScore(path, "ok", p_fake=0.25, logit=-1.0986, members={"mean": 0.25}, **spent)

    return score


def make_heavy(weight: bytes, bundle: Bundle, device: str, threads: int) -> object:
    """For a set-up that takes as much to send as ``weight``."""
    return make(bundle, device, threads)


def no_device(bundle: Bundle, device: str, threads: int) -> None:
    raise DeviceError("device 'cuda' cannot be had: test", stage="device")


def dies_at_start(bundle: Bundle, device: str, threads: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_at_start_but_once(bundle: Bundle, device: str, threads: int) -> object:
    """Only the first worker lives."""
    try:
        os.mkdir(os.environ["FAKE_LOG"] + ".first")
    except FileExistsError:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(bundle, device, threads)


def spent_on(plan: Plan) -> dict[str, str]:
    return {"sampling": str(plan.sampling.policy), "mode": plan.sampling.mode}


def _log(text: str) -> None:
    if path := os.environ.get("FAKE_LOG"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{text} {os.getpid()}\n")
