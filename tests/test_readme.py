"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
from assets import FACE, write_bundle, write_clip

import dfengine

README = Path(__file__).parents[1] / "README.md"


def test_a_network_of_your_own_becomes_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S) if "bundle.json" in c]
    network = onnx.load(write_bundle(tmp_path / "made") / "mean.onnx")
    for axis in (2, 3):
        network.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 224
    (tmp_path / "mine").mkdir()
    onnx.save(network, tmp_path / "mine" / "net.onnx")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    score = dfengine.score(write_clip(FACE, tmp_path), bundle="mine", frames=3)
    assert (score.status, score.bundle) == ("ok", "mine")
