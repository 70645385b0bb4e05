"""Scoring talks to nobody and leaves nothing behind: no socket, no process, no file outside what was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from assets import FACE, write_clip

# What is done is told by Python's own audit hooks, in an interpreter of its own: a hook cannot be removed.
_WATCHED = """
import os, sys

seen = []

def hook(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.fork", "os.posix_spawn", "os.exec", "os.system", "urllib.")):
        seen.append(event)
    elif event in ("os.mkdir", "os.rename", "os.remove"):
        seen.append(f"{event} {arguments}")
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if arguments[0] != os.devnull:
            seen.append(f"writes {arguments[0]}")

sys.dont_write_bytecode = True
sys.addaudithook(hook)
import dfengine
print(dfengine.Engine(threads=1).score(sys.argv[1]).status)
print("\\n".join(seen), end="")
"""


def test_scoring_opens_no_socket_and_writes_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    home = tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    clip = write_clip(FACE, folder)
    # CI switches the telemetry of OpenVINO off, which would hide it here.
    hidden = {"CI", "TF_BUILD", "JENKINS_URL"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"HOME": str(home)}
    command = [sys.executable, "-c", _WATCHED, str(clip)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, check=True, timeout=300)
    status, *seen = done.stdout.splitlines()
    assert status == "ok"
    assert seen == []
    assert list(home.iterdir()) == []
