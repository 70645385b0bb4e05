"""The sound of a video and its log-mel, against plain NumPy and pure tones."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from assets import FACE, NOBODY, write_clip

from dfengine.bundle import AudioSettings
from dfengine.errors import SourceNotFound, SourceNotReadable
from dfengine.stages.audio import decode_mono, load_log_mel, log_mel, mel_filters
from dfengine.stages.media import open_media

SETTINGS = AudioSettings(seconds=0.5)


def tone(hz: float, seconds: float, rate: int, gain: float = 1.0) -> np.ndarray:
    return (gain * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path: Path, samples: np.ndarray, rate: int) -> Path:
    """``samples``: (channels, N) in -1..1, as 16-bit PCM."""
    with av.open(str(path), "w", format="wav") as out:
        layout = "mono" if len(samples) == 1 else "stereo"
        stream = out.add_stream("pcm_s16le", rate=rate, layout=layout)
        packed = (samples.T.reshape(1, -1) * 32767).round().astype(np.int16)
        frame = av.AudioFrame.from_ndarray(packed, format="s16", layout=layout)
        frame.sample_rate = rate
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def test_log_mel_against_plain_numpy(rng: np.random.Generator) -> None:
    samples = rng.normal(0, 0.1, 8000).astype(np.float32)
    got = log_mel(samples, SETTINGS)
    n = SETTINGS.window
    hann = np.array([0.5 - 0.5 * np.cos(2 * np.pi * i / n) for i in range(n)])
    filters = mel_filters(SETTINGS)
    assert got.shape == (SETTINGS.bands, SETTINGS.frames) == (64, 48)
    for frame in (0, 17, 47):
        window = samples[frame * SETTINGS.hop :][:n] * hann
        power = np.array(
            [abs(sum(window * np.exp(-2j * np.pi * k * np.arange(n) / n))) ** 2 for k in range(n // 2 + 1)]
        )
        mel = filters @ (power * 2 / (hann**2).sum() / n)
        np.testing.assert_allclose(got[:, frame], 1 - np.log(np.maximum(mel, 1e-6)) / np.log(1e-6), atol=1e-5)


@pytest.mark.parametrize("hz", [150, 440, 1000, 3000, 7000])
def test_a_tone_is_loudest_in_its_own_band(hz: float) -> None:
    mel = log_mel(tone(hz, 0.5, 16000), SETTINGS).mean(axis=1)
    bins = np.arange(SETTINGS.window // 2 + 1) * 40.0
    centres = (mel_filters(SETTINGS) * bins).sum(axis=1) / mel_filters(SETTINGS).sum(axis=1)
    assert np.argmax(mel) in np.argsort(abs(centres - hz))[:2]
    assert 0.85 < mel.max() < 1.0


def test_silence_is_zero_and_what_is_missing_is_silence() -> None:
    assert (log_mel(np.zeros(8000, np.float32), SETTINGS) == 0).all()
    short = log_mel(tone(440, 0.2, 16000), SETTINGS)
    whole = log_mel(tone(440, 0.5, 16000), SETTINGS)
    np.testing.assert_array_equal(short[:, :17], whole[:, :17])
    assert (short[:, 21:] == 0).all()
    assert (log_mel(np.zeros(0, np.float32), SETTINGS) == 0).all()


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_files_of_any_rate_and_layout_sound_the_same(tmp_path: Path, rate: int) -> None:
    mono = write_wav(tmp_path / "mono.wav", tone(440, 1, rate, 0.5)[None], rate)
    stereo = write_wav(tmp_path / "stereo.wav", np.stack([tone(440, 1, rate, 0.5)] * 2), rate)
    want = log_mel(tone(440, 1, 16000, 0.5), SETTINGS)
    for path in (mono, stereo):
        sound = load_log_mel(path, SETTINGS)
        assert sound.missing is None
        loud = want > 0.5
        np.testing.assert_allclose(sound.log_mel[:, 2:][loud[:, 2:]], want[:, 2:][loud[:, 2:]], atol=0.02)


def test_no_more_is_decoded_than_asked(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "long.wav", tone(440, 30, 16000)[None], 16000)
    assert decode_mono(path, 16000, 4000).shape == (4000,)
    assert decode_mono(path, 16000, 10**9).shape == (480000,)


def test_a_video_without_sound_says_so(tmp_path: Path) -> None:
    silent = load_log_mel(write_clip(NOBODY, tmp_path), SETTINGS)
    assert silent.missing == "there is no sound track, or nothing in it"
    assert (silent.log_mel == 0).all()
    assert silent.log_mel.shape == (64, 48)
    assert load_log_mel(write_clip(FACE, tmp_path), SETTINGS).missing is None  # recorded silence is sound


def test_a_playlist_opens_nothing_else(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", tone(440, 1, 16000)[None], 16000)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\na.wav\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile a.wav\n")
    for name in ("list.m3u8", "list.ffconcat"):
        assert "the sound cannot be decoded (" in (load_log_mel(tmp_path / name, SETTINGS).missing or ""), name


def test_a_name_that_is_an_address_to_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_wav(tmp_path / "a.wav", tone(440, 1, 16000)[None], 16000).rename("http:a.wav")
    assert load_log_mel("http:a.wav", SETTINGS).missing is None


def test_what_cannot_be_decoded_says_so(tmp_path: Path) -> None:
    path = tmp_path / "text.mp4"
    path.write_text("no media")
    assert "the sound cannot be decoded (" in (load_log_mel(path, SETTINGS).missing or "")


def test_a_file_that_is_gone_is_no_silence(tmp_path: Path) -> None:
    """Its pictures may be in memory still; a score that heard nothing would be kept for good."""
    with pytest.raises(SourceNotFound, match="was there and is gone; score it again from where it is now") as caught:
        load_log_mel(tmp_path / "gone.mp4", SETTINGS)
    assert caught.value.stage == "audio"


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("when", ["open", "first", "later"])
def test_a_fault_of_the_machine_is_no_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, when: str
) -> None:
    """As while pictures are decoded: the file may be good, and is to be scored again."""
    path = write_wav(tmp_path / "a.wav", tone(440, 1, 16000)[None], 16000)

    def fail(*args: object) -> None:
        raise av.error.FFmpegError(number, os.strerror(number))

    class Failing:
        def __init__(self, container: av.container.InputContainer) -> None:
            self.streams, self._container = container.streams, container

        def decode(self, stream: object) -> Iterator[av.AudioFrame]:
            if when == "later":
                yield next(self._container.decode(stream))
            fail()

    @contextmanager
    def open_failing(path: Path) -> Iterator[Failing]:
        with open_media(path) as container:
            yield Failing(container)

    monkeypatch.setattr("dfengine.stages.audio.open_media", fail if when == "open" else open_failing)
    with pytest.raises(
        SourceNotReadable, match=r"the file cannot be read \(.*\); score it again when it can"
    ) as caught:
        load_log_mel(path, SETTINGS)
    assert caught.value.stage == "audio"
