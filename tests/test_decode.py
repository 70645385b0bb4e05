from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest
from assets import (
    AVI_NO_PTS,
    B_PYRAMID,
    CLIPS,
    FASTSTART,
    H264_KEYS,
    H264_OPEN_GOP,
    H264_REFRESH,
    HEVC_OPEN_GOP,
    TWO_KEYS,
    Clip,
    Decoded,
    decode_measured,
    decode_plainly,
    flipped,
    packet_times,
    pattern,
    rotated,
    stated_duration_mkv,
    stated_durations,
    truncated,
    write_clip,
    x264,
)
from av.video.reformatter import ColorRange, Colorspace

from dfengine.errors import DecodeError, DfengineError, InputError, NotAVideo, SourceNotFound, SourceNotReadable
from dfengine.sampling import KEYFRAME_STEP_FRAMES, MAX_SNAP_FRAMES, Mode, Policy, Sampling, nearest
from dfengine.stages.decode import open_video
from dfengine.stages.decode import video as video_module
from dfengine.stages.decode.cpu import to_image
from dfengine.types import Frames, Image

MODES: tuple[Mode, ...] = ("exact", "reference", "keyframe")
NO_LIMIT = 1 << 40

MakeClip = Callable[[Clip], Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> MakeClip:
    folder = tmp_path_factory.mktemp("clips")
    return lambda clip: write_clip(clip, folder)


def decode(
    path: Path, policy: str, mode: Mode = "exact", *, threads: int = 1, memory_bytes: int = NO_LIMIT
) -> tuple[Frames, int, list[str]]:
    """All sampled frames in one Frames, how many were decoded for them, and the warnings."""
    with open_video(path, threads=threads) as video:
        parts = list(video.frames(Sampling.parse(policy, mode), memory_bytes=memory_bytes))
    assert [p.is_last for p in parts] == [False] * (len(parts) - 1) + [True]
    joined = Frames(
        tuple(image for p in parts for image in p.images),
        np.concatenate([p.pts_seconds for p in parts]),
        np.concatenate([p.frame_index for p in parts]),
    )
    return joined, video.frames_decoded, video.warnings


def same(image: Image, planes: tuple[np.ndarray, ...]) -> bool:
    return len(image.components) == len(planes) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(image.components, planes, strict=True)
    )


def check_against_full_decode(path: Path, full: list[Decoded], frames: Frames) -> None:
    """Every kept frame is, bit for bit, the frame of a full decode that has its time, or its place."""
    assert len(frames) > 0
    times = packet_times(path)
    assert np.all(np.diff(frames.pts_seconds) > 0)
    assert np.all(np.diff(frames.frame_index) > 0)
    # AVI has no presentation times either: FFmpeg makes them up from the order of decoding.
    if path.suffix == ".avi" or np.isnan(times).any() or any(f.time is None for f in full):
        for image, index in zip(frames.images, frames.frame_index, strict=True):
            assert same(image, full[index].planes), f"frame {index} differs"
        return
    by_time = {round(f.time, 5): f.planes for f in full if f.time is not None}
    for image, pts, index in zip(frames.images, frames.pts_seconds, frames.frame_index, strict=True):
        assert times[index] - times[0] == pytest.approx(pts, abs=1e-6)
        assert same(image, by_time[round(pts + times[0], 5)]), f"frame {index} at {pts} s differs"


# -- every kept frame is a frame of a full decode ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_kept_frames_equal_a_full_decode(made: MakeClip, clip: Clip, mode: Mode) -> None:
    path = made(clip)
    full = decode_plainly(path)
    assert len(full) == clip.frames, "the plain decode itself is the oracle and must be whole"
    for policy in ("uniform:7", "every:1", "first:5", "every:13:2"):
        frames, _, warnings = decode(path, policy, mode)
        check_against_full_decode(path, full, frames)
        fields = ["the pictures are interlaced; one field of each is scored"]
        assert warnings == (fields if "interlaced" in clip.name else [])
    frames, _, _ = decode(path, "every:1", "exact")
    assert frames.frame_index.tolist() == list(range(clip.frames))


@pytest.mark.parametrize("clip", [c for c in CLIPS if c.pts_ms is None], ids=str)
def test_uniform_keeps_evenly_spaced_frames(made: MakeClip, clip: Clip) -> None:
    ideal = np.linspace(0, clip.frames - 1, 7)
    frames, _, _ = decode(made(clip), "uniform:7", "exact")
    assert np.abs(np.linspace(frames.frame_index[0], frames.frame_index[-1], 7) - ideal).max() == 0
    # Half-way places may go either way, and clocks of 1 ms move a place by a fraction of a frame.
    assert all(np.abs(ideal - i).min() <= 0.6 for i in frames.frame_index)
    assert len(frames) == min(7, clip.frames)

    frames, _, _ = decode(made(clip), "uniform:7", "reference")
    assert all(np.abs(ideal - i).min() <= MAX_SNAP_FRAMES for i in frames.frame_index)


@pytest.mark.parametrize(
    "clip", [c for c in CLIPS if c.codec in ("libx264", "libx265", "mpeg2video", "mpeg4")], ids=str
)
def test_reference_mode_keeps_the_nearest_frame_that_others_depend_on(made: MakeClip, clip: Clip) -> None:
    path = made(clip)
    times = packet_times(path)
    if path.suffix == ".avi" or np.isnan(times).any():
        pytest.skip("frames without times are counted, so none may be left out")
    kept_by_ffmpeg = np.array([f.time for f in decode_plainly(path, skip="NONREF")])
    wanted = Policy.parse("uniform:9").wanted_seconds(times)
    # A tie goes to the earlier, and sums of floats must not decide it.
    expected = np.unique(kept_by_ffmpeg[nearest(kept_by_ffmpeg, wanted - 1e-7)])
    frames, _, _ = decode(path, "uniform:9", "reference")
    assert frames.pts_seconds + times[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("clip", [B_PYRAMID, HEVC_OPEN_GOP], ids=str)
def test_reference_mode_decodes_fewer_frames(made: MakeClip, clip: Clip) -> None:
    _, exact, _ = decode(made(clip), "every:1", "exact")
    _, reference, _ = decode(made(clip), "every:1", "reference")
    assert exact == clip.frames
    assert reference <= 0.7 * exact


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("mode", MODES)
def test_rests_of_groups_are_left_out(made: MakeClip, mode: Mode, threads: int) -> None:
    path = made(TWO_KEYS)
    frames, decoded, warnings = decode(path, "uniform:4:3", mode, threads=threads)  # at frames 0, 49, 99 of 150
    check_against_full_decode(path, decode_plainly(path), frames)
    assert len(frames) == 3
    assert warnings == []
    if threads == 1:  # more threads decode ahead
        assert decoded <= {"exact": 101, "reference": 62, "keyframe": 14}[mode]


def test_keyframe_mode_gathers_frames_behind_key_frames(made: MakeClip) -> None:
    frames, decoded, _ = decode(made(TWO_KEYS), "uniform:12", "keyframe")
    first, second = frames.frame_index[frames.frame_index < 90], frames.frame_index[frames.frame_index >= 90]
    assert (first[0], second[0]) == (0, 90)
    assert len(frames) == 12
    assert np.abs(first - KEYFRAME_STEP_FRAMES * np.arange(len(first))).max() <= 1, "B-pictures at most one away"
    assert decoded <= 32


def test_skipping_all_b_pictures_would_change_the_pixels_of_others(made: MakeClip) -> None:
    # Why reference mode asks for NONREF and not for BIDIR: in a B-pyramid, P-pictures depend on B-pictures.
    path = made(B_PYRAMID)
    full = {f.time: f.planes[0] for f in decode_plainly(path)}
    bidir = decode_plainly(path, skip="BIDIR")
    assert any(not np.array_equal(f.planes[0], full[f.time]) for f in bidir)
    nonref = decode_plainly(path, skip="NONREF")
    assert all(np.array_equal(f.planes[0], full[f.time]) for f in nonref)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", [H264_KEYS, H264_OPEN_GOP, HEVC_OPEN_GOP], ids=str)
def test_groups_without_a_wanted_frame_are_not_decoded(made: MakeClip, clip: Clip, mode: Mode) -> None:
    path = made(clip)
    full = decode_plainly(path)
    # Two frames, the first and the last, and the first packet's: at most the two groups at the ends.
    frames, decoded, warnings = decode(path, "uniform:2", mode)
    check_against_full_decode(path, full, frames)
    assert len(frames) == 2
    assert decoded <= clip.frames / 2
    assert warnings == [], "a healthy file gives no warning"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 11, 23])
def test_open_groups_are_entered_without_using_their_leading_frames(made: MakeClip, count: int, mode: Mode) -> None:
    for clip in (H264_OPEN_GOP, HEVC_OPEN_GOP):
        path = made(clip)
        frames, _, warnings = decode(path, f"uniform:{count}", mode)
        assert len(frames) == count
        check_against_full_decode(path, decode_plainly(path), frames)
        assert warnings == []


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_intra_refresh_marks_key_frames_that_are_none(made: MakeClip, count: int) -> None:
    # x264 flags recovery points as key frames and FFmpeg's muxers believe it; pictures are whole only a while later.
    path = made(H264_REFRESH)
    frames, _, warnings = decode(path, f"uniform:{count}", "exact")
    assert len(frames) == count
    check_against_full_decode(path, decode_plainly(path), frames)
    assert warnings == []


@pytest.mark.parametrize("mode", MODES)
def test_threads_do_not_change_frames(made: MakeClip, mode: Mode) -> None:
    for clip in (B_PYRAMID, H264_OPEN_GOP, HEVC_OPEN_GOP, AVI_NO_PTS):
        one, _, _ = decode(made(clip), "uniform:6", mode, threads=1)
        two, _, _ = decode(made(clip), "uniform:6", mode, threads=2)
        assert one.frame_index.tolist() == two.frame_index.tolist()
        assert one.pts_seconds.tolist() == two.pts_seconds.tolist()
        assert all(same(a, b.components) for a, b in zip(one.images, two.images, strict=True))


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory_frames", "parts"), [(0, 10), (1, 10), (3, 4), (9, 2), (10, 1), (99, 1)])
def test_memory_limit_splits_frames_and_changes_nothing_else(made: MakeClip, memory_frames: int, parts: int) -> None:
    path = made(H264_KEYS)
    frame_bytes = 160 * 120 * 3 // 2
    with open_video(path) as video:
        limit = memory_frames * frame_bytes
        sizes = [len(f) for f in video.frames(Sampling.parse("uniform:10", "exact"), memory_bytes=limit)]
    assert len(sizes) == parts
    assert max(sizes) <= max(memory_frames, 1)
    whole, _, _ = decode(path, "uniform:10")
    split, _, _ = decode(path, "uniform:10", memory_bytes=limit)
    assert whole.pts_seconds.tolist() == split.pts_seconds.tolist()
    assert whole.frame_index.tolist() == split.frame_index.tolist()
    assert all(same(a, b.components) for a, b in zip(whole.images, split.images, strict=True))


def test_frames_stay_valid_after_close(made: MakeClip) -> None:
    path = made(B_PYRAMID)
    frames, _, _ = decode(path, "uniform:8")  # closed by now
    before = [tuple(c.copy() for c in image.components) for image in frames.images]
    decode(path, "every:1")  # would take over freed buffers
    assert all(same(image, planes) for image, planes in zip(frames.images, before, strict=True))
    check_against_full_decode(path, decode_plainly(path), frames)


def test_a_consumer_may_stop_early(made: MakeClip) -> None:
    with open_video(made(H264_KEYS)) as video:
        parts = video.frames(Sampling.parse("every:1", "exact"), memory_bytes=0)
        assert next(parts).frame_index.tolist() == [0]
        parts.close()


# -- times -------------------------------------------------------------------------------------------------------------


def test_one_frame(made: MakeClip) -> None:
    path = made(next(c for c in CLIPS if c.frames == 1))
    for policy in ("uniform:17", "uniform:1", "every:6", "first:60"):
        for mode in MODES:
            frames, decoded, warnings = decode(path, policy, mode)
            assert (frames.pts_seconds.tolist(), frames.frame_index.tolist(), decoded, warnings) == ([0.0], [0], 1, [])


def test_variable_rate_is_sampled_by_time(made: MakeClip) -> None:
    clip = next(c for c in CLIPS if c.name == "h264_vfr.mp4")
    assert clip.pts_ms is not None
    seconds = np.array([clip.pts_ms(i) for i in range(clip.frames)]) / 1000
    frames, _, _ = decode(made(clip), "uniform:6")
    assert frames.frame_index.tolist() == nearest(seconds, np.linspace(0, seconds[-1], 6)).tolist()
    assert frames.pts_seconds == pytest.approx(seconds[frames.frame_index], abs=1e-3)
    assert np.diff(frames.frame_index)[0] > 2 * np.diff(frames.frame_index)[-1], (
        "the dense part gives more frames apart"
    )


def test_seconds_count_from_the_first_frame(made: MakeClip) -> None:
    clip = next(c for c in CLIPS if c.name == "h264_late_start.mkv")
    path = made(clip)
    assert packet_times(path)[0] == pytest.approx(7.0)
    frames, _, _ = decode(path, "every:10")
    assert frames.frame_index.tolist() == [0, 10, 20, 30]
    assert frames.pts_seconds == pytest.approx(frames.frame_index / 25, abs=1e-3)


@pytest.mark.parametrize("factor", [1.02, 1.4, 0.5])
def test_a_wrong_stated_duration_moves_no_frame(made: MakeClip, tmp_path: Path, factor: float) -> None:
    path = tmp_path / "overstated.mp4"
    path.write_bytes(stated_durations(made(H264_KEYS).read_bytes(), factor))
    frames, _, _ = decode(path, "every:1")
    assert frames.frame_index.tolist() == list(range(H264_KEYS.frames))
    frames, _, warnings = decode(path, "uniform:5")
    check_against_full_decode(path, decode_plainly(path), frames)
    assert len(frames) >= 3
    assert len(frames) == 5 or "truncated" in warnings[0]


def test_an_overstated_duration_is_no_reason_to_refuse_a_whole_file(made: MakeClip, tmp_path: Path) -> None:
    # Timestamps decide: all samples that the table of an mp4 lists are there.
    path = tmp_path / "overstated.mp4"
    path.write_bytes(stated_durations(made(H264_KEYS).read_bytes(), 3.0))
    frames, _, _ = decode(path, "uniform:5")
    assert len(frames) >= 3


@pytest.mark.parametrize("seconds", [3e6, 1e9, 1e15, 1e300, np.inf, np.nan, -1.0, 0.0])
def test_an_absurd_stated_duration_costs_no_memory(made: MakeClip, tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "forever.mkv"
    path.write_bytes(stated_duration_mkv(made(DAMAGED[1]).read_bytes(), seconds))
    _, mib = decode_measured(path)
    assert mib < 200


def to_ts(path: Path, out: Path, shift_seconds: float = 0.0) -> bytes:
    """The packets of a file in an MPEG transport stream, later by ``shift_seconds``."""
    with av.open(str(path)) as source, av.open(str(out), "w", format="mpegts") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts += int(shift_seconds / packet.time_base)
                packet.dts += int(shift_seconds / packet.time_base)
                packet.stream = copy
                target.mux(packet)
    return out.read_bytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shifts", [(0, 0), (20, 0)], ids=["both from 0", "earlier"])
def test_joined_files_are_seen_to_the_end(made: MakeClip, tmp_path: Path, shifts: tuple[int, int], mode: Mode) -> None:
    parts = [to_ts(made(clip), tmp_path / "part.ts", s) for clip, s in zip((B_PYRAMID, TWO_KEYS), shifts, strict=True)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))
    frames, decoded, warnings = decode(path, "uniform:9", mode)
    count = B_PYRAMID.frames + TWO_KEYS.frames
    assert decoded == count
    assert frames.frame_index.tolist() == np.linspace(0, count - 1, 9).round().astype(int).tolist()
    assert warnings == ["the clock goes back in the middle, as in joined files; frames are counted instead"]


def test_a_clock_that_jumps_hides_nothing(made: MakeClip, tmp_path: Path) -> None:
    parts = [to_ts(made(B_PYRAMID), tmp_path / "part.ts", shift) for shift in (0, 5000)]
    path = tmp_path / "gap.ts"
    path.write_bytes(b"".join(parts))
    frames, _, warnings = decode(path, "uniform:9")
    assert frames.frame_index.tolist() == [0, 10, 20, 30, 40, 49, 59, 69, 79]
    assert warnings == ["there is no frame for 4998 s"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.EMFILE])
@pytest.mark.parametrize("when", ["open", "read"])
def test_a_fault_of_the_machine_is_none_of_the_file(
    made: MakeClip, monkeypatch: pytest.MonkeyPatch, number: int, when: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise av.error.FFmpegError(number, os.strerror(number))

    if when == "open":
        monkeypatch.setattr("dfengine.stages.decode.video.open_media", fail)
    else:
        monkeypatch.setattr("dfengine.stages.decode.video.NalFormat.may_begin", fail)
    with pytest.raises(SourceNotReadable, match=r"the file cannot be read \(.*\); score it again when it can"):
        decode(made(H264_KEYS), "uniform:5")


def test_gray_with_alpha_is_gray(tmp_path: Path) -> None:
    frame = av.VideoFrame(6, 4, "ya8")
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(4, plane.line_size)
    rows[:, 0:12:2], rows[:, 1:12:2] = np.arange(6) * 40, 255
    image = to_image(frame)
    np.testing.assert_allclose(image.components[0], np.tile(np.arange(6) * 40, (4, 1)), atol=1)


def test_avi_counts_frames_where_packets_state_no_time(made: MakeClip) -> None:
    frames, _, _ = decode(made(AVI_NO_PTS), "every:9", "reference")
    assert frames.frame_index.tolist() == [0, 9, 18, 27, 36]
    assert frames.pts_seconds == pytest.approx(frames.frame_index / 25, abs=1e-3)


# -- what an Image says about itself -----------------------------------------------------------------------------------

UNTAGGED = None, None
BT2020_NCL = 9  # AVCOL_SPC_BT2020_NCL; PyAV names it in no enum


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "tags", "expected"),
    [
        # expected: matrix, full range, bit depth, chroma subsampling, components
        ("libx264", "yuv420p", UNTAGGED, ("bt601", False, 8, (2, 2), 3)),
        ("libx264", "yuv420p", (Colorspace.ITU709, ColorRange.MPEG), ("bt709", False, 8, (2, 2), 3)),
        ("libx264", "yuv420p", (Colorspace.ITU709, ColorRange.JPEG), ("bt709", True, 8, (2, 2), 3)),
        ("libx264", "yuv420p", (Colorspace.ITU601, ColorRange.MPEG), ("bt601", False, 8, (2, 2), 3)),
        ("libx264", "yuv420p", (Colorspace.SMPTE240M, ColorRange.MPEG), ("smpte240m", False, 8, (2, 2), 3)),
        ("libx264", "yuv420p", (Colorspace.FCC, ColorRange.MPEG), ("fcc", False, 8, (2, 2), 3)),
        ("libx264", "yuv420p", (BT2020_NCL, ColorRange.MPEG), ("bt2020", False, 8, (2, 2), 3)),
        ("libx264", "yuvj420p", UNTAGGED, ("bt601", True, 8, (2, 2), 3)),
        ("libx264", "yuv422p", UNTAGGED, ("bt601", False, 8, (2, 1), 3)),
        ("libx264", "yuv444p", UNTAGGED, ("bt601", False, 8, (1, 1), 3)),
        ("libx264", "yuv420p10le", UNTAGGED, ("bt601", False, 10, (2, 2), 3)),
        ("libx264", "yuv422p10le", UNTAGGED, ("bt601", False, 10, (2, 1), 3)),
        ("libx264", "gray", UNTAGGED, ("bt601", False, 8, (2, 2), 3)),  # FFmpeg decodes 4:0:0 with flat chroma
        ("ffv1", "gray", UNTAGGED, ("gray", True, 8, (1, 1), 1)),
        ("ffv1", "gray16le", UNTAGGED, ("gray", True, 16, (1, 1), 1)),
        ("libx265", "gray", (None, ColorRange.MPEG), ("gray", False, 8, (1, 1), 1)),
        ("libx265", "gray10le", (None, ColorRange.JPEG), ("gray", True, 10, (1, 1), 1)),
        ("libx265", "yuv420p12le", (BT2020_NCL, ColorRange.MPEG), ("bt2020", False, 12, (2, 2), 3)),
        ("libx265", "yuv444p12le", UNTAGGED, ("bt601", False, 12, (1, 1), 3)),
        ("libx265", "gbrp", UNTAGGED, ("rgb", True, 8, (1, 1), 3)),
        ("libx265", "gbrp10le", UNTAGGED, ("rgb", True, 10, (1, 1), 3)),
        ("ffv1", "yuv420p16le", UNTAGGED, ("bt601", False, 16, (2, 2), 3)),
        ("ffv1", "yuva420p", UNTAGGED, ("bt601", False, 8, (2, 2), 3)),  # alpha is left out
        ("ffv1", "yuv411p", UNTAGGED, ("bt601", False, 8, (4, 1), 3)),
        ("ffv1", "yuv440p", UNTAGGED, ("bt601", False, 8, (1, 2), 3)),
        ("ffv1", "bgr0", UNTAGGED, ("rgb", True, 8, (1, 1), 3)),  # packed: converted
        ("mjpeg", "yuvj422p", UNTAGGED, ("bt601", True, 8, (2, 1), 3)),
    ],
)
def test_colour_tags(tmp_path: Path, codec: str, pix_fmt: str, tags, expected) -> None:
    # With B-pictures x265 now and then gives so short a stream decoding times that no container takes.
    options = {"x265-params": "log-level=none:pools=1:bframes=0"} if codec == "libx265" else {}
    clip = Clip("tags.mkv", codec, pix_fmt, wh=(64, 48), frames=2, options=options,
                colorspace=tags[0], color_range=tags[1])  # fmt: skip
    frames, _, _ = decode(write_clip(clip, tmp_path), "first:1")
    (image,) = frames.images
    seen = (image.matrix, image.full_range, image.bit_depth, image.subsampling_xy, len(image.components))
    assert seen == expected
    assert image.upright_hw == image.components[0].shape == (48, 64)
    sx, sy = image.subsampling_xy
    assert all(c.shape == (48 // sy, 64 // sx) for c in image.components[1:])
    assert all(c.dtype == (np.uint8 if image.bit_depth == 8 else np.uint16) for c in image.components)


@pytest.mark.parametrize("wh", [(16, 16), (17, 16), (16, 17), (161, 119)])
@pytest.mark.parametrize(
    ("pix_fmt", "chroma"), [("yuv420p", (2, 2)), ("yuv422p", (2, 1)), ("yuv444p", (1, 1)), ("yuv410p", (4, 4))]
)
def test_odd_sizes_round_chroma_up(tmp_path: Path, wh: tuple[int, int], pix_fmt: str, chroma: tuple[int, int]) -> None:
    path = write_clip(Clip("odd.mkv", "ffv1", pix_fmt, wh=wh, frames=2), tmp_path)
    frames, _, _ = decode(path, "first:1")
    (image,) = frames.images
    (w, h), (sx, sy) = wh, chroma
    assert image.components[0].shape == (h, w)
    assert image.components[1].shape == image.components[2].shape == (-(-h // sy), -(-w // sx))
    assert image.subsampling_xy == chroma
    check_against_full_decode(path, decode_plainly(path)[:1], frames)


def test_rgb_components_are_in_the_order_red_green_blue(tmp_path: Path) -> None:
    def orange(i: int, w: int, h: int) -> np.ndarray:
        return np.full((h, w, 3), (250, 120, 10), np.uint8)

    for codec, pix_fmt in (("ffv1", "bgr0"), ("libx264rgb", "rgb24"), ("gif", "rgb8")):
        suffix = ".gif" if codec == "gif" else ".mkv"
        clip = Clip(codec + suffix, codec, pix_fmt, wh=(64, 48), frames=2, picture=orange)
        frames, _, _ = decode(write_clip(clip, tmp_path), "first:1")
        means = [float(c.mean()) for c in frames.images[0].components]
        assert means == pytest.approx([250, 120, 10], abs=40), "the palette of the gif is coarse"


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_makes_pictures_upright(made: MakeClip, tmp_path: Path, degrees: int) -> None:
    path = tmp_path / "turned.mp4"
    path.write_bytes(rotated(made(H264_KEYS).read_bytes(), degrees))
    for mode in MODES:
        frames, _, _ = decode(path, "uniform:3", mode)
        assert {i.rotation for i in frames.images} == {degrees}
        assert {i.upright_hw for i in frames.images} == {(120, 160) if degrees in (0, 180) else (160, 120)}


# -- damage ------------------------------------------------------------------------------------------------------------

DAMAGED = [
    x264("moov_first.mp4", "keyint=12:bframes=2", frames=100, container_options=FASTSTART),
    x264("cut.mkv", "keyint=12:bframes=2", frames=100),
    x264("cut.ts", "keyint=12:bframes=2", frames=100),
    x264("cut.mov", "keyint=12:bframes=2", frames=100),
    Clip("cut.webm", "libvpx", frames=100, options={"g": "12", "cpu-used": "8"}),
    Clip("cut.avi", "mpeg4", frames=100, options={"bf": "2", "g": "12"}),
    next(c for c in CLIPS if c.name == "av1.mkv"),
    HEVC_OPEN_GOP,
    next(c for c in CLIPS if c.codec == "gif"),
]
# What is cut off these leaves a shorter video, and nothing to know it by: no header states a duration (FFmpeg
# estimates that of an AVI from the size of the file).
NO_DURATION = (".ts", ".gif", ".avi")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", DAMAGED, ids=str)
def test_truncated_files_are_scored_or_refused(made: MakeClip, tmp_path: Path, clip: Clip, mode: Mode) -> None:
    data = made(clip).read_bytes()
    scored = []
    for percent in range(0, 100, 7):
        path = tmp_path / f"{percent}_{clip.name}"
        path.write_bytes(truncated(data, percent / 100))
        try:
            frames, _, warnings = decode(path, "uniform:10", mode)
        except (DecodeError, NotAVideo):
            continue
        scored.append(percent)
        if path.suffix not in NO_DURATION and mode == "exact":
            assert len(frames) == 10 or (len(frames) >= 5 and warnings), percent
    # Bytes are not spread evenly over time, but nearly: far less than half is never scored, nearly all always is.
    assert 98 in scored or clip.name.endswith((".mov", "opengop.mp4")), "the index of these comes last"
    if path.suffix not in NO_DURATION:
        assert min(scored, default=100) > 25


def test_a_cut_behind_the_middle_is_scored_with_a_warning(made: MakeClip, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(truncated(made(DAMAGED[0]).read_bytes(), 0.75))
    frames, _, warnings = decode(path, "uniform:10", "exact")
    assert 5 <= len(frames) < 10
    assert any(w.startswith("the file is truncated: ") for w in warnings)
    assert any(w.endswith("of 10 wanted frames could be decoded") for w in warnings)
    # The times are those of the whole file: what is there is where it would be.
    whole, _, _ = decode(made(DAMAGED[0]), "uniform:10", "exact")
    assert np.abs(frames.frame_index - whole.frame_index[: len(frames)]).max() <= 1


def test_a_cut_before_the_middle_is_refused(made: MakeClip, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(truncated(made(DAMAGED[0]).read_bytes(), 0.45))
    with pytest.raises(DecodeError, match=r"\d of 10 wanted frames could be decoded, at least half are needed"):
        decode(path, "uniform:10", "exact")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", DAMAGED, ids=str)
def test_flipped_bytes_are_scored_or_refused(made: MakeClip, tmp_path: Path, clip: Clip, mode: Mode) -> None:
    data = made(clip).read_bytes()
    refused = []
    for percent in (0, 1, 3, 10, 25, 40, 55, 70, 85, 97):
        path = tmp_path / f"{percent}_{clip.name}"
        path.write_bytes(flipped(data, percent / 100))
        try:
            frames, _, _ = decode(path, "uniform:10", mode)
        except InputError:
            refused.append(percent)
        else:
            assert len(frames) >= 1
    # 64 bytes between the headers cost a group of pictures at most; a GIF cannot be read on behind damage.
    assert path.suffix == ".gif" or not {40, 55, 70} & set(refused)


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_raises_nothing_unexpected(made: MakeClip, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for clip in DAMAGED:
        data = bytearray(made(clip).read_bytes())
        # A third of the hits go to the first 2 KB, where the headers are.
        for at in [*rng.integers(0, len(data), 20), *rng.integers(0, min(2048, len(data)), 10)]:
            data[at] = rng.integers(0, 256)
        path = tmp_path / clip.name
        path.write_bytes(data)
        with contextlib.suppress(InputError):
            decode(path, "uniform:10", "reference")


def test_titles_that_are_not_utf8_are_no_damage(made: MakeClip, tmp_path: Path) -> None:
    clip = x264("title.mkv", "keyint=12", frames=5)
    data = made(clip).read_bytes()
    path = tmp_path / "latin1.mkv"
    path.write_bytes(data.replace(b"Lavf", b"L\xe4vf"))  # the name of the muxer, as a writer of Latin-1 would spell it
    assert path.read_bytes() != data
    frames, _, _ = decode(path, "uniform:5")
    assert len(frames) == 5


@pytest.mark.parametrize(
    ("version", "asked"), [("18.1.0", {"metadata_errors": "replace"}), ("19.0.0", {}), ("20.1.0rc1", {})]
)
def test_pyav_is_given_arguments_that_its_version_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, asked: dict[str, str]
) -> None:
    """Version 19 refuses metadata_errors, and then nothing at all could be opened."""
    given: list[dict[str, object]] = []
    monkeypatch.setattr(av, "__version__", version)
    monkeypatch.setattr(av, "open", lambda source, **arguments: given.append(arguments) or io.BytesIO())
    spec = importlib.util.find_spec("dfengine.stages.media")
    media = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(media)
    with media.open_media(tmp_path / "a.mp4"):
        pass
    del given[0]["options"]
    assert given == [asked]


# -- real clips --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_real_odd_files_equal_a_full_decode(data_dir: Path, mode: Mode) -> None:
    compared = []
    for path in sorted((data_dir / "odd").iterdir()):
        try:
            frames, _, warnings = decode(path, "uniform:7", mode)
        except DfengineError:
            continue
        # Decoders conceal damage with what they decoded before, and that differs where frames were skipped.
        skip = "NONREF" if warnings and mode != "exact" else "DEFAULT"
        check_against_full_decode(path, decode_plainly(path, skip=skip), frames)
        compared.append(path.name)
    assert len(compared) >= 20


def test_real_clips_equal_a_full_decode(data_dir: Path) -> None:
    for path in sorted(p for p in (data_dir / "clips").iterdir() if p.suffix != ".csv"):
        expected: dict[float, list[np.ndarray]] = {}
        modes = {mode: decode(path, "uniform:6", mode)[0] for mode in MODES}
        origin = packet_times(path)[0]
        times = {round(t + origin, 5) for f in modes.values() for t in f.pts_seconds}
        with av.open(str(path)) as container:  # one pass, and only the planes that are compared are kept
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(video=0):
                if round(frame.time, 5) in times:
                    rows = [np.frombuffer(p, np.uint8).reshape(-1, p.line_size) for p in frame.planes]
                    expected[round(frame.time, 5)] = [
                        r[: p.height, : p.width].copy() for r, p in zip(rows, frame.planes, strict=True)
                    ]
        for mode, frames in modes.items():
            for image, pts in zip(frames.images, frames.pts_seconds, strict=True):
                assert same(image, tuple(expected[round(pts + origin, 5)])), (path.name, mode, pts)


@pytest.mark.parametrize("name", ["519.mp4", "519_515.mp4", "634.mp4"])
@pytest.mark.parametrize("threads", [1, 2])
def test_old_444_streams_are_not_green(data_dir: Path, name: str, threads: int) -> None:
    # x264 tells its version in the first packet only; without it decoders misread old 4:4:4 and 4:2:0 lossless streams.
    path = data_dir / "clips" / name
    with open_video(path, threads=threads) as video:
        (frames,) = video.frames(Sampling.parse("uniform:1", "reference"))
    (image,) = frames.images
    assert frames.frame_index[0] > 50, "the frame must lie far behind the first packet"
    assert all(float(c.std()) > 2 for c in image.components), "a green frame has constant chroma"
    with open_video(path) as video:
        every = next(iter(video.frames(Sampling.parse(f"every:{frames.frame_index[0]}:2", "exact"))))
    assert same(image, every.images[-1].components) or every.frame_index[-1] != frames.frame_index[0]


def test_edit_list_that_hides_the_first_key_frame(data_dir: Path) -> None:
    path = data_dir / "odd" / "discard_first_keyframe.mp4"
    with av.open(str(path)) as container:
        hidden = sum(p.is_discard for p in container.demux(video=0) if p.size)
    assert hidden > 0
    full = decode_plainly(path)
    for mode in MODES:
        frames, _, warnings = decode(path, "every:1", mode)
        check_against_full_decode(path, full, frames)
        assert frames.pts_seconds[0] == 0
        assert warnings == []
    frames, _, _ = decode(path, "every:1", "exact")
    assert len(frames) == len(full)


@pytest.mark.parametrize(
    ("name", "matrix", "full_range", "bit_depth"),
    [
        ("bt601_limited_range.mp4", "bt601", False, 8),
        ("bt601_full_range.mp4", "bt601", True, 8),
        ("bt709_full_range.mp4", "bt709", True, 8),
        ("bt2020_10bit.mp4", "bt2020", False, 10),
        ("testsrc2_12bit_hdr.mp4", "bt2020", False, 12),
        ("h264_10bits.mp4", "bt601", False, 10),
        ("h265_10bits.mp4", "bt601", False, 10),
    ],
)
def test_real_colour_tags(data_dir: Path, name: str, matrix: str, full_range: bool, bit_depth: int) -> None:
    frames, _, _ = decode(data_dir / "odd" / name, "first:1")
    (image,) = frames.images
    assert (image.matrix, image.full_range, image.bit_depth) == (matrix, full_range, bit_depth)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_real_rotation(data_dir: Path, degrees: int) -> None:
    path = data_dir / "odd" / f"video_{degrees}.mov"
    frames, _, _ = decode(path, "first:1")
    (image,) = frames.images
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    # FFmpeg counts counter-clockwise.
    assert (image.rotation + frame.rotation) % 360 == 0
    assert (image.rotation in (90, 270)) == (degrees in (90, 270))


def test_start_that_is_not_zero(data_dir: Path) -> None:
    path = data_dir / "odd" / "test_non_zero_start.mp4"
    assert packet_times(path)[0] > 1
    frames, _, warnings = decode(path, "uniform:5")
    assert frames.pts_seconds[0] == 0
    assert len(frames) == 5
    assert warnings == []


def test_a_video_that_was_renamed_is_still_one(made: MakeClip, tmp_path: Path) -> None:
    path = tmp_path / "no_suffix"
    shutil.copyfile(made(H264_KEYS), path)
    frames, _, _ = decode(path, "uniform:3")
    assert len(frames) == 3


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_file_too_large_to_keep_is_read_again(made: MakeClip, monkeypatch: pytest.MonkeyPatch, mode: Mode) -> None:
    path = made(H264_KEYS)
    kept, count, _ = decode(path, "uniform:9", mode)
    monkeypatch.setattr(video_module, "KEPT_BYTES", path.stat().st_size // 2)  # not from the first packet on
    again, count_again, _ = decode(path, "uniform:9", mode)
    assert count == count_again
    np.testing.assert_array_equal(kept.pts_seconds, again.pts_seconds)
    assert all(same(a, b.components) for a, b in zip(kept.images, again.images, strict=True))


def test_a_file_that_vanishes_is_said_to_be_gone(
    made: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_module, "KEPT_BYTES", 0)
    path = tmp_path / "gone.mp4"
    shutil.copy(made(H264_KEYS), path)
    with open_video(path) as video:
        path.unlink()  # decoding opens the file a second time
        with pytest.raises(SourceNotFound, match="was there and is gone"):
            list(video.frames(Sampling.parse("uniform:3")))


def test_pictures_of_the_maker_differ() -> None:
    # The comparisons above mean nothing if all frames look alike.
    assert len({pattern(i, 160, 120).tobytes() for i in range(120)}) == 120
