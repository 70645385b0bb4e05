"""Loading a bundle: what is damaged, forged or from the future is refused with a reason, and nothing is executed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dfengine.bundle import (
    PACKAGED,
    SCHEMA_VERSION,
    Aggregation,
    Bundle,
    Calibration,
    CropSpec,
    DetectorSettings,
    ModelSpec,
    TrackingSettings,
    load_nets,
    to_json,
)
from dfengine.errors import BundleError, BundleNotFound, InferenceError
from dfengine.runtime import CpuDevice
from dfengine.sampling import Policy
from dfengine.stages.detect import Detector

WEIGHTS = b"stands for an ONNX file: loading a bundle does not parse it"
CROP_FIELDS = {f.name for f in dataclasses.fields(CropSpec)}
NETS = hashlib.sha256((PACKAGED / "mtcnn" / "bundle.json").read_bytes()).hexdigest()
PACKAGED_NAMES = sorted(p.parent.name for p in PACKAGED.glob("*/bundle.json"))


def member(name="m", data=WEIGHTS, **change):
    """With what belongs to the crop in its place."""
    crop = {"input_hw": [8, 6]} | {key: change.pop(key) for key in list(change) if key in CROP_FIELDS}
    fields = {"name": name, "file": f"{name}.onnx", "sha256": hashlib.sha256(data).hexdigest(), "crop": crop}
    return fields | change


def minimal(**change):
    detector = {"digest": NETS} | change.pop("detector", {}) if isinstance(change.get("detector", {}), dict) else []
    data = {"schema_version": SCHEMA_VERSION, "name": "tiny", "licence": "MIT", "members": [member()]}
    return data | {"detector": detector} | change


def write(folder: Path, data, files=("m.onnx",)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).write_bytes(WEIGHTS)
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    (folder / "bundle.json").write_bytes(text)
    return folder


# -- what loads --------------------------------------------------------------------------------------------------------


def test_the_least_a_bundle_says(tmp_path):
    bundle = Bundle.load(write(tmp_path, minimal()))
    assert bundle.folder == tmp_path
    assert bundle.members == (ModelSpec(**member() | {"crop": CropSpec(input_hw=(8, 6))}),)
    assert bundle.detector == DetectorSettings(digest=NETS)
    assert bundle.tracking == TrackingSettings()
    assert bundle.onnx_bytes(bundle.member("m")) == WEIGHTS
    assert Bundle.load(bundle) is bundle
    assert Bundle.load(str(tmp_path)) == bundle


def test_everything_a_bundle_can_say(tmp_path):
    data = minimal(
        members=[
            member("a", kind="frame", mean=[0.1, 0.2, 0.3], std=[1, 2, 3], margin_ratio=0.3, crop_shape="box",
                   resize="area", padding="zero", weight=2),
            member("b", file="sub/b.onnx"),
        ],
        provenance={"trained_on": ["x", {"y": None}]},
        experimental=True,
        sampling="uniform:5",
        sampling_mode="exact",
        detector={"min_face_ratio": 0.1, "thresholds": [0.5, 0.6, 0.7]},
        tracking={"max_gap_frames": 0},
        aggregation={"frames": "median", "members": "mean", "tracks": "largest"},
        calibration={"temperature": 2, "bias": -0.5, "fitted_on": "somewhere"},
    )  # fmt: skip
    (tmp_path / "sub").mkdir()
    bundle = Bundle.load(write(tmp_path, data, ["a.onnx", "sub/b.onnx"]))
    assert (bundle.sampling, bundle.sampling_mode) == (Policy("uniform", 5), "exact")
    assert bundle.members[0].crop.std == (1.0, 2.0, 3.0)
    assert type(bundle.members[0].weight) is float
    assert bundle.detector.thresholds == (0.5, 0.6, 0.7)
    assert bundle.detector.pyramid_factor == DetectorSettings().pyramid_factor
    assert bundle.tracking == dataclasses.replace(TrackingSettings(), max_gap_frames=0)
    assert bundle.aggregation == Aggregation(frames="median", members="mean", tracks="largest")
    assert bundle.calibration == Calibration(temperature=2, bias=-0.5, fitted_on="somewhere")
    assert bundle.provenance == {"trained_on": ["x", {"y": None}]}


@pytest.mark.parametrize("name", PACKAGED_NAMES)
def test_packaged_bundles(name):
    bundle = Bundle.load(name)
    assert bundle.name == name
    assert bundle.licence
    assert bundle.provenance
    listed = {"bundle.json", *(m.file for m in bundle.members)}
    assert {p.name for p in bundle.folder.iterdir() if p.suffix in (".onnx", ".json")} == listed
    for m in bundle.members:
        assert CpuDevice().session(bundle, m.name, threads=1).name == f"{name}/{m.name}"


def test_the_detector_is_packaged():
    assert "mtcnn" in PACKAGED_NAMES
    assert DetectorSettings().nets == "mtcnn"
    assert [m.kind for m in Bundle.load("mtcnn").members] == ["detector"] * 3


def test_a_folder_does_not_hide_a_packaged_bundle(tmp_path, monkeypatch):
    write(tmp_path / "mtcnn", minimal())
    monkeypatch.chdir(tmp_path)
    assert Bundle.load("mtcnn").folder == PACKAGED / "mtcnn"
    assert Bundle.load("./mtcnn").name == "tiny"
    assert Bundle.load(Path("mtcnn")).name == "tiny"


@pytest.mark.parametrize("relative", [".", "..", "../tiny", "./"])
def test_relative_folders(tmp_path, monkeypatch, relative):
    folder = write(tmp_path / "tiny", minimal())
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below" if relative == ".." else folder)
    assert Bundle.load(relative).name == "tiny"


def test_the_digest_is_that_of_the_text(tmp_path):
    folder = write(tmp_path, minimal())
    text = (folder / "bundle.json").read_bytes()
    assert Bundle.load(folder).digest == hashlib.sha256(text).hexdigest()
    (folder / "bundle.json").write_bytes(text + b"\n")
    assert Bundle.load(folder).digest == hashlib.sha256(text + b"\n").hexdigest()


VERSION_1 = {
    "schema_version": 1, "name": "tiny", "licence": "MIT",
    "members": [{
        "name": "m", "file": "m.onnx", "sha256": hashlib.sha256(WEIGHTS).hexdigest(), "kind": "clip", "clip_frames": 3,
        "input_hw": [8, 6], "mean": [0.5, 0.25, 0], "margin_ratio": 0.3, "padding": "zero",
    }],
}  # fmt: skip


def test_version_1_still_loads(tmp_path):
    bundle = Bundle.load(write(tmp_path, VERSION_1))
    crop = CropSpec(input_hw=(8, 6), mean=(0.5, 0.25, 0.0), margin_ratio=0.3, padding="zero")
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert bundle.detector == DetectorSettings(digest=NETS)
    assert bundle.members == (ModelSpec(name="m", file="m.onnx", sha256=sha256, kind="clip", crop=crop, clip_frames=3),)
    stored = json.loads(to_json(bundle))
    assert stored["schema_version"] == SCHEMA_VERSION
    assert stored["members"][0]["crop"]["input_hw"] == [8, 6]
    assert same(Bundle.load(write(tmp_path, stored)), bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_hw": [8.5, 8]}, r"members\[0\].crop.input_hw\[0\] must be int, got 8.5"),
        ({"size": 3}, r"unknown key members\[0\].'size'"),
        ({"crop": {}}, r"unknown key members\[0\].'input_hw'"),
    ],
)
def test_version_1_is_checked_too(tmp_path, change, message):
    with pytest.raises(BundleError, match=message):
        Bundle.load(write(tmp_path, VERSION_1 | {"members": [VERSION_1["members"][0] | change]}))
    for members in ({}, ["m"], None):
        with pytest.raises(BundleError, match="members"):
            Bundle.load(write(tmp_path, VERSION_1 | {"members": members}))


# -- to_json -----------------------------------------------------------------------------------------------------------


def same(a: Bundle, b: Bundle) -> bool:
    return dataclasses.replace(a, folder=Path()) == dataclasses.replace(b, folder=Path())


FULL = Bundle(
    schema_version=SCHEMA_VERSION,
    name="tiny, ä",
    licence="MIT",
    members=(ModelSpec(**member() | {"crop": CropSpec(input_hw=(8, 6), mean=(0.5, 0.25, 0.0), margin_ratio=0.3)}),),
    provenance={"command": "python", "seeds": [1, 2]},
    sampling=Policy("every", 6, 17, 2.5),
    sampling_mode="exact",
    detector=DetectorSettings(digest=NETS),
    calibration=Calibration(temperature=1.5, bias=0.1),
)
# Values that are false, and not the default.
ZEROS = dataclasses.replace(
    FULL,
    detector=DetectorSettings(dark_below=0.0, digest=NETS),
    tracking=TrackingSettings(max_gap_frames=0, min_motion=0.0, min_detected_ratio=0.0),
)


@pytest.mark.parametrize("defaults", [True, False])
@pytest.mark.parametrize("bundle", [FULL, ZEROS], ids=["full", "zeros"])
def test_round_trip(tmp_path, bundle, defaults):
    folder = write(tmp_path, to_json(bundle, defaults=defaults).encode())
    assert same(Bundle.load(folder), bundle)


def holds(full, stored):
    """Whether everything in ``stored`` is in ``full``, which may say more."""
    if isinstance(stored, dict):
        return all(key in full and holds(full[key], value) for key, value in stored.items())
    if isinstance(stored, list):
        return len(full) == len(stored) and all(map(holds, full, stored))
    return full == stored


@pytest.mark.parametrize("name", PACKAGED_NAMES)
def test_round_trip_of_packaged_bundles(name):
    bundle = Bundle.load(name)
    full = json.loads(to_json(bundle))
    assert "folder" not in full
    assert holds(full, json.loads((bundle.folder / "bundle.json").read_text("utf-8")))


# -- what is refused ---------------------------------------------------------------------------------------------------


def without(key):
    data = minimal()
    del data[key]
    return data


def member_without(key):
    data = member()
    del data[key]
    return minimal(members=[data])


def with_member(**change):
    return minimal(members=[member(**change)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        # Not a bundle at all.
        (b"", "bundle.json cannot be read"),
        (b"not json", "bundle.json cannot be read"),
        (b"\xff\xfe\x00", "bundle.json cannot be read"),
        (b"[" * 100_000, "bundle.json cannot be read"),
        ([], "states no schema_version; this is no bundle"),
        ({}, "states no schema_version"),
        (None, "states no schema_version"),
        (minimal(schema_version="1"), "states no schema_version"),
        (minimal(schema_version=1.0), "states no schema_version"),
        (minimal(schema_version=True), "schema_version"),
        (minimal(schema_version=0), "schema_version"),
        # From the future, with keys that are not known yet.
        (
            minimal(schema_version=SCHEMA_VERSION + 1, quantum=True),
            f"has schema_version {SCHEMA_VERSION + 1}, this dfengine reads up to {SCHEMA_VERSION}; update dfengine",
        ),
        # Keys.
        (without("name"), "name is missing"),
        (without("licence"), "licence is missing"),
        (without("members"), "members is missing"),
        (member_without("sha256"), r"members\[0\].sha256 is missing"),
        (minimal(smapling="uniform:3"), "unknown key 'smapling'; known are .*sampling"),
        (minimal(folder="/elsewhere"), "unknown key 'folder'"),
        (minimal(detector={"min_face": 1}), r"unknown key detector.'min_face'"),
        (with_member(size=3), r"unknown key members\[0\].'size'"),
        # Types.
        (minimal(name=3), "name must be str, got 3"),
        (minimal(name=None), "name must be str, got None"),
        (minimal(experimental=1), "experimental must be bool, got 1"),
        (minimal(provenance=[]), "provenance must be an object"),
        (minimal(detector=[]), "detector. must be an object, got list"),
        (minimal(members={}), "members must be a list"),
        (minimal(members=["m"]), r"members\[0\]. must be an object, got str"),
        (minimal(tracking={"max_gap_frames": 1.5}), "tracking.max_gap_frames must be int, got 1.5"),
        (minimal(tracking={"min_iou": True}), "tracking.min_iou must be float, got True"),
        (minimal(tracking={"min_iou": "0.3"}), "tracking.min_iou must be float, got '0.3'"),
        (minimal(detector={"thresholds": [0.1, 0.2]}), r"detector.thresholds must be a list of 3, got \[0.1, 0.2\]"),
        (minimal(detector={"thresholds": [0.1, 0.2, "x"]}), r"detector.thresholds\[2\] must be float, got 'x'"),
        (with_member(input_hw=[8.5, 8]), r"members\[0\].crop.input_hw\[0\] must be int, got 8.5"),
        (with_member(mean=0.5), r"members\[0\].crop.mean must be a list of 3, got 0.5"),
        (with_member(kind="video"), r"members\[0\].kind must be one of frame, clip, audio, detector; got 'video'"),
        (with_member(kind=["frame"]), r"members\[0\].kind must be one of frame, clip, audio, detector"),
        (with_member(clip_frames=5), "member 'm' has clip_frames 5; it is 1 unless kind is clip or audio"),
        (with_member(kind="clip", clip_frames=0), r"members\[0\].clip_frames must be int at least 1, got 0"),
        (with_member(kind="audio", audio={"high_hz": 9000}), "member 'm' has audio settings .*<= sample_rate / 2"),
        (with_member(kind="audio", audio={"seconds": 0.01}), "member 'm' has audio settings .* at least one window"),
        (
            with_member(kind="audio", audio={"seconds": 1e9}),
            r"members\[0\].audio.seconds must be float above 0 and at most 3600",
        ),
        (with_member(audio={"rate": 16000}), r"unknown key members\[0\].audio.'rate'; known are bands, floor"),
        (
            minimal(aggregation={"frames": "max"}),
            "aggregation.frames must be one of mean, logit_mean, median; got 'max'",
        ),
        # Values.
        (minimal(members=[]), "members must be at least one, with different names"),
        (minimal(members=[member(), member()]), r"with different names; got \['m', 'm'\]"),
        (with_member(weight=0), r"members\[0\].weight must be float above 0, got 0"),
        (with_member(weight=-1), r"members\[0\].weight must be float above 0, got -1"),
        (with_member(weight=float("nan")), "weight"),
        (with_member(weight=float("inf")), "weight"),
        (with_member(weight=10**400), "weight"),
        (with_member(mean=[0.5, float("nan"), 0.5]), r"mean\[1\]"),
        (with_member(std=[1.0, 0.0, 1.0]), "std"),
        (with_member(std=[1.0, -1.0, 1.0]), "std"),
        (with_member(margin_ratio=-1.0), "margin_ratio"),
        (with_member(input_hw=[0, 8]), r"member 'm' has input_hw \(0, 8\)"),
        (with_member(input_hw=[8, -8]), r"members\[0\].crop.input_hw\[1\] must be int at least 0, got -8"),
        (minimal(calibration={"temperature": 0}), "calibration.temperature must be float above 0, got 0"),
        (minimal(calibration={"temperature": -2}), "calibration.temperature must be float above 0, got -2"),
        (minimal(calibration={"temperature": float("nan")}), "temperature"),
        (minimal(calibration={"bias": float("inf")}), "bias"),
        (minimal(sampling="uniform:lots"), "bundle.json: sampling: sampling policy 'uniform:lots' is not understood"),
        (minimal(sampling=17), "sampling must be str, got 17"),
        (minimal(sampling_mode="fast"), "sampling_mode must be one of exact, reference, keyframe; got 'fast'"),
        (
            minimal(detector={"thresholds": [0.6, 9, 0.7]}),
            r"detector.thresholds\[1\] must be float at least 0 and at most 1",
        ),
        (minimal(detector={"min_face_ratio": 0}), "detector.min_face_ratio must be float above 0 and at most 1, got 0"),
        (
            minimal(detector={"min_face_ratio": 1.5}),
            "detector.min_face_ratio must be float above 0 and at most 1, got 1.5",
        ),
        (minimal(detector={"min_face_ratio": float("nan")}), "detector.min_face_ratio must be finite, got nan"),
        (minimal(detector={"max_gain": 0}), "detector.max_gain must be float at least 1, got 0"),
        (minimal(tracking={"max_gap_frames": -1}), "tracking.max_gap_frames must be int at least 0, got -1"),
        (
            minimal(tracking={"min_confidence": 90}),
            "tracking.min_confidence must be float at least 0 and at most 1, got 90",
        ),
        # These would make the detector and the tracker go on for ever.
        (minimal(detector={"pyramid_factor": 1.0}), "pyramid_factor"),
        (minimal(detector={"stride": 0}), "detector.stride must be int at least 1, got 0"),
        (minimal(tracking={"min_iou": -1.0}), "min_iou"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(tmp_path, data, message):
    folder = write(tmp_path / "bundle", data)
    with pytest.raises(BundleError, match=message) as raised:
        Bundle.load(folder)
    assert raised.value.path == folder
    assert raised.value.stage == "bundle"
    assert str(folder) in str(raised.value)


def test_wrong_hash(tmp_path):
    folder = write(tmp_path, minimal())
    (folder / "m.onnx").write_bytes(WEIGHTS + b"!")
    with pytest.raises(BundleError, match=r"member 'm': 'm.onnx' has sha256 .* the file was changed or damaged"):
        Bundle.load(folder)


def test_a_file_that_changes_after_loading(tmp_path):
    bundle = Bundle.load(write(tmp_path, minimal()))
    (tmp_path / "m.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match="has sha256"):
        CpuDevice().session(bundle, "m", threads=1)


@pytest.mark.parametrize("sha256", ["", "0" * 64, hashlib.sha256(WEIGHTS).hexdigest()[:-1]])
def test_other_hashes(tmp_path, sha256):
    with pytest.raises(BundleError, match="has sha256"):
        Bundle.load(write(tmp_path, with_member(sha256=sha256)))


@pytest.mark.parametrize("file", ["gone.onnx", "", ".", "sub/m.onnx", "m.onnx/x", "n" * 300, "nul\0.onnx"])
def test_missing_file(tmp_path, file):
    with pytest.raises(BundleError, match=r"member 'm'.*(is missing or cannot be read; copy the whole folder|outside)"):
        Bundle.load(write(tmp_path, with_member(file=file)))


def test_paths_that_lead_out(tmp_path):
    folder = tmp_path / "bundle"
    outside = tmp_path / "secret.onnx"
    outside.write_bytes(WEIGHTS)
    sibling = tmp_path / "bundle2"
    sibling.mkdir()
    (sibling / "m.onnx").write_bytes(WEIGHTS)
    inside = str(write(folder, minimal()) / "m.onnx")
    for file in ("../secret.onnx", str(outside), "../bundle2/m.onnx", "sub/../../secret.onnx", inside):
        with pytest.raises(BundleError, match=r"names the file .*, which is outside the bundle"):
            Bundle.load(write(folder, with_member(file=file)))


def test_links_that_lead_out(tmp_path):
    folder = write(tmp_path / "bundle", minimal())
    outside = tmp_path / "secret.onnx"
    outside.write_bytes(WEIGHTS)
    (folder / "m.onnx").unlink()
    (folder / "m.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match="which is outside the bundle"):
        Bundle.load(folder)
    (folder / "m.onnx").unlink()
    (folder / "link").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(BundleError, match="which is outside the bundle"):
        Bundle.load(write(folder, with_member(file="link/secret.onnx")))


def test_links_that_stay_inside_and_a_bundle_behind_a_link(tmp_path):
    folder = write(tmp_path / "bundle", minimal(), files=["real.onnx"])
    (folder / "m.onnx").symlink_to("real.onnx")
    (tmp_path / "alias").symlink_to(folder, target_is_directory=True)
    assert Bundle.load(tmp_path / "alias").name == "tiny"


def test_a_link_to_itself(tmp_path):
    folder = write(tmp_path, minimal(), files=[])
    (folder / "m.onnx").symlink_to("m.onnx")
    with pytest.raises(BundleError, match="member 'm'"):
        Bundle.load(folder)


def test_no_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for bundle in ("no such bundle", tmp_path / "gone", tmp_path / "file"):
        with pytest.raises(BundleNotFound, match=r"there is no such bundle; .* packaged name \(.*mtcnn"):
            Bundle.load(bundle)


def test_no_bundle_json(tmp_path):
    with pytest.raises(BundleNotFound, match=r"there is no bundle\.json in this folder"):
        Bundle.load(tmp_path)
    (tmp_path / "bundle.json").mkdir()
    with pytest.raises(BundleError, match=r"bundle\.json cannot be read"):
        Bundle.load(tmp_path)


def test_no_such_member(tmp_path):
    bundle = Bundle.load(write(tmp_path, minimal()))
    with pytest.raises(BundleError, match="there is no member 'x' in the bundle"):
        bundle.member("x")


# -- the detector's networks -------------------------------------------------------------------------------------------


def own_nets(folder: Path) -> str:
    """Puts another detector into a bundle's folder, at "nets"; returns its digest."""
    shutil.copytree(PACKAGED / "mtcnn", folder / "nets")
    text = (folder / "nets" / "bundle.json").read_bytes() + b"\n"
    (folder / "nets" / "bundle.json").write_bytes(text)
    return hashlib.sha256(text).hexdigest()


def test_a_bundle_states_its_detectors_networks(tmp_path):
    data = minimal()
    del data["detector"]
    with pytest.raises(BundleError, match=r"detector.digest is missing: the sha256 of the bundle.json"):
        Bundle.load(write(tmp_path, data))
    for name in PACKAGED_NAMES:
        bundle = Bundle.load(name)
        assert bundle.detector.digest == (NETS if bundle.scorers else None)


def test_what_writes_a_bundle_states_them(tmp_path):
    unsaid = dataclasses.replace(FULL, detector=DetectorSettings())
    assert same(Bundle.load(write(tmp_path, to_json(unsaid).encode())), FULL)


def test_other_networks_than_those_stated_are_refused(tmp_path):
    bundle = Bundle.load(write(tmp_path, minimal(detector={"digest": "0" * 64})))
    message = (
        r"the detector's networks 'mtcnn' have digest .*, detector.digest states 000000000000\.\.\.; use the networks"
    )
    with pytest.raises(BundleError, match=message):
        load_nets(bundle.detector, bundle.folder)
    with pytest.raises(BundleError, match=message):
        Detector(bundle.detector, folder=bundle.folder)


def test_networks_in_the_bundles_own_folder(tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    digest = own_nets(folder)
    bundle = Bundle.load(write(folder, minimal(detector={"nets": "nets", "digest": digest})))
    monkeypatch.chdir(tmp_path)  # not the folder that it is found from
    assert load_nets(bundle.detector, bundle.folder).folder == folder / "nets"
    Detector(bundle.detector, folder=bundle.folder)
    assert json.loads(to_json(bundle))["detector"]["digest"] == digest
    old = Bundle.load(write(folder, VERSION_1 | {"detector": {"nets": "nets"}}))
    assert old.detector.digest == digest
    (folder / "nets" / "pnet.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"member 'pnet': .* has sha256"):
        load_nets(bundle.detector, bundle.folder)


@pytest.mark.parametrize("nets", ["../nets", "nets", ".", "", "gone", "nul\0", "loop", "{outside}"])
def test_networks_from_elsewhere_are_refused(tmp_path, monkeypatch, nets):
    """Neither beside the bundle, nor in the current folder, nor the bundle itself."""
    own_nets(tmp_path)
    monkeypatch.chdir(tmp_path)
    nets = nets.format(outside=tmp_path / "nets")
    folder = write(tmp_path / "bundle", minimal(detector={"nets": nets}))
    (folder / "loop").symlink_to("loop")
    bundle = Bundle.load(folder)
    message = r"detector.nets is .*; it must be the name of a packaged detector \(mtcnn\), or of a folder .* inside"
    with pytest.raises(BundleError, match=message):
        load_nets(bundle.detector, bundle.folder)
    with pytest.raises(BundleError, match=message):
        Bundle.load(write(folder, VERSION_1 | {"detector": {"nets": nets}}))
    with pytest.raises(BundleError, match=message):
        load_nets(bundle.detector)


# -- no code is executed -----------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_pickle_in_the_folder_is_never_opened(tmp_path):
    folder = write(tmp_path / "bundle", minimal())
    bomb = pickle.dumps(Bomb(str(tmp_path / "exploded")))
    for name in ("bundle.pkl", "weights.pt", "m.pth", "m.bin", "__init__.py", "conftest.py", "bundle.py"):
        (folder / name).write_bytes(bomb)
    code = (
        "import sys\n"
        "from dfengine.bundle import Bundle\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append((event, str(args[0])))"
        " if event in ('open', 'pickle.find_class', 'os.system', 'subprocess.Popen') else None)\n"
        "bundle = Bundle.load(sys.argv[1])\n"
        "bundle.onnx_bytes(bundle.member('m'))\n"
        "import json; print(json.dumps([s for s in seen if s[0] != 'open' or sys.argv[1] in s[1]]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    opened = [("open", str(folder / "bundle.json")), ("open", str(folder / "m.onnx")), ("open", str(folder / "m.onnx"))]
    events = [tuple(event) for event in json.loads(result.stdout)]
    assert events == opened
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_as_weights_is_no_network(tmp_path):
    bomb = pickle.dumps(Bomb(str(tmp_path / "exploded")))
    folder = write(tmp_path / "bundle", with_member(sha256=hashlib.sha256(bomb).hexdigest()), files=[])
    (folder / "m.onnx").write_bytes(bomb)
    with pytest.raises(InferenceError, match="network tiny/m cannot be compiled"):
        CpuDevice().session(Bundle.load(folder), "m", threads=1)
    assert not (tmp_path / "exploded").exists()
