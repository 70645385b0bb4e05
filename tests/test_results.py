"""Files of scores, read back by other programs' readers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from dfengine import results
from dfengine.errors import OptionError
from dfengine.types import ErrorInfo, FrameScore, TrackScore, VideoScore

OK = VideoScore(
    path='with "quotes", commas\tand tabs.mp4',
    status="ok",
    p_fake=0.25,
    logit=-1.0986,
    warnings=("one", "two"),
    tracks=(TrackScore(3, 0.25, (FrameScore(0, 0.0, (1.0, 2.0, 3.0, 4.0), None, 0.25),)),),
    members={"net": 0.25},
    frames_decoded=9,
    frames_scored=1,
    bundle="b",
    device="cpu",
    decoder="pyav",
    timings={"decode": 0.5, "detect": 0.25},
)
NO_FACE = VideoScore(path="nobody.mp4", status="no_face")
FAILED = VideoScore(path="caf\\xe9.mp4", status="error", error=ErrorInfo("NotAVideo", "open", "line one\nline two"))
ALL = [OK, NO_FACE, FAILED]


def write(path: Path, scores: list[VideoScore]) -> Path:
    with results.open_writer(path) as writer:
        for score in scores:
            writer.write(score)
    return path


@pytest.mark.parametrize("scores", [[], [OK], ALL])
def test_json_lines(tmp_path: Path, scores: list[VideoScore]) -> None:
    lines = write(tmp_path / "out.jsonl", scores).read_text("ascii").splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(json.dumps(s.to_dict())) for s in scores]


@pytest.mark.parametrize("scores", [[], [OK], ALL])
def test_csv(tmp_path: Path, scores: list[VideoScore]) -> None:
    with write(tmp_path / "out.csv", scores).open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames or ()) == results.COLUMNS
    assert [r["path"] for r in rows] == [s.path for s in scores]
    assert [r["p_fake"] for r in rows] == ["" if s.p_fake is None else str(s.p_fake) for s in scores]
    assert [r["error_message"] for r in rows] == [s.error.message if s.error else "" for s in scores]


@pytest.mark.parametrize("scores", [[], [OK], ALL])
def test_parquet(tmp_path: Path, scores: list[VideoScore]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(write(tmp_path / "out.parquet", scores)).to_pylist()
    assert [{k: r[k] for k in results.COLUMNS} for r in rows] == [results.to_row(s) for s in scores]
    assert [json.loads(r["detail_json"]) for r in rows] == [json.loads(results.to_json(s)) for s in scores]
    assert [p.name for p in tmp_path.iterdir()] == ["out.parquet"]  # nothing partial is left


def test_a_row_can_be_read_before_the_run_is_over(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with results.open_writer(path) as writer:
        writer.write(OK)
        assert json.loads(path.read_text())["path"] == OK.path


def test_seconds_are_the_sum_of_the_stages() -> None:
    assert results.to_row(OK)["seconds"] == 0.75


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.txt", r"'out.txt' must end in \.jsonl, \.csv, \.parquet"),
        ("out", r"must end in"),
        ("nowhere/out.csv", r"the folder for the output .* does not exist"),
    ],
)
def test_refused_before_anything_is_scored(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        results.open_writer(tmp_path / name)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(OptionError, match=r"pip install 'dfengine\[parquet\]'"):
        results.open_writer(tmp_path / "out.parquet")


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out.csv").mkdir()
    with pytest.raises(OptionError, match=r"cannot be written \(Is a directory\)"):
        results.open_writer(tmp_path / "out.csv")
