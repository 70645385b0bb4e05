"""Videos that are good, but not plain: scored as the same pictures without the oddity, or refused as what they are."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from assets import (
    FACE,
    NOBODY,
    Clip,
    joined_streams,
    moving_face,
    rotated,
    with_matrix,
    write_bundle,
    write_clip,
    x264,
    x265,
)
from av.stream import Disposition
from av.video.reformatter import Colorspace
from PIL import Image as PillowImage

from dfengine import Engine
from dfengine.sampling import Mode, Sampling
from dfengine.stages.decode import open_video
from dfengine.types import Image, VideoScore

MakeClip = Callable[[Clip], Path]
TWIN = 0.03  # how far real files may be from the same pictures without the oddity: encoded once more
PREVIEW = x264("preview.mp4", "keyint=12", wh=(64, 48), frames=36)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(write_bundle(tmp_path_factory.mktemp("bundle"), sampling="uniform:5")) as engine:
        yield engine


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MakeClip:
    folder = tmp_path_factory.mktemp("clips")
    return lambda clip: write_clip(clip, folder)


def decode(path: Path, policy: str = "uniform:5", mode: Mode = "exact") -> tuple[list[Image], list[str]]:
    with open_video(path) as video:
        images = [image for part in video.frames(Sampling.parse(policy, mode)) for image in part.images]
    return images, video.warnings


def assert_as(score: VideoScore, twin: VideoScore, tolerance: float) -> None:
    assert (score.status, twin.status) == ("ok", "ok"), score.error
    assert score.p_fake == pytest.approx(twin.p_fake, abs=tolerance)
    assert len(score.tracks) == len(twin.tracks)


@pytest.fixture(scope="module")
def faults(data_dir: Path) -> Path:
    if not (data_dir / "faults").is_dir():
        pytest.skip("$DFENGINE_TEST_DATA has no faults/")
    return data_dir / "faults"


@pytest.fixture(scope="module")
def packaged() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def demo(faults: Path, packaged: Engine) -> VideoScore:
    """The pictures of faults/, without oddity."""
    return packaged.score(faults / "folder_from_a_mac" / "clip.mp4")


# -- several video streams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("preview", [0, 1])
def test_of_several_videos_the_best_is_scored_and_the_others_are_named(
    engine: Engine, made: MakeClip, tmp_path: Path, container: str, preview: int
) -> None:
    parts = [(made(FACE), int(Disposition.default)), (made(PREVIEW), 0)]
    parts = parts[::-1] if preview == 0 else parts
    path = joined_streams(tmp_path / f"both.{container}", parts)
    score = engine.score(path)
    assert_as(score, engine.score(made(FACE)), 0)
    assert score.warnings == (
        f"the file holds 2 videos: stream {1 - preview} (h264, 320x240) is scored, "
        f"not looked at: stream {preview} (h264, 64x48)",
    )


def test_the_default_video_is_scored_though_it_is_the_smaller(made: MakeClip, tmp_path: Path) -> None:
    path = joined_streams(tmp_path / "both.mkv", [(made(NOBODY), 0), (made(PREVIEW), int(Disposition.default))])
    images, warnings = decode(path)
    assert images[0].upright_hw == (48, 64)
    assert "not looked at: stream 0 (h264, 320x240)" in warnings[0]


@pytest.mark.parametrize("frames", [0, 1])
def test_a_stream_without_frames_or_with_a_still_is_passed_over(
    made: MakeClip, tmp_path: Path, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = made(x264("still.mp4", "keyint=12", wh=(64, 48), frames=1))
    parts = [(still, int(Disposition.default)), (made(FACE), 0)]
    path = joined_streams(tmp_path / "empty.mkv", parts, empty=() if frames else (0,))
    images, warnings = decode(path)
    assert len(images) == 5
    assert images[0].upright_hw == (240, 320)
    assert warnings == []
    monkeypatch.setattr("dfengine.stages.decode.video.KEPT_BYTES", 0)  # opened once more
    assert decode(path)[0][4].upright_hw == (240, 320)


def test_a_cover_picture_beside_a_video_is_no_video(made: MakeClip, tmp_path: Path) -> None:
    cover = made(Clip("cover.avi", "mjpeg", "yuvj420p", wh=(640, 480), frames=1))
    path = joined_streams(tmp_path / "cover.mp4", [(made(PREVIEW), 0), (cover, int(Disposition.attached_pic))])
    images, warnings = decode(path)
    assert images[0].upright_hw == (48, 64)
    assert warnings == []


@pytest.mark.parametrize(
    "name",
    [
        "two_video_streams_default_second.mkv",
        "two_video_streams_small_preview_first.mp4",
        "declared_but_empty_first_stream.mkv",
    ],
)
def test_real_files_with_several_streams(faults: Path, name: str) -> None:
    images, warnings = decode(faults / name)
    assert images[0].upright_hw == (480, 640)
    assert bool(warnings) == (not name.startswith("declared"))


# -- display matrices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_display_matrices_make_pictures_upright(
    engine: Engine, made: MakeClip, tmp_path: Path, degrees: int, mirrored: bool
) -> None:
    def coded(i: int, w: int, h: int) -> np.ndarray:  # what the matrix makes moving_face again
        turned = np.rot90(moving_face(i, *((w, h) if degrees in (0, 180) else (h, w))), degrees // 90)
        return np.ascontiguousarray(turned[:, ::-1] if mirrored else turned)

    wh = (320, 240) if degrees in (0, 180) else (240, 320)
    plain = made(x264("upright.mp4", "keyint=12:bframes=2", wh=(320, 240), frames=36, picture=moving_face))
    data = write_clip(x264("coded.mp4", "keyint=12:bframes=2", wh=wh, frames=36, picture=coded), tmp_path).read_bytes()
    path = tmp_path / "tagged.mp4"
    path.write_bytes(rotated(data, degrees, mirrored=mirrored))
    images, _ = decode(path)
    assert {(i.rotation, i.mirrored, i.upright_hw) for i in images} == {(degrees, mirrored, (240, 320))}
    score, twin = engine.score(path), engine.score(plain)
    assert_as(score, twin, 0.01)  # encoded turned, so not bit for bit
    np.testing.assert_allclose(
        [f.box for f in score.tracks[0].frames], [f.box for f in twin.tracks[0].frames], rtol=0, atol=6
    )


@pytest.mark.parametrize(
    ("abcd", "rotation", "mirrored"),
    [
        ((0, 0, 0, 0), 0, False),
        ((1, 1, 1, 1), 0, False),  # all on a line
        ((0, 0, 1, 0), 0, False),
        ((2, 0, 0, 0.5), 0, False),
        ((0, 3, -0.2, 0), 90, False),
        ((0.99, 0.14, -0.14, 0.99), 0, False),  # a camera that was held askew
        ((-1, 0, 0, 1), 0, True),
        ((0, 1, 1, 0), 270, True),  # transposed
    ],
)
def test_a_display_matrix_counts_as_the_nearest_orientation(
    made: MakeClip, tmp_path: Path, abcd: tuple[float, ...], rotation: int, mirrored: bool
) -> None:
    path = tmp_path / "tagged.mp4"
    path.write_bytes(with_matrix(made(PREVIEW).read_bytes(), abcd))
    images, _ = decode(path, "first:1")
    assert (images[0].rotation, images[0].mirrored) == (rotation, mirrored)


@pytest.mark.parametrize("name", ["mirrored_by_track_matrix.mp4", "flipped_by_track_matrix.mp4"])
def test_real_files_with_mirrored_matrices(faults: Path, demo: VideoScore, packaged: Engine, name: str) -> None:
    assert_as(packaged.score(faults / name), demo, TWIN)


# -- pictures that move, in formats of stills --------------------------------------------------------------------------


def animated(folder: Path, kind: str) -> Path:
    """The face, moving, in a format of stills, under the name of another."""
    pictures = [PillowImage.fromarray(moving_face(i, 320, 240)) for i in range(12)]
    path = folder / "face.mp4"
    if kind == "MJPEG":
        stills = [BytesIO() for _ in pictures]
        for picture, still in zip(pictures, stills, strict=True):
            picture.save(still, "JPEG", quality=90)
        path.write_bytes(b"".join(still.getvalue() for still in stills))
        return path
    try:
        pictures[0].save(path, kind, save_all=True, append_images=pictures[1:], duration=40, lossless=True)
    except (KeyError, OSError) as error:
        pytest.skip(f"cannot be made here: {error}")
    return path


@pytest.mark.parametrize("kind", ["AVIF", "GIF", "MJPEG", "PNG"])
def test_pictures_that_move_are_scored_whatever_their_format(engine: Engine, tmp_path: Path, kind: str) -> None:
    score = engine.score(animated(tmp_path, kind))
    assert score.status == "ok", score.error
    assert score.frames_scored == 5
    assert score.warnings == ()


def test_an_animated_webp_is_scored_or_refused_as_what_it_is(engine: Engine, tmp_path: Path) -> None:
    score = engine.score(animated(tmp_path, "WEBP"))
    if score.error is None:
        assert score.frames_scored == 5
    else:
        assert score.error.type == "UnsupportedVideo"
        assert "this is an animated WebP" in score.error.message


@pytest.mark.parametrize("name", ["animated.avif", "animated.png", "camera_stream.mjpeg"])
def test_real_pictures_that_move(faults: Path, packaged: Engine, name: str) -> None:
    score = packaged.score(faults / name)
    assert score.status == "ok", score.error
    assert score.frames_scored > 5
    assert score.warnings == ()


# -- pixels that are not square, and interlaced pictures ---------------------------------------------------------------


def assert_same_boxes(score: VideoScore, twin: VideoScore, atol: float) -> None:
    boxes, wanted = ([f.box for f in s.tracks[0].frames] for s in (score, twin))
    np.testing.assert_allclose(boxes, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("degrees", [0, 90])
@pytest.mark.parametrize("aspect", [(2, 1), (1, 2), (4, 3)])
def test_boxes_and_crops_are_those_of_square_pixels(
    engine: Engine, made: MakeClip, tmp_path: Path, aspect: tuple[int, int], degrees: int
) -> None:
    wide, high = aspect
    upright = (320, 240) if degrees else (240, 320)

    def coded(i: int, w: int, h: int) -> np.ndarray:
        square = np.ascontiguousarray(np.rot90(moving_face(i, *upright[::-1]), degrees // 90))
        return np.asarray(PillowImage.fromarray(square).resize((w, h), PillowImage.Resampling.BOX))

    wh = (round(320 * min(1, high / wide)), round(240 * min(1, wide / high)))
    params = f"keyint=12:bframes=2:sar={wide}/{high}"
    path = write_clip(x264("coded.mp4", params, wh=wh, frames=36, picture=coded), tmp_path)
    if degrees:
        path.write_bytes(rotated(path.read_bytes(), degrees))
    images, warnings = decode(path)
    assert {i.upright_hw for i in images} == {upright}
    assert {i.pixel_aspect for i in images} == {wide / high}
    assert warnings == []
    name = f"upright_{degrees}.mp4"
    twin = engine.score(made(x264(name, "keyint=12:bframes=2", wh=upright[::-1], frames=36, picture=moving_face)))
    score = engine.score(path)
    assert_as(score, twin, 0.01)
    assert_same_boxes(score, twin, 8)  # a face of 75 px, of half the pixels


def test_absurd_pixels_are_taken_for_square(made: MakeClip, tmp_path: Path) -> None:
    clip = x264("absurd.mkv", "keyint=12:sar=9/2", wh=(64, 48), frames=12)
    images, warnings = decode(write_clip(clip, tmp_path))
    assert images[0].upright_hw == (48, 64)
    assert warnings == ["pixels are said to be 9:2; they are taken for square"]


def woven(i: int, w: int, h: int) -> np.ndarray:
    """Two moments, row about row, far enough apart for combs that cover the face."""
    picture = moving_face(i, w, h).copy()
    picture[1::2] = np.roll(picture, 16, axis=1)[1::2]
    return picture


_WOVEN = {"flags": "+ildct+ilme", "b": "4M"}
INTERLACED = [
    x264("avc.mp4", "tff=1:keyint=12:bframes=2", wh=(320, 240), frames=36, picture=woven),
    Clip("mpeg2.ts", "mpeg2video", wh=(320, 240), frames=36, options=_WOVEN, picture=woven),
]


@pytest.mark.parametrize("clip", INTERLACED, ids=str)
def test_of_interlaced_pictures_one_field_is_scored(engine: Engine, made: MakeClip, clip: Clip) -> None:
    images, _ = decode(made(clip))
    assert {i.upright_hw for i in images} == {(240, 320)}
    assert {i.components[0].shape for i in images} == {(120, 320)}
    twin = engine.score(made(x264("upright.mp4", "keyint=12:bframes=2", wh=(320, 240), frames=36, picture=moving_face)))
    score = engine.score(made(clip))
    assert_as(score, twin, 0.01)
    assert_same_boxes(score, twin, 8)
    assert score.warnings == ("the pictures are interlaced; one field of each is scored",)
    assert twin.warnings == ()


def test_fields_that_come_one_by_one_are_stretched(made: MakeClip) -> None:
    def field(i: int, w: int, h: int) -> np.ndarray:
        return moving_face(i, w, 2 * h)[::2]

    clip = x265("fields.mp4", "interlace=tff:keyint=12", wh=(320, 120), frames=24, picture=field)
    images, warnings = decode(made(clip))
    assert {(i.upright_hw, i.components[0].shape) for i in images} == {((240, 320), (120, 320))}
    assert warnings == ["the pictures are interlaced; one field of each is scored"]


def test_a_real_file_with_wide_pixels(faults: Path, packaged: Engine, demo: VideoScore) -> None:
    score = packaged.score(faults / "anamorphic_2_to_1.mp4")
    assert score.warnings == ()
    assert len(score.tracks) == 1
    assert score.p_fake is not None


# -- HDR ---------------------------------------------------------------------------------------------------------------


def in_pq(i: int, w: int, h: int) -> np.ndarray:
    """The moving face as HDR shows it: BT.709 colours in BT.2020 ones, white at 203 cd/m2 (ITU-R BT.2408, BT.2087)."""
    light = (moving_face(i, w, h) / 255.0) ** 2.4
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    power = (light @ to_2020.T * 203 / 10000) ** (2610 / 16384)
    coded = ((107 / 128 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    return (255 * coded).round().astype(np.uint8)


def in_hlg(i: int, w: int, h: int) -> np.ndarray:
    light = (moving_face(i, w, h) / 255.0) ** 2.4
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    shown = light @ to_2020.T * 203 / 1000
    luminance = np.maximum(shown @ [0.2627, 0.6780, 0.0593], 1e-9)[..., None]
    scene = shown * luminance ** (-1 / 6)  # the inverse of the system gamma of 1.2
    bent = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return (255 * np.where(scene <= 1 / 12, np.sqrt(3 * scene), bent)).round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("name", "number", "picture"), [("smpte2084", 16, in_pq), ("arib-std-b67", 18, in_hlg)])
def test_hdr_is_scored_as_sdr_and_said(
    engine: Engine, made: MakeClip, name: str, number: int, picture: Callable[[int, int, int], np.ndarray]
) -> None:
    clip = x265(
        f"{name}.mp4",
        f"keyint=12:transfer={name}:colorprim=bt2020:colormatrix=bt2020nc",
        pix_fmt="yuv420p10le",
        wh=(320, 240),
        frames=36,
        picture=picture,
        colorspace=Colorspace.bt2020,
    )
    images, warnings = decode(made(clip))
    transfer = {16: "pq", 18: "hlg"}[number]
    assert {(i.transfer, i.matrix) for i in images} == {(transfer, "bt2020")}
    assert warnings == [f"the colours are HDR ({transfer.upper()}); they are mapped to SDR, as networks know them"]
    twin = engine.score(made(x264("upright.mp4", "keyint=12:bframes=2", wh=(320, 240), frames=36, picture=moving_face)))
    score = engine.score(made(clip))
    assert_as(score, twin, 0.03)
    assert_same_boxes(score, twin, 8)


def dolby_vision(profile: int, compatible_with: int) -> bytes:
    """A configuration record as a box (Dolby Vision Streams Within the ISO Base Media File Format, 2.2)."""
    bits = profile << 9 | 1 << 3 | 0b101  # level 1; metadata, no enhancement layer, base layer
    record = struct.pack(">BBHB", 1, 0, bits, compatible_with << 4) + bytes(19)
    return struct.pack(">I", 8 + len(record)) + b"dvcC" + record


@pytest.mark.parametrize(("profile", "compatible_with", "refused"), [(5, 0, True), (8, 1, False), (8, 4, False)])
def test_dolby_vision_without_a_readable_base_layer_is_refused(
    engine: Engine, made: MakeClip, tmp_path: Path, profile: int, compatible_with: int, refused: bool
) -> None:
    data = made(x265("face_hevc.mp4", "keyint=12", wh=(320, 240), frames=36, picture=moving_face)).read_bytes()
    at = data.index(b"hvcC") - 4
    box = dolby_vision(profile, compatible_with)
    for parent in (b"hev1", b"hvc1", b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        place = data.find(parent) - 4
        if place >= 0:
            (length,) = struct.unpack(">I", data[place : place + 4])
            data = data[:place] + struct.pack(">I", length + len(box)) + data[place + 4 :]
    path = tmp_path / "dolby.mp4"
    path.write_bytes(data[:at] + box + data[at:])
    score = engine.score(path)
    if refused:
        assert score.error is not None
        assert (score.error.type, score.error.stage) == ("UnsupportedVideo", "open")
        assert "this is Dolby Vision profile 5, whose samples mean other colours" in score.error.message
        if "matroska" in av.formats_available:  # the record goes along
            with av.open(str(path)) as source, av.open(str(tmp_path / "dolby.mkv"), "w") as sink:
                stream = sink.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        sink.mux(packet)
            again = engine.score(tmp_path / "dolby.mkv").error
            assert again is not None
            assert again.message == score.error.message
    else:
        assert score.status == "ok", score.error


def test_real_hdr(faults: Path, packaged: Engine, demo: VideoScore) -> None:
    score = packaged.score(faults / "hdr_pq_bt2020.mp4")
    assert_as(score, demo, 0.05)
    assert "HDR (PQ)" in score.warnings[0]
    refused = packaged.score(faults / "dolby_vision_profile5.mp4").error
    assert refused is not None
    assert refused.type == "UnsupportedVideo"


# -- sizes that change, and faces that lie on their side ---------------------------------------------------------------


def test_a_face_in_pictures_that_change_their_size_is_one_person(engine: Engine, tmp_path: Path) -> None:
    parts = [
        x264(f"{w}.h264", "keyint=12", wh=(w, h), frames=18, picture=moving_face, container="h264")
        for w, h in ((480, 360), (240, 180))
    ]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(write_clip(part, tmp_path).read_bytes() for part in parts))
    score = engine.score(path)
    assert score.status == "ok", score.error
    (track,) = score.tracks
    sides = [frame.box[2] - frame.box[0] for frame in track.frames]
    assert min(sides[:2]) > 1.8 * max(sides[-2:])


@pytest.mark.parametrize("turns", [1, 2])  # the detector takes this face, turned the other way, for an upright one
def test_faces_that_lie_on_their_side_are_said_to(engine: Engine, tmp_path: Path, turns: int) -> None:
    def lying(i: int, w: int, h: int) -> np.ndarray:
        return np.ascontiguousarray(np.rot90(moving_face(i, *((w, h) if turns == 2 else (h, w))), turns))

    clip = x264("lying.mp4", "keyint=12", wh=(320, 240) if turns == 2 else (240, 320), frames=36, picture=lying)
    score = engine.score(write_clip(clip, tmp_path))
    assert score.status == "no_face"
    how = "stand on their head" if turns == 2 else "lie on their side"
    assert score.warnings == (
        f"there are faces that {how}; turn the video by {90 * turns} degrees clockwise and score it again",
    )


def test_a_video_without_faces_has_no_such_warning(engine: Engine, made: MakeClip) -> None:
    score = engine.score(made(NOBODY))
    assert (score.status, score.warnings) == ("no_face", ())


def test_real_sizes_and_sides(faults: Path, packaged: Engine) -> None:
    assert len(packaged.score(faults / "size_changes_midway_vp8.webm").tracks) == 1
    score = packaged.score(faults / "sideways_without_metadata.mp4")
    assert score.status == "no_face"
    assert "lie on their side; turn the video by 270 degrees clockwise" in score.warnings[0]
