"""Checkpoints: one .safetensors file, with JSON in its header. Never a pickle, so reading one executes nothing.

A file is written beside its place, flushed to the disk and then moved there: whatever happens, the name holds either
the former checkpoint or the new one, whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from dfengine.errors import first_line
from dfengine.files import replacing

from .errors import CheckpointError

KEY = "dfengine"  # the entry of the header that holds our JSON


def write_atomically(path: Path, data: bytes) -> None:
    """Raises CheckpointError, and leaves the former file, if the disk is full or the folder gone."""
    try:
        with replacing(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        former = "the former one is kept" if path.exists() else "there is no former one"
        raise CheckpointError(
            f"could not be written ({error.strerror}, {len(data) / 1e6:.1f} MB); {former}; make room and "
            "go on with --resume",
            path=path,
        ) from None


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    whole = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    write_atomically(path, safetensors.torch.save(whole, {KEY: json.dumps(state)}))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) as they were saved. Raises CheckpointError."""
    tensors, metadata = read_tensors(path)
    try:
        state = json.loads(metadata[KEY])
    except (KeyError, ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(
            "these are tensors without the state of a run; give a checkpoint that training.train has written", path=path
        )
    return tensors, state


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a .safetensors file. Raises CheckpointError for anything else."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise CheckpointError("there is no such file", path=path) from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"this is no safetensors file ({first_line(error)}); pickled weights (.pt, .pth, .bin) are not "
            "read because loading them runs code: convert them",
            path=path,
        ) from None
