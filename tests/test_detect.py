"""The cascade against facenet-pytorch, and against itself: other companions, other formats, other light."""

from __future__ import annotations

import csv
import dataclasses

import numpy as np
import pytest
from conftest import TOLERANCE

from dfengine.bundle import DetectorSettings
from dfengine.stages.detect import _SAME_FACE, BATCH_FRAMES, MIN_FACE_PX, Detector
from dfengine.types import Faces, Image

SETTINGS = DetectorSettings()


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(SETTINGS, threads=2)


@pytest.fixture(scope="module")
def group(astronaut) -> np.ndarray:
    """A picture with two faces of different sizes: RGB (360, 640, 3)."""
    import cv2

    canvas = np.full((360, 640, 3), 90, np.uint8)
    canvas[:, :360] = cv2.resize(astronaut, (360, 360), interpolation=cv2.INTER_AREA)
    canvas[100:340, 390:630] = cv2.resize(astronaut, (240, 240), interpolation=cv2.INTER_AREA)
    return canvas


def to_yuv420(rgb: np.ndarray) -> Image:
    """BT.601 limited range 4:2:0, of a picture with even sides."""
    r, g, b = (rgb[..., c].astype(np.float64) / 255 for c in range(3))
    y = 0.299 * r + 0.587 * g + 0.114 * b
    cb, cr = (b - y) / 1.772, (r - y) / 1.402

    def halve(plane):
        return plane.reshape(plane.shape[0] // 2, 2, plane.shape[1] // 2, 2).mean(axis=(1, 3))

    samples = (16 + 219 * y, 128 + 224 * halve(cb), 128 + 224 * halve(cr))
    return Image(tuple(np.rint(s).astype(np.uint8) for s in samples), subsampling_xy=(2, 2))


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(A, 4), (B, 4) -> (A, B)"""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.clip(high - low, 0, None).prod(axis=2)
    area = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a, b)]
    return inter / (area[0][:, None] + area[1][None] - inter)


def assert_equal(got: Faces, want: Faces) -> None:
    for name in ("image_index", "xyxy", "landmarks", "confidence"):
        np.testing.assert_allclose(
            getattr(got, name), getattr(want, name), rtol=0, atol=TOLERANCE["detect_batch", "float32"], err_msg=name
        )


def assert_near(got: Faces, want: Faces, op: str) -> None:
    """The same faces: boxes by IoU, landmarks within a share of the face's width."""
    assert len(got) == len(want) > 0
    assert got.image_index.tolist() == want.image_index.tolist()
    width = (want.xyxy[:, 2] - want.xyxy[:, 0])[:, None, None]
    assert np.diag(iou(got.xyxy, want.xyxy)).min() >= 1 - TOLERANCE[op, "1 - iou"]
    assert (np.abs(got.landmarks - want.landmarks) / width).max() <= TOLERANCE[op, "face width"]


# -- frames between ----------------------------------------------------------------------------------------------------


@pytest.fixture
def proposed(detector, monkeypatch) -> list[int]:
    """How many frames went through the whole cascade, call by call."""
    counts: list[int] = []
    propose = Detector._run_pnet
    monkeypatch.setattr(
        Detector, "_run_pnet", lambda self, images, cutter: counts.append(len(images)) or propose(self, images, cutter)
    )
    return counts


def walk(astronaut, steps: int) -> list[np.ndarray]:
    """A face that moves by a tenth of its width from frame to frame."""
    canvas = np.pad(astronaut, ((0, 0), (0, 200), (0, 0)), "edge")
    return [np.ascontiguousarray(np.roll(canvas, 12 * i, axis=1)) for i in range(steps)]


def test_frames_between_need_no_proposals(detector, astronaut, proposed) -> None:
    images = [Image.from_rgb(p) for p in walk(astronaut, 8)]
    followed = detector.detect(images, stride=3)
    assert sum(proposed) == 4, "frames 0, 3, 6 and the last"
    assert_near(followed, detector.detect(images), "detect_between")


def test_frames_of_which_neighbours_tell_nothing_are_searched(detector, astronaut, group, proposed) -> None:
    face, empty = Image.from_rgb(group), Image.from_rgb(np.full_like(group, 200))
    one = Image.from_rgb(np.where(np.arange(640)[:, None] < 380, group, 90).astype(np.uint8))
    for frames, why in (
        ([empty, face, empty, empty], "faces in a frame between only"),
        ([face, empty, empty, face], "faces that are gone in between"),
        ([face, one, face, one], "a face that comes and goes"),
        ([face, one, one, face], "one of two is gone in between"),
    ):
        proposed.clear()
        assert_equal(detector.detect(frames, stride=3), detector.detect(frames)), why
        assert sum(proposed) == 8, why


class Scores:
    """A network of the cascade whose scores are all the same."""

    def __init__(self, network, score: np.float32) -> None:
        self._network, self._score = network, score

    def run(self, *inputs) -> list[np.ndarray]:
        score, *rest = self._network.run(*inputs)
        return [np.full_like(score, self._score), *rest]


@pytest.mark.parametrize("name", ["_pnet", "_rnet", "_onet"])
def test_a_score_that_equals_its_threshold_is_enough(astronaut, name) -> None:
    detector = Detector(SETTINGS)
    image = Image.from_rgb(astronaut)
    threshold = np.float32(SETTINGS.thresholds[("_pnet", "_rnet", "_onet").index(name)])
    network = getattr(detector, name)
    setattr(detector, name, Scores(network, threshold))
    assert len(detector.detect([image])) > 0
    setattr(detector, name, Scores(network, np.nextafter(threshold, np.float32(0))))
    assert len(detector.detect([image])) == 0


def test_an_overlap_that_equals_the_minimum_makes_one_face_of_two(detector, astronaut, proposed, monkeypatch) -> None:
    images = [Image.from_rgb(p) for p in walk(astronaut, 4)]
    for overlap, searched in ((_SAME_FACE, 2), (np.nextafter(np.float32(_SAME_FACE), np.float32(0)), 4)):
        monkeypatch.setattr(
            "dfengine.stages.detect._boxes.iou_matrix", lambda a, b, x=overlap: np.full((len(a), len(b)), x, np.float32)
        )
        proposed.clear()
        detector.detect(images, stride=3)
        assert sum(proposed) == searched


def test_frames_between_share_a_size(detector, astronaut, group) -> None:
    pictures = [p for pair in zip(walk(astronaut, 5), [group] * 5, strict=True) for p in pair]
    images = [Image.from_rgb(p) for p in pictures]
    by_place = [
        f[np.lexsort((f.xyxy[:, 0], f.image_index))] for f in (detector.detect(images, stride=s) for s in (4, 1))
    ]
    assert_near(*by_place, "detect_between")


def test_no_images_between(detector) -> None:
    assert len(detector.detect([], stride=3)) == 0


# -- facenet-pytorch ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facenet():
    """(RGB) -> boxes, landmarks, confidence, by the implementation the weights come from."""
    pytest.importorskip("facenet_pytorch")
    import torch
    from facenet_pytorch import MTCNN

    mtcnn = MTCNN(
        keep_all=True, thresholds=list(SETTINGS.thresholds), factor=SETTINGS.pyramid_factor, device="cpu"
    )  # fmt: skip

    def detect(rgb):
        mtcnn.min_face_size = max(MIN_FACE_PX, SETTINGS.min_face_ratio * min(rgb.shape[:2]))
        with torch.inference_mode():
            boxes, confidence, landmarks = mtcnn.detect(rgb.copy(), landmarks=True)
        if boxes is None:
            return np.zeros((0, 4)), np.zeros((0, 5, 2)), np.zeros(0)
        return boxes.astype(np.float64), landmarks.astype(np.float64), confidence.astype(np.float64)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its threads spin while they wait, and starve each other where cores are shared
    yield detect
    torch.set_num_threads(threads)


def compare(detector, facenet, pictures):
    """(faces of facenet, of those matched, faces of ours, of those extra) and the worst landmark, in face widths."""
    wanted = matched = ours = extra = 0
    worst = 0.0
    missed = []
    for name, rgb in pictures:
        boxes, landmarks, confidence = facenet(rgb)
        faces = detector.detect([Image.from_rgb(rgb)])
        overlap = iou(boxes, faces.xyxy.astype(np.float64)) if len(boxes) and len(faces) else np.zeros((len(boxes), 0))
        sure = confidence >= 0.9
        hit = (overlap >= 0.9).any(axis=1) if overlap.size else np.zeros(len(boxes), bool)
        wanted += int(sure.sum())
        matched += int((sure & hit).sum())
        missed += [name] * int((sure & ~hit).sum())
        for i in np.flatnonzero(sure & hit):
            j = int(np.argmax(overlap[i]))
            width = boxes[i, 2] - boxes[i, 0]
            worst = max(worst, float(np.abs(landmarks[i] - faces.landmarks[j]).max() / width))
        sure = faces.confidence >= 0.9
        ours += int(sure.sum())
        hit = (overlap >= 0.9).any(axis=0) if overlap.size else np.zeros(len(faces), bool)
        extra += int((sure & ~hit).sum())
    return wanted, matched, ours, extra, worst, missed


def assert_parity(result):
    wanted, matched, ours, extra, worst, missed = result
    assert wanted > 0
    assert matched >= 0.99 * wanted, f"{matched} of {wanted} faces were found; not in {missed}"
    assert extra <= 0.01 * ours, f"{extra} of {ours} faces are extra"
    assert worst <= TOLERANCE["detect_facenet", "face width"]


def test_as_facenet_on_the_astronaut(detector, facenet, astronaut, group):
    pictures = [("astronaut", astronaut), ("group", group), ("astronaut, odd", astronaut[3:350, 81:])]
    result = compare(detector, facenet, pictures)
    assert result[:4] == (4, 4, 4, 0)
    assert_parity(result)


def test_as_facenet_on_clips(detector, facenet, data_dir):
    import av

    def pictures():
        clips = sorted(p for p in (data_dir / "clips").iterdir() if p.suffix in (".mp4", ".webm"))
        assert clips
        for clip in clips:
            with av.open(str(clip)) as container:
                for i, frame in enumerate(container.decode(video=0)):
                    if i in (0, 40):
                        yield f"{clip.name} {i}", frame.to_ndarray(format="rgb24")
                    if i == 40:
                        break

    assert_parity(compare(detector, facenet, pictures()))


def test_as_facenet_on_portraits(detector, facenet, data_dir):
    from PIL import Image as PilImage

    folder = data_dir / "portraits"
    with (folder / "index.csv").open(newline="", encoding="utf-8") as file:
        names = sorted(row["file"] for row in csv.DictReader(file))
    chosen = np.random.default_rng(0).choice(len(names), 100, replace=False)

    def pictures():
        for i in chosen:
            with PilImage.open(folder / names[i]) as picture:
                picture.thumbnail((400, 400))  # faces stay above 100 px, and the reference is slow
                yield names[i], np.asarray(picture.convert("RGB"))

    assert_parity(compare(detector, facenet, pictures()))


# -- what is found -----------------------------------------------------------------------------------------------------


def test_the_astronaut(detector, astronaut):
    faces = detector.detect([Image.from_rgb(astronaut)])
    assert len(faces) == 1
    assert faces.image_index.tolist() == [0]
    assert faces.confidence[0] > 0.99
    (x1, y1, x2, y2), points = faces.xyxy[0], faces.landmarks[0]
    assert iou(faces.xyxy, np.float32([[178, 63, 273, 186]]))[0, 0] > 0.8  # drawn by hand
    assert (points > (x1, y1)).all()
    assert (points < (x2, y2)).all()
    left_eye, right_eye, nose, left_mouth, right_mouth = points
    assert left_eye[0] < nose[0] < right_eye[0]
    assert left_mouth[0] < right_mouth[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])


def test_faces_are_sorted_by_frame_then_confidence(detector, astronaut, group, rng):
    noise = rng.integers(0, 256, (360, 640, 3), dtype=np.uint8)
    faces = detector.detect([Image.from_rgb(p) for p in (group, noise, astronaut, group)])
    assert faces.image_index.tolist() == [0, 0, 2, 3, 3]
    for i in range(4):
        assert (np.diff(faces.confidence[faces.image_index == i]) <= 0).all()


def test_small_faces_are_not_looked_for(group):
    # The faces are 68 and 45 px wide; the box that is looked for is square, so heights count: 86 and 57.
    found = [
        len(Detector(dataclasses.replace(SETTINGS, min_face_ratio=ratio)).detect([Image.from_rgb(group)]))
        for ratio in (0.05, 0.2, 0.5)
    ]
    assert found[0] == 2
    assert found == sorted(found, reverse=True)
    assert found[2] == 0


# -- empties and tiny frames -------------------------------------------------------------------------------------------


def test_no_images(detector):
    assert_equal(detector.detect([]), Faces.empty())


@pytest.mark.parametrize("hw", [(1, 1), (8, 8), (1, 400), (400, 1), (19, 20), (20, 20), (21, 33), (24, 500)], ids=str)
@pytest.mark.parametrize("value", [0, 128, 255])
def test_tiny_frames_have_no_faces(detector, hw, value):
    faces = detector.detect([Image.from_rgb(np.full((*hw, 3), value, np.uint8))] * 2)
    assert_equal(faces, Faces.empty())


def test_tiny_frames_beside_a_real_one(detector, astronaut):
    tiny = Image.from_rgb(astronaut[:8, :8])
    faces = detector.detect([tiny, Image.from_rgb(astronaut), tiny])
    want = detector.detect([Image.from_rgb(astronaut)])
    assert faces.image_index.tolist() == [1]
    np.testing.assert_array_equal(faces.xyxy, want.xyxy)


def test_a_face_that_fills_the_frame_or_leaves_it(detector, astronaut):
    # A single row of the frame is cut off more and more; nothing may fail, and boxes may leave the frame.
    for x in range(150, 240, 15):
        part = np.ascontiguousarray(astronaut[60:190, x : x + 120])
        faces = detector.detect([Image.from_rgb(part)])
        assert np.isfinite(faces.xyxy).all()
        assert (faces.xyxy[:, 2:] > faces.xyxy[:, :2]).all()


# -- invariance --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(astronaut, group):
    """Frames of several sizes and formats, one of them dark, one empty."""
    dark = (group * 0.15).astype(np.uint8)
    return [
        Image.from_rgb(astronaut),
        Image.from_rgb(group),
        to_yuv420(group),
        Image.from_rgb(np.zeros_like(group)),
        Image.from_rgb(dark),
        Image.from_rgb(np.ascontiguousarray(astronaut[:300, 100:500])),
        to_yuv420((dark * 0.8).astype(np.uint8)),
        dataclasses.replace(Image.from_rgb(np.ascontiguousarray(np.rot90(group))), rotation=90),
    ]


def test_companions_change_nothing(detector, mixed, rng):
    together = detector.detect(mixed)
    alone = [detector.detect([image]) for image in mixed]
    assert [len(f) for f in alone] == [int((together.image_index == i).sum()) for i in range(len(mixed))]
    for i, faces in enumerate(alone):
        mine = together[together.image_index == i]
        assert_equal(dataclasses.replace(mine, image_index=np.zeros(len(mine), np.int64)), faces)
    for _ in range(3):
        order = rng.permutation(len(mixed))
        shuffled = detector.detect([mixed[i] for i in order])
        for new, old in enumerate(order):
            mine = shuffled[shuffled.image_index == new]
            assert_equal(
                dataclasses.replace(mine, image_index=np.full(len(mine), old)), together[together.image_index == old]
            )


def test_more_frames_than_a_batch(detector, group):
    small = np.ascontiguousarray(group[:, :360][::2, ::2])
    images = [Image.from_rgb(np.roll(small, i, axis=1)) for i in range(BATCH_FRAMES + 2)]
    together = detector.detect(images)
    for i in (0, BATCH_FRAMES - 1, BATCH_FRAMES, BATCH_FRAMES + 1):
        mine = together[together.image_index == i]
        assert_equal(dataclasses.replace(mine, image_index=np.zeros(len(mine), np.int64)), detector.detect([images[i]]))
    assert np.unique(together.image_index).tolist() == list(range(len(images)))


def test_threads_change_nothing(mixed):
    want, got = (Detector(SETTINGS, threads=t).detect(mixed, threads=t) for t in (1, 2))
    assert_equal(got, want)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_tagged_rotation_gives_the_upright_boxes(detector, group, rotation):
    upright = Image.from_rgb(group)
    coded = np.ascontiguousarray(np.rot90(group, rotation // 90))  # to be turned back, clockwise
    assert_near(
        detector.detect([dataclasses.replace(Image.from_rgb(coded), rotation=rotation)]),
        detector.detect([upright]),
        "detect_same_pixels",
    )


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_faces_that_lie_on_their_side(detector, group, degrees, mirrored):
    coded = np.ascontiguousarray(np.rot90(group, degrees // 90))  # to be turned back, clockwise
    lying = dataclasses.replace(Image.from_rgb(coded), mirrored=mirrored)
    nobody = Image.from_rgb(np.full((64, 64, 3), 90, np.uint8))
    if degrees:
        assert detector.lying([lying] * 3, 0.9) in ((degrees,) if not mirrored else (degrees, 360 - degrees))
        assert detector.lying([lying, nobody, nobody, nobody], 0.9) == 0, "most pictures must show one"
    assert detector.lying([nobody], 0.9) == detector.lying([], 0.9) == 0


def test_planes_give_the_boxes_of_rgb(detector, astronaut, group):
    for rgb in (astronaut, group):
        assert_near(detector.detect([to_yuv420(rgb)]), detector.detect([Image.from_rgb(rgb)]), "detect_yuv")


def test_gray_pictures(detector, astronaut):
    luma = Image((astronaut.mean(axis=2).astype(np.uint8),), matrix="gray", full_range=True)
    assert_near(detector.detect([luma]), detector.detect([Image.from_rgb(astronaut)]), "detect_gray")


# -- the second try on dark frames -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_retry():
    return Detector(dataclasses.replace(SETTINGS, dark_below=0.0), threads=2)


@pytest.mark.parametrize("form", ["rgb", "yuv", "yuv 10 bit", "rotated"])
def test_dark_frames_get_a_second_try(detector, without_retry, astronaut, form):
    dark = (astronaut * 0.06).astype(np.uint8)  # 15 levels
    image = Image.from_rgb(dark)
    if form.startswith("yuv"):
        image = to_yuv420(dark)
    if form == "yuv 10 bit":
        image = dataclasses.replace(
            image, components=tuple(c.astype(np.uint16) << 2 for c in image.components), bit_depth=10
        )
    if form == "rotated":
        image = dataclasses.replace(Image.from_rgb(np.ascontiguousarray(np.rot90(dark))), rotation=90)
    assert len(without_retry.detect([image])) == 0
    assert_near(detector.detect([image]), detector.detect([Image.from_rgb(astronaut)]), "detect_dark")


def test_bright_frames_are_not_tried_again(detector, without_retry, mixed, group):
    bright = [image for i, image in enumerate(mixed) if i not in (3, 4, 6)]
    assert_equal(detector.detect(bright), without_retry.detect(bright))


def test_a_face_that_was_found_in_the_dark_is_kept_as_it_was(detector, without_retry, astronaut):
    dim = Image.from_rgb((astronaut * 0.5).astype(np.uint8))  # below dark_below, but found
    assert len(without_retry.detect([dim])) == 1
    assert_equal(detector.detect([dim]), without_retry.detect([dim]))


def test_black_frames(detector):
    for image in (Image.from_rgb(np.zeros((60, 80, 3), np.uint8)), to_yuv420(np.zeros((60, 80, 3), np.uint8))):
        assert len(detector.detect([image])) == 0
    below_black = Image((np.zeros((60, 80), np.uint8),), matrix="gray")
    assert len(detector.detect([below_black])) == 0
