"""A bundle: weights bound to everything that is needed to score with them.

A folder with ``bundle.json`` and one ONNX file per network. Preprocessing, sampling, tracking, aggregation and
calibration come from it, so that none of them can be forgotten or guessed. Loading executes no code: JSON and ONNX
only, hashes verified, paths confined to the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from dfengine.errors import BundleError, BundleNotFound
from dfengine.sampling import Mode, Policy
from dfengine.settings import AboveZero, Count, NotNegative, Share, ZeroOrMore, from_plain, to_plain
from dfengine.types import PathLikeStr

# 2 has what a crop is in one place, members[i].crop. 1 had its fields flat in the member.
SCHEMA_VERSION = 2
PACKAGED = Path(__file__).parent / "bundles"

Precision = Literal["fp32", "bf16"]
MarginRatio = Annotated[float, Meta(gt=-1)]  # at -1 nothing of the box is left
Std = Annotated[float, Meta(gt=1e-6)]  # smaller ones would blow rounding up to pictures


@dataclass(frozen=True, kw_only=True)
class DetectorSettings:
    """Settings of the MTCNN cascade. Defaults are facenet-pytorch's unless a reason is given."""

    # A bundle with members pnet, rnet and onet: the name of a packaged one, or a folder inside the bundle's own.
    nets: str = "mtcnn"
    # sha256 of its bundle.json, which holds the hashes of the networks. Every bundle that scores states it; None, where
    # settings belong to no bundle yet, takes the networks as they are.
    digest: str | None = None
    # Smallest face that is looked for, as a share of the frame's shorter side. 0.05 is 54 px in 1080p and 24 px in
    # 480p: below that a crop holds fewer pixels than any member's input has, and P-Net's cost grows with 1 / size^2.
    min_face_ratio: Annotated[float, Meta(gt=0, le=1)] = 0.05
    # Scores from which P-Net, R-Net and O-Net take a box for a face. A score equal to its threshold is enough, as with
    # every minimum here and in TrackingSettings; facenet-pytorch has it so for P-Net only.
    thresholds: tuple[Share, Share, Share] = (0.6, 0.7, 0.7)
    pyramid_factor: Annotated[float, Meta(gt=0, lt=1)] = 0.709
    # In reference and keyframe mode every stride-th sampled frame goes through the whole cascade, those between only
    # where that is needed (Note [Frames between] in dfengine.stages.detect). Of 2, 3 and 4, three changed the scores of
    # 16 clips least for what it saved: mean .006, where a different colour conversion changes them by .005.
    stride: Count = 3
    # A frame whose brightest pixels (99th percentile of luma, 0..255) stay below this gets a second try, brightened.
    # 150 is the limit of github.com/zengm71/DeepFakeChallenge, which names dark frames as its main misses.
    dark_below: Annotated[float, Meta(ge=0, le=255)] = 150.0
    # A gain of 6 spreads the last 42 of 255 levels over the whole range; what is darker holds little but noise and
    # quantisation. Chosen, not fitted.
    max_gain: Annotated[float, Meta(ge=1)] = 6.0


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """When faces are one person, and which persons count. See dfengine.stages.track for how they are used.

    What equals a minimum is enough, and what equals a maximum is not too much.
    """

    # Low, because samples lie half a second apart: a face that moved by two thirds of its width still overlaps with
    # itself at .2. Faces of different people hardly overlap, and the best pairs are taken first. At the .3 usual for
    # dense video (NTech-Lab) three of 16 test clips of one person split in two; at .1 none does.
    min_iou: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    # A person ends after having been gone for longer than both. DFDC clips last 10 s and the detector's blinks stay
    # far below 2 s; the count is for sparse sampling, where a single frame may span more than that.
    max_gap_seconds: NotNegative = 2.0
    max_gap_frames: ZeroOrMore = 2
    # Share of the sampled frames a person must be detected in. False faces are brief: the 3rd place of the DFDC
    # (NTech-Lab) asks for 7 of about 50 boxes (14 %), the 5th for a run of 30 of 300 frames (10 %).
    min_detected_ratio: Share = 0.15
    # Median confidence of a person. Hands, T-shirts and paintings pass MTCNN's own .7 now and then; a team of the
    # DFDC (zengm71) went to .9 for every single face. The median over time keeps faces that blur for a moment.
    min_confidence: Share = 0.9
    # Side of a person's face against the largest face. SelfBlendedImages scores faces of at least half the largest
    # *area* (.71 of the side); people who sit at different depths need more room. Chosen, not fitted.
    min_relative_side: Share = 0.35
    # Prints and paintings before a fixed camera: movement of the landmarks in the frame, in box sides (root mean
    # square). Measured with this detector: 24 photographs under camera noise, re-encoded at CRF 26, at most .0053; the
    # stillest of the people in 16 test clips .0198.
    min_motion: NotNegative = 0.01


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """frames -> track (per member), members -> track, tracks -> video."""

    frames: Literal["mean", "logit_mean", "median"] = "logit_mean"
    members: Literal["mean", "geometric_mean", "logit_mean"] = "logit_mean"
    tracks: Literal["max", "mean", "largest"] = "max"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """p_fake = sigmoid(logit / temperature + bias), on the blended logit of each track."""

    temperature: AboveZero = 1.0
    bias: float = 0.0
    fitted_on: str = ""


@dataclass(frozen=True, kw_only=True)
class AudioSettings:
    """The sound that a member of kind "audio" takes. See dfengine.stages.audio for how the log-mel is made."""

    # 16 kHz, windows of 25 ms every 10 ms, 64 bands from 60 to 7800 Hz: the front end of YouTube's VGGish (Hershey et
    # al. 2017, arXiv:1609.09430, has 125 to 7500 Hz), widened at both ends: synthetic voices differ in the highs.
    sample_rate: Count = 16000
    window: Annotated[int, Meta(ge=2)] = 400  # samples; also the length of the Fourier transform
    hop: Count = 160  # samples
    bands: Count = 64
    low_hz: NotNegative = 60.0
    high_hz: AboveZero = 7800.0
    # From the start of the sound; a DFDC clip lasts 10 s. An hour is far above any use, and bounds what a header may
    # cost.
    seconds: Annotated[float, Meta(gt=0, le=3600)] = 10.0
    # Mel power that counts as silence. 16-bit noise of one step has 1e-7 to 1e-6 in a band.
    floor: Annotated[float, Meta(gt=0, lt=1)] = 1e-6

    @property
    def frames(self) -> int:
        """Windows in ``seconds``, all of them whole."""
        return max(0, 1 + (int(self.seconds * self.sample_rate) - self.window) // self.hop)


@dataclass(frozen=True, kw_only=True)
class CropSpec:
    """How a face becomes the input of a network: its preprocessing contract. See dfengine.stages.crop."""

    input_hw: tuple[ZeroOrMore, ZeroOrMore] = (0, 0)  # 0: any, P-Net alone
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # on RGB in 0..1
    std: tuple[Std, Std, Std] = (1.0, 1.0, 1.0)
    margin_ratio: MarginRatio = 0.0  # the crop is the face box grown by this share of its size, in total
    crop_shape: Literal["square", "box"] = "square"
    resize: Literal["triangle", "area", "bilinear"] = "triangle"
    padding: Literal["edge", "zero"] = "edge"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One network and what goes into it. All give one logit, (B, 1) or (B,); positive means fake.

    ``kind`` says what goes in: "frame" takes crops (B, 3, H, W); "clip" takes (B, clip_frames, 3, H, W), crops of one
    person in order of time; "audio" takes clips and, as a second input, the log-mel of the sound (B, bands, frames).
    How a track is cut into clips is in dfengine.stages.backbone.clip_rows.
    """

    name: str
    file: str
    sha256: str
    kind: Literal["frame", "clip", "audio", "detector"] = "frame"
    crop: CropSpec = CropSpec()
    clip_frames: Count = 1  # crops a clip; 1 for kind "frame"
    audio: AudioSettings = AudioSettings()  # for kind "audio" only
    weight: AboveZero = 1.0
    # bf16: the network may run in bfloat16 where the processor has units for it, about twice as fast. Its logits then
    # depend on the machine, in the third digit.
    precision: Precision = "fp32"

    @property
    def takes_clips(self) -> bool:
        return self.kind in ("clip", "audio")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Everything needed to score a video, except the video. Load one with ``Bundle.load``."""

    schema_version: Count
    name: str
    licence: str
    members: tuple[ModelSpec, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    experimental: bool = False
    sampling: Policy = Policy("uniform", 17)
    sampling_mode: Mode = "reference"
    detector: DetectorSettings = DetectorSettings()
    tracking: TrackingSettings = TrackingSettings()
    aggregation: Aggregation = Aggregation()
    calibration: Calibration = Calibration()
    folder: Path = field(default=Path(), metadata={"stored": False})
    # sha256 of the bytes of bundle.json, which hold the hashes of all networks; "" if not loaded from a folder.
    digest: str = field(default="", compare=False, metadata={"stored": False})

    @classmethod
    def load(cls, bundle: PathLikeStr | Bundle) -> Bundle:
        """Loads a packaged bundle by name, or any by its folder.

        Raises BundleNotFound, or BundleError for a damaged, tampered or newer bundle.
        """
        if isinstance(bundle, Bundle):
            return bundle
        folder = _find(bundle)
        try:
            text = (folder / "bundle.json").read_bytes()
            data = json.loads(text)
        except FileNotFoundError:
            raise BundleNotFound("there is no bundle.json in this folder", path=folder, stage="bundle") from None
        except (ValueError, OSError, RecursionError) as error:
            raise BundleError(f"bundle.json cannot be read ({error})", path=folder, stage="bundle") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if type(version) is not int:
            raise BundleError("bundle.json states no schema_version; this is no bundle", path=folder, stage="bundle")
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"the bundle has schema_version {version}, this dfengine reads up to {SCHEMA_VERSION}; update dfengine",
                path=folder,
                stage="bundle",
            )
        try:
            loaded = from_plain(cls, _from_version_1(data) if version == 1 else data)
            loaded = dataclasses.replace(loaded, folder=folder, digest=hashlib.sha256(text).hexdigest())
        except (TypeError, ValueError, OverflowError) as error:
            raise BundleError(f"bundle.json: {error}", path=folder, stage="bundle") from None
        if version == 1:  # did not know the digest
            loaded = loaded._with_detector_digest()
        loaded._check()
        return loaded

    @property
    def scorers(self) -> tuple[ModelSpec, ...]:
        """The members that score; a detector's networks do not."""
        return tuple(m for m in self.members if m.kind != "detector")

    def _with_detector_digest(self) -> Bundle:
        """The same bundle, stating the detector's networks that are there now if it states none."""
        if self.detector.digest is not None or not self.scorers:
            return self
        digest = load_nets(self.detector, self.folder).digest
        return dataclasses.replace(self, detector=dataclasses.replace(self.detector, digest=digest))

    def onnx_bytes(self, member: ModelSpec) -> bytes:
        """The member's ONNX file, verified. Raises BundleError."""
        folder = self.folder.resolve()
        try:
            path = (folder / member.file).resolve()
            inside = path.is_relative_to(folder) and not Path(member.file).is_absolute()
            data = path.read_bytes() if inside else b""
        except (OSError, ValueError, RuntimeError):  # also a NUL in the name, or a link to itself
            raise BundleError(
                f"member {member.name!r}: its file {member.file!r} is missing or cannot be read; copy the whole folder",
                path=self.folder,
                stage="bundle",
            ) from None
        if not inside:
            raise BundleError(
                f"member {member.name!r} names the file {member.file!r}, which is outside the bundle",
                path=self.folder,
                stage="bundle",
            )
        digest = hashlib.sha256(data).hexdigest()
        if digest != member.sha256:
            raise BundleError(
                f"member {member.name!r}: {member.file!r} has sha256 {digest[:12]}..., bundle.json states "
                f"{member.sha256[:12]}...; the file was changed or damaged, fetch the bundle again",
                path=self.folder,
                stage="bundle",
            )
        return data

    def member(self, name: str) -> ModelSpec:
        for member in self.members:
            if member.name == name:
                return member
        raise BundleError(f"there is no member {name!r} in the bundle", path=self.folder, stage="bundle")

    def _check(self) -> None:
        """Refuses what loads but could not score: wrong files, and settings that do not fit each other."""

        def require(ok: bool, message: str) -> None:
            if not ok:
                raise BundleError(message, path=self.folder, stage="bundle")

        names = [m.name for m in self.members]
        require(
            len(names) > 0 and len(set(names)) == len(names),
            f"members must be at least one, with different names; got {names}",
        )
        for m in self.members:
            who, c = f"member {m.name!r} has", m.crop
            require(m.kind == "detector" or min(c.input_hw) > 0, f"{who} input_hw {c.input_hw}; sizes are positive")
            ok = m.takes_clips or m.clip_frames == 1
            require(ok, f"{who} clip_frames {m.clip_frames}; it is 1 unless kind is clip or audio")
            a = m.audio
            require(
                a.frames >= 1 and a.low_hz < a.high_hz <= a.sample_rate / 2,
                f"{who} audio settings {a}; seconds hold at least one window, low_hz < high_hz <= sample_rate / 2",
            )
            self.onnx_bytes(m)
        require(
            self.detector.digest is not None or not self.scorers,
            "detector.digest is missing: the sha256 of the bundle.json of the detector's networks; write the bundle "
            "with to_json",
        )


def to_json(bundle: Bundle, *, defaults: bool = True) -> str:
    """The text of a bundle.json that loads as ``bundle``; ``defaults=False`` leaves out what has its default value.

    Where ``bundle`` states no digest of its detector's networks, that of the present ones is written. Raises
    BundleError if there are none.
    """
    return json.dumps(to_plain(bundle._with_detector_digest(), defaults=defaults), indent=2, ensure_ascii=False) + "\n"


def load_nets(settings: DetectorSettings, folder: Path | None = None) -> Bundle:
    """The bundle of a detector's networks, verified; ``folder`` is that of the bundle with these settings.

    Raises BundleError if it is neither packaged nor inside that folder, or not the one that the settings state.
    """
    found = _packaged(settings.nets) or (None if folder is None else _below(folder, settings.nets))
    if found is None:
        raise BundleError(
            f"detector.nets is {settings.nets!r}; it must be the name of a packaged detector (mtcnn), or of a folder "
            "with a bundle.json inside the bundle's own",
            path=folder or "",
            stage="bundle",
        )
    nets = Bundle.load(found)
    if settings.digest is not None and settings.digest != nets.digest:
        raise BundleError(
            f"the detector's networks {settings.nets!r} have digest {nets.digest[:12]}..., detector.digest states "
            f"{settings.digest[:12]}...; use the networks, or the dfengine, that the bundle was made with",
            path=folder or "",
            stage="bundle",
        )
    return nets


def _from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """The same bundle as schema version 2 writes it; what is wrong in it stays wrong."""
    flat = {f.name for f in dataclasses.fields(CropSpec)}

    def nest(member: Any) -> Any:
        if not isinstance(member, dict) or "crop" in member:  # which version 1 does not know: see whether 2 does
            return member
        crop = {key: value for key, value in member.items() if key in flat}
        return {key: value for key, value in member.items() if key not in flat} | {"crop": crop}

    members = data.get("members")
    nested = {"members": [nest(m) for m in members]} if isinstance(members, list) else {}
    return data | nested | {"schema_version": 2}


def _find(bundle: PathLikeStr) -> Path:
    if isinstance(bundle, str) and (packaged := _packaged(bundle)):
        return packaged
    folder = Path(bundle)
    if not folder.is_dir():
        known = ", ".join(sorted(p.parent.name for p in PACKAGED.glob("*/bundle.json")))
        raise BundleNotFound(
            f"there is no such bundle; give a folder with a bundle.json, or a packaged name ({known})",
            path=bundle,
            stage="bundle",
        )
    return folder


def _packaged(name: str) -> Path | None:
    folder = PACKAGED / name
    return folder if Path(name).name == name and (folder / "bundle.json").is_file() else None


def _below(folder: Path, name: str) -> Path | None:
    """A bundle in a folder below this one; not this one itself, which could name itself for ever."""
    try:
        found = (folder / name).resolve()
        return found if folder.resolve() in found.parents and (found / "bundle.json").is_file() else None
    except (OSError, ValueError, RuntimeError):  # a NUL in the name, a link to itself
        return None
