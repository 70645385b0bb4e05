"""Videos and photos -> crops and a table: the engine's faces, killed runs, files that fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

pq = pytest.importorskip("pyarrow.parquet")  # the `train` extra
PilImage = pytest.importorskip("PIL.Image")

from assets import moving_face, nobody, truncated, two_faces, write_bundle, write_clip, x264  # noqa: E402
from conftest import TOLERANCE  # noqa: E402

from dfengine.bundle import CropSpec  # noqa: E402
from dfengine.engine import Engine  # noqa: E402
from dfengine.errors import OptionError  # noqa: E402
from dfengine.sampling import Policy, Sampling  # noqa: E402
from dfengine.stages.crop import crop_faces  # noqa: E402
from dfengine.stages.decode import open_video  # noqa: E402
from dfengine.types import Image  # noqa: E402
from training import faces  # noqa: E402
from training.faces import ExtractSettings, draw_contact_sheet, extract  # noqa: E402
from training.labels import LabelsError, PersonPattern, read_items  # noqa: E402
from training.table import SCHEMA, DataError, FaceTable  # noqa: E402

FEW = ExtractSettings(sampling=Policy.parse("uniform:4"))
CLIPS = {
    "one.mp4": x264("faces_one.mp4", "keyint=8", frames=16, wh=(240, 180), picture=moving_face),
    "two.mp4": x264("faces_two.mp4", "keyint=8", frames=16, wh=(400, 180), picture=two_faces),
    "nobody.mp4": x264("faces_nobody.mp4", "keyint=8", frames=16, wh=(240, 180), picture=nobody),
}


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, a damaged one, and their labels."""
    folder = tmp_path_factory.mktemp("clips")
    made = {name: write_clip(clip, folder) for name, clip in CLIPS.items()}
    source = tmp_path_factory.mktemp("source")
    for name, path in made.items():
        (source / name).write_bytes(path.read_bytes())
    (source / "cut.mp4").write_bytes(truncated(made["one.mp4"].read_bytes(), 0.3))
    lines = ["file,label,source_id", "one.mp4,0,a", "two.mp4,1,a", "nobody.mp4,1,b", "cut.mp4,0,b"]
    (source / "labels.csv").write_text("\n".join(lines) + "\n")
    return source


@pytest.fixture(scope="session")
def table(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> FaceTable:
    return extract(clips, tmp_path_factory.mktemp("faces"), FEW, split="train", workers=2)


def test_the_table_has_a_row_for_every_face_and_every_failure(table: FaceTable) -> None:
    raw = pq.read_table(table.folder / "faces.parquet")
    assert raw.schema.equals(SCHEMA, check_metadata=False)
    rows = table.rows_by_video()
    assert {path: len(r) for path, r in rows.items()} == {"one.mp4": 4, "two.mp4": 8}
    assert np.unique(table.track[rows["two.mp4"]]).tolist() == [0, 1]
    assert (table.index[rows["one.mp4"]] == sorted(table.index[rows["one.mp4"]])).all()
    assert set(table.failures) == {"nobody.mp4", "cut.mp4"}
    assert table.failures["nobody.mp4"] == "no face was found, or none that counts as a person"
    assert table.failures["cut.mp4"].startswith("DecodeError: the download was cut before its index")
    assert table.label.tolist() == [0, 1] + [0] * 4 + [1] * 8  # sorted by path: cut, nobody, one, two
    assert set(table.source_id) == {"a", "b"}
    assert "train: 12 faces of 2 files (1 real, 1 fake), 1 sources\n2 files failed, the first is cut.mp4" in (
        table.summary()
    )


def test_the_faces_are_those_that_the_engine_scores(table: FaceTable, tmp_path: Path) -> None:
    with Engine(write_bundle(tmp_path / "b", sampling=FEW.sampling)) as engine:
        for path, rows in table.rows_by_video().items():
            scored = [f for t in engine.score(table.source / path).tracks for f in t.frames]
            assert [f.frame_index for f in scored] == table.index[rows].tolist()
            boxes = np.float32([f.box for f in scored])
            np.testing.assert_allclose(boxes, table.box[rows], atol=TOLERANCE["detect_batch", "float32"], rtol=0)


def test_training_crops_as_the_engine_crops_from_the_frame(table: FaceTable) -> None:
    spec = CropSpec(input_hw=(64, 64), margin_ratio=0.3, std=(1 / 255,) * 3)
    rows = table.rows_by_video()["two.mp4"]
    with open_video(table.source / "two.mp4") as video:
        (frames,) = video.frames(Sampling(FEW.sampling))
    of_frame = np.searchsorted(frames.frame_index, table.index[rows])
    wanted = crop_faces(frames.images, table.box[rows], of_frame, spec)
    stored = [Image.from_rgb(table.read_crop(row)) for row in rows]
    boxes = np.stack([table.in_crop(row, table.box[row].reshape(2, 2)).reshape(4) for row in rows])
    crops = crop_faces(stored, boxes, np.arange(len(rows)), spec)
    # 8-bit RGB is rounded, and clipped where YUV leaves the cube; both are gone in the mean.
    assert np.abs(crops - wanted).mean() < 0.5
    assert abs((crops - wanted).mean()) < 0.1


def test_regions_end_at_the_border_and_are_capped() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8)
    image, box = Image.from_rgb(rgb), np.float32([80.5, 10, 110.5, 50])
    region, xyxy = faces.cut_region(image, box, ExtractSettings())
    assert xyxy.tolist() == [55, 0, 120, 70]
    np.testing.assert_array_equal(region, rgb[0:70, 55:120])
    region, xyxy = faces.cut_region(image, box, ExtractSettings(max_px=35))
    assert (region.shape, xyxy.tolist()) == ((35, 32, 3), [55, 0, 120, 70])
    region, xyxy = faces.cut_region(image, np.float32([-50, -50, -40, -40]), ExtractSettings())
    assert (region.shape, xyxy.tolist()) == ((1, 1, 3), [0, 0, 1, 1]), "a box outside the frame is no crash"


def test_the_table_does_not_depend_on_the_workers(clips: Path, table: FaceTable, tmp_path: Path) -> None:
    extract(clips, tmp_path, FEW, split="train", workers=1)
    assert_equal(tmp_path, table.folder)


def test_a_process_for_each_core_that_may_be_used(
    clips: Path, tmp_path: Path, table: FaceTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's quota may be less than the cores that it sees."""
    asked: list[int] = []
    monkeypatch.setattr(faces, "usable_cores", lambda: 3)
    monkeypatch.setattr(faces, "_in_processes", lambda root, out, items, settings, workers: asked.append(workers) or [])
    shutil.copytree(table.folder, tmp_path / "faces")
    extract(clips, tmp_path / "faces", FEW, split="train")
    assert asked == [3]


def assert_equal(folder: Path, other: Path) -> None:
    assert pq.read_table(folder / "faces.parquet").equals(pq.read_table(other / "faces.parquet"), check_metadata=True)
    crops = sorted(p.relative_to(folder) for p in folder.glob("crops/*/*.png"))
    assert crops == sorted(p.relative_to(other) for p in other.glob("crops/*/*.png"))
    assert all((folder / p).read_bytes() == (other / p).read_bytes() for p in crops)


def test_a_killed_run_goes_on_and_ends_with_the_same_table(clips: Path, table: FaceTable, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.faces", clips, "--out", tmp_path, "--frames", str(FEW.sampling)]
    command += ["--split", "train", "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        while run.poll() is None and len(list(tmp_path.glob("parts/*.parquet"))) < 2:
            time.sleep(0.005)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        run.kill()
    while any(Path(f"/proc/{pid}/exe").exists() for pid in workers):  # they end by themselves, or this never does
        time.sleep(0.005)
    assert run.returncode == -signal.SIGKILL
    done = {p: p.stat().st_mtime_ns for p in tmp_path.glob("parts/*.parquet")}
    (tmp_path / "parts" / "x.parquet.1.partial").write_bytes(b"half")  # as if it had been writing
    assert len(done) >= 2

    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert_equal(tmp_path, table.folder)
    assert all(p.stat().st_mtime_ns == time_ns for p, time_ns in done.items()), "what was done was not done again"
    assert not list(tmp_path.glob("parts/*.partial"))


def test_a_worker_that_dies_costs_no_other_file_its_row(clips: Path, table: FaceTable, tmp_path: Path) -> None:
    root, items = read_items(clips)
    (tmp_path / "parts").mkdir()
    running = faces._in_processes(root, tmp_path, items, FEW, workers=1)
    done = [next(running)]
    for worker in active_children():
        os.kill(worker.pid, signal.SIGKILL)
    done += running
    assert sorted(i.path for i in done) == [i.path for i in items]
    extract(clips, tmp_path, FEW, split="train", workers=1)  # nothing left but to join the parts
    assert_equal(tmp_path, table.folder)


def test_a_file_that_was_replaced_is_read_again(clips: Path, table: FaceTable, tmp_path: Path) -> None:
    shutil.copytree(clips, tmp_path / "clips")
    shutil.copytree(table.folder, tmp_path / "faces")
    (tmp_path / "clips" / "one.mp4").write_bytes((clips / "two.mp4").read_bytes())
    again = extract(tmp_path / "clips", tmp_path / "faces", FEW, split="train")
    rows = again.rows_by_video()
    assert {path: len(r) for path, r in rows.items()} == {"one.mp4": 8, "two.mp4": 8}
    one, two = (again.read_crop(rows[name][0]) for name in ("one.mp4", "two.mp4"))
    np.testing.assert_array_equal(one, two)


def test_other_settings_and_other_splits(clips: Path, table: FaceTable, tmp_path: Path) -> None:
    shutil.copytree(table.folder, tmp_path / "faces")
    with pytest.raises(OptionError, match="the faces here were found with other settings than those asked for"):
        extract(clips, tmp_path / "faces", ExtractSettings(sampling=Policy.parse("uniform:5")))
    again = extract(clips, tmp_path / "faces", FEW, split="test")
    assert set(again.split_name) == {"test"}
    with pytest.raises(DataError, match="no face is in split 'train', only in test"):
        again.split("train")
    with pytest.raises(SystemExit, match="sampling policy 'some' is not understood"):
        faces.main([str(clips), "--out", str(tmp_path / "faces"), "--frames", "some"])
    with pytest.raises(LabelsError, match="split 'half' is not understood"):
        extract(clips, tmp_path / "faces", FEW, split="half")


def test_photos(astronaut: np.ndarray, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    tagged = PilImage.Exif()
    tagged[0x0112] = 6  # Orientation: turn by 90 degrees clockwise to see it upright
    PilImage.fromarray(np.ascontiguousarray(np.rot90(astronaut))).save(source / "Ann_2.png", exif=tagged)
    PilImage.fromarray(astronaut).save(source / "Ann_1.png")
    PilImage.fromarray(astronaut[300:]).save(source / "suit.png")
    (source / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    named = PersonPattern(r"^([A-Za-z]+)")
    table = extract(source, tmp_path / "faces", split="train", person=named, workers=1)
    assert set(table.failures) == {"broken.jpg", "suit.png"}
    assert table.failures["broken.jpg"].startswith("InputError: the photo cannot be read")
    upright, turned = (table.rows_by_video()[name][0] for name in ("Ann_1.png", "Ann_2.png"))
    np.testing.assert_allclose(table.box[turned], table.box[upright], atol=1.5)
    np.testing.assert_array_equal(table.read_crop(turned).shape, table.read_crop(upright).shape)
    assert table.source_id[upright] == table.source_id[turned] == "Ann"
    assert table.label[upright] == 0
    assert pq.read_table(table.folder / "faces.parquet")["label"].null_count == 4


def test_photos_of_two_folders_and_one_person(astronaut: np.ndarray, tmp_path: Path) -> None:
    for folder, file in (("a", "eileen_1.png"), ("b", "eileen_2.png")):
        (tmp_path / folder).mkdir()
        PilImage.fromarray(astronaut).save(tmp_path / folder / file)
    command = [str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "faces"), "--workers", "1"]
    faces.main([*command, "--person", r"([a-z]+)_\d", "--split", "identity:0.5"])
    table = FaceTable.load(tmp_path / "faces")
    assert table.path.tolist() == ["a/eileen_1.png", "b/eileen_2.png"]
    assert table.source == tmp_path.resolve()
    assert table.source_id.tolist() == ["eileen", "eileen"]
    assert len(set(table.split_name)) == 1
    assert set(table.dataset) == {"a", "b"}


def test_command_line(clips: Path, table: FaceTable, capsys: pytest.CaptureFixture[str]) -> None:
    common = [str(clips), "--out", str(table.folder), "--frames", str(FEW.sampling), "--split", "train"]
    faces.main([*common, "--contact-sheet"])
    assert "train: 12 faces of 2 files" in capsys.readouterr().out
    with PilImage.open(table.folder / "contact_sheet.png") as sheet:
        assert sheet.size == (12 * 120, 120)
        assert sheet.getpixel((1, 1)) == (0, 128, 0)
        assert sheet.getpixel((121, 1)) == (255, 0, 0)
    with pytest.raises(SystemExit, match="error: split 'some' is not understood"):
        faces.main([*common[:-1], "some"])


def test_a_recipe_says_how_faces_are_found(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[model]\nx = 1\n[bundle]\nname = "x"\nsampling = "every:6@10"\nsampling_mode = "exact"\n'
        "detector = { thresholds = [0.9, 0.9, 0.9] }\n"
    )
    settings = faces.settings_of_recipe(recipe)
    assert (settings.sampling, settings.sampling_mode) == (Policy("every", 6, seconds=10.0), "exact")
    assert settings.detector.thresholds == (0.9, 0.9, 0.9)
    assert settings.tracking == ExtractSettings().tracking
    recipe.write_text("[bundle]\ndetector = { threshold = 1 }\n")
    with pytest.raises(
        OptionError, match=r"r.toml: the recipe cannot be read \(unknown key bundle.detector.'threshold'"
    ):
        faces.settings_of_recipe(recipe)
    with pytest.raises(SystemExit, match=r"error: .*gone.toml: the recipe cannot be read"):
        faces.main([str(tmp_path), "--out", str(tmp_path), "--recipe", str(tmp_path / "gone.toml")])


def test_a_full_disk_is_said_and_what_is_done_is_kept(
    clips: Path, table: FaceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(table.folder, tmp_path / "faces")
    before = (tmp_path / "faces" / "faces.parquet").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(faces.pq, "write_table", full)
    command = [str(clips), "--out", str(tmp_path / "faces"), "--frames", str(FEW.sampling), "--split", "test"]
    with pytest.raises(SystemExit, match=r"error: .*No space left on device; what is done is kept"):
        faces.main(command)
    assert (tmp_path / "faces" / "faces.parquet").read_bytes() == before


def test_an_empty_table_draws_a_sheet(table: FaceTable, tmp_path: Path) -> None:
    draw_contact_sheet(table[np.zeros(len(table), bool)], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0


# -- the table ---------------------------------------------------------------------------------------------------------


def test_a_table_that_is_not_there_or_damaged(table: FaceTable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no faces.parquet; make it with python -m training.faces"):
        FaceTable.load(tmp_path)
    (tmp_path / "faces.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"faces.parquet: the table cannot be read"):
        FaceTable.load(tmp_path)
    pq.write_table(pq.read_table(table.folder / "faces.parquet").drop_columns("box"), tmp_path / "faces.parquet")
    with pytest.raises(DataError, match=r"the table has no column 'box'; make it again"):
        FaceTable.load(tmp_path)


def test_a_crop_that_is_damaged_or_another(table: FaceTable, tmp_path: Path) -> None:
    row = int(table.rows_by_video()["one.mp4"][0])
    moved = replace(table, folder=tmp_path)
    with pytest.raises(DataError, match=r"the crop cannot be read .*; remove its table in parts/"):
        moved.read_crop(row)
    file = tmp_path / table.crop[row]
    file.parent.mkdir(parents=True)
    file.write_bytes((table.folder / table.crop[row]).read_bytes()[:200])
    with pytest.raises(DataError, match="the crop cannot be read"):
        moved.read_crop(row)
    PilImage.new("RGB", (3, 5)).save(file)
    with pytest.raises(DataError, match=r"the crop has size \(5, 3\), the table says"):
        moved.read_crop(row)


def test_a_planted_leak_is_loud(table: FaceTable) -> None:
    split = table.split_name.copy()
    split[table.path == "two.mp4"] = "val"
    with pytest.raises(LabelsError, match=r"1 of 2 sources are in more than one split, 'a' in train and val"):
        replace(table, split_name=split).split("train")
    original = np.where(table.path == "two.mp4", "one.mp4", None)
    lied = np.where(table.path == "two.mp4", "c", table.source_id)
    with pytest.raises(DataError, match=r"the fake 'two.mp4' is in val, its original 'one.mp4' in train"):
        replace(table, split_name=split, source_id=lied, original=original).split("train")
