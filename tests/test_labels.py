"""Folders of videos and photos -> items, their sources and splits; and what is wrong with a list."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from training.labels import Item, LabelsError, PersonPattern, assign_splits, check_disjoint, read_items


def touch(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")
    return root


def write_csv(root: Path, text: str, *files: str, name: str = "labels.csv") -> Path:
    touch(root, *files)
    (root / name).write_text(text, encoding="utf-8")
    return root


def items_of(root: Path) -> dict[str, Item]:
    return {item.path: item for item in read_items(root)[1]}


def dfdc(root: Path, parts: dict[int, dict[str, dict[str, str]]]) -> Path:
    for number, metadata in parts.items():
        folder = root / f"dfdc_train_part_{number}"
        touch(folder, *metadata)
        (folder / "metadata.json").write_text(json.dumps(metadata))
    return root


def faceforensics(root: Path, *pairs: str) -> Path:
    ids = {i for pair in pairs for i in pair.split("_")}
    touch(root, *(f"original_sequences/youtube/c23/videos/{i}.mp4" for i in ids))
    return touch(root, *(f"manipulated_sequences/Deepfakes/c23/videos/{p}.mp4" for p in pairs))


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_dfdc(tmp_path: Path) -> None:
    real, fake = {"label": "REAL", "split": "train"}, {"label": "FAKE", "split": "train", "original": "a.mp4"}
    lost = {"label": "FAKE", "split": "train", "original": "gone.mp4"}
    items = items_of(dfdc(tmp_path, {3: {"a.mp4": real, "b.mp4": fake}, 41: {"c.mp4": real, "d.mp4": lost}}))
    assert [(i.path, i.label, i.folder, i.source_id) for i in items.values()] == [
        ("dfdc_train_part_3/a.mp4", 0, 3, "a.mp4"),
        ("dfdc_train_part_3/b.mp4", 1, 3, "a.mp4"),
        ("dfdc_train_part_41/c.mp4", 0, 41, "c.mp4"),
        ("dfdc_train_part_41/d.mp4", 1, 41, "gone.mp4"),
    ]
    assert items["dfdc_train_part_3/b.mp4"].original == "dfdc_train_part_3/a.mp4"
    assert items["dfdc_train_part_41/d.mp4"].original is None
    assert assign_splits(list(items.values()), "folders:41-49") == ("train", "train", "val", "val")
    assert assign_splits(list(items.values()), "folders:3:41-49") == ("val", "val", "test", "test")


def test_one_folder_of_dfdc_by_itself(tmp_path: Path) -> None:
    folder = dfdc(tmp_path, {7: {"a.mp4": {"label": "REAL"}}}) / "dfdc_train_part_7"
    assert items_of(folder)["a.mp4"].folder == 7


def test_faceforensics_joins_all_ids_that_occur_together(tmp_path: Path) -> None:
    items = items_of(faceforensics(tmp_path, "004_982", "982_004", "100_982", "200_300"))
    by_name = {Path(p).stem: item for p, item in items.items()}
    assert {by_name[n].source_id for n in ("004", "982", "100", "004_982", "982_004", "100_982")} == {"004"}
    assert {by_name[n].source_id for n in ("200", "300", "200_300")} == {"200"}
    assert by_name["982_004"].original == "original_sequences/youtube/c23/videos/982.mp4"
    assert by_name["982_004"].dataset == "FaceForensics++ c23"
    assert (by_name["982"].label, by_name["982_004"].label) == (0, 1)


def test_faceforensics_keeps_actors_and_official_splits_apart(tmp_path: Path) -> None:
    root = faceforensics(tmp_path, "004_982")
    touch(root, "original_sequences/actors/c23/videos/01__kitchen.mp4")
    touch(root, "original_sequences/actors/c23/videos/02__kitchen.mp4")
    touch(root, "manipulated_sequences/DeepFakeDetection/c23/videos/01_02__kitchen__AB12CD34.mp4")
    touch(root, "splits/x")
    (root / "splits/val.json").write_text('[["004", "982"]]')
    by_name = {Path(p).stem: item for p, item in items_of(root).items()}
    assert by_name["01_02__kitchen__AB12CD34"].source_id == by_name["02__kitchen"].source_id == "actor-01"
    assert by_name["01_02__kitchen__AB12CD34"].original == "original_sequences/actors/c23/videos/01__kitchen.mp4"
    assert {by_name[n].given_split for n in ("004", "004_982")} == {"val"}


def test_labels_csv(tmp_path: Path) -> None:
    root = write_csv(
        tmp_path,
        "\ufefffile,label,original,source_id,dataset,split,fps\n"
        "a.mp4,REAL,,,,train,25\n"
        'b.mp4,1,a.mp4,,mine,train,"25"\n'
        "sub/c.mp4,fake,,x;y,,val,25\n"
        "d.mp4,0,,y,,val,25\n",
        *("a.mp4", "b.mp4", "sub/c.mp4", "d.mp4"),
    )
    items = items_of(root)
    assert {p: i.label for p, i in items.items()} == {"a.mp4": 0, "b.mp4": 1, "sub/c.mp4": 1, "d.mp4": 0}
    assert items["b.mp4"].source_id == items["a.mp4"].source_id == "a.mp4"
    assert items["sub/c.mp4"].source_id == items["d.mp4"].source_id == "x"
    assert (items["b.mp4"].dataset, items["a.mp4"].dataset) == ("mine", tmp_path.name)
    assert assign_splits(list(items.values()), "given") == ("train", "train", "val", "val")
    assert read_items(root / "labels.csv") == read_items(root)


def test_photos_with_and_without_a_list(tmp_path: Path) -> None:
    files = ("ann/Ann_Lee_0001.jpg", "ann/Ann_Lee_0002.png", "00017.jpg", "notes.txt")
    items = items_of(touch(tmp_path / "plain", *files))
    assert [(i.path, i.label, i.source_id) for i in items.values()] == [
        ("00017.jpg", None, "file 00017.jpg"),
        ("ann/Ann_Lee_0001.jpg", None, "file ann/Ann_Lee_0001.jpg"),
        ("ann/Ann_Lee_0002.png", None, "file ann/Ann_Lee_0002.png"),
    ]
    named = read_items(tmp_path / "plain", PersonPattern(r"([^/]+?)(?:_\d+)?\.\w+$"))[1]
    assert [i.source_id for i in named] == ["00017", "Ann_Lee", "Ann_Lee"]
    listed = write_csv(tmp_path / "x", "file,source_dataset\n00017.jpg,mine\n", *files, name="index.csv")
    assert [(i.path, i.dataset) for i in items_of(listed).values()] == [("00017.jpg", "mine")]


def test_an_index_says_who_is_shown(tmp_path: Path) -> None:
    text = "file,person,source,licence\na.jpg,ann,here,CC0\nb.jpg,ann;bob,here,CC0\nc.jpg,,there,\nd.jpg,bob,there,\n"
    root = write_csv(tmp_path, text, "a.jpg", "b.jpg", "c.jpg", "d.jpg", name="index.csv")
    found = items_of(root)
    assert [i.source_id for i in found.values()] == ["ann", "ann", "file c.jpg", "ann"]
    assert [i.dataset for i in found.values()] == ["here", "here", "there", "there"]
    pattern = PersonPattern(r"(\w)\.jpg")
    assert read_items(root, pattern)[1][2].source_id == "c", "of whom the list says nothing"
    assert read_items(root, pattern)[1][3].source_id == "ann", "the list comes first"


# How the photos of the packaged default are named: numbers of people in one set, names in the other. Those who sat in
# both houses are not always written alike, so everybody with one surname counts as one.
PORTRAITS = r"_front_(?P<london>\d+)_|^us-(?:house|senate)/(?:.*-)?(?P<congress>[^-/]+)\.jpg$"


@pytest.mark.parametrize(
    ("pattern", "file", "person"),
    [
        (PORTRAITS, "us-house/ben-ray-lujan.jpg", "congress-lujan"),
        (PORTRAITS, "us-senate/ben-lujan.jpg", "congress-lujan"),
        (PORTRAITS, "us-house/cher.jpg", "congress-cher"),
        (PORTRAITS, "webmorphR.stim/inst_neutral_front_018_03.jpg", "london-018"),
        (PORTRAITS, "webmorphR.stim/inst_smiling_front_018_08.jpg", "london-018"),
        (r"([^/]+)_\d+\.", "lfw/Ann_Lee/Ann_Lee_0012.jpg", "Ann_Lee"),
        (r"^(.+)/", "vgg/n001/7.jpg", "vgg/n001"),
    ],
)
def test_a_pattern_names_people(pattern: str, file: str, person: str) -> None:
    assert PersonPattern(pattern).find(file) == person


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(", r"the pattern of people '\(' is no regular expression"),
        (r"\d+", r"has no group; put the person in brackets"),
        (r"(\d+)", r"finds nobody in 'a\.jpg'; widen it, or list the people in an index\.csv"),
    ],
)
def test_patterns_that_cannot_be_used(tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(LabelsError, match=message):
        read_items(touch(tmp_path, "a.jpg"), PersonPattern(pattern))


def test_a_person_in_two_folders_is_in_one_split(tmp_path: Path) -> None:
    names = [f"p{i}" for i in range(40)]
    folders = []
    for folder, own in (("here", names), ("there", names[::2])):
        text = "file,source_id\n" + "".join(f"{folder}-{n}.jpg,{n}\n" for n in own)
        files = [f"{folder}-{n}.jpg" for n in own]
        folders.append(write_csv(tmp_path / folder / "photos", text, *files, name="index.csv"))
    touch(tmp_path / "here/photos/../../videos", "a.mp4", "b.mp4")
    (tmp_path / "videos/labels.csv").write_text("file,label,original,source_id\na.mp4,REAL,,p3\nb.mp4,FAKE,a.mp4,\n")
    root, found = read_items([*folders, tmp_path / "videos"])
    assert root == tmp_path.resolve()
    assert len(found) == 40 + 20 + 2
    by_path = {item.path: item for item in found}
    assert by_path["there/photos/there-p4.jpg"].source_id == by_path["here/photos/here-p4.jpg"].source_id == "p4"
    assert by_path["videos/b.mp4"].original == "videos/a.mp4"
    assert by_path["videos/b.mp4"].source_id == by_path["here/photos/here-p3.jpg"].source_id
    splits = assign_splits(found, "identity:0.3:0.2")
    assert {"train", "val", "test"} == set(splits)
    of_person: dict[str, set[str]] = {}
    for item, split in zip(found, splits, strict=True):
        of_person.setdefault(item.source_id, set()).add(split)
    assert all(len(s) == 1 for s in of_person.values())


def test_one_folder_given_twice(tmp_path: Path) -> None:
    with pytest.raises(LabelsError, match=r"'a\.jpg' is in two of the folders that were given; give each once"):
        read_items([touch(tmp_path, "a.jpg"), tmp_path])


def test_the_real_sets_are_read(data_dir: Path) -> None:
    assert len(read_items(data_dir / "clips")[1]) == 16
    portraits = read_items(data_dir / "portraits")[1]
    assert len(portraits) == 929
    assert all(item.label is None for item in portraits)
    portraits = read_items(data_dir / "portraits", PersonPattern(PORTRAITS))[1]
    assert len({item.source_id for item in portraits}) == 734
    both = read_items([data_dir / "portraits", data_dir / "faces"], PersonPattern(PORTRAITS))[1]
    assert len(both) == 929 + 897
    stated = {item.source_id for item in both if item.path.startswith("faces/")}
    assert "alex-adams" in stated
    assert not any(s.startswith("file ") for s in stated)


# -- what is wrong with a list -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"labels.csv:1: there must be one column 'file', got \[\]"),
        ("file\na.mp4\n", r"labels.csv:1: there must be one column 'label', got \['file'\]"),
        ("file,label,file\n", r"labels.csv:1: there must be one column 'file'"),
        (
            "file,label,sourceid\n",
            r"labels.csv:1: unknown column 'sourceid'; did you mean 'source_id'\? known are file",
        ),
        ("file,label,colour\n", r"labels.csv:1: unknown column 'colour'; known are file.*rename it or take it out"),
        ("file,label\na.mp4,maybe\n", r"labels.csv:2: label 'maybe' must be 0, 1, REAL or FAKE"),
        ("file,label\na.mp4,2\n", r"labels.csv:2: label '2' must be 0, 1, REAL or FAKE"),
        ("file,label\na.mp4,\n", r"labels.csv:2: label '' must be 0, 1, REAL or FAKE"),
        ("file,label\na.mp4,0\nb.mp4\n", r"labels.csv:3: 1 values for 2 columns; quote values that hold a comma"),
        (
            "file,label\na.mp4,0\nb.mp4,0\na.mp4,FAKE\n",
            r"labels.csv:4: 'a.mp4' is listed twice, first in line 2, as REAL and as FAKE; keep one",
        ),
        ("file,label\na.mp4,1\na.mp4,FAKE\n", r"listed twice, first in line 2, both times as FAKE; keep one"),
        ("file,label,split\na.mp4,0,dev\n", r"labels.csv:2: split 'dev' must be train, val or test"),
        (
            "file,label,original\na.mp4,0,\nb.mp4,1,aa.mp4\n",
            r"labels.csv:3: the original 'aa.mp4' is not listed; list it, or name the source in source_id instead",
        ),
        ("file,label\n", r"labels.csv: nothing is listed"),
        (
            "file,label\na.mp4,0\ny.mp4,0\nx.mp4,1\n",
            r"labels.csv: 2 of 3 listed files are missing in .*, the first is 'y.mp4'; fetch them, or take them out",
        ),
    ],
)
def test_labels_csv_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LabelsError, match=message):
        read_items(write_csv(tmp_path, text, "a.mp4", "b.mp4"))


def test_labels_csv_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"file,label\n\xff\xfe,0\n")
    with pytest.raises(LabelsError, match=r"labels.csv: the file cannot be read as CSV in UTF-8"):
        read_items(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"metadata.json: the file cannot be read as JSON"),
        ("[1]", r"metadata.json: expected \{\"a.mp4\""),
        (
            '{"a.mp4": {"label": "REAL"}, "a.mp4": {"label": "FAKE"}}',
            r"metadata.json: 'a.mp4' is listed twice; keep one",
        ),
        ('{"a.mp4": {"label": "fakee"}}', r"metadata.json: 'a.mp4': label 'fakee' must be 0, 1, REAL or FAKE"),
        ('{"a.mp4": {}}', r"'a.mp4': label None must be 0, 1, REAL or FAKE"),
        ('{"b.mp4": {"label": "REAL"}}', r"1 of 1 listed files are missing"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(LabelsError, match=message):
        read_items(tmp_path)


def test_folders_that_hold_nothing_known(tmp_path: Path) -> None:
    with pytest.raises(LabelsError, match=r"no labels.csv, metadata.json \(DFDC\), original_sequences"):
        read_items(touch(tmp_path, "a.mp4"))
    with pytest.raises(LabelsError, match="there is no such folder"):
        read_items(tmp_path / "nowhere")
    root = touch(tmp_path / "ff", "original_sequences/youtube/c23/videos/4.mp4")
    with pytest.raises(LabelsError, match=r"4.mp4: expected a name like 004.mp4, 004_982.mp4"):
        read_items(root)


# -- splits ------------------------------------------------------------------------------------------------------------


def people(count: int, each: int = 3) -> list[Item]:
    return [Item(f"{p}-{n}.mp4", n % 2, "x", (f"p{p}",), source_id=f"p{p}") for p in range(count) for n in range(each)]


def test_split_by_identity_keeps_sources_whole_and_the_shares() -> None:
    items = people(2000)
    splits = assign_splits(items, "identity:0.15:0.1")
    check_disjoint([i.source_id for i in items], splits)
    assert abs(splits.count("val") / len(items) - 0.15) < 0.03
    assert abs(splits.count("test") / len(items) - 0.1) < 0.03


def test_new_people_move_nobody() -> None:
    few, many = people(50), people(80)
    assert assign_splits(many, "identity:0.3")[: len(few)] == assign_splits(few, "identity:0.3")


@pytest.mark.parametrize("count", [2, 3, 5])
def test_no_split_is_empty_that_was_asked_for(count: int) -> None:
    assert {"train", "val"} <= set(assign_splits(people(count), "identity:0.01"))


def test_everything_in_one_split() -> None:
    assert assign_splits(people(3), "test") == ("test",) * 9


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("identity", "split 'identity' is not understood; write identity:V"),
        ("identity:2", "is not understood"),
        ("identity:-.1", "is not understood"),
        ("identity:.1:.1:.1", "is not understood"),
        ("folders:a-b", "is not understood"),
        ("identity:.6:.4", r"val 0.6 and test 0.4 leave nothing to train on"),
        ("given", "'0-0.mp4' has no split of its own; give it one, or split by identity"),
        ("folders:41-49", "'0-0.mp4' is in no folder dfdc_train_part_N, so it cannot be split by folder"),
    ],
)
def test_split_rules_that_cannot_be_used(rule: str, message: str) -> None:
    with pytest.raises(LabelsError, match=message):
        assign_splits(people(3), rule)


def test_fakes_of_unknown_source_cannot_be_split_by_identity(tmp_path: Path) -> None:
    items = list(items_of(write_csv(tmp_path, "file,label\na.mp4,0\nb.mp4,1\n", "a.mp4", "b.mp4")).values())
    with pytest.raises(LabelsError, match=r"nobody says what 1 fakes were made from \(the first is 'b.mp4'\)"):
        assign_splits(items, "identity:0.2")
    assert assign_splits(items, "test") == ("test", "test")


def test_a_planted_leak_is_named() -> None:
    items = [replace(item, given_split="train") for item in people(4)]
    items[-1] = replace(items[-1], given_split="val")
    with pytest.raises(LabelsError, match=r"1 of 4 sources are in more than one split, 'p3' in train and val"):
        assign_splits(items, "given")
    folders = [replace(item, folder=40 + n % 3) for n, item in enumerate(people(2))]
    with pytest.raises(LabelsError, match=r"2 of 2 sources are in more than one split, 'p0' in train and val"):
        assign_splits(folders, "folders:41-49")
