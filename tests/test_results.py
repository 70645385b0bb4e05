"""Files of scores, read back by other programs' readers, and what is left of them when something goes wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dfengine.errors import OptionError, OutputError
from dfengine.jobs import submission, tables
from dfengine.jobs.journal import Journal
from dfengine.jobs.output import Output
from dfengine.jobs.submission import Submission
from dfengine.jobs.summary import Summary
from dfengine.jobs.tables import COLUMNS, to_json, to_row
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
    sampling="uniform:5",
    mode="exact",
    bundle="b",
    device="cpu",
    decoder="pyav",
    timings={"decode": 0.5, "detect": 0.25},
    fingerprint="00",
)
NO_FACE = VideoScore(path="nobody.mp4", status="no_face", fingerprint="11")
FAILED = VideoScore(
    path="caf\\xe9.mp4", status="error", error=ErrorInfo("NotAVideo", "open", "line one\nline two"), fingerprint="22"
)
GONE = VideoScore(path="gone.mp4", status="error", error=ErrorInfo("SourceNotFound", "open", "gone"), fingerprint="33")
ALL = [OK, NO_FACE, FAILED, GONE]
SUFFIXES = (".jsonl", ".csv", ".parquet")


def inputs_of(scores: list[VideoScore]) -> dict[str, str]:
    return {score.fingerprint: score.path for score in scores}


def write(
    path: Path, scores: list[VideoScore], *, inputs: list[VideoScore] | None = None, resume: bool = False
) -> Path:
    with Journal(path, inputs_of(scores if inputs is None else inputs), resume=resume) as journal:
        for score in scores:
            journal.write(score)
        journal.finish()
    return path


def read(path: Path) -> list[dict[str, object]]:
    """Rows as to_row would give them, numbers as text."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".parquet":
        rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text("ascii").splitlines()]
    return [
        {k: "" if r.get(k) is None else str(r[k]) for k in ("path", "status", "p_fake", "fingerprint")} for r in rows
    ]


def names(path: Path) -> list[object]:
    return [row["path"] for row in read(path)]


# -- complete files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [[], [OK], ALL])
def test_json_lines(tmp_path: Path, scores: list[VideoScore]) -> None:
    lines = write(tmp_path / "out.jsonl", scores).read_text("ascii").splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(json.dumps(s.to_dict())) for s in scores]


@pytest.mark.parametrize("scores", [[], [OK], ALL])
def test_csv(tmp_path: Path, scores: list[VideoScore]) -> None:
    with write(tmp_path / "out.csv", scores).open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames or ()) == COLUMNS
    assert [r["path"] for r in rows] == [s.path for s in scores]
    assert [r["p_fake"] for r in rows] == ["" if s.p_fake is None else str(s.p_fake) for s in scores]
    assert [r["error_message"] for r in rows] == [s.error.message if s.error else "" for s in scores]
    assert [r["members"] for r in rows] == ["; ".join(s.members) for s in scores]


@pytest.mark.parametrize("scores", [[], [OK], ALL])
def test_parquet(tmp_path: Path, scores: list[VideoScore]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(write(tmp_path / "out.parquet", scores)).to_pylist()
    assert [{k: r[k] for k in COLUMNS} for r in rows] == [to_row(s) for s in scores]
    assert [json.loads(r["detail_json"]) for r in rows] == [json.loads(to_json(s)) for s in scores]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_but_the_file_is_left(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"out{suffix}", ALL)
    assert [p.name for p in tmp_path.iterdir()] == [f"out{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_run_without_resume_replaces_what_is_there(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"out{suffix}", ALL)
    assert names(write(path, [NO_FACE])) == [NO_FACE.path]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("is_whole", [True, False])
def test_nothing_is_replaced_before_the_first_new_row(
    tmp_path: Path, suffix: str, resume: bool, is_whole: bool
) -> None:
    path = tmp_path / f"out{suffix}"
    with Output(inputs_of([OK, GONE]), out=path, submission=tmp_path / "s.csv") as output:
        output.write(OK)
        output.write(GONE)
        output.finish(complete=is_whole)
    before = contents(tmp_path)
    assert len(before) == 2
    other = dataclasses.replace(OK, fingerprint="99", p_fake=0.75)
    files = {"out": path, "submission": tmp_path / "s.csv", "resume": resume}
    for interrupted in (True, False):
        with Output(inputs_of([other, GONE]), **files) as output:
            assert output.done == {}
            if interrupted:
                output.finish(complete=False)
        assert contents(tmp_path) == before
        assert output.path == path if is_whole else output.path in (path, tmp_path / f"out{suffix}.journal.jsonl")
    with Output(inputs_of([other, GONE]), **files) as output:
        output.write(other)
        rows = [json.loads(line) for line in output.path.read_text().splitlines()]
        assert [row["p_fake"] for row in rows] == [0.75]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_is_full_at_the_first_row_leaves_the_old_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"out{suffix}", ALL)
    before = contents(tmp_path)
    with Journal(path, inputs_of(ALL)) as journal, largest_file(100), pytest.raises(OutputError, match="File too"):
        journal.write(OK)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_are_in_the_order_of_the_input(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PARQUET_ROWS", 3)
    path = write(tmp_path / f"out{suffix}", ALL[::-1], inputs=ALL)
    assert names(path) == [s.path for s in ALL]


def test_seconds_are_the_sum_of_the_stages() -> None:
    assert to_row(OK)["seconds"] == 0.75


# -- before the end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_row_can_be_read_before_the_run_is_over(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    with Journal(path, inputs_of(ALL)) as journal:
        journal.write(OK)
        assert json.loads(journal.path.read_text())["path"] == OK.path
        assert (journal.path == path) == (suffix == ".jsonl")
        assert path.exists() == (suffix == ".jsonl"), "a table is there when it is complete"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("torn", [b"", b'{"path": "half', b"\x00\x00", b'{"path": "whole"}'])
def test_resuming_an_unfinished_run(tmp_path: Path, suffix: str, torn: bytes) -> None:
    path = tmp_path / f"out{suffix}"
    with Journal(path, inputs_of(ALL)) as journal:
        journal.write(OK)
        journal.write(NO_FACE)
    with journal.path.open("ab") as file:
        file.write(torn)
    with Journal(path, inputs_of(ALL), resume=True) as journal:
        assert journal.done == {"00": ("ok", 0.25), "11": ("no_face", None)}
        journal.write(FAILED)
        journal.write(GONE)
        journal.finish()
    assert sorted(map(str, names(path))) == sorted(s.path for s in ALL)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_resuming_a_finished_run(tmp_path: Path, suffix: str) -> None:
    """More inputs than before: the finished file is the start, and its rows stay as they were."""
    path = write(tmp_path / f"out{suffix}", [OK, FAILED])
    before = read(path)
    with Journal(path, inputs_of(ALL), resume=True) as journal:
        assert journal.done == {"00": ("ok", 0.25), "22": ("error", None)}
        journal.write(NO_FACE)
        journal.finish()
    after = read(path)
    assert [row for row in after if row["path"] != NO_FACE.path] == before
    assert len(after) == 3


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_resuming_what_is_not_there_starts_anew(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"out{suffix}", ALL, resume=True)
    assert names(path) == [s.path for s in ALL]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("error", "again"),
    [
        ("SourceNotFound", True), ("SourceNotReadable", True), ("VideoTimeout", True), ("WorkerCrashed", True),
        ("MemoryError", True), ("DeadlineExceeded", True), ("InferenceError", True), ("ZeroDivisionError", True),
        ("NotAVideo", False), ("UnsupportedVideo", False), ("DecodeError", False),
    ],
)  # fmt: skip
def test_errors_that_may_pass_are_tried_again(tmp_path: Path, suffix: str, error: str, again: bool) -> None:
    row = VideoScore("x.mp4", "error", error=ErrorInfo(error, "open", "."), fingerprint="44")
    path = tmp_path / f"out{suffix}"
    for finish in (True, False):  # from the table and from the journal
        with Journal(path, inputs_of([row])) as journal:
            journal.write(row)
            if finish:
                journal.finish()
        with Journal(path, inputs_of([row]), resume=True) as journal:
            assert ("44" not in journal.done) == again
            if again:
                journal.write(row)
            journal.finish()
        assert names(path) == ["x.mp4"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_row_of_another_request_is_replaced_and_rows_of_other_files_stay(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"out{suffix}", [OK, NO_FACE])
    changed = dataclasses.replace(OK, fingerprint="99", p_fake=0.75)
    with Journal(path, inputs_of([changed]), resume=True) as journal:
        assert journal.done == {}
        journal.write(changed)
        journal.finish()
    assert {(r["path"], r["p_fake"]) for r in read(path)} == {(NO_FACE.path, ""), (OK.path, "0.75")}
    assert len(read(path)) == 2


def test_a_path_twice_in_a_journal_keeps_its_last_row(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    lines = [to_json(s) for s in (OK, dataclasses.replace(OK, p_fake=0.75), NO_FACE)]
    path.write_text("\n".join(lines) + "\n")
    with Journal(path, inputs_of([OK, NO_FACE]), resume=True) as journal:
        assert journal.done["00"].p_fake == 0.75
        journal.finish()
    assert len(read(path)) == 2


# -- what is refused ---------------------------------------------------------------------------------------------------


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
        Journal(tmp_path / name, {})


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(OptionError, match=r"pip install 'dfengine\[parquet\]'"):
        Journal(tmp_path / "out.parquet", {})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_output_that_cannot_be_written(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"out{suffix}").mkdir()
    with pytest.raises(OptionError, match=r"cannot be written \(Is a directory\)"):
        Journal(tmp_path / f"out{suffix}", {})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("out.jsonl", b"some notes\n", "line 1 is no row of scores that this version of dfengine wrote"),
        ("out.jsonl", b'{"path": "x"}\n', "line 1 is no row"),
        ("out.jsonl", to_json(OK).encode() + b"\n[1]\n", "line 2 is no row"),
        ("out.csv", b"filename,label\nx,0.5\n", "row 1 is no row"),
        ("out.csv", b"\xff\xfe,\nx,y\n", "this is no table of results"),
        ("out.parquet", b"PAR1 not", "this is no table of results"),
    ],
)
def test_a_file_of_something_else_is_not_resumed_and_not_touched(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OutputError, match=message):
        Journal(tmp_path / name, inputs_of(ALL), resume=True)
    assert (tmp_path / name).read_bytes() == content


def line_with(**values: object) -> bytes:
    """A line of a file of results in which something is different."""
    return json.dumps(OK.to_dict() | tables.to_row(OK) | values).encode() + b"\n"


DEEP = b'{"path": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
DAMAGED_LINES = {
    "binary": bytes(range(256)) * 50 + b"\n",
    "binary without an end": bytes(range(255, 0, -1)),
    "not UTF-8": line_with().replace(b"quotes", b"caf\xe9"),
    "deep": DEEP,
    "deep inside": line_with(note=0).replace(b'"note": 0', b'"note": ' + DEEP.strip()),
    "no object": b"[1, 2]\n",
    "no number": line_with(p_fake="high"),
    "400 digits": line_with(p_fake=10**400),
    "5000 digits": line_with(p_fake=0).replace(b'"p_fake": 0', b'"p_fake": ' + b"9" * 5000),
    "NaN": line_with(p_fake=float("nan")),
    "infinite": line_with(p_fake=0).replace(b'"p_fake": 0', b'"p_fake": 1e999'),
    "no probability": line_with(p_fake=7),
    "a truth": line_with(p_fake=True),
    "no score": line_with(p_fake=None),
    "a list as path": line_with(path=["x"]),
    "a list as fingerprint": line_with(fingerprint=["x"]),
    "a list as status": line_with(status=["ok"]),
    "a status that there is not": line_with(status="fine"),
    "nothing": line_with(path=None),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", DAMAGED_LINES)
def test_a_damaged_line_is_said_and_the_file_is_left_alone(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"out{suffix}"
    journal_path = path if suffix == ".jsonl" else tmp_path / f"out{suffix}.journal.jsonl"
    content = (to_json(NO_FACE) + "\n").encode() + DAMAGED_LINES[damage]
    if suffix != ".jsonl":
        content = (tables.to_line(to_row(NO_FACE)) + "\n").encode() + DAMAGED_LINES[damage]
    journal_path.write_bytes(content)
    with pytest.raises(OutputError, match=r"line 2 is no row of scores that this version .* leave out --resume to rep"):
        Journal(path, inputs_of(ALL), resume=True)
    assert journal_path.read_bytes() == content


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "values",
    [
        {"people": 10**400}, {"people": "9" * 400}, {"frames_scored": 2**63}, {"seconds": [1]}, {"logit": "1e999"},
        {"warnings": 3}, {"device": {"a": 1}}, {"mode": "half \ud800 a pair"}, {"error": [1], "status": "error"},
        {"error": {"type": ["x"]}, "status": "error"}, {"error_type": [1], "status": "error"},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_columns_are_said_or_do_not_matter(tmp_path: Path, suffix: str, values: dict[str, object]) -> None:
    """Before anything is scored, and not when the table is made at the end."""
    path = tmp_path / f"out{suffix}"
    journal_path = path if suffix == ".jsonl" else tmp_path / f"out{suffix}.journal.jsonl"
    if "status" in values:
        values = {"p_fake": None, **values}
    journal_path.write_bytes(line_with(**values))
    (name, *_) = values.keys() - {"status", "p_fake"}
    if suffix != ".jsonl" and name in COLUMNS:
        with pytest.raises(OutputError, match=rf"line 1 is no row of scores .*\({name} of .* is "):
            Journal(path, inputs_of(ALL), resume=True)
        return
    with Journal(path, inputs_of(ALL), resume=True) as journal:
        for score in ALL:
            if score.fingerprint not in journal.done:
                journal.write(score)
        journal.finish()
    assert len(read(path)) == 4


def test_long_fields_of_a_csv_are_read(tmp_path: Path) -> None:
    long = dataclasses.replace(OK, warnings=("w" * 300_000,))
    path = write(tmp_path / "out.csv", [long])
    with Journal(path, inputs_of([long, GONE]), resume=True) as journal:
        assert set(journal.done) == {"00"}
        journal.write(GONE)
        journal.finish()
    assert csv.field_size_limit() == 131_072, "the limit of others stays"
    assert path.read_text().count("w" * 300_000) == 1


@pytest.mark.parametrize(
    "content", [bytes(range(256)) * 9, b'path,status,p_fake,fingerprint\n"x', b"\xe9", b"a,b\n1,2,3,4\n", b"path\n\0\n"]
)
def test_damaged_csv(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out.csv").write_bytes(content)
    with pytest.raises(OutputError, match=r"is no (table of results|row of scores) .*leave out --resume to replace it"):
        Journal(tmp_path / "out.csv", inputs_of(ALL), resume=True)
    assert (tmp_path / "out.csv").read_bytes() == content


def test_damaged_parquet(tmp_path: Path) -> None:
    """Whatever byte is damaged: it is said, or it is where it does not matter."""
    path = write(tmp_path / "out.parquet", ALL)
    whole = path.read_bytes()
    said = 0
    for at in range(0, len(whole), 37):
        content = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
        path.write_bytes(content)
        try:
            Journal(path, inputs_of(ALL), resume=True).__exit__()
        except OutputError:
            said += 1
        assert path.read_bytes() == content
    assert said > 10
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OutputError, match=r"this is no table of results .*leave out --resume to replace it"):
        Journal(path, inputs_of(ALL), resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_two_runs_do_not_write_to_one_file(tmp_path: Path, resume: bool) -> None:
    with Journal(tmp_path / "out.csv", inputs_of(ALL)) as journal:
        journal.write(OK)
        with pytest.raises(OptionError, match=r"another run is writing to .*out\.csv"):
            Journal(tmp_path / "out.csv", inputs_of(ALL), resume=resume)
        journal.write(NO_FACE)
        journal.finish()
    assert names(tmp_path / "out.csv") == [OK.path, NO_FACE.path]


def test_a_resumed_file_is_still_locked(tmp_path: Path) -> None:
    write(tmp_path / "out.jsonl", ALL)
    with (
        Journal(tmp_path / "out.jsonl", inputs_of(ALL), resume=True),
        pytest.raises(OptionError, match="another run is writing"),
    ):
        Journal(tmp_path / "out.jsonl", inputs_of(ALL), resume=True)


# -- disks that fail ---------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes of any file fail, after a part of them was written: as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_loses_nothing_that_was_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    with Journal(path, inputs_of(ALL)) as journal:
        journal.write(OK)
        size = journal.path.stat().st_size
        with (
            largest_file(size + 100),
            pytest.raises(OutputError, match=r"cannot be written .*File too large.*--resume"),
        ):
            journal.write(NO_FACE)
        assert journal.path.stat().st_size == size, "no half a row stays"
    with Journal(path, inputs_of(ALL), resume=True) as journal:
        assert set(journal.done) == {"00"}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_disk_that_is_full_at_the_end_keeps_the_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    path.write_text("from an earlier run")
    with Journal(path, inputs_of(ALL)) as journal:
        for score in ALL:
            journal.write(score)
        with largest_file(50), pytest.raises(OutputError, match=r"its rows are in .*\.journal\.jsonl"):
            journal.finish()
    assert path.read_text() == "from an earlier run"
    assert len(journal.path.read_text().splitlines()) == 4
    with Journal(path, inputs_of(ALL), resume=True) as journal:
        journal.write(GONE)
        journal.finish()
    assert names(path) == [s.path for s in ALL]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_that_goes_away_is_noticed(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with Journal(folder / f"out{suffix}", inputs_of(ALL)) as journal:
        journal.write(OK)
        shutil.rmtree(folder)
        with pytest.raises(OutputError, match="was removed while results were written to it"):
            journal.write(NO_FACE)


# -- the submission ----------------------------------------------------------------------------------------------------


def test_a_submission_is_complete_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub.csv"
    inputs = {"00": "b/z.mp4", "11": "a.mp4", "22": "b/m.mp4"}
    ok = VideoScore("b/z.mp4", "ok", p_fake=0.125, fingerprint="00")
    failed = VideoScore("a.mp4", "error", error=ErrorInfo("DecodeError", "", ""), fingerprint="11")
    with Output(inputs, submission=path) as output:
        assert path.read_text() == "filename,label\na.mp4,0.5\nm.mp4,0.5\nz.mp4,0.5\n"
        output.write(ok)
        assert path.read_text().endswith("z.mp4,0.5\n"), "not written anew for every row"
        monkeypatch.setattr(submission, "SUBMISSION_SECONDS", 0)
        output.write(failed)
        assert path.read_text() == "filename,label\na.mp4,0.5\nm.mp4,0.5\nz.mp4,0.125\n"
        output.finish(complete=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sub.csv", "sub.csv.journal.jsonl"]
    with Output(inputs, submission=path, missing_label=0.25, resume=True) as output:
        assert output.done == {"00": ("ok", 0.125), "11": ("error", None)}
        assert path.read_text() == "filename,label\na.mp4,0.5\nm.mp4,0.5\nz.mp4,0.125\n"
        output.write(VideoScore("b/m.mp4", "no_face", fingerprint="22"))
        assert path.read_text() == "filename,label\na.mp4,0.25\nm.mp4,0.25\nz.mp4,0.125\n"
        output.finish(complete=True)
    assert path.read_text() == "filename,label\na.mp4,0.25\nm.mp4,0.25\nz.mp4,0.125\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sub.csv", "sub.csv.journal.jsonl"]
    with Output(inputs, submission=path, resume=True) as output:  # it was complete, and its labels stay
        assert set(output.done) == {"00", "11", "22"}
        output.finish(complete=True)
    assert path.read_text() == "filename,label\na.mp4,0.5\nm.mp4,0.5\nz.mp4,0.125\n"


def test_a_folder_without_videos_has_a_name_in_a_submission(tmp_path: Path) -> None:
    Submission(tmp_path / "s.csv", ["empty/", "a/none/"], missing_label=0.5).save()
    assert (tmp_path / "s.csv").read_text() == "filename,label\nempty,0.5\nnone,0.5\n"


def test_a_table_that_somebody_has_edited(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    with Journal(path, inputs_of(ALL)) as journal:
        for score in ALL:
            journal.write(score)
        journal.finish()
    with path.open(newline="") as file:
        rows = [row | {"note": "seen"} for row in csv.DictReader(file)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with Journal(path, inputs_of(ALL), resume=True) as journal:
        for score in ALL:
            if score.fingerprint not in journal.done:
                journal.write(score)
        journal.finish()
    with path.open(newline="") as file:
        assert [tuple(row) for row in csv.DictReader(file)] == [COLUMNS] * len(ALL)
    path.write_text(path.read_text().replace(f"{OK.p_fake}", "high", 1))
    with pytest.raises(OutputError, match=r"row 1 is no row of scores .*\(p_fake of .* is 'high'\)"):
        Journal(path, inputs_of(ALL), resume=True)


def test_a_submission_beside_other_results(tmp_path: Path) -> None:
    with Output(inputs_of(ALL), out=tmp_path / "o.jsonl", submission=tmp_path / "s.csv") as output:
        for score in ALL:
            output.write(score)
        output.finish(complete=True)
        assert output.failed == 2
    with Output(inputs_of(ALL), out=tmp_path / "o.jsonl", submission=tmp_path / "s.csv", resume=True) as output:
        assert set(output.done) == {"00", "11", "22"}
        assert output.failed == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.jsonl", "s.csv"]
    with (tmp_path / "s.csv").open(newline="") as file:
        assert dict(csv.reader(file))[OK.path] == "0.25"


def test_names_that_clash_are_refused_before_anything_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "o.csv").write_text("kept")
    with pytest.raises(OptionError, match=r"'a/x\.mp4' and 'b/x\.mp4' have the same name"):
        Output({"0": "a/x.mp4", "1": "b/x.mp4"}, out=tmp_path / "o.csv", submission=tmp_path / "s.csv")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("o.csv", "kept")]


def test_options_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--out and --submission name the same file .*x\.csv"):
        Output({}, out=tmp_path / "x.csv", submission=tmp_path / "." / "x.csv")
    with pytest.raises(OptionError, match="--resume needs the file to go on with: give --out or --submission"):
        Output({}, resume=True)
    with pytest.raises(OptionError, match=r"the missing label must be in \[0, 1\], got 2"):
        Submission(tmp_path / "s.csv", [], missing_label=2)
    with pytest.raises(OptionError, match="does not exist"):
        Submission(tmp_path / "nowhere" / "s.csv", [], missing_label=0.5)


def test_a_submission_on_a_full_disk_stays_as_it_was(tmp_path: Path) -> None:
    submission = Submission(tmp_path / "s.csv", ["a.mp4", "b.mp4"], missing_label=0.5)
    submission.save()
    before = (tmp_path / "s.csv").read_text()
    submission.update({"a.mp4": 0.75})
    with largest_file(20), pytest.raises(OutputError, match="cannot be written"):
        submission.save()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("s.csv", before)]


# -- summary -----------------------------------------------------------------------------------------------------------


def test_a_summary_counts() -> None:
    summary = Summary()
    for i in range(8):
        summary.add(dataclasses.replace(OK, path=str(i), timings={"decode": float(i)}))
    for score in (NO_FACE, FAILED, FAILED, GONE, dataclasses.replace(OK, fallback_reason="no GPU")):
        summary.add(score)
    assert summary.statuses == {"ok": 9, "no_face": 1, "error": 3}
    assert summary.errors == {"NotAVideo": 2, "SourceNotFound": 1}
    assert summary.fallbacks == {"no GPU": 1}
    assert summary.spent == {"exact, uniform:5, 1 members": 9}
    assert summary.slowest() == [(7.0, "7"), (6.0, "6"), (5.0, "5"), (4.0, "4"), (3.0, "3")]
