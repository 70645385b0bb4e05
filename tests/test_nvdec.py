"""NVDEC's part of decoding, on stand-ins for the GPU and for PyNvVideoCodec (fake_cuda.py, fake_nvdec.py)."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable
from pathlib import Path

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
    HEVC_OPEN_GOP,
    TWO_KEYS,
    Clip,
    decode_plainly,
    flipped,
    joined_streams,
    rotated,
    truncated,
    write_clip,
    x264,
    x265,
)
from av.bitstream import BitStreamFilterContext
from fake_cuda import FakeGpu, array_of
from fake_nvdec import FakeNvc

from dfengine.errors import DecodeError, DeviceError, DeviceMemoryError
from dfengine.gpu import nvdec
from dfengine.gpu.nvdec import NvdecPool
from dfengine.sampling import Mode, Sampling
from dfengine.stages.decode import open_video
from dfengine.stages.decode.decoder import CannotDecode
from dfengine.stages.decode.nal import NalFormat, _split_start_codes
from dfengine.types import Frames, Image

MODES: tuple[Mode, ...] = ("exact", "reference", "keyframe")
POLICIES = ("uniform:7", "every:1", "first:5", "every:13:2")

MakeClip = Callable[[Clip], Path]


def taken(clip: Clip) -> bool:
    """Whether NVDEC is for it, as far as the stand-in's capabilities go."""
    return (
        clip.codec in ("libx264", "libx265")
        and clip.pix_fmt in ("yuv420p", "yuvj420p", "yuv420p10le")
        and "interlaced" not in clip.name
        and clip.container != "h264"
        and not clip.name.endswith(".avi")
    )


HEVC_FASTSTART = x265("hevc_faststart.mp4", "keyint=10:bframes=4", frames=80, container_options=FASTSTART)
CODED = [clip for clip in CLIPS if clip.codec in ("libx264", "libx265")]
TAKEN = [clip for clip in CLIPS if taken(clip)]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> MakeClip:
    folder = tmp_path_factory.mktemp("clips")
    return lambda clip: write_clip(clip, folder)


class Rig:
    """A GPU, a package and a pool, all fake but the pool."""

    def __init__(self, *, size: int = 2, memory_bytes: int = 1 << 30, **faults: object) -> None:
        self.gpu = FakeGpu(memory_bytes)
        self.nvc = FakeNvc(**faults)
        self.pool = NvdecPool(self.gpu, size, nvc=self.nvc)
        self.lane = self.gpu.lane()

    def decode(self, path: Path, policy: str, mode: Mode, *, memory_bytes: int = 1 << 40) -> Decoded:
        with open_video(path, lane=self.lane, pool=self.pool) as video:
            parts = list(video.frames(Sampling.parse(policy, mode), memory_bytes=memory_bytes))
        return Decoded(video, parts)

    @property
    def decoder(self) -> object:
        return self.nvc.decoders[-1]


class Decoded:
    def __init__(self, video: object, parts: list[Frames]) -> None:
        self.parts = parts
        self.images = [image for part in parts for image in part.images]
        self.seconds = [s for part in parts for s in part.pts_seconds.tolist()]
        self.index = [i for part in parts for i in part.frame_index.tolist()]
        self.count, self.name = video.frames_decoded, video.name
        self.warnings, self.fallback_reason = video.warnings, video.fallback_reason


def on_cpu(path: Path, policy: str, mode: Mode) -> Decoded:
    with open_video(path) as video:
        parts = list(video.frames(Sampling.parse(policy, mode)))
    return Decoded(video, parts)


def check_same(gpu: Decoded, cpu: Decoded) -> None:
    assert gpu.seconds == cpu.seconds
    assert gpu.index == cpu.index
    assert gpu.warnings == cpu.warnings
    assert [p.is_last for p in gpu.parts] == [False] * (len(gpu.parts) - 1) + [True]
    for a, b in zip(gpu.images, cpu.images, strict=True):
        check_same_image(a, b)


def check_same_image(gpu: Image, cpu: Image) -> None:
    assert (gpu.matrix, gpu.full_range, gpu.transfer) == (cpu.matrix, cpu.full_range, cpu.transfer)
    assert (gpu.rotation, gpu.mirrored, gpu.pixel_aspect) == (cpu.rotation, cpu.mirrored, cpu.pixel_aspect)
    assert (gpu.subsampling_xy, gpu.upright_hw) == (cpu.subsampling_xy, cpu.upright_hw)
    shift = gpu.bit_depth - cpu.bit_depth  # P016 has its bits at the top
    assert shift in (0, 4, 6)
    for a, b in zip(gpu.components, cpu.components, strict=True):
        assert np.array_equal(array_of(a), b << shift)


# -- headers -----------------------------------------------------------------------------------------------------------


def pictures(path: Path) -> list[tuple[float, bool]]:
    """(seconds, whether others depend on it) of each packet, by its NAL units alone."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        nal = NalFormat(stream.codec_context)
        read = [(float(p.pts * p.time_base), nal.picture(bytes(p))) for p in container.demux(stream) if p.size]
    top = max(picture.layer for _, picture in read)
    return [(at, not (picture.disposable and picture.layer == top)) for at, picture in read]


@pytest.mark.parametrize("clip", [c for c in CODED if "raw" not in c.name], ids=str)
def test_headers_tell_the_frames_that_ffmpeg_calls_non_reference(made: MakeClip, clip: Clip) -> None:
    path = made(clip)
    if path.suffix == ".avi":
        pytest.skip("FFmpeg makes up the times")
    kept = sorted(at for at, is_reference in pictures(path) if is_reference)
    assert kept == [f.time for f in decode_plainly(path, skip="NONREF")]


@pytest.mark.parametrize("clip", [c for c in CODED if c.name.endswith((".mp4", ".mkv", ".mov"))], ids=str)
def test_start_codes_stand_before_the_units_that_ffmpegs_filter_finds(made: MakeClip, clip: Clip) -> None:
    """But for what that takes from the header: parameter sets, and SEI that x265 puts beside them."""
    with av.open(str(made(clip))) as container:
        stream = container.streams.video[0]
        nal = NalFormat(stream.codec_context)
        convert = BitStreamFilterContext(f"{nal.codec}_mp4toannexb", stream)
        header = {7, 8} if nal.codec == "h264" else {32, 33, 34, 39}

        def units(data: bytes) -> list[bytes]:
            return [bytes(u) for u in _split_start_codes(data) if nal._kind(u) not in header]

        for packet in container.demux(stream):
            if packet.size:
                ours = nal.annex_b(nal.units(bytes(packet)))
                assert ours.startswith(b"\0\0\0\1")
                (theirs,) = convert.filter(packet)
                assert units(ours) == units(bytes(theirs))


@pytest.mark.parametrize("clip", CODED, ids=str)
def test_parameter_sets_state_what_ffmpeg_reads(made: MakeClip, clip: Clip) -> None:
    with av.open(str(made(clip))) as container:
        stream = container.streams.video[0]
        nal = NalFormat(stream.codec_context)
        codec = stream.codec_context
        (sps,) = nal.sps()
        seen = nal.sequence(sps)
        assert seen.display_wh == (codec.width, codec.height)
        step = 16 if clip.codec == "libx264" else 8
        assert seen.coded_wh == (-(-codec.width // step) * step, -(-codec.height // step) * step)
        depth = max(c.bits for c in codec.format.components)
        assert seen.bit_depth == depth
        chroma = {"420": 1, "422": 2, "444": 3}
        expected = (
            0 if clip.pix_fmt == "gray" else 3 if clip.pix_fmt == "gbrp" else chroma[clip.pix_fmt.replace("j", "")[3:6]]
        )
        assert seen.chroma_format == expected
        assert seen.progressive == ("interlaced" not in clip.name)


def test_lengths_and_start_codes_hold_the_same_units(made: MakeClip) -> None:
    def units(path: Path) -> list[bytes]:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            nal = NalFormat(stream.codec_context)
            found = [bytes(u) for p in container.demux(stream) if p.size for u in nal.units(bytes(p))]
        return [u for u in found if u[0] & 31 in (1, 5)]

    lengths = made(x264("units.mp4", "keyint=12:bframes=2:slices=3", frames=20))
    codes = lengths.with_name("units.h264")
    with av.open(str(lengths)) as source, av.open(str(codes), "w", format="h264") as sink:
        out = sink.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = out
                sink.mux(packet)
    assert len(units(lengths)) == 60
    assert units(lengths) == units(codes)


def test_only_the_highest_temporal_layer_is_left_out(made: MakeClip, tmp_path: Path) -> None:
    path = made(x265("layers.mp4", "keyint=30:bframes=4:b-adapt=0:temporal-layers=3", frames=60))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        nal = NalFormat(stream.codec_context)
        layers = [nal.picture(bytes(p)) for p in container.demux(stream) if p.size]
    assert max(p.layer for p in layers) > 0
    rig = Rig()
    full = {round(f.time, 5): f.planes for f in decode_plainly(path)}
    got = rig.decode(path, "every:1", "reference")
    assert got.fallback_reason == ""
    assert 0 < got.count < 60
    for image, at in zip(got.images, got.seconds, strict=True):
        for a, b in zip(image.components, full[round(at + min(full), 5)], strict=True):
            assert np.array_equal(array_of(a), b)


# -- the same frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", TAKEN, ids=str)
def test_frames_are_those_of_the_cpu(made: MakeClip, clip: Clip, mode: Mode) -> None:
    path, rig = made(clip), Rig()
    for policy in POLICIES:
        got = rig.decode(path, policy, mode)
        assert (got.fallback_reason, got.name) == ("", "nvdec")
        check_same(got, on_cpu(path, policy, mode))
    assert len(rig.nvc.decoders) == 1, "the decoder is used again"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", [TWO_KEYS, H264_OPEN_GOP, HEVC_OPEN_GOP], ids=str)
def test_groups_without_a_wanted_frame_are_not_submitted(made: MakeClip, clip: Clip, mode: Mode) -> None:
    for count in (1, 2, 3, 11):
        got, cpu = Rig().decode(made(clip), f"uniform:{count}", mode), on_cpu(made(clip), f"uniform:{count}", mode)
        assert got.fallback_reason == ""
        check_same(got, cpu)
        assert got.count <= cpu.count + 16, "a flush brings out what the CPU decoder still held"


@pytest.mark.parametrize("clip", [B_PYRAMID, HEVC_OPEN_GOP], ids=str)
def test_reference_mode_submits_what_others_depend_on(made: MakeClip, clip: Clip) -> None:
    path = made(clip)
    for mode, ratio in (("exact", 1.0), ("reference", 0.55)):
        rig = Rig()
        got = rig.decode(path, "every:1", mode)
        with av.open(str(path)) as container:
            base = container.streams.video[0].time_base
        submitted = [float(pts * base) for pts in rig.decoder.pts]
        assert submitted == [at for at, is_reference in pictures(path) if is_reference or mode == "exact"]
        assert got.count == len(submitted) <= ratio * clip.frames


def test_a_typical_clip_of_300_frames_costs_half_of_them(made: MakeClip) -> None:
    # x264's default of three B-pictures, chosen by content, as in DFDC: one group, most B-pictures in twos and threes.
    path = made(x264("typical.mp4", "", frames=300))
    got = Rig().decode(path, "uniform:17", "reference")
    assert got.fallback_reason == ""
    assert len(got.images) == 17
    assert got.count <= 160


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_orientation(made: MakeClip, tmp_path: Path, degrees: int, mirrored: bool) -> None:
    path = tmp_path / "turned.mp4"
    path.write_bytes(rotated(made(H264_KEYS).read_bytes(), degrees, mirrored=mirrored))
    got = Rig().decode(path, "uniform:3", "reference")
    assert {(i.rotation, i.mirrored) for i in got.images} == {(degrees, mirrored)}
    check_same(got, on_cpu(path, "uniform:3", "reference"))


HDR = x265(
    "hdr.mp4", "keyint=12:transfer=smpte2084:colorprim=bt2020:colormatrix=bt2020nc", pix_fmt="yuv420p10le", frames=24
)
WIDE = x264("wide.mp4", "keyint=12:sar=4/3", frames=24)


@pytest.mark.parametrize("clip", [HDR, WIDE], ids=str)
def test_hdr_and_the_shape_of_pixels(made: MakeClip, clip: Clip) -> None:
    got = Rig().decode(made(clip), "uniform:3", "reference")
    assert (got.name, got.fallback_reason) == ("nvdec", "")
    assert {(i.transfer, i.pixel_aspect) for i in got.images} == {("pq", 1.0) if clip is HDR else ("sdr", 4 / 3)}
    check_same(got, on_cpu(made(clip), "uniform:3", "reference"))


@pytest.mark.parametrize("frames", [0, 1, 24])
def test_of_several_streams_the_one_that_is_scored_is_decoded(made: MakeClip, tmp_path: Path, frames: int) -> None:
    other = x265(f"other_{max(frames, 1)}.mp4", "keyint=12", wh=(96, 80), frames=max(frames, 1))
    parts = [(made(other), 0 if frames > 1 else 1), (made(H264_KEYS), 1 if frames > 1 else 0)]
    path = joined_streams(tmp_path / "both.mkv", parts, empty=() if frames else (0,))
    got = Rig().decode(path, "uniform:3", "reference")
    assert (got.name, got.fallback_reason) == ("nvdec", "")
    assert {i.upright_hw for i in got.images} == {(120, 160)}
    assert len(got.warnings) == (frames > 1)
    check_same(got, on_cpu(path, "uniform:3", "reference"))


@pytest.mark.parametrize("wh", [(162, 118), (178, 146), (1920, 1080)])
@pytest.mark.parametrize("codec", [x264, x265], ids=["h264", "hevc"])
def test_coded_sizes_are_cropped(made: MakeClip, codec: Callable[..., Clip], wh: tuple[int, int]) -> None:
    path = made(codec(f"crop_{codec.__name__}_{wh[0]}.mp4", "keyint=12", wh=(wh[0] // 4 * 2, wh[1] // 4 * 2), frames=4))
    got = Rig().decode(path, "every:1", "exact")
    assert got.fallback_reason == ""
    check_same(got, on_cpu(path, "every:1", "exact"))


@pytest.mark.parametrize("memory_frames", [0, 1, 3, 99])
def test_chunks(made: MakeClip, memory_frames: int) -> None:
    path, rig = made(H264_KEYS), Rig()
    got = rig.decode(path, "uniform:10", "exact", memory_bytes=memory_frames * 160 * 120 * 3 // 2)
    assert len(got.parts) == {0: 10, 1: 10, 3: 4, 99: 1}[memory_frames]
    check_same(got, on_cpu(path, "uniform:10", "exact"))


def test_edit_list_that_hides_the_first_key_frame(data_dir: Path) -> None:
    path = data_dir / "odd" / "discard_first_keyframe.mp4"
    for mode in MODES:
        got = Rig().decode(path, "every:1", mode)
        assert got.fallback_reason == ""
        check_same(got, on_cpu(path, "every:1", mode))


def test_real_files(data_dir: Path) -> None:
    rig, on_gpu = Rig(), 0
    paths = [
        *(data_dir / "odd").iterdir(),
        *sorted(p for p in (data_dir / "clips").iterdir() if p.suffix != ".csv")[:6],
    ]
    for path in sorted(paths):
        for mode in MODES:
            try:
                cpu = on_cpu(path, "uniform:5", mode)
            except Exception as error:
                with pytest.raises(type(error)):
                    rig.decode(path, "uniform:5", mode)
                continue
            got = rig.decode(path, "uniform:5", mode)
            on_gpu += not got.fallback_reason
            if got.fallback_reason:
                assert len(got.images) == len(cpu.images)
            else:
                check_same(got, cpu)
    assert on_gpu > 30


# -- fallback ----------------------------------------------------------------------------------------------------------


def check_falls_back(rig: Rig, path: Path, reason: str, mode: Mode = "reference", policy: str = "uniform:7") -> Decoded:
    got = rig.decode(path, policy, mode)
    assert got.fallback_reason == reason
    assert got.name == "pyav"
    cpu = on_cpu(path, policy, mode)
    assert (got.seconds, got.count, got.warnings) == (cpu.seconds, cpu.count, cpu.warnings)
    for a, b in zip(got.images, cpu.images, strict=True):
        assert (a.bit_depth, a.subsampling_xy) == (b.bit_depth, b.subsampling_xy)
        assert all(np.array_equal(array_of(x), y) for x, y in zip(a.components, b.components, strict=True)), "uploaded"
    return got


def clip_named(name: str) -> Clip:
    return next(c for c in CLIPS if c.name == name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vp9.webm", "NVDEC is used for H.264 and HEVC alone; the codec is vp9"),
        ("av1.mkv", "NVDEC is used for H.264 and HEVC alone; the codec is libdav1d"),
        ("mjpeg.avi", "NVDEC is used for H.264 and HEVC alone; the codec is mjpeg"),
        ("h264_444.mp4", "NVDEC is used for 4:2:0 alone; this is 4:4:4"),
        ("h264_422.mkv", "NVDEC is used for 4:2:0 alone; this is 4:2:2"),
        ("h264_gray.mp4", "NVDEC is used for 4:2:0 alone; this is 4:0:0"),
        ("hevc_rgb.mkv", "NVDEC is used for 4:2:0 alone; this is 4:4:4"),
        ("h264_interlaced.mp4", "the video is interlaced; NVDEC would change its pictures"),
        (
            "h264_bframes.avi",
            "the file does not state when frames are shown; NVDEC's frames are told apart by that",
        ),
    ],
)
def test_video_that_nvdec_is_not_for(made: MakeClip, name: str, reason: str) -> None:
    rig = Rig()
    check_falls_back(rig, made(clip_named(name)), reason)
    assert rig.nvc.decoders == []


@pytest.mark.parametrize(
    ("caps", "reason"),
    [
        ({"supported": 0}, "NVDEC of this GPU does not take H.264 with 8 bits"),
        (
            {"width_min": 144, "height_min": 144},
            "NVDEC of this GPU takes H.264 of 144x144 to 4096x4096 pixels and at most 65536 macroblocks; "
            "this is 160x128",
        ),
        (
            {"mb_num_max": 79},
            "NVDEC of this GPU takes H.264 of 48x16 to 4096x4096 pixels and at most 79 macroblocks; this is 160x128",
        ),
    ],
)
def test_the_driver_is_asked_what_it_takes(made: MakeClip, caps: dict[str, int], reason: str) -> None:
    rig = Rig()
    rig.nvc.caps["h264", 8] = caps
    pool = NvdecPool(rig.gpu, nvc=rig.nvc)
    rig.pool = pool
    check_falls_back(rig, made(H264_KEYS), reason)
    asked = rig.nvc.asked
    check_falls_back(rig, made(H264_KEYS), reason)
    assert rig.nvc.asked == asked, "asking makes a CUDA context"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"create_fails": True}, "NVDEC cannot be started: PyNvDecoder constructor failed: no libnvcuvid.so.1"),
        ({"fail_at": 0}, "NVDEC failed: cuvidDecodePicture returned error 999"),
        ({"fail_at": 9}, "NVDEC failed: cuvidDecodePicture returned error 999"),
        ({"fail_at": -1}, "NVDEC failed: cuvidParseVideoData returned error 1"),
        ({"lost": {3}}, None),
        ({"lost": {0}}, None),
        ({"late": 1}, None),
        ({"shown_size": (160, 118)}, "NVDEC gave frames of 160x118 for 160x120, with 18880 bytes of luma"),
        ({"kind": "P016"}, "NVDEC gave frames of kind P016 for 8 bits"),
        ({"kind": "YUV444"}, "NVDEC gave frames of kind YUV444 for 8 bits"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_faults(made: MakeClip, faults: dict[str, object], reason: str | None, mode: Mode) -> None:
    rig, path = Rig(**faults), made(B_PYRAMID)
    got = rig.decode(path, "every:1", mode)
    assert got.name == "pyav"
    cpu = on_cpu(path, "every:1", mode)
    assert got.seconds == cpu.seconds
    assert got.warnings == []
    if reason is None:
        assert got.fallback_reason.startswith("NVDEC gave the frame with time stamp ")
    else:
        assert got.fallback_reason == reason
    assert "\n" not in got.fallback_reason
    # The decoder that failed is not used again, and the next video gets another.
    rig.nvc.heal()
    before = len(rig.nvc.decoders)
    again = rig.decode(path, "every:1", mode)
    assert again.fallback_reason == ""
    assert len(rig.nvc.decoders) == before + 1
    check_same(again, cpu)


def test_a_fault_between_chunks_hands_no_frame_out_twice(made: MakeClip) -> None:
    path = made(H264_KEYS)
    cpu = on_cpu(path, "every:10", "exact")
    whole = Rig()
    whole.decode(path, "every:10", "exact")
    submitted = len(whole.decoder.packets)
    for fail_at in (1, submitted // 3, submitted // 2, submitted - 1):
        got = Rig(fail_at=fail_at).decode(path, "every:10", "exact", memory_bytes=2 * 160 * 120 * 3 // 2)
        assert got.fallback_reason.startswith("NVDEC failed: ")
        assert got.seconds == cpu.seconds
        assert [p.is_last for p in got.parts] == [False] * (len(got.parts) - 1) + [True]
        for a, b in zip(got.images, cpu.images, strict=True):
            luma = array_of(a.components[0])
            assert np.array_equal(luma, b.components[0])


def test_a_crop_at_the_left(made: MakeClip, tmp_path: Path) -> None:
    path = tmp_path / "left.ts"
    with av.open(str(made(clip_named("h264_keys.ts")))) as source, av.open(str(path), "w") as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        crop = BitStreamFilterContext("h264_metadata=crop_left=64:crop_top=8", source.streams.video[0])
        for packet in (p for p in source.demux(video=0) if p.size):
            for cropped in crop.filter(packet):
                cropped.stream = stream
                sink.mux(cropped)
    rig = Rig()
    got = rig.decode(path, "uniform:5", "exact")
    assert got.fallback_reason == "the video is cropped at the left or at the top; NVDEC would crop it elsewhere"
    assert {i.upright_hw for i in got.images} == {(112, 96)}


def test_two_sizes_in_one_video(made: MakeClip, tmp_path: Path) -> None:
    path = tmp_path / "sizes.ts"
    with open(path, "wb") as out:
        for i, wh in enumerate([(160, 128), (192, 128)]):
            part = made(x264(f"size{i}.h264", "keyint=12", wh=wh, frames=20, container="h264"))
            out.write(part.read_bytes())
    with av.open(str(path), format="h264") as source, av.open(str(tmp_path / "both.ts"), "w", format="mpegts") as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(p for p in source.demux(video=0) if p.size):
            packet.pts = packet.dts = i * 3600
            packet.time_base = stream.time_base or packet.time_base
            packet.stream = stream
            sink.mux(packet)
    rig = Rig()
    got = rig.decode(tmp_path / "both.ts", "uniform:4", "exact")
    assert got.fallback_reason == "the video has 2 sequence parameter sets; NVDEC is used for one alone"
    assert {i.upright_hw for i in got.images} == {(128, 160), (128, 192)}


@pytest.mark.parametrize("clip", [H264_KEYS, HEVC_FASTSTART], ids=str)
def test_damaged_files_are_judged_by_the_cpu(made: MakeClip, tmp_path: Path, clip: Clip) -> None:
    data = made(clip).read_bytes()
    damaged = [truncated(data, r / 10) for r in range(3, 10)] + [flipped(data, r / 10) for r in range(3, 10)]
    verdicts = []
    for i, content in enumerate(damaged):
        path = tmp_path / f"{i}{made(clip).suffix}"
        path.write_bytes(content)
        try:
            cpu = on_cpu(path, "uniform:10", "exact")
        except Exception as error:
            with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
                Rig().decode(path, "uniform:10", "exact")
            verdicts.append("refused")
            continue
        got = Rig().decode(path, "uniform:10", "exact")
        verdicts.append(got.fallback_reason)
        if got.fallback_reason:
            assert (got.seconds, got.warnings) == (cpu.seconds, cpu.warnings)
    assert any(v.startswith("the file is damaged: ") for v in verdicts)


def test_a_cut_that_is_refused_is_refused_by_both(made: MakeClip, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(truncated(made(H264_KEYS).read_bytes(), 0.45))
    with pytest.raises(DecodeError, match=r"\d of 10 wanted frames could be decoded, at least half are needed"):
        Rig().decode(path, "uniform:10", "exact")


def test_without_a_pool_frames_are_decoded_on_the_cpu_and_uploaded(made: MakeClip) -> None:
    rig = Rig()
    with open_video(made(AVI_NO_PTS), lane=rig.lane) as video:
        (frames,) = video.frames(Sampling.parse("uniform:5", "exact"))
    assert (video.name, video.fallback_reason) == ("pyav", "")
    for a, b in zip(frames.images, on_cpu(made(AVI_NO_PTS), "uniform:5", "exact").images, strict=True):
        assert all(np.array_equal(array_of(x), y) for x, y in zip(a.components, b.components, strict=True))


# -- memory ------------------------------------------------------------------------------------------------------------


def test_frames_are_the_callers_and_nothing_leaks(made: MakeClip) -> None:
    rig, path = Rig(), made(B_PYRAMID)
    got = rig.decode(path, "uniform:8", "exact")
    before = [[array_of(c).copy() for c in image.components] for image in got.images]
    rig.decode(path, "every:1", "exact")  # would take over freed buffers
    for image, planes in zip(got.images, before, strict=True):
        assert all(np.array_equal(array_of(a), b) for a, b in zip(image.components, planes, strict=True))
    assert rig.gpu.live_bytes > 0
    del got, image
    gc.collect()
    assert rig.gpu.live_bytes == 0


def test_unwanted_frames_are_not_copied(made: MakeClip) -> None:
    rig = Rig()
    rig.decode(made(H264_KEYS), "uniform:5", "exact")
    calls = [c for c in rig.gpu.fake.calls if c in ("record", "wait", "dtod")]
    assert calls == ["record", "wait", "dtod", "record", "wait"] * 5, "each copy waits, and is waited for"


def test_a_gpu_without_memory_says_so(made: MakeClip) -> None:
    rig, path = Rig(memory_bytes=100_000), made(H264_KEYS)
    with open_video(path, lane=rig.lane, pool=rig.pool) as video, pytest.raises(DeviceMemoryError, match="no room for"):
        list(video.frames(Sampling.parse("uniform:9", "exact")))
    assert rig.decode(path, "uniform:1", "exact").fallback_reason == "", "the pool still has both decoders to lend"


# -- the pool ----------------------------------------------------------------------------------------------------------


def test_the_size_comes_from_the_engines(made: MakeClip) -> None:
    nvc = FakeNvc()
    assert NvdecPool(FakeGpu(), nvc=nvc).size == 4
    nvc.caps["h264", 8] = {"num_decoder_engines": 7}
    assert NvdecPool(FakeGpu(), nvc=nvc).size == 14
    assert NvdecPool(FakeGpu(), 3, nvc=nvc).size == 3


def test_decoders_are_used_again_for_equal_parameter_sets_alone(made: MakeClip) -> None:
    # The same coded size, another display size: a decoder that is kept would crop wrongly. And 8, then 10 bits.
    clips = [
        x264("display_532.mp4", "keyint=12", wh=(320, 132), frames=6),
        x264("display_530.mp4", "keyint=12", wh=(320, 130), frames=6),
        x264("deep.mp4", "keyint=12", wh=(320, 132), frames=6, pix_fmt="yuv420p10le"),
    ]
    rig = Rig(size=1)
    for count, clip in enumerate([*clips, *clips], start=1):
        for _ in range(2):
            got = rig.decode(made(clip), "every:1", "exact")
            assert got.fallback_reason == ""
            check_same(got, on_cpu(made(clip), "every:1", "exact"))
        assert len(rig.nvc.decoders) == count


def test_streams_are_not_left_behind(made: MakeClip) -> None:
    rig = Rig(size=1)
    clips = [x264(f"room{i}.mp4", "keyint=12", wh=(320, 96 + 32 * i), frames=4) for i in range(2)]
    for fault in (None, 0, None):
        rig.nvc.fail_at = fault
        for clip in clips * 2:
            rig.decode(made(clip), "first:1", "exact")
    assert len(rig.nvc.decoders) == 12
    assert len(rig.gpu._lanes) == 2, "the caller's and one for the pool"


def test_the_decoder_unused_longest_makes_room(made: MakeClip) -> None:
    a, b, c = (x264(f"room{i}.mp4", "keyint=12", wh=(320, 96 + 32 * i), frames=4) for i in range(3))
    rig = Rig(size=2)
    for clip in (a, b, a, c, a):
        rig.decode(made(clip), "first:1", "exact")
    assert len(rig.nvc.decoders) == 3, "b made room for c"


def test_a_video_that_is_left_early_gives_its_decoder_back(made: MakeClip) -> None:
    rig, path = Rig(size=1), made(H264_KEYS)
    with open_video(path, lane=rig.lane, pool=rig.pool) as video:
        parts = video.frames(Sampling.parse("every:1", "exact"), memory_bytes=0)
        assert next(parts).frame_index.tolist() == [0]
        parts.close()
    with open_video(path, lane=rig.lane, pool=rig.pool) as video:
        next(video.frames(Sampling.parse("every:1", "exact"), memory_bytes=0))  # closed by leaving the block
    got = rig.decode(path, "every:7", "exact")
    check_same(got, on_cpu(path, "every:7", "exact"))
    assert len(rig.nvc.decoders) == 1


def test_waiting_is_bounded(made: MakeClip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvdec, "WAIT_SECONDS", 0.05)
    rig, path = Rig(size=1), made(H264_KEYS)
    with open_video(path, lane=rig.lane, pool=rig.pool) as video:
        parts = video.frames(Sampling.parse("every:1", "exact"), memory_bytes=0)
        next(parts)
        check_falls_back(rig, path, "none of 1 NVDEC decoders became free in 0 s")
    assert rig.decode(path, "uniform:7", "exact").fallback_reason == ""


def test_many_threads_share_few_decoders(made: MakeClip) -> None:
    rig = Rig(size=2)
    clips = [H264_KEYS, B_PYRAMID, HEVC_OPEN_GOP]
    expected = {clip: on_cpu(made(clip), "uniform:6", "reference") for clip in clips}
    failures: list[BaseException] = []

    def work(start: int) -> None:
        lane = rig.gpu.lane()
        try:
            for i in range(4):
                clip = clips[(start + i) % 3]
                with open_video(made(clip), lane=lane, pool=rig.pool) as video:
                    parts = list(video.frames(Sampling.parse("uniform:6", "reference"), memory_bytes=1))
                assert video.fallback_reason == ""
                check_same(Decoded(video, parts), expected[clip])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_closed_pool_lends_nothing(made: MakeClip) -> None:
    rig, path = Rig(size=1), made(H264_KEYS)
    with open_video(path, lane=rig.lane, pool=rig.pool) as video:
        parts = video.frames(Sampling.parse("every:30", "exact"), memory_bytes=0)
        next(parts)
        rig.pool.close()
        assert len(list(parts)) == 3, "what is lent goes on"
    check_falls_back(rig, path, "the engine was closed")


def test_a_closed_pool_wakes_who_waits(made: MakeClip) -> None:
    rig, path = Rig(size=1), made(H264_KEYS)
    reasons: list[str] = []

    def wait() -> None:
        with pytest.raises(CannotDecode) as caught:
            rig.pool.borrow(("h264", b"other"))
        reasons.append(str(caught.value))

    with open_video(path, lane=rig.lane, pool=rig.pool) as video:
        parts = video.frames(Sampling.parse("every:30", "exact"), memory_bytes=0)
        next(parts)
        thread = threading.Thread(target=wait)
        thread.start()
        rig.pool.close()
        thread.join()
    assert reasons == ["the engine was closed"]


def test_a_driver_that_cannot_be_asked(made: MakeClip) -> None:
    rig = Rig()
    rig.nvc.caps["hevc", 8] = None  # type: ignore[assignment]
    got = rig.decode(made(HEVC_FASTSTART), "uniform:2", "exact")
    assert got.fallback_reason.startswith("NVDEC cannot be asked what it takes: ")


def test_the_package_that_is_missing_is_named() -> None:
    with pytest.raises(DeviceError, match=r"NVDEC cannot be used: .*; pip install 'dfengine\[gpu\]'"):
        NvdecPool(FakeGpu())
