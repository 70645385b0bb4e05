"""Videos or photos -> face crops and one table: ``python -m training.faces SOURCE... --out DIR``.

    DIR/faces.parquet    one row a face, or a video that failed (``failure`` says why); see training.table
    DIR/crops/           PNG, the face with a wide margin, at the size it has in the frame
    DIR/parts/           one small table a video: what a killed run need not do again
    DIR/settings.json    how the faces were found; another run into the same folder must do it the same way

Decoder, detector, tracking and the choice of who counts are the engine's, so the rows of a video are the faces that the
engine would score. SOURCE is described in training.labels, ``--split`` there too.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image as PilImage
from PIL import ImageDraw, ImageOps
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dfengine.bundle import CropSpec, DetectorSettings, MarginRatio, TrackingSettings
from dfengine.errors import DfengineError, InputError, OptionError, first_line
from dfengine.files import replacing
from dfengine.machine import usable_cores
from dfengine.sampling import Mode, Policy, Sampling, parse_mode
from dfengine.settings import Count, from_plain, to_plain
from dfengine.stages import _kernels
from dfengine.stages.crop import crop_boxes
from dfengine.stages.decode import open_video
from dfengine.stages.detect import Detector
from dfengine.stages.people import People
from dfengine.types import F32, Frames, Image

from .labels import Item, PersonPattern, assign_splits, read_items
from .table import FACE_FIELDS, SCHEMA, FaceTable

# The largest face of a portrait fills 27 % of it at least; looking for faces below 15 % would only find patterns.
PHOTO_MIN_FACE_RATIO = 0.15


@dataclass(frozen=True, kw_only=True)
class ExtractSettings:
    """How faces are found and stored. The defaults are those of a bundle."""

    sampling: Policy = Policy("uniform", 17)
    sampling_mode: Mode = "reference"
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    # Room around the face box, as in CropSpec: networks of this field see margins up to .6, the rest is for turning
    # and shifting. Chosen, not measured.
    margin_ratio: MarginRatio = 1.0
    # Longer sides are scaled down to this: with a margin of 1 the face keeps 512 px. What is scaled down here and again
    # in training is softer than what the engine crops at once: a clip with regions of 781 px, kept at 512, scored
    # .0013 off with the default bundle, at 640 .0011, unscaled .00001.
    max_px: Count = 1024


def extract(
    source: Path | Sequence[Path],
    out: Path,
    settings: ExtractSettings = ExtractSettings(),
    *,
    split: str = "identity:0.15",
    person: PersonPattern | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FaceTable:
    """Finds the faces of everything in ``source`` and writes ``out``; goes on where a killed run stopped.

    ``workers``: processes, one thread each; by default one a core. The table does not depend on them. Raises
    LabelsError and OptionError before anything is done; a file that fails becomes a row.
    """
    root, items = read_items(source, person)
    splits = assign_splits(items, split)
    _check_settings(out, settings)
    parts = {item: out / "parts" / f"{_key(item)}.parquet" for item in items}
    todo = [item for item in items if not _is_done(parts[item], root / item.path)]
    on_progress(len(items) - len(todo), len(items))
    for done, _ in enumerate(_in_processes(root, out, todo, settings, workers or usable_cores()), 1):
        on_progress(len(items) - len(todo) + done, len(items))
    tables = [
        _with_labels(pq.read_table(parts[item]), item, item_split)
        for item, item_split in zip(items, splits, strict=True)
    ]
    about = {"source": str(root.resolve()), "settings": json.dumps(to_plain(settings))}
    _write_table(out / "faces.parquet", pa.concat_tables(tables).replace_schema_metadata(about))
    return FaceTable.load(out)


def settings_of_recipe(recipe: Path) -> ExtractSettings:
    """What the [bundle] table of a recipe says about finding faces: the engine will do it so. Raises OptionError."""
    try:
        table = tomllib.loads(recipe.read_text(encoding="utf-8")).get("bundle", {})
        names = [f.name for f in fields(ExtractSettings) if f.name in table]
        return from_plain(ExtractSettings, {name: table[name] for name in names}, "bundle.")
    except (OSError, TypeError, ValueError) as error:
        raise OptionError(f"the recipe cannot be read ({error})", path=recipe) from None


# -- one item ----------------------------------------------------------------------------------------------------------


def find_faces(path: Path, is_photo: bool, detector: Detector, settings: ExtractSettings) -> Iterator[dict[str, Any]]:
    """The faces of one video or photo: values of FACE_FIELDS, with the pixels, RGB (H, W, 3), under "crop".

    Raises InputError.
    """
    people = People(detector, settings.tracking, settings.sampling_mode)
    regions: list[tuple[NDArray[np.uint8], NDArray[np.int32]]] = []
    for frames, rows, image_index in people.each(_one_photo(path) if is_photo else _video_frames(path, settings)):
        regions += [cut_region(frames.images[i], box, settings) for i, box in zip(image_index, rows.xyxy, strict=True)]
    rows, order = people.finish()
    kept = list(range(len(rows)))
    if is_photo and len(rows):  # of one person: others in the picture are nobody we know
        kept = [int(np.argmax(np.prod(rows.xyxy[:, 2:] - rows.xyxy[:, :2], axis=1)))]
    for r in kept:
        rgb, crop_xyxy = regions[order[r]]
        yield {
            "track": rows.track_id[r],
            "pts_seconds": rows.pts_seconds[r],
            "index": rows.frame_index[r],
            "box": rows.xyxy[r],
            "landmarks": rows.landmarks[r].reshape(10) if rows.detected[r] else None,
            "confidence": rows.confidence[r],
            "crop": rgb,
            "crop_xyxy": crop_xyxy,
            "crop_hw": rgb.shape[:2],
        }


def cut_region(image: Image, box: F32, settings: ExtractSettings) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """What is stored of a face: RGB (H, W, 3), and where it lies in the upright frame, xyxy in whole pixels.

    The region ends at the frame's border: what lies beyond is for the crop to fill in, by the rule of its CropSpec.
    """
    wide = crop_boxes(box[None], CropSpec(margin_ratio=settings.margin_ratio))[0]
    h, w = image.upright_hw
    x1, y1 = np.clip(np.floor(wide[:2]), 0, (w - 1, h - 1)).astype(int)
    x2, y2 = np.clip(np.ceil(wide[2:]), (x1 + 1, y1 + 1), (w, h)).astype(int)
    scale = min(1.0, settings.max_px / max(x2 - x1, y2 - y1))
    pixels = _kernels.crop_resize(
        [image],
        np.array([[x1, y1, x2, y2]], np.float32),
        np.zeros(1, np.int32),
        out_hw=(max(1, round((y2 - y1) * scale)), max(1, round((x2 - x1) * scale))),
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
    )[0]
    rgb = pixels.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    return np.ascontiguousarray(rgb), np.array([x1, y1, x2, y2], np.int32)


def _video_frames(path: Path, settings: ExtractSettings) -> Iterator[Frames]:
    with open_video(path) as video:
        yield from video.frames(Sampling(settings.sampling, settings.sampling_mode))


def _one_photo(path: Path) -> Iterator[Frames]:
    try:
        with PilImage.open(path) as photo:
            rgb = np.asarray(ImageOps.exif_transpose(photo).convert("RGB"))
    except (OSError, ValueError, SyntaxError, PilImage.DecompressionBombError) as error:  # Pillow raises all of these
        raise InputError(f"the photo cannot be read ({first_line(error)})", path=path, stage="open") from None
    yield Frames((Image.from_rgb(np.ascontiguousarray(rgb)),), np.zeros(1), np.zeros(1, np.int64))


def _extract_item(root: Path, out: Path, item: Item, settings: ExtractSettings) -> None:
    """Writes the crops of one item and then, as the sign that they are whole, its part of the table."""
    rows: list[dict[str, Any]] = []
    crops = out / "crops" / _key(item)
    shutil.rmtree(crops, ignore_errors=True)  # of a run that was killed, or of another file
    failure = "no face was found, or none that counts as a person"
    try:
        for face in find_faces(root / item.path, item.is_photo, _detector(item.is_photo, settings), settings):
            crops.mkdir(parents=True, exist_ok=True)
            file = crops / f"{face['track']}-{face['index']}.png"
            # Level 1: of 1, 3 and 6 three times as fast as the last, and 9 % larger.
            PilImage.fromarray(face["crop"]).save(file, compress_level=1)
            rows.append(face | {"crop": file.relative_to(out).as_posix(), "failure": None})
    except DfengineError as error:
        rows, failure = [], f"{type(error).__name__}: {error.message}"
    except OSError:  # of ours: the disk is full, or the folder may not be written to
        raise
    except Exception as error:  # a defect of dfengine costs this file its row, and no other
        rows, failure = [], f"unexpected {type(error).__name__}: {error}; please report this"
    if not rows:
        rows = [dict.fromkeys(FACE_FIELDS.names) | {"failure": failure}]
    _write_part(root, out, item, rows)


def _write_part(root: Path, out: Path, item: Item, rows: list[dict[str, Any]]) -> None:
    part = pa.Table.from_pylist(rows, FACE_FIELDS).replace_schema_metadata({"file": _file_state(root / item.path)})
    _write_table(out / "parts" / f"{_key(item)}.parquet", part)


def _file_state(path: Path) -> str:
    """Tells a file from another of the same name."""
    try:
        state = path.stat()
    except OSError:
        return "gone"
    return f"{state.st_size} {state.st_mtime_ns}"


def _is_done(part: Path, path: Path) -> bool:
    """Whether there is a part, made of the file that is there now."""
    if not part.exists():
        return False
    return (pq.read_schema(part).metadata or {}).get(b"file") == _file_state(path).encode()


def _key(item: Item) -> str:
    """A name for files: readable, and different for different paths."""
    return f"{Path(item.path).stem[:40]}-{hashlib.sha256(item.path.encode()).hexdigest()[:10]}"


def _with_labels(part: pa.Table, item: Item, split: str) -> pa.Table:
    columns = {
        "path": item.path,
        "label": item.label,
        "source_id": item.source_id,
        "original": item.original,
        "dataset": item.dataset,
        "split": split,
    }
    arrays = {k: pa.array([v] * len(part), SCHEMA.field(k).type) for k, v in columns.items()}
    return pa.table(arrays | {name: part[name] for name in FACE_FIELDS.names}, SCHEMA)


def _write_table(path: Path, table: pa.Table) -> None:
    """The old file or the whole new one is there, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        pq.write_table(table, partial)


def _check_settings(out: Path, settings: ExtractSettings) -> None:
    file, text = out / "settings.json", json.dumps(to_plain(settings), indent=2) + "\n"
    if file.exists() and _stored_settings(file) != settings:
        raise OptionError(
            "the faces here were found with other settings than those asked for; use another folder, or remove "
            "this one",
            path=out,
        )
    for left_behind in out.glob("parts/*.partial"):  # by a run that was killed
        left_behind.unlink()
    out.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        partial.write_text(text)


def _stored_settings(file: Path) -> ExtractSettings | None:
    """None if they are of another version of this package."""
    try:
        return from_plain(ExtractSettings, json.loads(file.read_text()))
    except (TypeError, ValueError):
        return None


# -- many items --------------------------------------------------------------------------------------------------------

_detectors: dict[DetectorSettings, Detector] = {}


def _detector(is_photo: bool, settings: ExtractSettings) -> Detector:
    """One a process, compiled when it is first asked for."""
    wanted = replace(settings.detector, min_face_ratio=PHOTO_MIN_FACE_RATIO) if is_photo else settings.detector
    if wanted not in _detectors:
        _detectors[wanted] = Detector(wanted)
    return _detectors[wanted]


def _in_processes(
    root: Path, out: Path, items: Sequence[Item], settings: ExtractSettings, workers: int
) -> Iterator[Item]:
    """Extracts items and yields each when it is done. An item whose process dies is tried once more, alone."""
    queue = iter(items)
    left = len(items)
    while left:
        pool = _make_pool(min(workers, left))
        running: dict[Future[None], Item] = {}
        try:
            while True:
                while len(running) < 2 * workers and (item := next(queue, None)) is not None:
                    running[pool.submit(_extract_item, root, out, item, settings)] = item
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    left -= 1
                    yield running.pop(future)
            break
        except BrokenProcessPool:
            for item in running.values():
                with _make_pool(1) as alone:
                    try:
                        alone.submit(_extract_item, root, out, item, settings).result()
                    except BrokenProcessPool:
                        _note_death(root, out, item)
                left -= 1
                yield item
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _note_death(root: Path, out: Path, item: Item) -> None:
    failure = "the process that read it died (killed, or out of memory); remove this part to try again"
    _write_part(root, out, item, [dict.fromkeys(FACE_FIELDS.names) | {"failure": failure}])


def _make_pool(workers: int) -> ProcessPoolExecutor:
    # Not forked: OpenVINO's threads do not survive that.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# -- looking at it -----------------------------------------------------------------------------------------------------


SHEET_COLUMNS, SHEET_FACES, TILE_PX = 12, 144, 120  # 1440 px square at most; chosen by eye


def draw_contact_sheet(table: FaceTable, file: Path) -> None:
    """One face of each of up to SHEET_FACES videos, evenly chosen; a red frame is a fake, a green one real."""
    middle = [rows[len(rows) // 2] for rows in table.rows_by_video().values()]
    shown = [middle[i] for i in np.linspace(0, len(middle) - 1, min(len(middle), SHEET_FACES)).astype(int)]
    sheet = PilImage.new("RGB", (SHEET_COLUMNS * TILE_PX, max(1, -(-len(shown) // SHEET_COLUMNS)) * TILE_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(shown):
        x, y = i % SHEET_COLUMNS * TILE_PX, i // SHEET_COLUMNS * TILE_PX
        tile = PilImage.fromarray(table.read_crop(row))
        tile.thumbnail((TILE_PX - 8, TILE_PX - 8))
        draw.rectangle((x + 1, y + 1, x + TILE_PX - 2, y + TILE_PX - 2), fill="red" if table.label[row] else "green")
        sheet.paste(tile, (x + 4, y + 4))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    file.write_bytes(buffer.getvalue())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.faces", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="+", help="folders of videos or photos, or a labels.csv")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, help="take frames, mode, detector and tracking from its [bundle]")
    parser.add_argument("--frames", help="uniform:17 (the default), every:6, every:10:17, every:1@2 (two seconds)")
    parser.add_argument("--mode", help="exact, reference (the default) or keyframe")
    parser.add_argument("--split", default="identity:0.15", help="identity:V[:T], folders:41-49, given, or one split")
    parser.add_argument("--person", help="a regular expression: who is shown, by the path of a photo; see labels.py")
    parser.add_argument("--workers", type=int, help="processes; default: one a core")
    parser.add_argument("--contact-sheet", action="store_true", help="also write DIR/contact_sheet.png")
    args = parser.parse_args(arguments)
    text = TextColumn("{task.description}")
    with Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("faces")
        try:
            settings = settings_of_recipe(args.recipe) if args.recipe else ExtractSettings()
            settings = replace(
                settings,
                sampling=Policy.parse(args.frames) if args.frames else settings.sampling,
                sampling_mode=parse_mode(args.mode) if args.mode else settings.sampling_mode,
            )
            table = extract(
                args.source,
                args.out,
                settings,
                split=args.split,
                person=PersonPattern(args.person) if args.person else None,
                workers=args.workers,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except DfengineError as error:
            progress.stop()
            sys.exit(f"error: {error}")
        except OSError as error:  # the disk is full, say
            progress.stop()
            sys.exit(f"error: {error}; what is done is kept: mend this and run the same command again")
    if args.contact_sheet:
        draw_contact_sheet(table, args.out / "contact_sheet.png")
    print(table.summary())


if __name__ == "__main__":
    main()
