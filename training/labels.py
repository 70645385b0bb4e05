"""A folder of videos or photos -> what is in it and what is known about each file.

``read_items`` recognises the layout by what lies in the folder, in this order:

    labels.csv       one row a file (a CSV of another name can be named itself). Columns: ``file`` (relative to the CSV)
                     and ``label`` (0, 1, REAL or FAKE); if known ``source_id`` (who or what is shown; several joined
                     by ";"), ``original`` (the file a fake was made from), ``dataset``, ``split`` (train, val, test)
    metadata.json    DFDC, here or in the folders: {"a.mp4": {"label": "FAKE", "original": "b.mp4"}, ...}; the number of
                     dfdc_train_part_N is the folder that ``folders:`` splits by
    original_sequences, manipulated_sequences
                     FaceForensics++: .../youtube/c23/videos/004.mp4 and .../Deepfakes/c23/videos/004_982.mp4, also
                     actors and DeepFakeDetection; splits/{train,val,test}.json if they are there
    index.csv        photos of real faces; the columns of labels.csv, ``label`` not needed. ``source_id`` (or
                     ``person``) says who is shown, ``dataset`` (or ``source``, ``source_dataset``) where a photo comes
                     from; ``licence`` and the like are read past
    photos           the same without a list

Files that share a source belong together: ``Item.source_id`` names the group, and a split never divides one. A photo of
which nobody says whom it shows is a person of its own: give a column, or a pattern that finds the person in the path
(PersonPattern). Several folders are one set, and a name means the same person in all of them.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dfengine.errors import DfengineError

SPLITS = ("train", "val", "test")
PHOTO_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_LABELS = {"0": 0, "REAL": 0, "1": 1, "FAKE": 1}
_COLUMNS = ("file", "label", "source_id", "original", "dataset", "split")
_ALIASES = {"source_dataset": "dataset", "source": "dataset", "person": "source_id"}
# Columns that say where a file came from or what it holds. They are read past; anything else may be a slip.
_INFORMATIVE = {
    "author", "change", "codec", "commit", "duration_s", "face_px", "fps", "height", "licence", "path", "repo",
    "sha256_of_original", "url", "width",
}  # fmt: skip


class LabelsError(DfengineError, ValueError):
    """What is said about the files cannot be used; the message names file and line or key."""


@dataclass(frozen=True)
class Item:
    """One video or photo."""

    path: str  # relative to the root, with "/"
    label: int | None  # 1 fake, 0 real, None for photos, which are real
    dataset: str
    identities: tuple[str, ...] = ()  # who or what is shown; empty if nobody said
    original: str | None = None  # path of the item a fake was made from, if that is in the set
    folder: int | None = None  # N of dfdc_train_part_N
    given_split: str | None = None  # as the set itself has it
    source_id: str = ""  # the same for all items that share an identity, directly or through others

    @property
    def is_photo(self) -> bool:
        return Path(self.path).suffix.lower() in PHOTO_SUFFIXES


class PersonPattern:
    """A regular expression that finds, anywhere in a photo's path, who is shown: the first group that matched.

    ``([^/]+)_\\d+\\.`` makes Ann_Lee of lfw/Ann_Lee/Ann_Lee_0002.jpg, ``^(.+)/`` a person of each folder. A name of the
    group comes before: ``_front_(?P<london>\\d+)_`` makes london-018, so that numbers of several sets stay apart.
    """

    def __init__(self, pattern: str) -> None:
        """Raises LabelsError."""
        try:
            self._expression = re.compile(pattern)
        except re.error as error:
            raise LabelsError(f"the pattern of people {pattern!r} is no regular expression ({error})") from None
        if not self._expression.groups:
            raise LabelsError(f"the pattern of people {pattern!r} has no group; put the person in brackets")

    def find(self, file: str) -> str:
        """Raises LabelsError if it does not match."""
        match = self._expression.search(file)
        if match is None or match.lastindex is None:
            raise LabelsError(
                f"the pattern of people {self._expression.pattern!r} finds nobody in {file!r}; widen it, or list the "
                "people in an index.csv"
            )
        number = next(i for i in range(1, self._expression.groups + 1) if match[i] is not None)
        name = next((name for name, i in self._expression.groupindex.items() if i == number), None)
        return f"{name}-{match[number]}" if name else match[number]


def read_items(source: Path | Sequence[Path], person: PersonPattern | None = None) -> tuple[Path, tuple[Item, ...]]:
    """(root, its items by path) of one folder or list, or of several as one set, whose root holds them all.

    ``person`` names who is shown in photos of which no list says it. Raises LabelsError, also when a file that is
    listed is missing.
    """
    sources = [source] if isinstance(source, Path) else list(source)
    found = [_read_source(s, person) for s in sources]
    root, items = found[0]
    if len(found) > 1:
        root = Path(os.path.commonpath([folder.resolve() for folder, _ in found]))
        items = [_below_root(item, folder.resolve().relative_to(root)) for folder, own in found for item in own]
        paths = [item.path for item in items]
        if len(set(paths)) < len(paths):
            twice = next(p for p in paths if paths.count(p) > 1)
            raise LabelsError(f"{twice!r} is in two of the folders that were given; give each once", path=root)
    return root, tuple(sorted(_name_sources(items), key=lambda item: item.path))


def _below_root(item: Item, folder: Path) -> Item:
    original = None if item.original is None else (folder / item.original).as_posix()
    return replace(item, path=(folder / item.path).as_posix(), original=original)


def _read_source(source: Path, person: PersonPattern | None) -> tuple[Path, list[Item]]:
    """(root, its items), which have no ``source_id`` yet."""
    if source.suffix.lower() == ".csv" and source.is_file():
        root, listed, items = source.parent, source, _read_csv(source, photos=False)
    elif not source.is_dir():
        raise LabelsError("there is no such folder (nor a CSV of this name)", path=source)
    else:
        root, (listed, items) = source, _read_folder(source)
    if not items:
        raise LabelsError("nothing is listed: add a row for each file", path=listed)
    _check_paths(root, listed, items)
    if person is not None:
        items = [
            replace(item, identities=(person.find(item.path),)) if item.label is None and not item.identities else item
            for item in items
        ]
    return root, items


def assign_splits(items: Sequence[Item], rule: str) -> tuple[str, ...]:
    """The split of each item.

    ``rule``: ``identity:V`` or ``identity:V:T`` (shares of the sources for val and test, chosen by a hash of the
    source's name, so that new files move nobody), ``folders:41-49`` or ``folders:40-45:46-49`` (DFDC folders for val
    and test), ``given`` (the set's own), or the name of one split for everything. Raises LabelsError.
    """
    kind, *numbers = rule.split(":")
    if rule in SPLITS:
        return (rule,) * len(items)
    if rule == "given":
        splits = tuple(_given(item) for item in items)
    elif kind == "identity" and 1 <= len(numbers) <= 2 and all(re.fullmatch(r"0?\.\d+|0", n) for n in numbers):
        splits = _by_identity(items, *map(float, numbers))
    elif kind == "folders" and 1 <= len(numbers) <= 2 and all(re.fullmatch(r"\d+(-\d+)?", n) for n in numbers):
        splits = _by_folder(items, *map(_folder_range, numbers))
    else:
        raise LabelsError(
            f"split {rule!r} is not understood; write identity:V or identity:V:T with shares below 1, "
            "folders:41-49 (val) or folders:40-45:46-49 (val, test), given, train, val or test"
        )
    check_disjoint([item.source_id for item in items], splits)
    return splits


def check_disjoint(source_ids: Iterable[str], splits: Iterable[str]) -> None:
    """Raises LabelsError, with names, if a source is in two splits."""
    seen: dict[str, set[str]] = {}
    for source_id, split in zip(source_ids, splits, strict=True):
        seen.setdefault(source_id, set()).add(split)
    leaks = sorted(s for s, where in seen.items() if len(where) > 1)
    if leaks:
        where = " and ".join(sorted(seen[leaks[0]]))
        raise LabelsError(
            f"{len(leaks)} of {len(seen)} sources are in more than one split, {leaks[0]!r} in {where}; "
            "a fake stays with its original: split by identity"
        )


# -- layouts -----------------------------------------------------------------------------------------------------------


def _read_folder(root: Path) -> tuple[Path, list[Item]]:
    """(the file that lists them, or the folder; items)"""
    if (root / "labels.csv").is_file():
        return root / "labels.csv", _read_csv(root / "labels.csv", photos=False)
    metadata = [root / "metadata.json"] if (root / "metadata.json").is_file() else sorted(root.glob("*/metadata.json"))
    if metadata:
        return metadata[0], _join_dfdc([item for path in metadata for item in _read_dfdc(root, path)])
    if (root / "original_sequences").is_dir() or (root / "manipulated_sequences").is_dir():
        return root, _read_faceforensics(root)
    if (root / "index.csv").is_file():
        return root / "index.csv", _read_csv(root / "index.csv", photos=True)
    photos = sorted(p.relative_to(root) for p in root.rglob("*") if p.suffix.lower() in PHOTO_SUFFIXES)
    if photos:
        return root, [Item(p.as_posix(), None, root.resolve().name) for p in photos]
    raise LabelsError(
        "no labels.csv, metadata.json (DFDC), original_sequences (FaceForensics++), index.csv or photos were found "
        "here; write a labels.csv with the columns file and label",
        path=root,
    )


def _read_csv(path: Path, *, photos: bool) -> list[Item]:
    items: list[Item] = []
    lines: dict[str, int] = {}
    originals: dict[str, int] = {}
    for line, row in _csv_rows(path, ("file",) if photos else ("file", "label")):
        where = f"{path}:{line}"
        file = Path(row["file"]).as_posix()
        label = _label(row["label"], where) if row.get("label") or not photos else None
        if file in lines:
            before = items[[item.path for item in items].index(file)].label
            said = f"as {_word(before)} and as {_word(label)}" if before != label else f"both times as {_word(label)}"
            raise LabelsError(f"{file!r} is listed twice, first in line {lines[file]}, {said}; keep one", path=where)
        lines[file] = line
        if row.get("split") and row["split"] not in SPLITS:
            raise LabelsError(f"split {row['split']!r} must be train, val or test", path=where)
        original = Path(row["original"]).as_posix() if row.get("original") else None
        if original is not None:
            originals.setdefault(original, line)
        named = tuple(s.strip() for s in (row.get("source_id") or "").split(";") if s.strip())
        if not named and label == 0:
            named = (file,)
        dataset = row.get("dataset") or path.parent.resolve().name
        items.append(Item(file, label, dataset, named, original, given_split=row.get("split") or None))
    for original, line in originals.items():
        if original not in lines:
            raise LabelsError(
                f"the original {original!r} is not listed; list it, or name the source in source_id instead",
                path=f"{path}:{line}",
            )
    return items


def _csv_rows(path: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, values by column)"""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [_ALIASES.get(name.strip(), name.strip()) for name in next(reader, [])]
            for name in header:
                if name not in _COLUMNS and name not in _INFORMATIVE:
                    near = difflib.get_close_matches(name, _COLUMNS, 1)
                    hint = f"did you mean {near[0]!r}? " if near else ""
                    raise LabelsError(
                        f"unknown column {name!r}; {hint}known are {', '.join(_COLUMNS)}; rename it or take it out",
                        path=f"{path}:1",
                    )
            for name in required:
                if header.count(name) != 1:
                    raise LabelsError(f"there must be one column {name!r}, got {header}", path=f"{path}:1")
            for row in reader:
                if len(row) != len(header):
                    raise LabelsError(
                        f"{len(row)} values for {len(header)} columns; quote values that hold a comma",
                        path=f"{path}:{reader.line_num}",
                    )
                yield reader.line_num, {name: value.strip() for name, value in zip(header, row, strict=True)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabelsError(f"the file cannot be read as CSV in UTF-8 ({error})", path=path) from None


def _read_dfdc(root: Path, path: Path) -> list[Item]:
    """Items of one metadata.json; ``original`` still as the file names it."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counted = dict(pairs)
        if len(counted) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise LabelsError(f"{twice!r} is listed twice; keep one", path=path)
        return counted

    try:
        data = json.loads(path.read_bytes(), object_pairs_hook=once)
    except LabelsError:
        raise
    except (OSError, ValueError) as error:
        raise LabelsError(f"the file cannot be read as JSON ({error})", path=path) from None
    part = re.fullmatch(r".*_part_(\d+)", path.parent.resolve().name)
    items = []
    if not isinstance(data, dict) or not all(isinstance(entry, dict) for entry in data.values()):
        raise LabelsError('expected {"a.mp4": {"label": "FAKE", "original": "b.mp4"}, ...}', path=path)
    for name, entry in data.items():
        label = _label(entry.get("label"), f"{path}: {name!r}")
        original = entry.get("original") or None
        split = entry.get("split")
        items.append(
            Item(
                (path.parent / name).relative_to(root).as_posix(),
                label,
                "DFDC",
                (original,) if original else (name,) if label == 0 else (),
                original,
                int(part[1]) if part else None,
                split if split in SPLITS else None,
            )
        )
    return items


def _join_dfdc(items: list[Item]) -> list[Item]:
    """Replaces the names of originals by their paths; an original may lie in another folder, or nowhere."""
    by_name = {Path(item.path).name: item.path for item in items if item.label == 0}
    return [replace(item, original=by_name.get(item.original or "")) for item in items]


# 004.mp4; 004_982.mp4 (target, source); 01__kitchen.mp4; 01_02__kitchen__AB12CD34.mp4 (target, source, of actors)
_FACEFORENSICS = re.compile(r"(\d{3})(?:_(\d{3}))?|(\d{2})(?:_(\d{2}))?__(.+?)(?:__[0-9A-Z]{8})?")


def _read_faceforensics(root: Path) -> list[Item]:
    splits: dict[str, str] = {}
    for split in SPLITS:
        listed = root / "splits" / f"{split}.json"
        if listed.is_file():
            try:
                splits |= {str(i): split for pair in json.loads(listed.read_bytes()) for i in pair}
            except (TypeError, ValueError) as error:
                raise LabelsError(f'expected pairs of ids, [["004", "982"], ...] ({error})', path=listed) from None
    originals: dict[tuple[str, str], str] = {}  # (compression, name) -> path
    items = []
    for path in sorted(root.glob("original_sequences/*/*/videos/*.mp4")) + sorted(
        root.glob("manipulated_sequences/*/*/videos/*.mp4")
    ):
        file = path.relative_to(root)
        match = _FACEFORENSICS.fullmatch(path.stem)
        if match is None:
            raise LabelsError("expected a name like 004.mp4, 004_982.mp4 or 01_02__kitchen__AB12CD34.mp4", path=path)
        target, donor, actor, other_actor, scene = match.groups()
        ids = (target, donor) if target else (actor and f"actor-{actor}", other_actor and f"actor-{other_actor}")
        label = int(file.parts[0] == "manipulated_sequences")
        compression = file.parts[2]
        original = None
        if label == 1:
            original = originals.get((compression, target or f"{actor}__{scene}"))
        else:
            originals[compression, path.stem] = file.as_posix()
        items.append(
            Item(
                file.as_posix(),
                label,
                f"FaceForensics++ {compression}",
                tuple(i for i in ids if i),
                original,
                given_split=splits.get(target or ""),
            )
        )
    if not items:
        raise LabelsError("no .../videos/*.mp4 below original_sequences or manipulated_sequences", path=root)
    return items


# -- splits ------------------------------------------------------------------------------------------------------------


def _given(item: Item) -> str:
    if item.given_split is None:
        raise LabelsError(f"{item.path!r} has no split of its own; give it one, or split by identity")
    return item.given_split


def _by_identity(items: Sequence[Item], val: float, test: float = 0.0) -> tuple[str, ...]:
    if val + test >= 1:
        raise LabelsError(f"val {val} and test {test} leave nothing to train on; their sum must be below 1")
    unknown = [item.path for item in items if item.label == 1 and not item.identities]
    if unknown:
        raise LabelsError(
            f"nobody says what {len(unknown)} fakes were made from (the first is {unknown[0]!r}), so they might be "
            "split from their originals; add a column source_id or original, or put everything into one split"
        )
    sources = sorted({item.source_id for item in items})
    at = {s: int.from_bytes(hashlib.sha256(s.encode()).digest()[:4], "big") / 2**32 for s in sources}
    split = {s: "test" if at[s] < test else "val" if at[s] < test + val else "train" for s in sources}
    # A split that was asked for is not empty, however few sources there are: it gets the nearest of the training set.
    for name, share in (("test", test), ("val", val)):
        rest = sorted((s for s in sources if split[s] == "train"), key=at.__getitem__)
        if share > 0 and name not in split.values() and len(rest) > 1:
            split[rest[0]] = name
    return tuple(split[item.source_id] for item in items)


def _folder_range(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _by_folder(items: Sequence[Item], val: range, test: range = range(0)) -> tuple[str, ...]:
    for item in items:
        if item.folder is None:
            raise LabelsError(
                f"{item.path!r} is in no folder dfdc_train_part_N, so it cannot be split by folder; split by identity"
            )
    return tuple("test" if i.folder in test else "val" if i.folder in val else "train" for i in items)


# -- helpers -----------------------------------------------------------------------------------------------------------


def _name_sources(items: list[Item]) -> list[Item]:
    """Sets ``source_id``: the first, by name, of all identities that are connected through items."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    of_path = {item.path: item.identities or (f"file {item.path}",) for item in items}
    tied = [(*of_path[item.path], *of_path.get(item.original or "", ())) for item in items]
    for names in tied:
        for name in names[1:]:
            a, b = sorted((find(names[0]), find(name)))
            parent[b] = a
    return [
        replace(item, source_id=find(names[0]), identities=item.identities or (names[1:] if item.original else ()))
        for item, names in zip(items, tied, strict=True)
    ]


def _check_paths(root: Path, listed: Path, items: Sequence[Item]) -> None:
    missing = [item.path for item in items if not (root / item.path).is_file()]
    if missing:
        raise LabelsError(
            f"{len(missing)} of {len(items)} listed files are missing in {root}, the first is {missing[0]!r}; "
            "fetch them, or take them out of the list",
            path=listed,
        )


def _label(value: Any, where: str) -> int:
    label = _LABELS.get(str(value).upper())
    if label is None:
        raise LabelsError(f"label {value!r} must be 0, 1, REAL or FAKE", path=where)
    return label


def _word(label: int | None) -> str:
    return {0: "REAL", 1: "FAKE", None: "a photo"}[label]
