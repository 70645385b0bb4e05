"""Path -> log-mel: what a member of kind "audio" gets beside the crops. Training uses the very same function.

Note [Sound that is missing]
The log-mel is scaled so that silence is 0 and full scale about 1. A video without a sound track, or with one that
cannot be decoded, is all zeros, as digital silence is, and ``Sound.missing`` says why. Zeros are no verdict: a member
of kind "audio" is trained on such videos too, and the score carries the reason as a warning.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import av
import numpy as np
from numpy.typing import NDArray

from dfengine.bundle import AudioSettings
from dfengine.errors import SourceNotFound, first_line
from dfengine.stages.media import GONE, may_pass, open_media, raise_if_it_may_pass
from dfengine.types import F32, F64, PathLikeStr

STAGE = "audio"


@dataclass(frozen=True, eq=False)
class Sound:
    """The sound of one video. ``missing``: why there is none, or None."""

    log_mel: F32  # (bands, frames), 0 for silence, about 1 for full scale
    missing: str | None = None


def load_log_mel(path: PathLikeStr, settings: AudioSettings) -> Sound:
    """The log-mel of the first ``settings.seconds`` of a video's sound. Nothing is raised for what is in the file.

    Raises SourceNotReadable where the file cannot be read now, and SourceNotFound where it is gone, as decoding does.
    """
    try:
        samples = decode_mono(path, settings.sample_rate, int(settings.seconds * settings.sample_rate))
    except FileNotFoundError:  # av's own is one too
        raise SourceNotFound(GONE, path=path, stage=STAGE) from None
    except (av.FFmpegError, ValueError, OSError) as error:
        raise_if_it_may_pass(error, path, STAGE)
        return _silence(f"the sound cannot be decoded ({first_line(error)})", settings)
    if len(samples) == 0:
        return _silence("there is no sound track, or nothing in it", settings)
    return Sound(log_mel(samples, settings))


def decode_mono(path: PathLikeStr, sample_rate: int, limit: int) -> F32:
    """At most ``limit`` samples of the first sound track, (N,), the mean of its channels; none if there is no track.

    Full scale is 1. Raises av.FFmpegError, ValueError or OSError if nothing could be decoded, or where the file cannot
    be read now; damage further behind ends the sound there.
    """
    blocks: list[F32] = []
    count = 0
    with open_media(path) as container:
        if not container.streams.audio:
            return np.zeros(0, np.float32)
        # The channels are averaged here: FFmpeg's mono of two equal channels is louder than each.
        resampler = av.AudioResampler(format="fltp", rate=sample_rate)
        try:
            for frame in container.decode(container.streams.audio[0]):
                for block in resampler.resample(frame):
                    blocks.append(_mono(block))
                    count += len(blocks[-1])
                if count >= limit:
                    break
            blocks += [_mono(block) for block in resampler.resample(None)]
        except (av.FFmpegError, ValueError) as error:  # ValueError: the layout or the rate changes on the way
            if count == 0 or may_pass(error):
                raise
    samples = np.concatenate([np.zeros(0, np.float32), *blocks])[:limit].astype(np.float32)
    return np.nan_to_num(samples, posinf=1.0, neginf=-1.0).astype(np.float32)  # float codecs may hold anything


def _mono(block: av.AudioFrame) -> F32:
    return np.asarray(block.to_ndarray().mean(axis=0), np.float32)


def log_mel(samples: F32, settings: AudioSettings) -> F32:
    """Mono samples (N,) -> (bands, frames); what is missing at the end is silence.

    Hann window, power spectrum over the window's energy (a full-scale sine has .2 to .5 in its band), mel bands
    after HTK, 2595 log10(1 + Hz / 700), as triangles of height 1.
    """
    need = (settings.frames - 1) * settings.hop + settings.window
    padded = np.zeros(need, np.float64)
    padded[: min(need, len(samples))] = samples[:need]
    starts = settings.hop * np.arange(settings.frames)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(settings.window) / settings.window)
    windows = padded[starts[:, None] + np.arange(settings.window)] * hann  # (frames, window)
    power = np.abs(np.fft.rfft(windows)) ** 2 * (2 / (hann**2).sum() / settings.window)
    mel = np.maximum(mel_filters(settings) @ power.T, settings.floor)
    scaled: F64 = 1 - np.log(mel) / np.log(settings.floor)
    return scaled.astype(np.float32)


@cache
def mel_filters(settings: AudioSettings) -> F64:
    """(bands, window // 2 + 1)"""

    def to_mel(hz: float) -> float:
        return 2595 * float(np.log10(1 + hz / 700))

    edges_mel = np.linspace(to_mel(settings.low_hz), to_mel(settings.high_hz), settings.bands + 2)
    edges: NDArray[np.float64] = 700 * (10 ** (edges_mel / 2595) - 1)
    hz = np.arange(settings.window // 2 + 1) * settings.sample_rate / settings.window
    up = (hz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - hz) / (edges[2:] - edges[1:-1])[:, None]
    return np.asarray(np.maximum(0, np.minimum(up, down)), np.float64)


def _silence(why: str, settings: AudioSettings) -> Sound:
    return Sound(np.zeros((settings.bands, settings.frames), np.float32), why)
