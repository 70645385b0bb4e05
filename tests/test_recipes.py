"""Each recipe of the package, from videos to a score, on clips that are made here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("torch")  # the `train` extra

import torch
from training_assets import write_videos

import dfengine
from dfengine.bundle import Bundle
from training import export, faces, scoring, train
from training.models import Network
from training.recipe import Recipe
from training.table import FaceTable

RECIPES = sorted((Path(__file__).parents[1] / "training" / "recipes").glob("*.toml"))

# The one override, for all of them: no weights are fetched, and sizes are those of a test.
TINY = (
    "model.pretrained=false",
    "model.input_hw=[80, 80]",
    "train.epochs=1",
    "train.batch=2",
    "fakes.views=1",
    "data.workers=0",
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_videos(tmp_path_factory.mktemp("videos"), sound=True)


@pytest.fixture(scope="module")
def table(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faces")
    faces.main([str(videos), "--out", str(out), "--frames", "uniform:6", "--split", "given", "--workers", "1"])
    return out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_trains_exports_and_scores(recipe: Path, videos: Path, table: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    sets = [x for change in TINY for x in ("--set", change)]
    train.main([str(recipe), "--faces", str(table), "--out", str(tmp_path / "run"), *sets])
    checkpoints = sorted((tmp_path / "run").rglob(train.BEST))
    assert len(checkpoints) == {"ensemble7": 7, "default": 2}.get(recipe.stem, 1)

    export.main([*map(str, checkpoints), "--faces", str(table), "--out", str(tmp_path / "bundle")])
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.name == recipe.stem
    with dfengine.Engine(bundle) as engine:
        heard, unheard = (engine.score(videos / name) for name in ("p2_fake.mkv", "p3_fake.mp4"))
    for score in (heard, unheard):
        assert score.status == "ok", score.error
        assert math.isfinite(score.logit)
        assert set(score.members) == {m.name for m in bundle.members}
    assert heard.warnings == ()
    hears = any(m.kind == "audio" for m in bundle.members)
    assert hears == (recipe.stem == "inception_lstm_av")
    assert bool(unheard.warnings) == hears, "a video without sound says so, to a member that listens"


def test_evaluation_of_clips(table: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = next(p for p in RECIPES if p.stem == "mixnet_lstm")
    trained = scoring.Trained("m", Network(clip_recipe(recipe).model), clip_recipe(recipe), {}, "")
    found = scoring.predict(
        trained.network, scoring.make_evaluation_batches(FaceTable.load(table), trained, "test").epoch(0)
    )
    assert len(found) == 2
    for label, rows in found.values():
        assert label in (0, 1)
        assert len(rows) == 6, "every face has a logit"
        assert len({logit for _, logit, _ in rows.values()}) == 2, "six faces are two clips of five"
        by_row = [rows[r] for r in sorted(rows)]
        assert len({entry[:2] for entry in by_row[:5]}) == 1, "where clips overlap, the earlier one counts"


def clip_recipe(path: Path) -> Recipe:
    return train.load_recipe(path, TINY)[path.stem]
