"""Networks from checkpoints, and what they make of videos: shared by training, evaluation and export.

Frames become a video's score by dfengine.stages.aggregate, with the rules of the recipe's [bundle].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dfengine.bundle import SCHEMA_VERSION, Bundle, Calibration, ModelSpec
from dfengine.stages.aggregate import PooledTracks, pool_rows
from dfengine.stages.audio import load_log_mel
from dfengine.types import F32, F64, I64, Tracks

from .calibration import VideoLogits
from .checkpoint import load_checkpoint
from .data import Batch, Batches
from .errors import CheckpointError, RecipeError, TrainingError
from .models import Network
from .recipe import Recipe, build_recipe
from .table import FaceTable

BATCH = 32  # crops, or about as many in clips


@dataclass(frozen=True, eq=False)
class Trained:
    """A network from a checkpoint, in eval mode, and what is known of it."""

    name: str
    network: Network
    recipe: Recipe
    state: dict[str, Any]
    sha256: str  # of the checkpoint

    @property
    def spec(self) -> ModelSpec:
        return self.recipe.model.spec(self.name)


def load_trained(path: Path, device: torch.device | str = "cpu") -> Trained:
    """The network of a best.safetensors. Raises CheckpointError for anything else."""
    tensors, state = load_checkpoint(path)
    if state.get("kind") != "best":
        raise CheckpointError(
            f"this is a checkpoint of kind {state.get('kind')!r}; give a run's best.safetensors", path=path
        )
    plain: Any = state.get("recipe")  # build_recipe says what it should be
    try:
        recipe = build_recipe(plain, str(path))
    except RecipeError as error:
        raise CheckpointError(f"its recipe is none of this version ({error.message})", path=path) from None
    if not isinstance(state.get("name"), str):
        raise CheckpointError("the network has no name; give a checkpoint that training.train has written", path=path)
    network = Network(recipe.model, fetch=False)
    load_weights(network, tensors, path)
    network.requires_grad_(False).eval()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Trained(state["name"], network.to(device), recipe, state, digest)


def load_weights(network: Network, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError if they are of another network."""
    tensors = {_present_name(name): tensor for name, tensor in tensors.items()}
    wanted = network.state_dict()
    wrong = sorted(k for k in wanted.keys() | tensors.keys() if k not in tensors or k not in wanted)
    wrong = wrong or [k for k, v in wanted.items() if tensors[k].shape != v.shape]
    if wrong:
        raise CheckpointError(
            f"the checkpoint is of another network than the recipe's {network.settings.backbone!r}: {wrong[0]!r} does "
            "not fit; use the recipe that it was trained with",
            path=path,
        )
    network.load_state_dict(tensors)


# What parts of a network were called in checkpoints of former versions, and are called now.
RENAMED = {"ears": "audio_head"}


def _present_name(tensor: str) -> str:
    part, dot, rest = tensor.partition(".")
    return RENAMED.get(part, part) + dot + rest


# -- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scored:
    """N videos, judged as the engine would. Pseudo-fakes count as videos of their own."""

    video: list[str]
    label: F64  # (N,), 1 fake
    source_id: list[str]
    original: list[str | None]  # what a fake was made from, if that is known
    dataset: list[str]
    logits: VideoLogits
    sharpness: F64  # (N,), what a score that knows nothing of fakes would go by

    def __len__(self) -> int:
        return len(self.video)


@dataclass(frozen=True, eq=False)
class ScoredVideo:
    """One of them."""

    video: str
    label: float
    source_id: str
    original: str | None
    dataset: str
    tracks: PooledTracks
    sharpness: float


def collect(videos: Sequence[ScoredVideo], rule: str) -> Scored:
    """``rule``: how the tracks of a video make its score, Aggregation.tracks."""
    return Scored(
        [v.video for v in videos],
        np.array([v.label for v in videos]),
        [v.source_id for v in videos],
        [v.original for v in videos],
        [v.dataset for v in videos],
        VideoLogits([v.tracks.blend for v in videos], [v.tracks.sides for v in videos], rule),
        np.array([v.sharpness for v in videos]),
    )


# By video: the label, and by row of the table the logit and the sharpness, each with where its clip begins.
Predictions = dict[str, tuple[float, dict[int, tuple[int, float, float]]]]


def make_evaluation_batches(
    table: FaceTable, trained: Trained, split: str, device: torch.device | str = "cpu", *, rank: int = 0, world: int = 1
) -> Batches:
    recipe, spec = trained.recipe, trained.spec
    return Batches(
        table,
        spec.crop,
        recipe.data,
        recipe.augment,
        recipe.fakes,
        split=split,
        seed=0,  # the same pseudo-fakes for every network of the same fakes and augment
        batch=max(1, BATCH // spec.clip_frames),
        device=device,
        clip_frames=spec.clip_frames if spec.takes_clips else None,
        audio=make_audio_loader(spec),
        training=False,
        rank=rank,
        world=world,
    )


def make_audio_loader(spec: ModelSpec) -> Callable[[Path], F32] | None:
    """Path -> log-mel (bands, frames), for networks with an audio head, else None.

    What it returns raises TrainingError if the file is gone.
    """
    if spec.kind != "audio":
        return None

    @lru_cache(64)  # the clips of one video follow each other
    def load(path: Path) -> F32:
        if not Path(path).is_file():  # silence would be learned as if it were this video's sound
            raise TrainingError("the video is gone, and its sound is needed; put it back where it was", path=path)
        return load_log_mel(path, spec.audio).log_mel

    return load


def check_same_pictures(batches: Mapping[str, Batches]) -> None:
    """Raises TrainingError if networks would see different pseudo-fakes: no engine blends such scores."""
    seen = {name: b.pictures for name, b in batches.items()}
    (first, wanted), *rest = seen.items()
    for name, pictures in rest:
        if pictures != wanted:
            raise TrainingError(
                f"the split has no fakes of its own, and {first!r} and {name!r} make different ones (their recipes "
                "differ in [fakes], [augment] or the size of crops); take them one by one, or training.heldout"
            )


@torch.no_grad()
def predict(network: Network, batches: Iterable[Batch]) -> Predictions:
    """Logits of all faces of a split. A row in two clips has the logit of the earlier one, as in the engine."""
    network.eval()
    found: Predictions = {}
    for batch in batches:
        logits = network(batch.x, batch.audio).float().squeeze(1).cpu().numpy()
        sharp = sharpness(batch.x.flatten(0, -4)).reshape(len(batch), -1)
        for i, video in enumerate(batch.video):
            _, rows = found.setdefault(video, (float(batch.y[i]), {}))
            for row, s in zip(batch.rows[i], sharp[i], strict=True):
                entry = (int(batch.rows[i][0]), float(logits[i]), float(s))
                rows[int(row)] = min(rows.get(int(row), entry), entry)
    return found


def sharpness(crops: Tensor) -> F32:
    """Variance of the Laplacian of the grey crops: (N, 3, H, W) -> (N,)."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], device=crops.device)
    return F.conv2d(crops.mean(dim=1, keepdim=True), kernel[None, None]).flatten(1).var(dim=1).cpu().numpy()


def score_videos(faces: FaceTable, predictions: Mapping[str, Predictions], bundle: Bundle) -> Scored:
    """Pools the members' predictions for ``faces`` by track, as the engine does, and leaves them uncalibrated."""
    first = next(iter(predictions.values()))
    scored: list[ScoredVideo] = []
    for video, (label, rows_of) in first.items():
        rows = np.array(sorted(rows_of), np.int64)
        tracks = make_tracks(faces, rows)
        order = np.lexsort((tracks.pts_seconds, tracks.track_id))
        logits = {
            name: np.array([found[video][1][int(r)][1] for r in rows[order]]) for name, found in predictions.items()
        }
        pooled = pool_rows(tracks[order], logits, bundle)
        sharp = float(np.mean([s for _, _, s in rows_of.values()]))
        path, row = video.removesuffix("#fake"), rows[0]
        original = path if path != video else faces.original[row]
        scored.append(ScoredVideo(video, label, faces.source_id[row], original, faces.dataset[row], pooled, sharp))
    return collect(scored, bundle.aggregation.tracks)


def make_tracks(faces: FaceTable, rows: I64) -> Tracks:
    """Rows of one video as the engine has them."""
    part = faces[rows]
    detected = np.asarray(np.isfinite(part.landmarks).all(axis=(1, 2)), np.bool_)
    return Tracks(part.track, part.index, part.pts_seconds, part.box, part.landmarks, part.confidence, detected)


def make_bundle(
    trained: Sequence[Trained],
    members: Sequence[ModelSpec],
    *,
    calibration: Calibration | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Bundle:
    """The bundle of some checkpoints. Raises CheckpointError if they do not belong together."""
    settings = trained[0].recipe.bundle
    for other in trained[1:]:
        if other.recipe.bundle != settings:
            raise CheckpointError(
                f"the checkpoints {trained[0].name!r} and {other.name!r} have different [bundle] tables; members of "
                "one bundle share one"
            )
    names = [t.name for t in trained]
    if len(set(names)) < len(names):
        raise CheckpointError(f"two checkpoints are of one name, got {names}; members of a bundle have different names")
    return Bundle(
        schema_version=SCHEMA_VERSION,
        members=tuple(members),
        calibration=calibration or Calibration(),
        provenance=provenance or {},
        **{k: getattr(settings, k) for k in settings.__dataclass_fields__},
    )
